"""Gemma 4 text: full layers with heads of their own, shared keys and values, per-layer embeddings,
a mixture of experts. The 12B ("unified") is the same block with other defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uq.errors import CheckpointError
from uq.formats.config import (
    FULL,
    SLIDING,
    Experts,
    FullLayers,
    GemmaConfig,
    PerLayerEmbedding,
)
from uq.formats.families import parts, reading
from uq.formats.families.family import Family, Kind, Role
from uq.formats.families.keys import JSON, Keys

PATTERN = 6
GLOBAL_HEAD_DIM = 512
SLIDING_ROPE: JSON = {"rope_type": "default", "rope_theta": 1e4}
FULL_ROPE: JSON = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}


@dataclass(frozen=True)
class Variant:
    """Class defaults in which the two kinds of configuration differ.

    Attributes:
        extras: per-layer embeddings and experts are known to the class.
    """

    family: str
    max_positions: int
    window: int
    extras: bool


GEMMA4 = Variant("gemma4", 131072, 512, extras=True)
GEMMA4_UNIFIED = Variant("gemma4_unified", 262144, 1024, extras=False)


def read(keys: Keys) -> GemmaConfig:
    """Resolve the keys of a `Gemma4TextConfig` of transformers.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    return _read(keys, GEMMA4)


def read_unified(keys: Keys) -> GemmaConfig:
    """Resolve the keys of a `Gemma4UnifiedTextConfig` of transformers.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    return _read(keys, GEMMA4_UNIFIED)


def _read(keys: Keys, variant: Variant) -> GemmaConfig:
    if keys.data.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise keys.refuse("use_bidirectional_attention", "null or vision; text is causal here")
    reading.require_tanh_gelu(keys)
    defaults = reading.Defaults(262144, 2304, 9216, 30, 8, 4, variant.max_positions)
    sizes = reading.sizes(keys, defaults)
    layers = sizes["num_layers"]
    types = (*reading.layer_types(keys, layers, PATTERN)[:-1], FULL)  # the last one is always full
    local, full = _ropes(keys, types)
    reading.refuse_scaled(keys.file, local)
    heads = _full_layers(keys, types, sizes)
    fraction, scaling = _full_rope(keys, full)
    shared = reading.shared_layers(keys, types, 0)
    return GemmaConfig(
        family=variant.family,
        **sizes,
        query_pre_attn_scalar=1.0,
        sliding_window=reading.window(keys, types, variant.window),
        layer_types=types,
        rope_theta=reading.theta(keys, full, "rope_theta", 1e6),
        rope_local_theta=reading.theta(keys, local, "rope_local_base_freq", 1e4),
        rope_scaling=scaling,
        attn_softcap=None,
        final_softcap=keys.optional("final_logit_softcapping", None),
        post_norms=True,
        qk_norm=True,
        value_norm=True,
        full=FullLayers(
            head_dim=heads["head_dim"],
            num_kv_heads=heads["num_key_value_heads"],
            rotary_pairs=int(fraction * heads["head_dim"] // 2),
            key_is_value=keys.flag("attention_k_eq_v"),
        ),
        intermediate_sizes=_widths(keys, sizes["intermediate_size"], layers, shared),
        kv_shared_layers=shared,
        layer_scalar=True,
        per_layer=_per_layer(keys) if variant.extras else None,
        experts=_experts(keys) if variant.extras else None,
    )


def _ropes(keys: Keys, types: tuple[str, ...]) -> tuple[JSON, JSON]:
    """RoPE of sliding and of full layers; `rope_scaling` is another name of `rope_parameters`."""
    key = "rope_scaling" if keys.object("rope_scaling") else "rope_parameters"
    found = keys.object(key) or {FULL: FULL_ROPE, SLIDING: SLIDING_ROPE}
    nested = Keys(f"{keys.file}: {key}", found)
    for kind in sorted(set(types)):
        if "rope_theta" not in nested.object(kind):
            raise keys.refuse(key, f"an object with rope_theta under {kind}")
    return nested.object(SLIDING), nested.object(FULL)


def _full_layers(keys: Keys, types: tuple[str, ...], sizes: Mapping[str, Any]) -> dict[str, int]:
    """`head_dim` and `num_key_value_heads` of the full layers.

    The Hub's files say them by key, those that transformers saves by layer (`per_layer_config`).
    """
    heads = {"num_key_value_heads": sizes["num_kv_heads"], "head_dim": sizes["head_dim"]}
    if "per_layer_config" not in keys.data:
        heads["head_dim"] = keys.integer("global_head_dim", GLOBAL_HEAD_DIM)
        if keys.flag("attention_k_eq_v") and keys.data.get("num_global_key_value_heads"):
            heads["num_key_value_heads"] = keys.integer("num_global_key_value_heads", 1)
        return heads
    nested = Keys(f"{keys.file}: per_layer_config", keys.object("per_layer_config"))
    if not nested.data:  # saved where full layers have the sizes of the others
        return heads
    full = [layer for layer, kind in enumerate(types) if kind == FULL]
    named = [int(key) for key in nested.data if key.isdecimal()]
    own = nested.object(next(iter(nested.data), ""))
    if named != full or any(found != own for found in nested.data.values()):
        raise keys.refuse("per_layer_config", "the same sizes for every full layer, and no other")
    inner = Keys(nested.file, own)
    if unknown := sorted(set(own) - set(heads)):
        raise inner.refuse(unknown[0], f"only {' and '.join(heads)}")
    return {name: inner.integer(name, value) for name, value in heads.items()}


def _full_rope(keys: Keys, parameters: JSON) -> tuple[float, float]:
    """Share of a head's components that turn, and what positions are divided by."""
    inner = Keys(f"{keys.file}: RoPE of type proportional", parameters)
    if parameters.get("rope_type") != "proportional":
        return 1.0, reading.linear_factor(keys.file, parameters)
    share = inner.number("partial_rotary_factor", 1.0)
    if share > 1:
        raise inner.refuse("partial_rotary_factor", "at most 1")
    return share, inner.number("factor", 1.0)


def _widths(keys: Keys, size: int, layers: int, shared: int) -> tuple[int, ...]:
    if not shared or not keys.flag("use_double_wide_mlp"):
        return ()
    return (size,) * (layers - shared) + (2 * size,) * shared


def _per_layer(keys: Keys) -> PerLayerEmbedding | None:
    if keys.data.get("hidden_size_per_layer_input", 256) in (None, 0):
        return None
    return PerLayerEmbedding(
        vocab_size=keys.integer("vocab_size_per_layer_input", 262144),
        size=keys.integer("hidden_size_per_layer_input", 256),
    )


def _experts(keys: Keys) -> Experts | None:
    if not keys.flag("enable_moe_block"):
        return None
    needed = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if missing := [name for name in needed if keys.data.get(name) is None]:
        raise CheckpointError(f"{keys.file}: enable_moe_block needs {missing[0]}, which is missing")
    count, active, size = (keys.integer(name, 0) for name in needed)
    if active > count:
        raise keys.refuse("top_k_experts", f"at most the {count} experts")
    return Experts(count=count, active=active, intermediate_size=size)


def layer_roles(config: GemmaConfig, layer: int) -> tuple[Role, ...]:
    """The common block, and what Gemma 4 adds to it."""
    return (
        *parts.block(config, layer),
        *_expert_roles(config),
        *parts.per_layer_inputs(config),
        Role("layer_scalar", Kind.KEPT, (1,), bare=True),
    )


def _expert_roles(config: GemmaConfig) -> tuple[Role, ...]:
    if config.experts is None:
        return ()
    hidden, count, size = (
        config.hidden_size,
        config.experts.count,
        config.experts.intermediate_size,
    )
    return (
        Role("experts.gate_up_proj", Kind.EXPERTS, (count, 2 * size, hidden), bare=True),
        Role("experts.down_proj", Kind.EXPERTS, (count, hidden, size), bare=True),
        Role("router.proj", Kind.KEPT, (count, hidden)),
        Role("router.scale", Kind.KEPT, (hidden,), bare=True),
        Role("router.per_expert_scale", Kind.KEPT, (count,), bare=True),
        parts.norm("pre_feedforward_layernorm_2", hidden),
        parts.norm("post_feedforward_layernorm_1", hidden),
        parts.norm("post_feedforward_layernorm_2", hidden),
    )


def model_roles(config: GemmaConfig) -> tuple[Role, ...]:
    return (*parts.tables_and_norm(config), *parts.per_layer_tables(config))


FAMILY = Family(
    name=GEMMA4.family,
    model_types={"gemma4_text": False, "gemma4": True},
    read=read,
    layer_roles=layer_roles,
    model_roles=model_roles,
    norm_offset=0.0,
)
UNIFIED = Family(
    name=GEMMA4_UNIFIED.family,
    model_types={"gemma4_unified_text": False, "gemma4_unified": True},
    read=read_unified,
    layer_roles=layer_roles,
    model_roles=model_roles,
    norm_offset=0.0,
)
