"""Tensors of an output file, made piece by piece, and what a narrower type takes from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.errors import BundleError
from uq.formats.checkpoint.tensors import bf16_to_float32, to_bfloat16

Array = NDArray[np.float32]
SAFETENSORS: Mapping[str, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
)
ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2})
DTYPES = tuple(SAFETENSORS)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file will hold it.

    Attributes:
        kind: how it is stored, e.g. `BF16` or `Q4_0`.
        chunks: makes the C-contiguous parts of its data, which add up to `nbytes`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[NDArray[Any]]]


class Losses:
    """How far the stored values are from the bundle's own, for the tensors that had to be rounded.

    Attributes:
        tensors: squared error and squared value, summed over each tensor that differs, in float64.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[float, float]] = {}

    def add(self, name: str, exact: Array, stored: Array) -> None:
        """Count a piece of a tensor: both of the same shape."""
        error = float(np.square(stored.astype(np.float64) - exact).sum())
        if error == 0 and name not in self.tensors:
            return
        square = float(np.square(exact.astype(np.float64)).sum())
        before = self.tensors.get(name, (0.0, 0.0))
        self.tensors[name] = (before[0] + error, before[1] + square)

    @property
    def relative_error(self) -> float:
        """Root mean square of the error over that of the values, over all tensors that differ."""
        error = sum(pair[0] for pair in self.tensors.values())
        square = sum(pair[1] for pair in self.tensors.values())
        return float((error / square) ** 0.5) if square else 0.0


def rounded(name: str, values: Array, dtype: str, losses: Losses) -> NDArray[Any]:
    """`values` in a floating-point type of safetensors, ties to even; the loss is counted.

    Returns:
        float32, float16, or the bits of bfloat16 as uint16; of the same shape.

    Raises:
        BundleError: a value is too large for float16.
    """
    if dtype == "float32":
        return values
    stored = to_bfloat16(values) if dtype == "bfloat16" else _to_float16(name, values)
    losses.add(name, values, widened(stored))
    return stored


def widened(stored: NDArray[Any]) -> Array:
    """What `rounded` stores, as float32."""
    if stored.dtype == np.uint16:
        return bf16_to_float32(stored)
    return stored.astype(np.float32)


def _to_float16(name: str, values: Array) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    if not np.isfinite(stored).all():
        raise BundleError(
            f"{name}: holds {np.abs(values).max():g}, more than float16 can say; use --dtype "
            "bfloat16 or float32"
        )
    return stored
