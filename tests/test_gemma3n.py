"""Gemma 3n against transformers: configurations, names, and the float32 forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gemma3n import (
    FULL,
    OTHER,
    PLAIN,
    SLIDING,
    transformers_config,
    transformers_logits,
    transformers_model,
)
from tests.test_reference import LENGTH, all_logits, random_tokens
from uq.errors import CheckpointError
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.checkpoint import expected_shapes
from uq.formats.checkpoint.hf_config import parse_config
from uq.formats.config import GemmaConfig
from uq.kernels.laurel import keep_largest
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Sampling

E4B = {
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    "intermediate_size": [16384] * 35,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
}
E2B = {
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
    "intermediate_size": [8192] * 30,
    "num_hidden_layers": 30,
    "num_kv_shared_layers": 10,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 6,
}
CONFIGS = [{}, E4B, E2B, PLAIN, OTHER, {"num_hidden_layers": 10, "num_kv_shared_layers": 5}]


def facts(config: GemmaConfig) -> dict[str, Any]:
    layers, altup = range(config.num_layers), config.altup
    assert altup is not None and config.per_layer is not None
    return {
        "sizes": (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads),
        "heads": (config.num_kv_heads, config.head_dim),
        "mlp": [config.layer_intermediate_size(i) for i in layers],
        "sparsity": [config.sparsity(i) for i in layers],
        "windows": [config.window(i) for i in layers],
        "theta": [config.theta(i) for i in layers],
        "shared": [config.kv_source(i) != i for i in layers],
        "softcap": config.final_softcap,
        "positions": config.max_position_embeddings,
        "per_layer": (config.per_layer.vocab_size, config.per_layer.size),
        "altup": (altup.streams, altup.active, altup.scaled),
        "laurel": config.laurel_rank,
        "tied": config.tied_head,
    }


def oracle(keys: dict[str, Any]) -> dict[str, Any]:
    """The same of the configuration class of transformers."""
    config = transformers_config(keys)
    types = config.layer_types
    return {
        "sizes": (config.vocab_size, config.hidden_size, len(types), config.num_attention_heads),
        "heads": (config.num_key_value_heads, config.head_dim),
        "mlp": list(config.intermediate_size),
        "sparsity": list(config.activation_sparsity_pattern),
        "windows": [config.sliding_window if kind == SLIDING else None for kind in types],
        "theta": [config.rope_parameters[kind]["rope_theta"] for kind in types],
        "shared": [mode == "reuse" for mode in config.kv_sharing_modes],
        "softcap": config.final_logit_softcapping,
        "positions": config.max_position_embeddings,
        "per_layer": (config.vocab_size_per_layer_input, config.hidden_size_per_layer_input),
        "altup": (config.altup_num_inputs, config.altup_active_idx, config.altup_correct_scale),
        "laurel": config.laurel_rank,
        "tied": config.tie_word_embeddings,
    }


@pytest.mark.parametrize("keys", CONFIGS)
def test_sparse_config_resolves_as_in_transformers(keys: dict[str, Any]) -> None:
    found = {"model_type": "gemma3n_text", **copy.deepcopy(keys)}
    assert facts(parse_config(found)) == oracle(found)


@pytest.mark.parametrize("keys", [E2B, PLAIN])
def test_config_saved_by_transformers_reads_back_the_same(keys: dict[str, Any]) -> None:
    found = {"model_type": "gemma3n_text", **copy.deepcopy(keys)}
    assert parse_config(transformers_config(found).to_dict()) == parse_config(found)


@pytest.mark.parametrize("keys", [E2B, E4B])
def test_names_and_shapes_of_the_published_sizes(keys: dict[str, Any]) -> None:
    found = {"model_type": "gemma3n_text", **copy.deepcopy(keys)}
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
        ({"altup_active_idx": 4}, "altup_active_idx is 4; expected one of the 4 streams"),
        ({"altup_num_inputs": 1000}, "altup_num_inputs is 1000; expected a positive integer, at m"),
        ({"intermediate_size": [64, 0]}, "intermediate_size is .*; expected a positive integer or"),
        ({"intermediate_size": [64] * 3}, "intermediate_size has 3 entries for 35 layers"),
        ({"activation_sparsity_pattern": [1.0] * 35}, "each at least 0 and below 1"),
        ({"activation_sparsity_pattern": 0.95}, "expected a list of shares"),
        ({"activation_sparsity_pattern": [0.5]}, "has 1 entries for 35 layers"),
        ({"num_kv_shared_layers": 34}, "num_kv_shared_layers is 34, which leaves no layer"),
        ({"laurel_rank": 0}, "laurel_rank is 0; expected a positive integer"),
    ],
)
def test_what_cannot_be_run_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config({"model_type": "gemma3n_text", **keys})


@pytest.mark.parametrize("variant", ["plain", "other"])
def test_logits_of_transformers(tiny_gemma3n: Callable[..., Path], variant: str) -> None:
    folder = tiny_gemma3n(variant)
    session = ReferenceSession(open_checkpoint(folder))
    tokens = random_tokens(session, 1, LENGTH)
    actual = all_logits(session, session.score(tokens))
    error = np.abs(actual - transformers_logits(folder)(tokens))
    assert error.max() <= 1e-4 * np.abs(actual).max()


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_gate_keeps_what_transformers_keeps(sparsity: float) -> None:
    model = transformers_model({**PLAIN, "num_hidden_layers": 5})
    mlp = model.model.layers[0].mlp
    mlp.activation_sparsity = sparsity
    gate = np.random.default_rng(0).normal(1, 3, (7, 640)).astype(np.float32)
    expected = mlp._gaussian_topk(torch.from_numpy(gate.copy())).numpy()
    keep_largest(gate, sparsity)
    np.testing.assert_allclose(gate, expected, atol=1e-5)
    assert (gate > 0).mean() == pytest.approx(1 - sparsity, abs=0.02)


def test_greedy_decoding_follows_scoring(tiny_gemma3n: Callable[..., Path]) -> None:
    """Each decoded token is the argmax behind the text so far; the prompt comes in two blocks."""
    session = ReferenceSession(open_checkpoint(tiny_gemma3n("plain", text={"sliding_window": 9})))
    prompt = random_tokens(session, 1, 20)[0].tolist()
    session.prefill(prompt[:13])
    session.prefill(prompt[13:])
    decoded = list(session.decode(30, Sampling()))
    scored = session.score(np.array([prompt + decoded], np.int32))
    assert all_logits(session, scored)[0, 19:-1].argmax(axis=-1).tolist() == decoded


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_both_multimodal_prefixes(tiny_gemma3n: Callable[..., Path], prefix: str) -> None:
    tower = {"model.vision_tower.timm_model.conv_stem.conv.weight": np.ones((4, 8), np.float32)}
    plain = open_checkpoint(tiny_gemma3n("plain"))
    nested = open_checkpoint(tiny_gemma3n("plain", kind="gemma3n", prefix=prefix, extra=tower))
    assert nested.config == plain.config
    assert set(nested.tensors) == set(plain.tensors)
    for role, weight in plain.layer(4).items():
        np.testing.assert_array_equal(nested.layer(4)[role], weight)


def test_unused_keys_and_values_of_shared_layers_are_skipped(
    tiny_gemma3n: Callable[..., Path],
) -> None:
    names = [f"model.layers.4.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    extra = {name: np.ones((64, 64), np.float32) for name in names}
    checkpoint = open_checkpoint(tiny_gemma3n("plain", extra=extra))
    assert not set(names) & set(checkpoint.tensors)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("altup_projections.1.weight", None, r"missing; expected shape \(64, 64\)"),
        ("layers.1.altup.prediction_coefs.weight", (4, 4), r"\(4, 4\), expected \(16, 4\)"),
        ("layers.0.altup.correct_output_scale", None, r"missing; expected shape \(64,\)"),
        ("layers.2.laurel.linear_left.weight", (9, 64), r"\(9, 64\), expected \(8, 64\)"),
    ],
)
def test_tensors_that_do_not_match_the_config(
    tiny_gemma3n: Callable[..., Path], name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    other = {f"model.{name}": None if shape is None else np.ones(shape, np.float32)}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tiny_gemma3n("plain", extra=other))
