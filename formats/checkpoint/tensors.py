"""Where a tensor lies in a file, and its rows as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError
from uq.formats.checkpoint.weight_file import WeightFile
from uq.formats.decode import printable


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a weight file.

    Attributes:
        name: as in the file.
        offset: of the first byte, from the start of the file.
        shape: rows first; (out, in) for a linear.
        dtype: `bf16`, `f16`, `f32`, or a GGML block type such as `q4_k`.
        nbytes: of the whole tensor, a multiple of the number of rows.
    """

    name: str
    file: WeightFile
    offset: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def where(self) -> str:
        """Prefix of a message about this tensor."""
        return f"{self.file.name}: {printable(self.name)}"


def read_rows(info: TensorInfo, start: int, stop: int) -> NDArray[np.float32]:
    """`raw_rows` and `as_float32` in one: rows `start:stop` of a tensor."""
    return as_float32(info, raw_rows(info, start, stop), start)


def raw_rows(info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
    """Rows `start:stop` of a tensor as they are stored.

    Returns:
        (stop - start, bytes of a row) uint8, C-contiguous, read-only.

    Raises:
        CheckpointError: the file was cut after it was opened.
        HubError: the file is on the Hub, and the network failed.
    """
    if not 0 <= start <= stop <= info.shape[0]:
        raise IndexError(f"{info.where}: rows {start}:{stop} of {info.shape[0]}")
    row_bytes = info.nbytes // max(1, info.shape[0])
    if start == stop:
        return np.empty((0, row_bytes), np.uint8)
    raw = info.file.read(info.offset + start * row_bytes, (stop - start) * row_bytes)
    return raw.reshape(stop - start, row_bytes)


def as_float32(info: TensorInfo, raw: NDArray[np.uint8], start: int) -> NDArray[np.float32]:
    """Rows from `start` on, (rows, bytes of a row) uint8, widened or dequantized.

    Returns:
        (rows, ...) float32, a new array.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    if not len(raw):
        return np.empty((0, *info.shape[1:]), np.float32)
    decode = DECODERS.get(info.dtype)
    rows = decode(raw) if decode else _dequantize(raw, info.dtype)
    rows = rows.reshape(len(raw), *info.shape[1:])
    _refuse_non_finite(rows, info, start)
    return rows


def bf16_to_float32(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32: exact."""
    wide: NDArray[np.uint32] = np.left_shift(raw.view("<u2"), 16, dtype=np.uint32)
    return wide.view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even, of finite values."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    half, one = np.uint32(16), np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + (bits >> half & one)) >> half).astype(np.uint16)


def _f16_to_float32(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    from uq.formats.half import widen  # compiled, so not loaded for a look at the header

    return widen(raw.view("<f2"))


def _f32_to_float32(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return raw.view("<f4").astype(np.float32)


DECODERS: Mapping[str, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
    "bf16": bf16_to_float32,
    "f16": _f16_to_float32,
    "f32": _f32_to_float32,
}


@cache
def is_readable(dtype: str) -> bool:
    """Whether `read_rows` knows the dtype."""
    if dtype in DECODERS:
        return True
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype.upper()]][1]
        _dequantize(np.zeros((1, block_bytes), np.uint8), dtype)
    except (KeyError, NotImplementedError):
        return False
    return True


def _dequantize(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType, quants

    rows: NDArray[np.float32] = quants.dequantize(raw, GGMLQuantizationType[dtype.upper()])
    return rows


def _refuse_non_finite(rows: NDArray[np.float32], info: TensorInfo, start: int) -> None:
    # The sum is finite unless a value is not (or, harmlessly, unless it overflows).
    with np.errstate(over="ignore", invalid="ignore"):
        total = rows.sum()
    if np.isfinite(total):
        return
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad) == 0:
        return
    first = tuple(int(index) for index in bad[0])
    index = ", ".join(str(i) for i in (first[0] + start, *first[1:]))
    raise CheckpointError(
        f"{info.where}[{index}]: {rows[first]}; {len(bad)} values in {len(rows)} rows are not "
        "finite, the checkpoint is broken"
    )
