"""What the matmul computes, in float64: products and sums of int8 are exact there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def matmul(a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    """(m, k) @ (k, n); exact while k < 2^17, where int32 may overflow."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int32)
