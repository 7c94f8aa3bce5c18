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
from uq.formats.families.keys import JSON, Keys
from uq.formats.families.registry import MODEL_TYPES, known

OUTER_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a multimodal model, too


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
    text = outer.object("text_config") if family.model_types[str(model_type)] else data
    keys = {key: data[key] for key in OUTER_KEYS if key in data} | dict(text)
    if "tie_word_embeddings" in data:
        keys["tie_word_embeddings"] = data["tie_word_embeddings"]
    inner = Keys(file, keys)
    config = family.read(inner)
    check_heads(config, file)
    more = Keys("generation_config.json", generation or {})
    eos = [token for part in (inner, outer, more) for token in part.tokens("eos_token_id")]
    return replace(config, eos_token_ids=tuple(dict.fromkeys(eos)) or (1,))


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
