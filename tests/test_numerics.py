"""Integers beside the weights: inputs of linears, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import GemmaConfig
from uq.kernels.attention import rope_tables
from uq.kernels.elementwise import rotate
from uq.kernels.experts import (
    DOWN,
    GATE_UP,
    expert_hidden,
    experts_input,
    experts_output,
    leave_experts,
    route,
)
from uq.kernels.kv_format import KVFormat
from uq.kernels.numerics import KV, Int8Activations, Numerics
from uq.kernels.products import linear
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Sampling
from uq.kernels.weights import BundleWeights, CheckpointWeights

Array = NDArray[np.float32]
RNG = np.random.default_rng(0)
INT4 = KV["int4"]
PAGE = 64


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint())


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def relative(error: Array, of: Array) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(of))


def test_int8_activations_are_the_codes_of_q8_0() -> None:
    x = normal(7, 128) * np.float32(30)
    blocks = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    codes = blocks[:, 2:].view(np.int8)
    scale = np.abs(x.reshape(-1, 32)).max(axis=1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(Int8Activations().rounded(x), (codes * scale).reshape(x.shape))


def test_a_linear_of_rounded_inputs_sums_integer_products() -> None:
    x, codes = normal(5, 64), RNG.integers(-8, 8, (6, 64))
    scales = np.abs(normal(6, 2)).astype(np.float64)
    weight = (codes.reshape(6, 2, 32) * scales[:, :, None]).reshape(6, 64)
    groups = x.reshape(5, 2, 32)
    steps = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    integers = np.rint(groups / steps).astype(np.int64)
    dots = np.einsum("tgi,rgi->trg", integers, codes.reshape(6, 2, 32))
    expected = np.einsum("trg,tg,rg->tr", dots, steps[:, :, 0].astype(np.float64), scales)
    found = linear(Int8Activations().rounded(x), weight.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_zeros_stay_zero() -> None:
    zeros = np.zeros((1, 3, 1, 64), np.float32)
    assert not Int8Activations().rounded(zeros).any()
    assert not KVFormat(4, rotated=True).values(zeros).any()


@pytest.mark.parametrize(("kv", "bound"), [(KVFormat(8), 0.007), (KVFormat(4), 0.1)])
def test_values_keep_their_size(kv: KVFormat, bound: float) -> None:
    v = normal(2, 50, 2, 64)
    assert bound / 4 < relative(kv.values(v) - v, v) < bound


def norms(k_gain: Array) -> dict[str, Array]:
    return {"self_attn.k_norm": k_gain, "self_attn.q_norm": np.ones_like(k_gain)}


def turned(config: GemmaConfig, layer: int, k: Array) -> Array:
    """Keys behind RoPE from position 0 on."""
    out = k.copy()
    rotate(out, *rope_tables(config, layer, 0, k.shape[1]))
    return out


@pytest.mark.parametrize("layer", [0, 1])
def test_keys_that_only_turn_are_predicted_by_the_page_before(
    checkpoint: Checkpoint, layer: int
) -> None:
    """A mean over a page shrinks what turns within it, so the slow channels are asked only."""
    config = checkpoint.config
    same = np.zeros((1, 3 * PAGE, 1, 32), np.float32)
    same[..., 15] = 20.0
    k = turned(config, layer, same)
    assert INT4 is not None
    stored = INT4.keys(config, layer, norms(np.ones(32, np.float32)), k)
    plain = replace(INT4, page=None).keys(config, layer, norms(np.ones(32, np.float32)), k)
    behind = slice(PAGE, None)
    ours, theirs = (relative((x - k)[:, behind], k[:, behind]) for x in (stored, plain))
    assert ours < 0.01 < theirs


def test_large_channels_of_the_keys_do_not_drown_the_others(checkpoint: Checkpoint) -> None:
    gain = np.ones(32, np.float32)
    gain[[3, 19]] = 30.0
    k = turned(checkpoint.config, 0, normal(1, 100, 2, 32) * gain)
    small = np.flatnonzero(gain == 1)
    errors = [
        relative((kv.keys(checkpoint.config, 0, norms(gain), k) - k)[..., small], k[..., small])
        for kv in (KVFormat(4), KVFormat(4, balanced=True))
    ]
    assert errors[1] < errors[0] / 2


def test_keys_do_not_depend_on_later_ones(checkpoint: Checkpoint) -> None:
    k = normal(2, 3 * PAGE + 5, 2, 32)
    assert INT4 is not None
    weights = norms(1 + np.abs(normal(32)))
    whole = INT4.keys(checkpoint.config, 0, weights, k)
    for count in (1, PAGE, PAGE + 1, 2 * PAGE + 30):
        part = INT4.keys(checkpoint.config, 0, weights, k[:, :count])
        np.testing.assert_allclose(part, whole[:, :count], atol=1e-5)


def test_the_first_page_of_keys_has_eight_bits(checkpoint: Checkpoint) -> None:
    k = normal(1, 2 * PAGE, 2, 32)
    assert INT4 is not None
    stored = INT4.keys(checkpoint.config, 0, norms(np.ones(32, np.float32)), k)
    eight = KVFormat(8).keys(checkpoint.config, 0, {}, k)
    np.testing.assert_array_equal(stored[:, :PAGE], eight[:, :PAGE])
    assert (stored[:, PAGE:] != eight[:, PAGE:]).any()


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_decoding_follows_scoring(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    weights = open_checkpoint(tiny_checkpoint(family=family, spread=8.0))
    session = ReferenceSession(weights, numerics=Numerics(Int8Activations(), INT4))
    prompt = RNG.integers(6, 512, 2 * PAGE - 10).tolist()
    session.prefill(prompt[:50])
    session.prefill(prompt[50:])
    decoded = list(session.decode(30, Sampling()))
    scored = session.score(np.array([prompt + decoded], np.int32))[0, len(prompt) - 1 : -1]
    assert session.logits(scored, 0, 512).argmax(axis=1).tolist() == decoded


def test_every_part_changes_the_hidden_states_a_little(checkpoint: Checkpoint) -> None:
    tokens = RNG.integers(6, 512, (1, 2 * PAGE)).astype(np.int32)
    exact = ReferenceSession(checkpoint).score(tokens)
    for numerics in (
        Numerics(Int8Activations()), Numerics(kv=KV["int8"]), Numerics(kv=KV["int4"])
    ):  # fmt: skip
        found = ReferenceSession(checkpoint, numerics=numerics).score(tokens)
        assert 1e-4 < relative(found - exact, exact) < 0.1


def test_the_head_is_left_out_on_demand(checkpoint: Checkpoint) -> None:
    hidden = normal(3, 128)
    sessions = (
        ReferenceSession(checkpoint, numerics=Numerics(Int8Activations(head=head)))
        for head in (False, True)
    )
    without, with_head = (session.logits(hidden, 0, 512) for session in sessions)
    np.testing.assert_array_equal(without, ReferenceSession(checkpoint).logits(hidden, 0, 512))
    assert 1e-4 < relative(with_head - without, without) < 0.02


def test_shapes_that_a_group_does_not_divide_are_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    odd = open_checkpoint(tiny_checkpoint(head_dim=24, hidden=128, heads=4))
    with pytest.raises(UsageError, match="head_dim 24 does not divide by 32"):
        ReferenceSession(odd, numerics=Numerics(kv=KV["int8"]))
    with pytest.raises(UsageError, match="intermediate_size 100 does not divide by 32"):
        wide = open_checkpoint(tiny_checkpoint(ffn=100))
        ReferenceSession(wide, numerics=Numerics(Int8Activations()))


def test_experts_that_a_group_does_not_divide_are_refused(tiny_gemma4: Callable[..., Path]) -> None:
    odd = open_checkpoint(tiny_gemma4("experts", text={"moe_intermediate_size": 48}))
    with pytest.raises(UsageError, match="moe_intermediate_size 48 does not divide by 32"):
        ReferenceSession(odd, numerics=Numerics(Int8Activations()))


def test_the_inputs_of_experts_are_rounded_and_the_routers_are_not(
    tiny_gemma4: Callable[..., Path],
) -> None:
    """Against a loop over tokens and their experts, in float64."""
    checkpoint = open_checkpoint(tiny_gemma4("experts"))
    weights, config = CheckpointWeights(checkpoint, resident=True).layer(0), checkpoint.config
    rounded = Int8Activations().rounded
    hidden = normal(1, 7, config.hidden_size)
    found = experts_output(config, weights, hidden, Numerics(Int8Activations()))
    x = rounded(experts_input(config, weights, hidden))
    assert config.experts
    expected = np.zeros(x.shape)
    chosen = zip(*route(config, config.experts, weights, hidden), strict=True)
    for token, (own, shares) in enumerate(chosen):
        for expert, share in zip(own, shares, strict=True):
            y = rounded(expert_hidden(weights[f"{GATE_UP}.{expert}"], x[token : token + 1]))
            expected[token] += share * (weights[f"{DOWN}.{expert}"].astype(np.float64) @ y[0])
    normed = leave_experts(config, weights, expected.astype(np.float32))
    np.testing.assert_allclose(found[0], normed, rtol=1e-4, atol=1e-5)
    assert relative(found - experts_output(config, weights, hidden), found) > 1e-3


def test_a_bundle_runs_as_the_checkpoint_of_its_dequantized_weights(
    tiny_bundle: Callable[..., Path],
) -> None:
    bundle = open_bundle(tiny_bundle(tied=False))
    weights = BundleWeights(bundle)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(weights.layer(1)["mlp.up_proj"], bundle.quant(name).dequantize())
    head = bundle.quant("lm_head.weight").dequantize()
    np.testing.assert_array_equal(weights.head(100, 300), head[100:300])
    table = bundle.quant("model.embed_tokens.weight").dequantize()
    np.testing.assert_array_equal(weights.embedding(7, 9), table[7:9])
