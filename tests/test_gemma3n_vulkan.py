"""Gemma 3n on Vulkan against the CPU backend, which computes with the same codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.test_gemma4_vulkan import (
    GREEDY,
    LENGTH,
    assert_close_to_the_cpu,
    divergence,
    log_probabilities,
    on_vulkan,
)
from tests.vulkan_lab import give_matrices, no_messages  # noqa: F401
from uq.errors import DeviceError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.cpu import open_cpu
from uq.quantize.pipeline import QuantizeOptions, quantize


@pytest.mark.parametrize(("variant", "hidden"), [("plain", 128), ("other", 64)])
def test_a_model_answers_like_on_the_cpu(
    tiny_gemma3n: Callable[..., Path], tmp_path: Path, variant: str, hidden: int
) -> None:
    """Of every token of a text, in passes of many, and of greedy text behind it; hidden states that
    fill their tiles, and others."""
    text = {"sliding_window": 9, "hidden_size": hidden}
    checkpoint = open_checkpoint(tiny_gemma3n(variant, text=text))
    options = QuantizeOptions(recipe="int4", method="rtn")
    model = open_bundle(quantize(checkpoint, tmp_path / "bundle", options))
    vulkan = on_vulkan(model, tmp_path, max_context=LENGTH)
    cpu = open_cpu(model, max_context=LENGTH)
    tokens = np.random.default_rng(0).integers(0, 512, (1, LENGTH), dtype=np.int32)
    assert divergence(log_probabilities(cpu, tokens), log_probabilities(vulkan, tokens)) <= 1e-6
    for session in (vulkan, cpu):
        session.prefill(tokens[0, :-12].tolist())
    assert list(vulkan.decode(12, GREEDY)) == list(cpu.decode(12, GREEDY))
    vulkan.close()


def test_matrix_instructions_answer_like_the_cpu(
    tiny_gemma3n: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_matrices(monkeypatch)
    checkpoint = open_checkpoint(tiny_gemma3n("plain", text={"sliding_window": 9}))
    options = QuantizeOptions(recipe="int4", method="rtn")
    assert_close_to_the_cpu(
        open_bundle(quantize(checkpoint, tmp_path / "bundle", options)), tmp_path
    )


def test_more_streams_than_the_kernels_take(
    tiny_gemma3n: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_gemma3n("plain", text={"altup_num_inputs": 9}))
    options = QuantizeOptions(recipe="int4", method="rtn")
    model = open_bundle(quantize(checkpoint, tmp_path / "bundle", options))
    with pytest.raises(DeviceError, match="up to 8 residual streams, not 9; use --device cpu"):
        on_vulkan(model, tmp_path)
