"""Gemma 4 on Vulkan against the CPU backend, which computes with the same codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.vulkan_lab import no_messages  # noqa: F401
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.cpu import open_cpu
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Sampling, Session
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.sources import BundleSource, CheckpointSource
from uq.quantize.pipeline import QuantizeOptions, quantize

GREEDY = Sampling()
TRUE_HEADS = {"head_dim": 256, "global_head_dim": 512, "num_hidden_layers": 2, "layer_types": None}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads of 256 and 512": ("large", TRUE_HEADS),
    "all": ("all", {"sliding_window": 9}),
}


@pytest.fixture(scope="module")
def bundle(
    tiny_gemma4: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """Models by name, rounded to the nearest INT4 codes."""
    root, made = tmp_path_factory.mktemp("gemma4-vulkan"), dict[str, Bundle]()
    options = QuantizeOptions(recipe="int4", method="rtn")

    def make(name: str) -> Bundle:
        if name not in made:
            variant, text = MODELS[name]
            checkpoint = open_checkpoint(tiny_gemma4(variant, text=text))
            made[name] = open_bundle(quantize(checkpoint, root / f"{len(made)}", options))
        return made[name]

    return make


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
    vulkan, cpu = on_vulkan(model, cache, max_context=100), open_cpu(model, max_context=100)
    tokens = np.random.default_rng(0).integers(0, 512, (1, 70), dtype=np.int32)
    assert divergence(log_probabilities(cpu, tokens), log_probabilities(vulkan, tokens)) <= 1e-6
    for session in (vulkan, cpu):
        session.prefill(tokens[0].tolist())
    error = np.abs(vulkan.next_logits - cpu.next_logits).max()
    assert error <= 2e-3 * np.abs(cpu.next_logits).max()
    assert list(vulkan.decode(20, GREEDY)) == list(cpu.decode(20, GREEDY))
    vulkan.close()


def test_tokens_one_by_one(bundle: Callable[[str], Bundle], cache: Path) -> None:
    """What a pass of many and steps of one make of a text, up to rounding."""
    session = on_vulkan(bundle("all"), cache, max_context=100)
    tokens = np.arange(2, 32, dtype=np.int32)[None] * 7 % 512
    together = session.logits(session.score(tokens)[0], 0, 512)
    for token, expected in zip(tokens[0].tolist(), together, strict=True):
        session.prefill([token])
        assert np.abs(session.next_logits - expected).max() <= 2e-3 * np.abs(expected).max()
    session.close()


def test_a_checkpoint_in_floating_point(tiny_gemma4: Callable[..., Path], cache: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4("all"))
    source, config = CheckpointSource(checkpoint, "f32"), checkpoint.config
    session = VulkanSession(config, source, choose(), pipeline_cache=cache, max_context=100)
    tokens = np.arange(2, 32, dtype=np.int32)[None] * 7 % 512
    actual, expected = session.score(tokens), ReferenceSession(checkpoint).score(tokens)
    assert np.linalg.norm(actual - expected) <= 1e-3 * np.linalg.norm(expected)
    session.close()


def log_probabilities(session: Session, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """(tokens, vocab) behind each token of one sequence."""
    logits = session.logits(session.score(tokens)[0], 0, 512).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def divergence(truth: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean KL divergence in nats."""
    return float((np.exp(truth) * (truth - other)).sum(axis=-1).mean())
