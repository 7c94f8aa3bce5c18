"""Gemma 4 against transformers: configurations, names, and the float32 forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gemma4 import ALL, transformers_config, transformers_logits, transformers_model
from tests.test_reference import LENGTH, all_logits, random_tokens
from uq.errors import CheckpointError
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.checkpoint import expected_shapes
from uq.formats.checkpoint.hf_config import parse_config
from uq.formats.config import GemmaConfig
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Sampling

SLIDING, FULL = "sliding_attention", "full_attention"
E2B = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
    "final_logit_softcapping": 30.0,
}
E4B = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 42,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
    "final_logit_softcapping": 30.0,
}
DENSE = {
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
    "final_logit_softcapping": 30.0,
}
A4B = DENSE | {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
UNIFIED = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
OTHER_ROPE = {
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 2e6},
        SLIDING: {"rope_type": "default", "rope_theta": 2e4},
    }
}
CONFIGS = [
    ("gemma4_text", {}),
    ("gemma4_text", E2B),
    ("gemma4_text", E4B),
    ("gemma4_text", DENSE),
    ("gemma4_text", A4B),
    ("gemma4_text", ALL),
    ("gemma4_text", OTHER_ROPE | {"global_head_dim": 128}),
    ("gemma4_unified_text", {}),
    ("gemma4_unified_text", UNIFIED),
]


def facts(config: GemmaConfig) -> dict[str, Any]:
    layers = range(config.num_layers)
    return {
        "sizes": (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads),
        "heads": [(config.layer_kv_heads(i), config.layer_head_dim(i)) for i in layers],
        "mlp": [config.layer_intermediate_size(i) for i in layers],
        "windows": [config.window(i) for i in layers],
        "theta": [config.theta(i) for i in layers],
        "shared": [config.kv_source(i) != i for i in layers],
        "k_eq_v": config.key_is_value(config.num_layers - 1),
        "softcap": config.final_softcap,
        "positions": config.max_position_embeddings,
        "per_layer": config.per_layer and (config.per_layer.vocab_size, config.per_layer.size),
        "experts": config.experts
        and (config.experts.count, config.experts.active, config.experts.intermediate_size),
    }


def oracle(keys: dict[str, Any]) -> dict[str, Any]:
    """The same of the configuration class of transformers."""
    config = transformers_config(keys)
    types, wide = config.layer_types, config.use_double_wide_mlp
    shared = [mode == "reuse" for mode in config.kv_sharing_modes]
    size = getattr(config, "hidden_size_per_layer_input", 0)
    own = [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]
    experts = (config.num_experts, config.top_k_experts, config.moe_intermediate_size) if getattr(
        config, "enable_moe_block", False
    ) else None  # fmt: skip
    return {
        "sizes": (config.vocab_size, config.hidden_size, len(types), config.num_attention_heads),
        "heads": [(layer.num_key_value_heads, layer.head_dim) for layer in own],
        "mlp": [config.intermediate_size * (2 if wide and reads else 1) for reads in shared],
        "windows": [config.sliding_window if kind == SLIDING else None for kind in types],
        "theta": [config.rope_parameters[kind]["rope_theta"] for kind in types],
        "shared": shared,
        "k_eq_v": config.attention_k_eq_v,
        "softcap": config.final_logit_softcapping,
        "positions": config.max_position_embeddings,
        "per_layer": (config.vocab_size_per_layer_input, size) if size else None,
        "experts": experts,
    }


@pytest.mark.parametrize(("kind", "keys"), CONFIGS)
def test_sparse_config_resolves_as_in_transformers(kind: str, keys: dict[str, Any]) -> None:
    found = {"model_type": kind, **copy.deepcopy(keys)}
    assert facts(parse_config(found)) == oracle(found)


@pytest.mark.parametrize("keys", [E2B, A4B])
def test_config_saved_by_transformers_reads_back_the_same(keys: dict[str, Any]) -> None:
    found = {"model_type": "gemma4_text", **copy.deepcopy(keys)}
    assert parse_config(transformers_config(found).to_dict()) == parse_config(found)


def test_a_quarter_of_a_full_head_turns() -> None:
    config = parse_config({"model_type": "gemma4_text"})
    assert [config.rotary_pairs(layer) for layer in (0, 5)] == [128, 64]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("gemma4_text", E2B),
        ("gemma4_text", E4B),
        ("gemma4_text", DENSE),
        ("gemma4_text", A4B),
        ("gemma4_unified_text", UNIFIED),
    ],
)
def test_names_and_shapes_of_the_published_sizes(kind: str, keys: dict[str, Any]) -> None:
    found = {"model_type": kind, **copy.deepcopy(keys)}
    ours = {
        name.removesuffix(".weight"): shape
        for name, shape in expected_shapes(parse_config(found)).items()
    }
    with torch.device("meta"):
        theirs = transformers_model(found).state_dict()
    assert ours == {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in theirs.items()
        if name != "lm_head.weight"
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"num_kv_shared_layers": 29}, "num_kv_shared_layers is 29, which leaves no layer"),
        ({"enable_moe_block": True, "num_experts": 8}, "enable_moe_block needs top_k_experts"),
        (A4B | {"top_k_experts": 200}, "top_k_experts is 200; expected at most the 128 experts"),
        ({"per_layer_config": {"5": {"head_dim": 64}}}, "the same sizes for every full layer"),
        (
            {
                "rope_parameters": {
                    k: {"rope_type": "yarn", "rope_theta": 1e4} for k in (FULL, SLIDING)
                }
            },
            "RoPE of type 'yarn' is not supported",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config({"model_type": "gemma4_text", **keys})


@pytest.mark.parametrize("variant", ["small", "large", "experts", "all"])
def test_logits_of_transformers(tiny_gemma4: Callable[..., Path], variant: str) -> None:
    folder = tiny_gemma4(variant)
    session = ReferenceSession(open_checkpoint(folder))
    tokens = random_tokens(session, 1, LENGTH)
    actual = all_logits(session, session.score(tokens))
    error = np.abs(actual - transformers_logits(folder)(tokens))
    assert error.max() <= 1e-4 * np.abs(actual).max()


def test_unified_text_of_transformers(tiny_gemma4: Callable[..., Path]) -> None:
    folder = tiny_gemma4("large", kind="gemma4_unified_text")
    session = ReferenceSession(open_checkpoint(folder))
    tokens = random_tokens(session, 2, 100)
    actual = all_logits(session, session.score(tokens))
    error = np.abs(actual - transformers_logits(folder)(tokens))
    assert error.max() <= 1e-4 * np.abs(actual).max()


def test_greedy_decoding_follows_scoring(tiny_gemma4: Callable[..., Path]) -> None:
    """Each decoded token is the argmax behind the text so far; the prompt comes in two blocks."""
    session = ReferenceSession(open_checkpoint(tiny_gemma4("all", text={"sliding_window": 9})))
    prompt = random_tokens(session, 1, 20)[0].tolist()
    session.prefill(prompt[:13])
    session.prefill(prompt[13:])
    decoded = list(session.decode(30, Sampling()))
    scored = session.score(np.array([prompt + decoded], np.int32))
    assert all_logits(session, scored)[0, 19:-1].argmax(axis=-1).tolist() == decoded


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_both_multimodal_prefixes(tiny_gemma4: Callable[..., Path], prefix: str) -> None:
    tower = {"model.vision_tower.patch_embedder.weight": np.ones((4, 8), np.float32)}
    plain = open_checkpoint(tiny_gemma4("small"))
    nested = open_checkpoint(tiny_gemma4("small", kind="gemma4", prefix=prefix, extra=tower))
    assert nested.config == plain.config
    assert set(nested.tensors) == set(plain.tensors)
    for role, weight in plain.layer(4).items():
        np.testing.assert_array_equal(nested.layer(4)[role], weight)


def test_unused_keys_and_values_of_shared_layers_are_skipped(
    tiny_gemma4: Callable[..., Path],
) -> None:
    names = [f"model.layers.5.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    extra = {name: np.ones((32, 64), np.float32) for name in names}
    checkpoint = open_checkpoint(tiny_gemma4("small", extra=extra))
    assert not set(names) & set(checkpoint.tensors)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("experts.down_proj", (7, 64, 32), r"shape \(7, 64, 32\), expected \(8, 64, 32\)"),
        ("router.per_expert_scale", (7,), r"shape \(7,\), expected \(8,\)"),
        ("layer_scalar", None, r"layers.1.layer_scalar.*missing; expected shape \(1,\)"),
        ("experts.gate_up_proj", None, r"experts.gate_up_proj.*missing; expected shape \(8, 64, "),
    ],
)
def test_tensors_that_do_not_match_the_config(
    tiny_gemma4: Callable[..., Path], name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    stored = f"model.layers.1.{name}"
    other = {stored: None if shape is None else np.ones(shape, np.float32)}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tiny_gemma4("experts", extra=other))
