"""Gemma 3 text: five windows to one full layer, normed queries and keys, two RoPE bases."""

from __future__ import annotations

from uq.formats.config import GemmaConfig
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
    reading.refuse_variants(keys)
    reading.require_tanh_gelu(keys)
    sizes = reading.sizes(keys, DEFAULTS)
    listed = keys.data.get("layer_types") is not None
    pattern = PATTERN if listed else keys.integer("sliding_window_pattern", PATTERN)
    types = reading.layer_types(keys, sizes["num_layers"], pattern)
    theta, local_theta, scaling = reading.two_ropes(keys)
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
