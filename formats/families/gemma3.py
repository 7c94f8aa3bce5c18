"""Gemma 3 text: five windows to one full layer, normed queries and keys, two RoPE bases."""

from __future__ import annotations

from uq.errors import CheckpointError
from uq.formats.config import FULL, SLIDING, GemmaConfig
from uq.formats.families import parts, reading
from uq.formats.families.family import Family, GgufDefaults
from uq.formats.families.keys import Keys

DEFAULTS = reading.Defaults(262208, 2304, 9216, 26, 8, 4, 131072)
PATTERN = 6


def read(keys: Keys) -> GemmaConfig:
    """Resolve the keys of a `Gemma3TextConfig` of transformers.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    reading.refuse_flag(keys, "use_bidirectional_attention")
    reading.require_tanh_gelu(keys)
    sizes = reading.sizes(keys, DEFAULTS)
    old = keys.integer("_sliding_window_pattern", PATTERN)
    pattern = keys.integer("sliding_window_pattern", old)
    types = reading.layer_types(keys, sizes["num_layers"], pattern)
    theta, local_theta, scaling = _rope(keys)
    return GemmaConfig(
        family=FAMILY.name,
        **sizes,
        query_pre_attn_scalar=keys.number("query_pre_attn_scalar", 256),
        sliding_window=reading.window(keys, types),
        layer_types=types,
        rope_theta=theta,
        rope_local_theta=local_theta,
        rope_scaling=scaling,
        attn_softcap=None,  # transformers accepts the key and never applies it
        final_softcap=keys.optional("final_logit_softcapping", None),
        post_norms=True,
        qk_norm=True,
    )


def _rope(keys: Keys) -> tuple[float, float, float]:
    """Base of full layers, base of sliding layers, linear factor of full layers.

    New files hold `rope_parameters` per layer type, old ones `rope_theta`, `rope_local_base_freq`
    and `rope_scaling`.
    """
    nested = Keys(f"{keys.file}: rope_parameters", keys.object("rope_parameters"))
    full = {**nested.object(FULL), **keys.object("rope_scaling")}
    local = nested.object(SLIDING)
    if reading.linear_factor(keys.file, local) != 1:
        raise CheckpointError(
            f"{keys.file}: rope_parameters scale the sliding layers; only full layers may be"
        )
    return (
        reading.theta(keys, full, "rope_theta", 1e6),
        reading.theta(keys, local, "rope_local_base_freq", 1e4),
        reading.linear_factor(keys.file, full),
    )


FAMILY = Family(
    name="gemma3",
    model_types={"gemma3_text": False, "gemma3": True},
    read=read,
    layer_roles=parts.block,
    model_roles=parts.tables_and_norm,
    norm_offset=1.0,
    gguf=GgufDefaults(
        window=0,
        pattern=PATTERN,
        scaled_layers=62,
        local_theta=1e4,
        attn_softcap=None,
        final_softcap=0.0,
        linear_rope=True,
        post_norms=True,
        qk_norm=True,
    ),
)
