"""What a run will write, need and take, found out without running it (`uq quantize --dry-run`).

Sizes on the disk are exact. Memory, a sum of the arrays that live at the worst moment, and time
(`seconds.py`) are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import psutil

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import TABLES, GemmaConfig, layer_tensor
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import expected_tensors
from uq.formats.towers import stored_bytes
from uq.quantize.job import curvature_on_disk, fetched_on_disk, fitted_plan, recognised_plan
from uq.quantize.options import QuantizeOptions
from uq.quantize.plan import Plan, WorkSizes
from uq.quantize.probes import table_names
from uq.quantize.seconds import run_seconds
from uq.text import duration, size, table


@dataclass(frozen=True)
class Kind:
    """Tensors of one role, which are treated alike."""

    name: str
    tensors: int
    weights: int
    format: str
    method: str
    layout: str
    nbytes: int


@dataclass(frozen=True)
class Estimate:
    """`nbytes` on the disk without the tokenizer, `towers` more for those, and `spilled` while the
    run lasts; memory in bytes; `seconds` on this machine; `sizes` of the work where they are not
    the usual ones.
    """

    recipe: str
    kinds: tuple[Kind, ...]
    nbytes: int
    towers: int
    bits_per_weight: float
    spilled: int
    peak_memory: int
    free_memory: int
    seconds: float
    sizes: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        head = ("tensors", "count", "weights", "format", "method", "layout", "size")
        rows = [(*list(asdict(kind).values())[:-1], size(kind.nbytes)) for kind in self.kinds]
        spilled = f"; {size(self.spilled)} during calibration" if self.spilled else ""
        spilled += f"; {size(self.towers)} for vision and audio towers" if self.towers else ""
        memory = f"about {size(self.peak_memory)} of {size(self.free_memory)} free"
        return "\n".join(
            [
                table(rows, head=head),
                f"disk: {size(self.nbytes)}, {self.bits_per_weight:.2f} bits per weight{spilled}",
                f"memory: {memory} (estimate){self.sizes and f'; {self.sizes}'}",
                f"time: about {duration(self.seconds)} on this machine (estimate)",
            ]
        )


def estimate(checkpoint: Checkpoint, options: QuantizeOptions) -> Estimate:
    """Figures of `quantize(checkpoint, ..., options)`; reads a few rows, writes nothing.

    Raises:
        UsageError: the options do not fit the model or each other.
    """
    config = checkpoint.config
    fitted = fitted_plan(checkpoint, recognised_plan(checkpoint, options), options)
    plan = fitted.plan
    kinds = tuple(_kinds(config, plan))
    gains = 4 * sum(map(math.prod, expected_tensors(config)[1].values()))
    nbytes = gains + sum(kind.nbytes for kind in kinds)
    return Estimate(
        recipe=plan.recipe,
        kinds=kinds,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / config.num_parameters(),
        peak_memory=checkpoint.buffered + fitted.resident,
        towers=stored_bytes(checkpoint.towers, options.towers),
        spilled=fitted.spilled
        + curvature_on_disk(config, plan, options)
        + fetched_on_disk(checkpoint, plan, options),
        sizes="" if plan.gptq.work == WorkSizes() else str(plan.gptq.work),
        free_memory=psutil.virtual_memory().available,
        seconds=run_seconds(checkpoint, plan, options, nbytes),
    )


def _kinds(config: GemmaConfig, plan: Plan) -> Iterator[Kind]:
    shapes = expected_tensors(config)[0]
    tables = table_names(config)
    names = {kind: [name] for name, kind in TABLES.items() if name in shapes}
    for layer in range(config.num_layers):
        for role in config.linear_shapes(layer):
            names.setdefault(role, []).append(layer_tensor(layer, role))
    for kind, members in names.items():
        tensor = plan.tensors[members[0]]
        weights = sum(math.prod(shapes[name]) for name in members)
        mixed = plan.budget is not None and (plan.budget.tables or members[0] not in tables)
        layout = LAYOUTS[tensor.layout]
        nbytes = sum(layout.nbytes(*shapes[name], tensor.spec) for name in members)
        yield Kind(
            name=kind,
            tensors=len(members),
            weights=weights,
            format="mixed" if mixed else str(tensor.spec),
            method=tensor.method,
            layout=tensor.layout,
            nbytes=round(weights * _budgeted_bytes(config, plan)) if mixed else nbytes,
        )


def _budgeted_bytes(config: GemmaConfig, plan: Plan) -> float:
    """Mean bytes per weight of the tensors whose grids are still to be chosen."""
    assert plan.budget is not None
    shapes = expected_tensors(config)[0]
    names = [name for name in shapes if plan.budget.tables or name not in table_names(config)]
    return plan.budget.nbytes / sum(rows * cols for rows, cols in (shapes[n] for n in names))
