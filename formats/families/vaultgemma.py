"""VaultGemma: the block of gemma2 without the norms behind attention and MLP."""

from __future__ import annotations

from uq.formats.config import GemmaConfig
from uq.formats.families import parts
from uq.formats.families.family import Family
from uq.formats.families.gemma2 import read_capped
from uq.formats.families.keys import Keys


def read(keys: Keys) -> GemmaConfig:
    """Resolve config.json of a `VaultGemmaConfig` of transformers.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    return read_capped(keys, FAMILY.name, post_norms=False)


FAMILY = Family(
    name="vaultgemma",
    model_types={"vaultgemma": False},
    read=read,
    layer_roles=parts.block,
    model_roles=parts.tables_and_norm,
    norm_offset=1.0,
    # Without norms behind the outputs the one in front of the MLP has the name that gemma gives it.
    stored_names={"post_attention_layernorm": "pre_feedforward_layernorm"},
)
