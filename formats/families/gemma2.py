"""Gemma 2: alternating windows, norms behind attention and MLP, soft-capped scores and logits."""

from __future__ import annotations

from uq.errors import CheckpointError
from uq.formats.config import GemmaConfig
from uq.formats.families import parts, reading
from uq.formats.families.family import Family, GgufDefaults
from uq.formats.families.keys import Keys

DEFAULTS = reading.Defaults(256000, 2304, 9216, 26, 8, 4, 8192)


def read(keys: Keys) -> GemmaConfig:
    """Resolve config.json of a `Gemma2Config` of transformers.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    return read_capped(keys, FAMILY.name, post_norms=True)


def read_capped(keys: Keys, family: str, *, post_norms: bool) -> GemmaConfig:
    """A configuration with the keys of gemma2.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    reading.refuse_variants(keys)
    reading.require_tanh_gelu(keys)
    sizes = reading.sizes(keys, DEFAULTS)
    types = reading.layer_types(keys, sizes["num_layers"], pattern=2)
    theta, scaling = reading.single_rope(keys)
    if scaling != 1:
        raise CheckpointError(
            f"{keys.file}: RoPE is scaled by {scaling:g}, which is not supported for {family}"
        )
    return GemmaConfig(
        family=family,
        **sizes,
        query_pre_attn_scalar=keys.number("query_pre_attn_scalar", 256),
        sliding_window=reading.window(keys, types),
        layer_types=types,
        rope_theta=theta,
        rope_local_theta=theta,
        rope_scaling=scaling,
        attn_softcap=keys.optional("attn_logit_softcapping", 50.0),
        final_softcap=keys.optional("final_logit_softcapping", 30.0),
        post_norms=post_norms,
        qk_norm=False,
    )


FAMILY = Family(
    name="gemma2",
    model_types={"gemma2": False},
    read=read,
    layer_roles=parts.block,
    model_roles=parts.tables_and_norm,
    norm_offset=1.0,
    gguf=GgufDefaults(
        window=4096,
        pattern=2,
        scaled_layers=46,
        local_theta=None,
        attn_softcap=50.0,
        final_softcap=30.0,
        linear_rope=False,
        post_norms=True,
        qk_norm=False,
    ),
)
