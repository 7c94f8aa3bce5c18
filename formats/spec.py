"""How one tensor is quantized, and a quantized tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUPS = (32, 64, 128)
BITS = (4, 8)


@dataclass(frozen=True)
class Spec:
    """Symmetric integer grid: `weight = code * scale`, one signed float16 scale per group.

    A group is `group` consecutive input channels of one row. INT4 codes are -8..7; INT8 codes are
    -127..127, so that a code can be negated in eight bits.
    """

    bits: int
    group: int

    @property
    def qmin(self) -> int:
        return -8 if self.bits == 4 else -127

    @property
    def qmax(self) -> int:
        return 7 if self.bits == 4 else 127

    @property
    def bits_per_weight(self) -> float:
        return self.bits + 16 / self.group

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of codes and scales, without padding of any layout."""
        return rows * cols * self.bits // 8 + rows * (cols // self.group) * 2


@dataclass(frozen=True)
class QuantTensor:
    """A weight on its grid, in canonical order.

    Attributes:
        codes: (out, in) int8, C order.
        scales: (out, in // group) float16, C order.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    spec: Spec

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def dequantize(self) -> NDArray[np.float32]:
        """(out, in) float32: `codes * scales`, exact in float32."""
        rows, cols = self.shape
        grouped = self.codes.reshape(rows, -1, self.spec.group).astype(np.float32)
        grouped *= self.scales.astype(np.float32)[:, :, None]
        return grouped.reshape(rows, cols)
