"""How the work of a product is cut into workgroups: by a rule, or as it was measured to be best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import gcd
from pathlib import Path
from typing import Any

from uq.kernels.vulkan.weights import Kind, Matrix

# What follows a product, as in shaders/gemv.comp; ADD is the sum of shaders/experts.comp.
STORE, GEGLU, CHOOSE, BRANCH, TELL, ADD = range(6)
MOST_LANES = 512
ATTENTION = "attention"  # measured as a product: `Shape.parts` are parts of the context
ENOUGH_LANES = 1 << 17  # that keep the memory of a large GPU busy
SUMS = 4096  # floats of shared memory that a product may use
EXPERT_LANES = 512
QUERIES = 2  # heads that a workgroup of attention serves, where that was not measured
NORMED_CHANNELS = 1536  # up to which a product makes the norm in front of it in every workgroup


@dataclass(frozen=True)
class Shape:
    """How a workgroup goes through its part of a matrix.

    Attributes:
        lanes: invocations, a multiple of 64: each 64 take every so many-th tile of 128 columns.
        blocks: of 16 rows, at a time.
        rounds: times that many; of a pass of one column.
        parts: of the columns, each another workgroup's; of a BRANCH, whose reader sums them. Of ADD
            those of an expert, each another slice's.
    """

    lanes: int
    blocks: int
    rounds: int = 1
    parts: int = 1


@dataclass(frozen=True)
class Cut:
    """How all layers of a token are shared among the workgroups of one dispatch.

    Attributes:
        queries: heads that a workgroup of attention serves.
        teams: slices of 64 invocations that share the columns of a block: of q, k and v; of
            attention's output; of gate and up; of down; of experts' gate and up, and of their down.
        out_parts, down_parts: of the columns of attention's output and of down, each another
            workgroup's.
        depth: tiles of weights that an invocation has on their way, up to 8, of each of its blocks.
        lanes: invocations of a workgroup.
        joins: the splits of a head are joined by one workgroup; otherwise by each that needs it.
        width: blocks of rows that a slice multiplies at a time, 1 or 2.
        splits: of the context, at most; 0: as many as dispatches have.
        straight: chunks of tiles that are full have code of their own.
        reads: looks for a message in vain, for each group of blocks, that read weights ahead.
    """

    workgroups: int
    queries: int
    teams: tuple[int, ...]
    out_parts: int
    down_parts: int
    depth: int
    lanes: int
    joins: bool
    width: int = 1
    splits: int = 0
    straight: bool = False
    reads: int = 0


@dataclass(frozen=True)
class Measured:
    """What was fastest on a device.

    Attributes:
        products: key of a product -> its shape.
        layers: key of a model -> how its layers are cut; None: each product is a dispatch.
        queries: key of a model -> `Tuning.queries`.
    """

    products: Mapping[str, Shape] = field(default_factory=dict)
    layers: Mapping[str, Cut | None] = field(default_factory=dict)
    queries: Mapping[str, int] = field(default_factory=dict)

    def updated(self, newer: Measured) -> Measured:
        products, layers = {**self.products, **newer.products}, {**self.layers, **newer.layers}
        return Measured(products, layers, {**self.queries, **newer.queries})


@dataclass(frozen=True)
class Tuning:
    """Which kernel and which shape serve a matrix on one device.

    Attributes:
        integer_dot: the device multiplies four bytes at once.
        measured: key of a product -> its best shape.
        cut: of the layers of one token that are one dispatch; None: each product is one.
        queries: heads with one key head that a workgroup of attention serves, at most.
    """

    integer_dot: bool
    measured: Mapping[str, Shape] = field(default_factory=dict)
    cut: Cut | None = None
    queries: int = QUERIES

    def kernel(self, kind: Kind) -> str:
        dotted = self.integer_dot and not kind.is_float
        return f"gemv_{kind.name}_dot" if dotted else f"gemv_{kind.name}"

    def shape(self, matrix: Matrix, columns: int, epilogue: int) -> Shape:
        """`epilogue` is that of one column; more columns have the same lanes, so the same bits."""
        one = self.measured.get(product_key(matrix, epilogue)) or usual_shape(matrix, epilogue)
        if columns == 1:
            return one
        blocks = min(one.blocks, 4 if columns <= 4 or epilogue == GEGLU else 2)
        return Shape(one.lanes, blocks, parts=one.parts)

    def makes_norm(self, channels: int) -> bool:
        """Whether every workgroup of a product of one column makes the norm in front of it."""
        return channels <= NORMED_CHANNELS


def product_key(matrix: Matrix, epilogue: int) -> str:
    size = f"{matrix.rows}x{matrix.cols}"
    kind = matrix.kind
    return f"{kind.spec or kind.name} {size} x1 {epilogue}"


def usual_shape(matrix: Matrix, epilogue: int) -> Shape:
    """Few blocks get many lanes each, so that all of the device has work."""
    if epilogue == ADD:
        return Shape(EXPERT_LANES, 1, parts=gcd(EXPERT_LANES // 64, matrix.tiles))
    gated = epilogue == GEGLU
    blocks = 4 if gated else 2 if matrix.blocks >= 4096 else 1
    groups = -(-matrix.blocks // (blocks // 2 if gated else blocks))
    wanted = -(-ENOUGH_LANES // (64 * groups))
    most = min(MOST_LANES // 64, matrix.tiles, SUMS // (16 * blocks))
    return Shape(64 * max(1, min(max(wanted, 2), most)), blocks)


def candidates(matrix: Matrix, epilogue: int, most_lanes: int) -> list[Shape]:
    """Shapes worth measuring for one column."""
    # A gate's workgroup has whole groups of 32 outputs: 2 blocks of each weight, or more.
    blocks = (4, 8) if epilogue == GEGLU else (1, 2, 4)
    slices = [count for count in (1, 2, 4, 6, 8) if count <= matrix.tiles]
    rounds = (1, 4) if epilogue == CHOOSE else (1,)
    parts = [count for count in (1, 2, 3, 4, 6, 8) if epilogue == BRANCH or count == 1]
    return [
        Shape(64 * count, rows, times, part)
        for count in slices
        for rows in blocks
        for times in rounds
        for part in parts
        if 64 * count <= most_lanes
        and 16 * rows * count <= SUMS
        and count * part < matrix.tiles + count
    ]


def read_measured(path: Path) -> Measured:
    """What `write_measured` wrote; nothing when there is no such file, or a broken one.

    A way to cut the layers with options that this version lacks is left out: it is to be measured
    again, and what stands beside it is not.
    """
    try:
        stored = json.loads(path.read_text())
        products = {key: Shape(**shape) for key, shape in stored["products"].items()}
        layers = {key: _cut(cut) for key, cut in stored["layers"].items() if _is_known(cut)}
        queries = {key: int(count) for key, count in stored.get("queries", {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return Measured()
    return Measured(products, layers, queries)


def _is_known(cut: dict[str, Any] | None) -> bool:
    return cut is None or cut.keys() <= {option.name for option in fields(Cut)}


def _cut(stored: dict[str, Any] | None) -> Cut | None:
    return Cut(**{**stored, "teams": tuple(stored["teams"])}) if stored else None


def write_measured(path: Path, measured: Measured) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(measured), indent=1))
