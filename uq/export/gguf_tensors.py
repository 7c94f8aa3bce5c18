"""The tensors of a GGUF file: GGML blocks with a bundle's codes and scales, or plain floats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from uq.errors import BundleError
from uq.export.gguf_blocks import (
    BLOCK,
    BLOCK_BYTES,
    block_type,
    half,
    has_float16_minima,
    minima,
    stored_values,
    to_blocks,
)
from uq.export.stored import ITEM_BYTES, SAFETENSORS, Losses, StoredTensor, rounded
from uq.formats.bundle import Bundle
from uq.formats.checkpoint.gguf_config import gguf_names
from uq.formats.manifest import gain_name
from uq.formats.spec import QuantTensor


@dataclass(frozen=True)
class Storage:
    """How matrices are stored.

    Attributes:
        dtype: `float32`, `float16` or `bfloat16`; None: blocks with the bundle's codes.
        allow_rounding: minima may be rounded to float16, which takes 5 bits where 8 are exact.
    """

    dtype: str | None
    allow_rounding: bool


def gguf_tensors(bundle: Bundle, losses: Losses, storage: Storage) -> list[StoredTensor]:
    """All tensors of the file, in its order."""
    return [
        _matrix(bundle, name, stored_name, losses, storage)
        if name in bundle.manifest.tensors
        else _gain(bundle, gain_name(name), stored_name)
        for name, stored_name in gguf_names(bundle.config).items()
    ]


def _matrix(
    bundle: Bundle, name: str, stored_name: str, losses: Losses, storage: Storage
) -> StoredTensor:
    if storage.dtype is not None:
        return _floats(bundle, name, stored_name, storage.dtype, losses)
    spec = bundle.manifest.tensors[name].spec
    fits = spec.zero_point and (storage.allow_rounding or has_float16_minima(bundle.pieces(name)))
    return _blocks(bundle, name, stored_name, block_type(spec, minima=fits), losses)


def _blocks(bundle: Bundle, name: str, stored_name: str, kind: str, losses: Losses) -> StoredTensor:
    rows, cols = bundle.manifest.tensors[name].shape

    def chunks() -> Iterator[Any]:
        for piece in bundle.pieces(name):
            if kind.endswith("_1"):
                _require_finite(name, piece)
                losses.add(name, piece.dequantize(), stored_values(piece, kind))
            yield to_blocks(piece, kind)

    nbytes = rows * (cols // BLOCK) * BLOCK_BYTES[kind]
    return StoredTensor(stored_name, kind, (rows, cols), nbytes, chunks)


def _floats(
    bundle: Bundle, name: str, stored_name: str, dtype: str, losses: Losses
) -> StoredTensor:
    shape = bundle.manifest.tensors[name].shape

    def chunks() -> Iterator[Any]:
        for piece in bundle.pieces(name):
            yield rounded(name, piece.dequantize(), dtype, losses)

    nbytes = ITEM_BYTES[dtype] * int(np.prod(shape))
    return StoredTensor(stored_name, SAFETENSORS[dtype], shape, nbytes, chunks)


def _gain(bundle: Bundle, name: str, stored_name: str) -> StoredTensor:
    shape = bundle.manifest.arrays[name].shape
    nbytes = 4 * int(np.prod(shape))
    return StoredTensor(stored_name, "F32", shape, nbytes, lambda: iter([bundle.array(name)]))


def _require_finite(name: str, piece: QuantTensor) -> None:
    if not np.isfinite(half(minima(piece))).all():
        raise BundleError(f"{name}: minima are too large for float16; leave --allow-rounding away")
