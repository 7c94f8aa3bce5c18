"""Gemma 4 on Vulkan against the CPU backend, which computes with the same codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.gemma4 import rounded_models
from tests.vulkan_lab import give_matrices, no_messages  # noqa: F401
from uq.errors import DeviceError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.cpu import open_cpu
from uq.kernels.numerics import ACTIVATIONS, Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Piece, Sampling, Session
from uq.kernels.vulkan import autotune
from uq.kernels.vulkan.batch import VulkanBatch
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.engine import check_sizes
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.sources import BundleSource, CheckpointSource
from uq.kernels.vulkan.tuning import product_key
from uq.kernels.weights import BundleWeights
from uq.quantize.pipeline import QuantizeOptions, quantize

GREEDY = Sampling()
LENGTH = 48  # of texts and contexts: passes and steps of all tests share their kernels
LARGE_HEADS = {"global_head_dim": 512, "num_hidden_layers": 1, "num_attention_heads": 3}
LARGE_HEADS |= {"num_key_value_heads": 3}
OTHER_HEADS = {"sliding_window": 9, "num_key_value_heads": 2}  # than the full layers
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads of 512": ("large", LARGE_HEADS),
    "all": ("all", OTHER_HEADS),
}


@pytest.fixture(scope="module")
def bundle(
    tiny_gemma4: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    return rounded_models(tiny_gemma4, tmp_path_factory.mktemp("gemma4-vulkan"), MODELS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def on_vulkan(bundle: Bundle, cache: Path, **options: Any) -> VulkanSession:
    source = BundleSource(bundle)
    return VulkanSession(bundle.config, source, choose(), pipeline_cache=cache, **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_like_on_the_cpu(
    bundle: Callable[[str], Bundle], cache: Path, name: str
) -> None:
    """Of every token of a text, in passes of many, and of greedy text behind it."""
    model = bundle(name)
    vulkan, cpu = on_vulkan(model, cache, max_context=LENGTH), open_cpu(model, max_context=LENGTH)
    tokens = np.random.default_rng(0).integers(0, 512, (1, LENGTH), dtype=np.int32)
    assert divergence(log_probabilities(cpu, tokens), log_probabilities(vulkan, tokens)) <= 1e-6
    for session in (vulkan, cpu):
        session.prefill(tokens[0, :-12].tolist())
    error = np.abs(vulkan.next_logits - cpu.next_logits).max()
    assert error <= 2e-3 * np.abs(cpu.next_logits).max()
    assert list(vulkan.decode(12, GREEDY)) == list(cpu.decode(12, GREEDY))
    vulkan.close()


def test_tokens_one_by_one(bundle: Callable[[str], Bundle], cache: Path) -> None:
    """What a pass of many and steps of one make of a text, up to rounding."""
    session = on_vulkan(bundle("all"), cache, max_context=LENGTH)
    tokens = np.arange(2, 2 + LENGTH, dtype=np.int32)[None] * 7 % 512
    together = session.logits(session.score(tokens)[0], 0, 512)
    for token, expected in zip(tokens[0].tolist(), together, strict=True):
        session.prefill([token])
        assert np.abs(session.next_logits - expected).max() <= 3e-3 * np.abs(expected).max()
    session.close()


def test_sequences_together(bundle: Callable[[str], Bundle], cache: Path) -> None:
    """Each has experts, keys and per-layer inputs of its own."""
    model, texts = bundle("all"), ([2, 40, 41, 77, 300], [9, 100, 511])
    batch = VulkanBatch(
        model.config,
        BundleSource(model),
        choose(),
        slots=2,
        pipeline_cache=cache,
        max_context=LENGTH,
    )
    batch.extend([Piece(slot, text[:-1]) for slot, text in enumerate(texts)])
    pieces = [Piece(slot, text[-1:]) for slot, text in enumerate(texts)]
    written = batch.write(pieces, 8, GREEDY).tolist()
    cpu = open_cpu(model, max_context=LENGTH)
    for text, found in zip(texts, written, strict=True):
        cpu.reset()
        cpu.prefill(text)
        assert list(cpu.decode(8, GREEDY)) == found
    batch.close()


def test_every_product_is_tuned_once(bundle: Callable[[str], Bundle], cache: Path) -> None:
    """Of both kinds of layers, of the experts and of the per-layer embedding."""
    session = on_vulkan(bundle("all"), cache, max_context=LENGTH)
    products = autotune._products(session._engine._stages)
    keys = [product_key(*product) for product in products]
    assert len(keys) == len(set(keys)) == 13
    session.close()


@pytest.mark.parametrize("matrices", [False, True])
def test_int8_activations_of_experts_are_those_of_the_emulation(
    tiny_gemma4: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    matrices: bool,
) -> None:
    """In a pass of many tokens, and in steps of one. Attention says nothing here: what a device
    rounds otherwise there would turn codes over; so do float16 products of matrix instructions."""
    if matrices:
        give_matrices(monkeypatch)
    silent = {"model.layers.0.self_attn.o_proj.weight": np.zeros((64, 256), np.float32)}
    text = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "moe_intermediate_size": 96}
    checkpoint = open_checkpoint(tiny_gemma4("experts", text=text, extra=silent))
    options = QuantizeOptions(method="rtn", group=32)
    model = open_bundle(quantize(checkpoint, tmp_path / "bundle", options))
    numerics, weights = Numerics(ACTIVATIONS["int8"]), BundleWeights(model)
    tokens = np.random.default_rng(0).integers(0, 512, (1, LENGTH), dtype=np.int32)
    emulation = ReferenceSession(weights, numerics=numerics)
    emulated = emulation.score(tokens)[0]
    exact = ReferenceSession(weights).score(tokens)[0]
    session = on_vulkan(model, tmp_path, max_context=LENGTH, numerics=numerics)
    together, expected = session.score(tokens)[0], emulation.logits(emulated, 0, 512)
    loss = np.abs(emulated - exact).max()
    most = 0.5 if matrices or choose().has_matrix_blocks else 1e-3
    assert loss > 0.02 and np.abs(together - emulated).max() <= most * loss
    for token, logits in zip(tokens[0, :8].tolist(), expected, strict=False):
        session.prefill([token])
        np.testing.assert_allclose(session.next_logits, logits, atol=1e-4)
    session.close()


def test_heads_that_the_kernels_do_not_take(bundle: Callable[[str], Bundle]) -> None:
    model = bundle("all")
    assert model.config.full
    large = replace(model.config, full=replace(model.config.full, head_dim=520))
    with pytest.raises(DeviceError, match="heads of up to 512 channels, not 520; use --device cpu"):
        check_sizes(large)


def test_a_checkpoint_in_floating_point(tiny_gemma4: Callable[..., Path], cache: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4("all"))
    source, config = CheckpointSource(checkpoint, "f32"), checkpoint.config
    session = VulkanSession(config, source, choose(), pipeline_cache=cache, max_context=LENGTH)
    tokens = np.arange(2, 2 + LENGTH, dtype=np.int32)[None] * 7 % 512
    actual, expected = session.score(tokens), ReferenceSession(checkpoint).score(tokens)
    assert np.linalg.norm(actual - expected) <= 1e-3 * np.linalg.norm(expected)
    session.close()


@pytest.mark.parametrize("name", MODELS)
def test_matrix_instructions_answer_like_the_cpu(
    bundle: Callable[[str], Bundle], cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    give_matrices(monkeypatch)
    assert_close_to_the_cpu(bundle(name), cache)


def assert_close_to_the_cpu(model: Bundle, cache: Path) -> None:
    """Behind a prompt, up to what weights and activations of float16 lose."""
    vulkan, cpu = on_vulkan(model, cache, max_context=LENGTH), open_cpu(model, max_context=LENGTH)
    for session in (vulkan, cpu):
        session.prefill((np.arange(LENGTH) * 7 % 512).tolist())
    error = np.abs(vulkan.next_logits - cpu.next_logits).max()
    assert 0 < error <= 2e-2 * np.abs(cpu.next_logits).max()
    vulkan.close()


def log_probabilities(session: Session, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """(tokens, vocab) behind each token of one sequence."""
    logits = session.logits(session.score(tokens)[0], 0, 512).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def divergence(truth: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean KL divergence in nats."""
    return float((np.exp(truth) * (truth - other)).sum(axis=-1).mean())
