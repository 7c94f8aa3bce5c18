"""What the sizes and options of a model must agree on, in whatever file they were found."""

from __future__ import annotations

import math
from collections.abc import Iterator

from uq.errors import BundleError
from uq.formats.config import FULL, MAX_COUNT, MAX_LAYERS, SLIDING, GemmaConfig
from uq.formats.decode import shown
from uq.formats.families.registry import FAMILIES

POSITIVE = ("rms_norm_eps", "query_pre_attn_scalar", "rope_theta", "rope_local_theta")


def check_model(config: GemmaConfig, where: str) -> None:
    """Raises BundleError: a field is out of range or contradicts another; `where` begins it."""
    if config.family not in FAMILIES:
        raise BundleError(
            f"{where}.family: {shown(config.family)} is not one of {', '.join(FAMILIES)}"
        )
    for name, count in _counts(config):
        if not 1 <= count <= MAX_COUNT:
            raise BundleError(f"{where}.{name}: {count} is not in 1..{MAX_COUNT}")
    if config.num_layers > MAX_LAYERS:
        raise BundleError(f"{where}.num_layers: {config.num_layers} is more than {MAX_LAYERS}")
    for name in (*POSITIVE, "rope_scaling", "attn_softcap", "final_softcap"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BundleError(f"{where}.{name}: {value} is not above 0")
    _check_tokens(config, where)
    _check_layers(config, where)
    _check_heads(config, where)
    if config.experts and config.experts.active > config.experts.count:
        raise BundleError(f"{where}.experts.active: {config.experts.active} of fewer experts")


def _counts(config: GemmaConfig) -> Iterator[tuple[str, int]]:
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    for name in (*counts, "num_kv_heads", "head_dim", "q_size", "max_position_embeddings"):
        yield name, getattr(config, name)
    for size in config.intermediate_sizes:
        yield "intermediate_sizes", size
    if config.full is not None:
        yield "full.head_dim", config.full.head_dim
        yield "full.num_kv_heads", config.full.num_kv_heads
        yield "full.rotary_pairs", config.full.rotary_pairs
        yield "full.head_dim", config.num_heads * config.full.head_dim
    if config.per_layer is not None:
        yield "per_layer.vocab_size", config.per_layer.vocab_size
        yield "per_layer.size", config.per_layer.size
        yield "per_layer.size", config.num_layers * config.per_layer.size
    if config.altup is not None:
        yield "altup.streams", config.altup.streams
    if config.laurel_rank:
        yield "laurel_rank", config.laurel_rank
    if config.experts is not None:
        yield "experts.active", config.experts.active
        yield "experts.count", config.experts.count
        yield "experts.intermediate_size", config.experts.intermediate_size


def _check_tokens(config: GemmaConfig, where: str) -> None:
    tokens = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    found = [*tokens.items(), *(("eos_token_ids", token) for token in config.eos_token_ids)]
    for name, token in found:
        if not 0 <= token < config.vocab_size:
            raise BundleError(f"{where}.{name}: {token} is not in 0..{config.vocab_size - 1}")
    if config.per_layer and config.per_layer.vocab_size > config.vocab_size:
        raise BundleError(
            f"{where}.per_layer.vocab_size: {config.per_layer.vocab_size} is more than vocab_size"
        )


def _check_layers(config: GemmaConfig, where: str) -> None:
    types, layers, shared = config.layer_types, config.num_layers, config.kv_shared_layers
    if len(types) != layers:
        raise BundleError(f"{where}.layer_types: {len(types)} items, not num_layers")
    for kind in types:
        if kind not in (SLIDING, FULL):
            raise BundleError(f"{where}.layer_types: {shown(kind)} is not one of {SLIDING}, {FULL}")
    if config.sliding_window < 1 and SLIDING in types:
        raise BundleError(f"{where}.sliding_window: {config.sliding_window} is not above 0")
    if config.intermediate_sizes and len(config.intermediate_sizes) != layers:
        raise BundleError(
            f"{where}.intermediate_sizes: {len(config.intermediate_sizes)} items, not num_layers"
        )
    sparsity = config.activation_sparsity
    if sparsity and len(sparsity) != layers:
        raise BundleError(f"{where}.activation_sparsity: {len(sparsity)} items, not num_layers")
    if not all(0 <= share < 1 for share in sparsity):
        raise BundleError(f"{where}.activation_sparsity: {max(sparsity)} is not in 0..1")
    if config.altup and not 0 <= config.altup.active < config.altup.streams:
        raise BundleError(f"{where}.altup.active: {config.altup.active} of fewer streams")
    if not 0 <= shared < layers or set(types[: layers - shared]) != set(types):
        raise BundleError(
            f"{where}.kv_shared_layers: {shared} leave no layer of some type with keys and values"
        )


def _check_heads(config: GemmaConfig, where: str) -> None:
    full = [("full.", config.full.num_kv_heads, config.full.head_dim)] if config.full else []
    for prefix, kv_heads, head_dim in [("", config.num_kv_heads, config.head_dim), *full]:
        if config.num_heads % kv_heads:
            raise BundleError(
                f"{where}.num_heads: {config.num_heads} is no multiple of {prefix}num_kv_heads"
            )
        if head_dim % 2:
            raise BundleError(f"{where}.{prefix}head_dim: {head_dim} is odd")
    if config.full and config.full.rotary_pairs > config.full.head_dim // 2:
        raise BundleError(f"{where}.full.rotary_pairs: more than half of full.head_dim")
