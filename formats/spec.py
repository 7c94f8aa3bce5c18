"""How one tensor is quantized, and a quantized tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

GROUPS = (32, 64, 128)
BITS = (4, 5, 6, 8)
ZERO_POINT_BITS = (4, 5, 6)  # widths that may have zero points
SCALE_BITS = (16, 8)  # of a stored scale
NIBBLE = 4  # bits of the low plane of a code, and of a stored zero point


@dataclass(frozen=True)
class Spec:
    """Integer grid: `weight = (code - zero) * scale`, one signed float16 scale per group.

    A group is `group` consecutive input channels of one row. Codes are -8..7, -16..15, -32..31 with
    4, 5, 6 bits; INT8 codes are -127..127, so that a code can be negated in eight bits. Without
    zero points `zero` is 0. With them every group has one: a multiple of `zero_step` from `qmin`
    on, 16 values, so that four bits store it.

    Scales are stored as they are (`scale_bits` 16), or as whole multiples of a float16 step of
    their row (8): see `row_scales.py`. Either way they are float16 numbers: what is
    computed with them does not depend on it.

    `str(spec)` is its short name: `int4 g32`, `int4z g32` with zero points, `int4 g32 s8` with
    scales of 8 bits.
    """

    bits: int
    group: int
    zero_point: bool = False
    scale_bits: int = 16

    def __str__(self) -> str:
        steps = " s8" if self.row_step else ""
        return f"int{self.bits}{'z' * self.zero_point} g{self.group}{steps}"

    @property
    def row_step(self) -> bool:
        """Whether scales are stored as multiples of a step of their row."""
        return self.scale_bits == 8

    @property
    def expanded(self) -> Spec:
        """The same grid with its scales stored as they are."""
        return replace(self, scale_bits=16)

    @property
    def qmin(self) -> int:
        return -127 if self.bits == 8 else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def high_bits(self) -> int:
        """Bits of a code above its nibble that lie in a plane of their own; INT8 has no planes."""
        return 0 if self.bits == 8 else self.bits - NIBBLE

    @property
    def zero_step(self) -> int:
        """Distance of two zero points that can be told apart."""
        return 1 << self.high_bits

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales and zero points, without the steps of rows and padding of any layout."""
        return self.bits + (self.scale_bits + NIBBLE * self.zero_point) / self.group

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of codes, scales, zero points and steps, without padding of any layout."""
        groups = rows * (cols // self.group)
        scales = groups * self.scale_bits // 8 + 2 * rows * self.row_step
        return rows * cols * self.bits // 8 + scales + (groups + 1) // 2 * self.zero_point


# All grids with scales as they are; each is offered with scales of 8 bits, too.
SPECS = tuple(
    Spec(bits, group, zero_point)
    for bits in BITS
    for zero_point in (False, True)[: 1 + (bits in ZERO_POINT_BITS)]
    for group in GROUPS
)


@dataclass(frozen=True)
class QuantTensor:
    """A weight on its grid, in canonical order.

    Attributes:
        codes: (out, in) int8, C order.
        scales: (out, in // group) float16, C order.
        zeros: (out, in // group) int8, C order, the zero points; None where the spec has none.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    spec: Spec
    zeros: NDArray[np.int8] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def expanded(self) -> QuantTensor:
        """The same numbers with their scales stored as they are."""
        return replace(self, spec=self.spec.expanded)

    def rows(self, start: int, stop: int) -> QuantTensor:
        """Rows `start:stop`."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return QuantTensor(self.codes[start:stop], self.scales[start:stop], self.spec, zeros)

    def levels(self) -> NDArray[np.int8]:
        """(out, in) int8: `codes - zeros`, the weight in units of its scale."""
        if self.zeros is None:
            return self.codes
        grouped = self.codes.reshape(*self.zeros.shape, self.spec.group) - self.zeros[:, :, None]
        return grouped.reshape(self.shape)

    def dequantize(self) -> NDArray[np.float32]:
        """(out, in) float32: `(codes - zeros) * scales`, exact in float32."""
        rows, cols = self.shape
        grouped = self.levels().reshape(rows, -1, self.spec.group).astype(np.float32)
        grouped *= self.scales.astype(np.float32)[:, :, None]
        return grouped.reshape(rows, cols)
