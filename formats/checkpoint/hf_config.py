"""config.json of a Hugging Face folder -> GemmaConfig.

Configurations on the Hub are sparse: what equals the default of the transformers class is left out.
The defaults are in the file of each architecture, `uq.formats.families`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from uq.errors import CheckpointError
from uq.formats.checkpoint.small_file import read_small
from uq.formats.config import GemmaConfig
from uq.formats.decode import parse_json
from uq.formats.families.family import Family
from uq.formats.families.keys import JSON, Keys
from uq.formats.families.registry import MODEL_TYPES, known

# Of a multimodal model, too.
OUTER_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, or not a JSON object.
    """
    data = parse_json(read_small(path), str(path), CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def parse_config(
    data: JSON, file: str = "config.json", generation: JSON | None = None
) -> GemmaConfig:
    """Resolve every field of the text model.

    Args:
        data: config.json; of a multimodal model the `text_config` is used.
        file: its name, for messages.
        generation: generation_config.json, which may name more end-of-sequence tokens.

    Raises:
        CheckpointError: another architecture, a feature that is not supported, or a broken value.
    """
    model_type = data.get("model_type")
    family = known(model_type, MODEL_TYPES, f"{file}: model_type")
    outer = Keys(file, data)
    multimodal = family.model_types[str(model_type)]
    text = _text_part(outer, family) if multimodal else data
    keys = {key: data[key] for key in OUTER_KEYS if key in data} | dict(text)
    if multimodal:  # the outer key decides, and so does its default
        keys["tie_word_embeddings"] = data.get("tie_word_embeddings", True)
    inner = Keys(file, keys)
    config = family.read(inner)
    check_heads(config, file)
    more = Keys("generation_config.json", generation or {})
    eos = [token for part in (inner, outer, more) for token in part.tokens("eos_token_id")]
    return replace(config, eos_token_ids=tuple(dict.fromkeys(eos)) or (1,))


def _text_part(outer: Keys, family: Family) -> JSON:
    """Raises CheckpointError: it is of another family."""
    text = Keys(f"{outer.file}: text_config", outer.object("text_config"))
    if text.data.get("model_type", "") not in ("", *family.model_types):
        raise text.refuse("model_type", f"one of {', '.join(family.model_types)}")
    return text.data


def check_heads(config: GemmaConfig, file: str) -> None:
    """Refuse head counts that no attention can have.

    Raises:
        CheckpointError: key-value heads do not divide the heads, or head_dim is odd.
    """
    for layer in range(config.num_layers):
        kv_heads, head_dim = config.layer_kv_heads(layer), config.layer_head_dim(layer)
        if config.num_heads % kv_heads:
            raise CheckpointError(
                f"{file}: {config.num_heads} attention heads do not divide by "
                f"{kv_heads} key-value heads"
            )
        if head_dim % 2:
            raise CheckpointError(f"{file}: head_dim is {head_dim}; RoPE needs an even number")
