"""The files beside the weights of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from uq.export.folder import to_json
from uq.export.text_config import text_config, token_ids
from uq.formats.bundle import Bundle
from uq.formats.checkpoint.checkpoint import TOKENIZER
from uq.formats.config import GemmaConfig
from uq.formats.decode import parse_json
from uq.formats.families.keys import Keys
from uq.formats.manifest import SHARD_SUFFIX, TOWERS

CONFIG, GENERATION, TOKENIZER_CONFIG = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
IMAGE_KEYS = ("use_bidirectional_attention",)  # of no effect on text


def folder_assets(bundle: Bundle, dtype: str, extra: Mapping[str, Any]) -> dict[str, bytes]:
    """Files that let `AutoModelForCausalLM` and `AutoTokenizer` load the folder.

    Args:
        dtype: that the model is loaded in.
        extra: further keys of config.json.

    Raises:
        BundleError: transformers has no class for such a model.
    """
    names = [name for name in bundle.manifest.files if not name.endswith(SHARD_SUFFIX)]
    assets = {name: bundle.asset(name) for name in names}
    config = text_config(bundle.config) | {"dtype": dtype}
    if TOWERS in bundle.manifest.files:
        config = _multimodal_config(assets[CONFIG], config, bundle.config)
    assets[CONFIG] = to_json(config | dict(extra))
    assets.setdefault(GENERATION, to_json(token_ids(bundle.config)))
    if TOKENIZER_CONFIG not in assets:
        tokenizer = json.loads(assets[TOKENIZER])
        assets[TOKENIZER_CONFIG] = to_json(_tokenizer_config(tokenizer, bundle.config))
        assets[TOKENIZER] = json.dumps(
            _with_bos(tokenizer, bundle.config), ensure_ascii=False
        ).encode()
    return assets


def _multimodal_config(source: bytes, text: dict[str, Any], config: GemmaConfig) -> dict[str, Any]:
    """The source's config.json around that of the text model, which keeps how it sees images."""
    outer = Keys(CONFIG, parse_json(source, CONFIG))
    inner = {key: value for key, value in text.items() if key != "architectures"}
    before = outer.object("text_config")
    inner |= {key: before[key] for key in IMAGE_KEYS if key in before}
    found = {key: value for key, value in outer.data.items() if key != "torch_dtype"}
    tied = {"tie_word_embeddings": config.tied_head}
    return found | {"text_config": inner, "dtype": text["dtype"]} | tied


def _tokenizer_config(tokenizer: dict[str, Any], config: GemmaConfig) -> dict[str, Any]:
    """For a tokenizer.json that came alone, as one made from a GGUF file's words does."""
    words = _words(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[config.bos_token_id],
        "eos_token": words[config.eos_token_ids[0]],
        "pad_token": words[config.pad_token_id],
        "unk_token": tokenizer["model"]["unk_token"],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }


def _words(tokenizer: dict[str, Any]) -> dict[int, str]:
    """Token id -> token."""
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    return words | {token["id"]: token["content"] for token in tokenizer["added_tokens"]}


def _with_bos(tokenizer: dict[str, Any], config: GemmaConfig) -> dict[str, Any]:
    """The same, putting `<bos>` in front of a text: uq does so itself, transformers is told."""
    bos = _words(tokenizer)[config.bos_token_id]
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    post = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {bos: {"id": bos, "ids": [config.bos_token_id], "tokens": [bos]}},
    }
    return tokenizer | {"post_processor": post}
