"""Products of matrices, and how they are cut into workgroups."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from uq.kernels.vulkan.dense.matrix import TILE, Matrix
from uq.kernels.vulkan.dense.stream import MOST_WORK, Stream
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import words
from uq.kernels.vulkan.variants import VARIANTS

PANELS = 16  # of the rows of a symmetric product


@dataclass(frozen=True)
class Cut:
    """A workgroup makes bm x bn, each of its subgroups (or lanes, without matrix) sm x sn."""

    bm: int
    bn: int
    sm: int
    sn: int
    step: int = 32

    @property
    def parts(self) -> int:
        return self.bm // self.sm * (self.bn // self.sn)


# The first one fills an NVIDIA GPU best and has more sums than the registers of an AMD iGPU hold.
MATRIX_CUT, SMALL_MATRIX_CUT = Cut(128, 128, 64, 64), Cut(64, 64, 32, 32)
LARGE_SYSTEMS = 37 << 10  # shared memory of 128 rows of systems; 64 rows take 27 KiB
PLAIN_CUT = Cut(64, 64, 4, 4)
PLAIN_SYSTEMS = Cut(16, 128, 4, 4)


@dataclass(frozen=True)
class Batch:
    """Products of the same size side by side, as pairs (outer, inner); distances in elements.

    Attributes:
        sharing: inner ones that share B.
        a, b, c: distance from an outer to the next, from an inner to the next.
    """

    outer: int
    inner: int
    sharing: int
    a: tuple[int, int]
    b: tuple[int, int]
    c: tuple[int, int]


ONE = Batch(1, 1, 1, (0, 0), (0, 0), (0, 0))


class Products:
    """C = alpha A B^T (+ C) and its relatives."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._matrix = stream.gpu.physical.has_matrix_blocks
        physical = stream.gpu.physical
        self._is_large = physical.kind == "discrete" and physical.has_large_blocks

    def multiply(
        self,
        c: Matrix,
        a: Matrix,
        b: Matrix,
        *,
        alpha: float = 1.0,
        add: bool = False,
        a_by_k: bool = False,
        b_by_k: bool = False,
        batch: Batch = ONE,
    ) -> None:
        """C (m, n) float32 from A (m, k) and B (n, k), both float16 or both float32.

        Args:
            a_by_k, b_by_k: A is (k, m), B is (k, n).
            add: to what C holds.
        """
        k = a.height if a_by_k else a.width
        rows = max(TILE, int(MOST_WORK / (2.0 * c.width * k)) // TILE * TILE)
        for start in range(0, c.height, rows):
            height = min(rows, c.height - start)
            part = _rows(a, start, start + height, k, a_by_k)
            here = c.block(start, 0, height, c.width)
            self._multiply(here, part, b, k, alpha, add, a_by_k, b_by_k, batch)

    def square(
        self, c: Matrix, a: Matrix, *, alpha: float = 1.0, add: bool = False, by_k: bool = False
    ) -> None:
        """C = alpha A A^T (+ C) on and below the diagonal, and in places above it."""
        rows = -(-c.height // (PANELS * TILE)) * TILE
        for start in range(0, c.height, rows):
            stop = min(start + rows, c.height)
            k = a.height if by_k else a.width
            left, right = _rows(a, start, stop, k, by_k), _rows(a, 0, stop, k, by_k)
            here = c.block(start, 0, stop - start, stop)
            self.multiply(here, left, right, alpha=alpha, add=add, a_by_k=by_k, b_by_k=by_k)

    def systems(self, result: Span, levels: Matrix, hessian: Matrix, group: int) -> None:
        """L_g^T H_gh L_h of every row, (rows, groups, groups): what the refit solves.

        Args:
            levels: (rows, n) float16; hessian: (n, n) float32.
        """
        groups = levels.width // group
        name, cut, constants = self._cut("systems", levels.height, TILE, group)
        batch = Batch(1, groups, 1, (0, group), (0, group * hessian.stride), (groups**2, 0))
        whole = Matrix(result, 0, 0, 0, 0, groups, "f32")
        push = _push(whole, levels, hessian, group, 1.0, batch, levels)
        grid = (levels.width // cut.bn, levels.height // cut.bm, groups)
        work = 2.0 * levels.height * levels.width**2
        constants |= {"A_BY_K": False, "B_BY_K": True, "ADD": False, "GROUP": group}
        self._stream.dispatch(name, push, grid, constants, work)

    def _multiply(
        self,
        c: Matrix,
        a: Matrix,
        b: Matrix,
        k: int,
        alpha: float,
        add: bool,
        a_by_k: bool,
        b_by_k: bool,
        batch: Batch,
    ) -> None:
        kind = "half" if a.kind == "f16" else "float"
        name, cut, constants = self._cut(kind, c.height, c.width)
        constants |= {"A_BY_K": a_by_k, "B_BY_K": b_by_k, "ADD": add}
        count = batch.outer * batch.inner
        grid = (c.width // cut.bn, c.height // cut.bm, count)
        push = _push(c, a, b, k, alpha, batch)
        self._stream.dispatch(name, push, grid, constants, 2.0 * c.height * c.width * k * count)

    def _cut(
        self, kind: str, height: int, width: int, group: int = 0
    ) -> tuple[str, Cut, dict[str, int | float]]:
        """The module, how it is cut, and the constants that say so."""
        if not self._matrix:
            cut = PLAIN_SYSTEMS if group else PLAIN_CUT
            return f"dense_{kind}", cut, cut_constants(cut, 1)
        name = f"dense_{kind}_matrix"
        fits = height % TILE == width % TILE == 0
        cut = MATRIX_CUT if self._is_large and fits else SMALL_MATRIX_CUT
        physical = self._stream.gpu.physical
        cut = systems_cut(group, physical.shared_bytes) if group else cut
        lanes = physical.lanes(VARIANTS[name].subgroup)
        return name, cut, cut_constants(cut, lanes)


def systems_cut(group: int, shared_bytes: int) -> Cut:
    """With matrix instructions: a subgroup sums whole groups of columns.

    Args:
        shared_bytes: that a workgroup may have.
    """
    wide = max(32, group)
    return Cut(128 if shared_bytes >= LARGE_SYSTEMS else 64, 128, 2048 // wide, wide)


def cut_constants(cut: Cut, lanes: int) -> dict[str, int | float]:
    """`lanes` of a part: of a subgroup, or 1."""
    sizes = {"BM": cut.bm, "BN": cut.bn, "SM": cut.sm, "SN": cut.sn, "STEP": cut.step}
    return {"LANES": lanes * cut.parts, **sizes}


def _rows(operand: Matrix, start: int, stop: int, k: int, by_k: bool) -> Matrix:
    if by_k:
        return operand.block(0, start, k, stop - start)
    return operand.block(start, 0, stop - start, k)


def _push(
    c: Matrix,
    a: Matrix,
    b: Matrix,
    k: int,
    alpha: float,
    batch: Batch,
    levels: Matrix | None = None,
) -> bytes:
    beside = levels or a
    push = struct.pack("<4Q", a.address, b.address, c.address, beside.address)
    push += words(k, a.stride, b.stride, c.stride, batch.inner, batch.sharing)
    push += words(*batch.a, *batch.b, *batch.c)
    return push + struct.pack("<fI", alpha, beside.stride)
