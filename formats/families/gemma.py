"""Gemma: full attention, and one norm in front of each of attention and MLP."""

from __future__ import annotations

from uq.formats.config import FULL, GemmaConfig
from uq.formats.families import parts, reading
from uq.formats.families.family import Family, GgufDefaults
from uq.formats.families.keys import Keys

DEFAULTS = reading.Defaults(256000, 3072, 24576, 28, 16, 16, 8192)


def read(keys: Keys) -> GemmaConfig:
    """Resolve config.json of a `GemmaConfig` of transformers.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    reading.refuse_variants(keys)
    # "gelu" in an old config means the tanh form; transformers replaces it silently.
    reading.require_tanh_gelu(keys, "hidden_act", also=("gelu",))
    reading.require_tanh_gelu(keys, also=(None,))  # which of the two keys counts has changed
    sizes = reading.sizes(keys, DEFAULTS)
    theta, scaling = reading.single_rope(keys)
    return GemmaConfig(
        family=FAMILY.name,
        **sizes,
        query_pre_attn_scalar=sizes["head_dim"],
        sliding_window=0,
        layer_types=(FULL,) * sizes["num_layers"],
        rope_theta=theta,
        rope_local_theta=theta,
        rope_scaling=scaling,
        attn_softcap=None,
        final_softcap=None,
        post_norms=False,
        qk_norm=False,
    )


FAMILY = Family(
    name="gemma",
    model_types={"gemma": False},
    read=read,
    layer_roles=parts.block,
    model_roles=parts.tables_and_norm,
    norm_offset=1.0,
    gguf=GgufDefaults(
        window=0,
        pattern=1,
        scaled_layers=None,
        local_theta=None,
        attn_softcap=None,
        final_softcap=0.0,
        linear_rope=True,
        post_norms=False,
        qk_norm=False,
    ),
)
