"""The files beside the weights of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from uq.errors import BundleError
from uq.export.folder import to_json
from uq.formats.bundle import Bundle
from uq.formats.checkpoint.checkpoint import TOKENIZER
from uq.formats.checkpoint.hf_config import parse_config
from uq.formats.config import FULL, SLIDING, GemmaConfig
from uq.formats.decode import parse_json
from uq.formats.manifest import SHARD_SUFFIX, TOWERS

CONFIG, GENERATION, TOKENIZER_CONFIG = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gemma": ("gemma", "GemmaForCausalLM"),
        "gemma2": ("gemma2", "Gemma2ForCausalLM"),
        "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    }
)


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
    assets.setdefault(GENERATION, to_json(_token_ids(bundle.config)))
    if TOKENIZER_CONFIG not in assets:
        tokenizer = json.loads(assets[TOKENIZER])
        assets[TOKENIZER_CONFIG] = to_json(_tokenizer_config(tokenizer, bundle.config))
        assets[TOKENIZER] = json.dumps(
            _with_bos(tokenizer, bundle.config), ensure_ascii=False
        ).encode()
    return assets


def text_config(config: GemmaConfig) -> dict[str, Any]:
    """config.json of a text model.

    Raises:
        BundleError: it cannot say what the model is.
    """
    if config.family not in CLASSES:
        raise BundleError(f"export of {config.family} is not offered; it is of " + _families())
    model_type, architecture = CLASSES[config.family]
    found = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tied_head,
        "rope_parameters": _rope(config),
    }
    found |= _token_ids(config) | _family_keys(config)
    if parse_config(found) != config:
        raise BundleError(
            f"transformers has no {model_type} model of this kind: it takes other numbers than the "
            "bundle's for RoPE, soft-caps or the scale of the scores"
        )
    return found


def _multimodal_config(source: bytes, text: dict[str, Any], config: GemmaConfig) -> dict[str, Any]:
    """The source's config.json around that of the text model."""
    outer = parse_json(source, CONFIG)
    inner = {key: value for key, value in text.items() if key != "architectures"}
    found = {key: value for key, value in outer.items() if key != "torch_dtype"}
    tied = {"tie_word_embeddings": config.tied_head}
    return found | {"text_config": inner, "dtype": text["dtype"]} | tied


def _families() -> str:
    return ", ".join(CLASSES)


def _family_keys(config: GemmaConfig) -> dict[str, Any]:
    if config.family == "gemma":
        return {"hidden_act": "gelu_pytorch_tanh"}
    scalar = config.query_pre_attn_scalar
    found = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "layer_types": list(config.layer_types),
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
    }
    return found | ({"sliding_window": config.sliding_window} if config.sliding_window else {})


def _rope(config: GemmaConfig) -> dict[str, Any]:
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != 1:
        full |= {"rope_type": "linear", "factor": config.rope_scaling}
    if config.family != "gemma3":
        return full
    return {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": config.rope_local_theta}}


def _token_ids(config: GemmaConfig) -> dict[str, Any]:
    eos = list(config.eos_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id,
    }


def _tokenizer_config(tokenizer: dict[str, Any], config: GemmaConfig) -> dict[str, Any]:
    """For a tokenizer.json that was made from a GGUF file's words."""
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[config.bos_token_id],
        "eos_token": words[config.eos_token_ids[0]],
        "pad_token": words[config.pad_token_id],
        "unk_token": tokenizer["model"]["unk_token"],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }


def _with_bos(tokenizer: dict[str, Any], config: GemmaConfig) -> dict[str, Any]:
    """The same, putting `<bos>` in front of a text: uq does so itself, transformers is told."""
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    bos = words[config.bos_token_id]
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    post = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {bos: {"id": bos, "ids": [config.bos_token_id], "tokens": [bos]}},
    }
    return tokenizer | {"post_processor": post}
