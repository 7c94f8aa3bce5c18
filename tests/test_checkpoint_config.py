"""config.json against the configuration classes of transformers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    VaultGemmaConfig,
    VaultGemmaForCausalLM,
)

from uq.errors import CheckpointError
from uq.formats.checkpoint.checkpoint import expected_shapes
from uq.formats.checkpoint.hf_config import parse_config
from uq.formats.checkpoint.opening import canonical_names
from uq.formats.families.registry import FAMILIES

LAYERS_34 = {"num_hidden_layers": 34, "hidden_size": 2560, "intermediate_size": 10240}
GEMMA3_27B = {
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 168,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
NEW_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
# google/vaultgemma-1b: no layer has a window. Sizes as keras-hub's conversion test has them.
VAULTGEMMA_1B = {
    "vocab_size": 256000,
    "num_hidden_layers": 26,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "layer_types": ["full_attention"] * 26,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "sliding_window": 512,
}
SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {}),
    ("gemma", {"hidden_act": "gelu", "rope_theta": 5e4, "num_key_value_heads": 1}),
    ("gemma", {"hidden_activation": None, "eos_token_id": [1, 107]}),
    ("gemma", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gemma2", {}),
    ("gemma2", {"query_pre_attn_scalar": 144, "head_dim": 128, "num_hidden_layers": 46}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}),
    ("gemma2", {"sliding_window": 128, "layer_types": ["full_attention"] * 26}),
    ("vaultgemma", {}),
    ("vaultgemma", VAULTGEMMA_1B),
    ("vaultgemma", {"sliding_window": 512, "attn_logit_softcapping": None}),
    ("gemma3_text", {}),
    ("gemma3_text", GEMMA3_27B),
    ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "num_hidden_layers": 7}),
    ("gemma3_text", {"rope_parameters": NEW_ROPE, "vocab_size": 262144}),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ("gemma3_text", {"sliding_window_pattern": 3, "num_hidden_layers": 8}),
    ("gemma3_text", {"_sliding_window_pattern": 3}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 26, "sliding_window_pattern": None}),
    ("gemma3_text", {"quantization_config": None, "is_causal": True, "per_layer_config": None}),
    ("gemma3_text", {"final_logit_softcapping": 30.0, "rms_norm_eps": 1e-5}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3}),
]
CLASSES = {
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "vaultgemma": VaultGemmaConfig,
}


def oracle(model_type: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The fields of our config as the class of transformers resolves them."""
    config = CLASSES[model_type](**copy.deepcopy(keys))
    rope = config.rope_parameters
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
    eos = config.eos_token_id
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "layer_types": tuple(types),
        "rope_theta": full["rope_theta"],
        "rope_local_theta": local["rope_theta"],
        "rope_scaling": full.get("factor", 1.0),
        "final_softcap": getattr(config, "final_logit_softcapping", None),
        "attn_softcap": getattr(config, "attn_logit_softcapping", None),
        "tied_head": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": config.pad_token_id,
        "query_pre_attn_scalar": getattr(config, "query_pre_attn_scalar", config.head_dim),
    }


@pytest.mark.parametrize(("model_type", "keys"), SPARSE)
def test_sparse_config_resolves_as_in_transformers(model_type: str, keys: dict[str, Any]) -> None:
    config = parse_config({"model_type": model_type, **copy.deepcopy(keys)}).to_json()
    expected = oracle(model_type, keys)
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("keys", [{}, GEMMA3_27B, LAYERS_34])
def test_multimodal_text_part_resolves_as_in_transformers(keys: dict[str, Any]) -> None:
    ours = parse_config({"model_type": "gemma3", "text_config": copy.deepcopy(keys)}).to_json()
    text = Gemma3Config(text_config=copy.deepcopy(keys)).text_config
    expected = oracle("gemma3_text", text.to_dict())
    assert {key: ours[key] for key in expected} == expected


@pytest.mark.parametrize("outer", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("inner", [True, False])
def test_outer_key_of_a_multimodal_model_ties_the_head(outer: dict[str, bool], inner: bool) -> None:
    keys = {**outer, "text_config": {"tie_word_embeddings": inner}}
    expected = Gemma3Config(**copy.deepcopy(keys)).tie_word_embeddings
    assert parse_config({"model_type": "gemma3", **keys}).tied_head is expected


def test_tokens_that_are_null_are_those_of_the_class() -> None:
    config = parse_config({"model_type": "gemma", "bos_token_id": None, "pad_token_id": None})
    assert (config.bos_token_id, config.pad_token_id) == (2, 0)


def test_config_saved_by_transformers_reads_back_the_same() -> None:
    sparse = parse_config({"model_type": "gemma3_text", **copy.deepcopy(GEMMA3_27B)})
    saved = Gemma3TextConfig(**copy.deepcopy(GEMMA3_27B)).to_dict()
    assert parse_config(saved) == sparse


def test_names_and_shapes_of_vaultgemma() -> None:
    config = parse_config({"model_type": "vaultgemma", **VAULTGEMMA_1B})
    with torch.device("meta"):
        theirs = VaultGemmaForCausalLM(VaultGemmaConfig(**VAULTGEMMA_1B)).state_dict()
    del theirs["lm_head.weight"]  # the embedding's
    named = canonical_names(theirs, FAMILIES["vaultgemma"].stored_names)
    assert {name: tuple(value.shape) for name, value in named.items()} == expected_shapes(config)


def test_sliding_window_is_that_of_the_config() -> None:
    config = parse_config({"model_type": "gemma3_text", "sliding_window": 512})
    assert [config.window(layer) for layer in (4, 5)] == [512, None]


def test_linear_scaling_divides_positions_of_full_layers_only() -> None:
    config = parse_config({"model_type": "gemma3_text", **copy.deepcopy(GEMMA3_27B)})
    assert [config.position_scale(layer) for layer in (4, 5)] == [1.0, 1 / 8]
    assert math.isclose(config.attention_scale, 168**-0.5)


def test_generation_config_adds_end_tokens() -> None:
    config = {"model_type": "gemma3_text", "eos_token_id": 1}
    assert parse_config(config, generation={"eos_token_id": [1, 106]}).eos_token_ids == (1, 106)


def test_end_tokens_beside_the_text_config_are_read() -> None:
    config = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {}}
    assert parse_config(config).eos_token_ids == (1, 106)


@pytest.mark.parametrize(
    ("model_type", "nearest"),
    [
        ("gemma5", "; the nearest is gemma"),
        ("vaultgemma2", "; the nearest is vaultgemma"),
        ("llama", ""),
        (None, ""),
    ],
)
def test_other_architectures_are_refused_by_name(model_type: str | None, nearest: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config({"model_type": model_type})
    assert str(caught.value).startswith(
        f"config.json: model_type {model_type!r} is not supported{nearest}"
    )
    assert "; supported are: gemma, gemma2, " in str(caught.value)


TANH = "gelu_pytorch_tanh"
YARN = {"rope_type": "yarn", "factor": 8.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3_text", {"rope_scaling": YARN}, "RoPE of type 'yarn' is not supported"),
    ("gemma3_text", {"rope_parameters": {"full_attention": YARN}}, "RoPE of type 'yarn'"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "the RoPE of sliding_attention is scaled by 2; only full_attention may be",
    ),
    (
        "gemma2",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "scaled by 2, which is not supported for gemma2",
    ),
    ("gemma3_text", {"attention_bias": True}, "attention_bias is True"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation is 'silu'; expected gelu_"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; expected gelu_"),
    ("gemma", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("gemma", {"quantization_config": {"bits": 4}}, "quantized already"),
    ("gemma", {"hidden_size": "640"}, "hidden_size is '640'; expected a positive integer"),
    ("gemma", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("gemma", {"head_dim": None}, "head_dim is None"),
    ("gemma", {"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    ("gemma", {"bos_token_id": "2"}, "bos_token_id is '2'; expected a token id"),
    ("gemma", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or f"),
    ("gemma4_text", {"enable_moe_block": 1}, "enable_moe_block is 1; expected true or false"),
    ("gemma", {"is_causal": False}, "is_causal is False; expected true"),
    ("gemma2", {"is_causal": None}, "is_causal is None; expected true"),
    ("gemma4_text", {"is_causal": False}, "is_causal is False; expected true"),
    ("gemma", {"hidden_activation": TANH, "hidden_act": "silu"}, "hidden_act is 'silu'"),
    ("gemma2", {"rope_parameters": NEW_ROPE}, "rope_parameters is {'full_attention"),
    ("gemma3_text", {"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config is {'1'"),
    ("gemma4_text", {"rope_scaling": YARN}, "rope_scaling is {'rope_type': 'yarn'"),
    ("gemma4_text", {"rope_parameters": {"rope_theta": 1e4}}, "an object with rope_theta under"),
    ("gemma4_text", {"rope_parameters": {"full_attention": {}}}, "with rope_theta under full"),
    (
        "gemma",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "RoPE of type default: partial_rotary_factor is 0.5; expected 1",
    ),
    ("gemma3", {"quantization_config": {"bits": 4}, "text_config": {}}, "quantized already"),
    (
        "gemma3",
        {"text_config": {"model_type": "gemma4_text"}},
        "text_config: model_type is 'gemma4_text'; expected one of gemma3_text, gemma3",
    ),
    ("gemma", {"eos_token_id": ["1"]}, "eos_token_id is ['1']"),
    ("gemma", {"num_key_value_heads": 3}, "16 attention heads do not divide by 3"),
    ("gemma", {"head_dim": 33}, "head_dim is 33; RoPE needs an even number"),
    ("gemma2", {"layer_types": ["full_attention"]}, "1 entries for 26 layers"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 26}, "expected a list of sliding_attention"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window is None"),
    ("gemma3", {"text_config": [1]}, "text_config is [1]; expected an object"),
]


@pytest.mark.parametrize(("model_type", "keys", "message"), REFUSED)
def test_unsupported_or_broken_values_are_refused(
    model_type: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config({"model_type": model_type, **keys})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
