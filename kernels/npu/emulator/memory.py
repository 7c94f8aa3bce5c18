"""Buffers of tiles: bytes, the array a core sees in them, and their address for C++ kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, IndexType, MemRefType
from xdsl.ir import Attribute

from uq.errors import DesignError
from uq.kernels.npu.emulator.streams import Bytes
from uq.kernels.npu.model import element_bits, nbytes

ALIGNMENT = 64  # bytes: that of the widest load


@dataclass(frozen=True, eq=False)
class Memory:
    """One buffer.

    Attributes:
        data: its bytes, flat.
        values: the same memory in the type and shape of its memref; bf16 as uint16.
        address: of the first byte, aligned as vectors need it.
    """

    data: Bytes
    values: NDArray[Any]

    @property
    def address(self) -> int:
        return self.data.ctypes.data


def width_of(kind: MemRefType[Attribute]) -> int:
    """Bytes of an element. Raises DesignError for types that are not whole bytes."""
    bits = 64 if isinstance(kind.element_type, IndexType) else element_bits(kind)
    if bits not in (8, 16, 32, 64):
        raise DesignError(f"buffers of {kind.element_type} are not emulated; use i8, i16, i32, f32")
    return bits // 8


def memory(kind: MemRefType[Attribute], initial: Attribute | None = None) -> Memory:
    """A buffer of zeros, or of `initial` values."""
    width, size = width_of(kind), nbytes(kind)
    store = np.zeros(size + ALIGNMENT, np.uint8)
    start = -store.ctypes.data % ALIGNMENT
    data = store[start : start + size]
    values = data.view(_dtype(kind, width)).reshape(kind.get_shape())
    if isinstance(initial, DenseIntOrFPElementsAttr):
        values[...] = np.array(initial.get_values()).reshape(values.shape)
    return Memory(data, values)


def _dtype(kind: MemRefType[Attribute], width: int) -> str:
    name = kind.element_type.name
    return {"f32": "f4", "f64": "f8", "f16": "f2", "bf16": "u2"}.get(name, f"i{width}")
