"""The tensors of a GGUF file: GGML blocks with a bundle's codes and scales, or plain floats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from uq.errors import BundleError
from uq.export.gguf_blocks import (
    BLOCK,
    BLOCK_BYTES,
    WITH_MINIMA,
    block_type,
    half,
    has_float16_minima,
    minima,
    stored_values,
    to_blocks,
)
from uq.export.stored import ITEM_BYTES, SAFETENSORS, Losses, StoredTensor, rounded
from uq.formats.bundle import Bundle
from uq.formats.checkpoint.checkpoint import expected_shapes
from uq.formats.checkpoint.gguf_config import STACKED, gguf_names
from uq.formats.config import PER_LAYER_EMBEDDING, GemmaConfig
from uq.formats.manifest import gain_name
from uq.formats.spec import QuantTensor

ROPE_FACTORS = "rope_freqs.weight"


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
    """All tensors of the file, in its order: those of no layer, then layer by layer."""
    manifest, found = bundle.manifest, _rope_factors(bundle.config)
    for name, stored_name in gguf_names(bundle.config).items():
        if name in manifest.tensors:
            found.append(_matrix(bundle, name, stored_name, losses, storage))
        else:
            array = name if name in manifest.arrays else gain_name(name)
            found.append(_array(bundle, array, stored_name))
    found += [*_stacks(bundle), *_unread(bundle.config)]
    return sorted(found, key=lambda tensor: layer_of(tensor.name))


def layer_of(stored_name: str) -> int:
    """`blk.3.attn_q.weight` -> 3; -1 of a tensor of no layer."""
    return int(stored_name.split(".")[1]) if stored_name.startswith("blk.") else -1


def widening(bundle: Bundle, tensors: Sequence[StoredTensor]) -> str | None:
    """What to tell the user of matrices in 8 bits that the bundle has in fewer."""
    names, kinds = gguf_names(bundle.config), {tensor.name: tensor.kind for tensor in tensors}
    specs = {name: record.spec for name, record in bundle.manifest.tensors.items()}
    wider = [name for name in specs if specs[name].bits < 8 and kinds[names[name]] == "Q8_0"]
    if not wider:
        return None
    told = f"{len(wider)} of {len(specs)} tensors take 8 bits, which hold zero points and 6 bits"
    if any(specs[name].zero_point and specs[name].bits in WITH_MINIMA for name in wider):
        told += "; --allow-rounding keeps 4 and 5 bits with zero points"
    return told


def _rope_factors(config: GemmaConfig) -> list[StoredTensor]:
    """What the full layers of gemma4 divide angles by: pairs that do not turn by very much."""
    if config.full is None:
        return []
    factors = np.full(config.full.head_dim // 2, 1e30, np.float32)
    factors[: config.full.rotary_pairs] = 1
    shape, nbytes = factors.shape, factors.nbytes
    return [StoredTensor(ROPE_FACTORS, "F32", shape, nbytes, lambda: iter([factors]))]


def _stacks(bundle: Bundle) -> list[StoredTensor]:
    """Matrices between residual streams, which a file holds as one tensor."""
    if bundle.config.altup is None:
        return []
    others, hidden = bundle.config.altup.streams - 1, bundle.config.hidden_size

    def stack(role: str, stored_name: str) -> StoredTensor:
        names = [f"{role}.{number}.weight" for number in range(others)]
        shape = (others, hidden, hidden)
        return StoredTensor(
            stored_name, "F32", shape, 4 * math.prod(shape), lambda: map(bundle.array, names)
        )

    return [stack(role, stored_name) for role, stored_name in STACKED.items()]


def _unread(config: GemmaConfig) -> list[StoredTensor]:
    """Zeros for keys and values of gemma3n's layers that read those of others: llama.cpp opens no
    file without them, and reads none."""
    if config.family != "gemma3n":
        return []
    shape = config.kv_size, config.hidden_size
    size, gain = math.prod(shape) // BLOCK * BLOCK_BYTES["Q4_0"], 4 * config.head_dim
    return [
        tensor
        for layer in range(config.num_layers - config.kv_shared_layers, config.num_layers)
        for tensor in (
            _zeros(f"blk.{layer}.attn_k.weight", "Q4_0", shape, size),
            _zeros(f"blk.{layer}.attn_v.weight", "Q4_0", shape, size),
            _zeros(f"blk.{layer}.attn_k_norm.weight", "F32", (config.head_dim,), gain),
        )
    ]


def _zeros(name: str, kind: str, shape: tuple[int, ...], nbytes: int) -> StoredTensor:
    return StoredTensor(name, kind, shape, nbytes, lambda: iter([np.zeros(nbytes, np.uint8)]))


def _matrix(
    bundle: Bundle, name: str, stored_name: str, losses: Losses, storage: Storage
) -> StoredTensor:
    stored = _as_stored(bundle, name, stored_name, losses, storage)
    if name == PER_LAYER_EMBEDDING:
        return _filled_up(stored, bundle.config.vocab_size)
    return stored


def _filled_up(table: StoredTensor, rows: int) -> StoredTensor:
    """With the first row for tokens beyond the table's end, as the model has it."""
    found, cols = table.shape
    if found == rows:
        return table

    def chunks() -> Iterator[Any]:
        rest = table.chunks()
        first = next(rest)
        yield first
        yield from rest
        yield np.repeat(first[:1], rows - found, axis=0)

    nbytes = table.nbytes // found * rows
    return replace(table, shape=(rows, cols), nbytes=nbytes, chunks=chunks)


def _as_stored(
    bundle: Bundle, name: str, stored_name: str, losses: Losses, storage: Storage
) -> StoredTensor:
    if storage.dtype is not None:
        return _floats(bundle, name, stored_name, storage.dtype, losses)
    spec = bundle.manifest.tensors[name].spec
    fits = spec.zero_point and (storage.allow_rounding or has_float16_minima(bundle.pieces(name)))
    return _blocks(bundle, name, stored_name, block_type(spec, minima=fits), losses)


def _blocks(bundle: Bundle, name: str, stored_name: str, kind: str, losses: Losses) -> StoredTensor:
    shape = expected_shapes(bundle.config)[name]  # experts are a stack

    def chunks() -> Iterator[Any]:
        for piece in bundle.pieces(name):
            if kind.endswith("_1"):
                _require_finite(name, piece)
                losses.add(name, piece.dequantize(), stored_values(piece, kind))
            yield to_blocks(piece, kind)

    nbytes = int(np.prod(shape)) // BLOCK * BLOCK_BYTES[kind]
    return StoredTensor(stored_name, kind, shape, nbytes, chunks)


def _floats(
    bundle: Bundle, name: str, stored_name: str, dtype: str, losses: Losses
) -> StoredTensor:
    shape = expected_shapes(bundle.config)[name]

    def chunks() -> Iterator[Any]:
        for piece in bundle.pieces(name):
            yield rounded(name, piece.dequantize(), dtype, losses)

    nbytes = ITEM_BYTES[dtype] * int(np.prod(shape))
    return StoredTensor(stored_name, SAFETENSORS[dtype], shape, nbytes, chunks)


def _array(bundle: Bundle, name: str, stored_name: str) -> StoredTensor:
    shape = bundle.manifest.arrays[name].shape
    nbytes = 4 * int(np.prod(shape))
    return StoredTensor(stored_name, "F32", shape, nbytes, lambda: iter([bundle.array(name)]))


def _require_finite(name: str, piece: QuantTensor) -> None:
    if not np.isfinite(half(minima(piece))).all():
        raise BundleError(f"{name}: minima are too large for float16; leave --allow-rounding away")
