"""The gradient of a layer against autograd through the layers of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import layer_tensor
from uq.kernels.products import rms_norm
from uq.kernels.reference import embed, layer_forward
from uq.kernels.weights import CheckpointWeights
from uq.quantize.backward import layer_backward, rms_norm_backward

Array = NDArray[np.float32]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_gradients_of_transformers(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    """At every linear's output, behind a window that hides some keys."""
    folder = tiny_checkpoint(family=family, dtype="f32", window=6)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 512, (2, 20)).astype(np.int32)
    upstream = rng.standard_normal((2, 20, 128)).astype(np.float32)
    ours, theirs = gradients(folder, tokens, upstream), torch_gradients(folder, tokens, upstream)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = np.abs(ours[name] - expected).max() / np.abs(expected).max()
        assert error < 2e-4, name


def gradients(folder: Path, tokens: NDArray[np.int32], upstream: Array) -> dict[str, Array]:
    """Gradient at every linear's output of the sum of `upstream` times the final states."""
    checkpoint = open_checkpoint(folder)
    config, weights = checkpoint.config, CheckpointWeights(checkpoint, resident=False)
    states = [embed(config, weights.embedding(tokens))]
    for layer in range(config.num_layers):
        states.append(layer_forward(config, layer, weights.layer(layer), states[-1]))
    gain = checkpoint.final_norm()
    slope = rms_norm_backward(states[-1], gain, config.rms_norm_eps, upstream)
    found = {}
    for layer in reversed(range(config.num_layers)):

        def visit(role: str, out: Array, at_out: Array, layer: int = layer) -> None:
            found[layer_tensor(layer, role)] = at_out.reshape(*tokens.shape, -1)
            assert out.shape == at_out.shape

        slope = layer_backward(config, layer, weights.layer(layer), states[layer], slope, visit)
    return found


def torch_gradients(folder: Path, tokens: NDArray[np.int32], upstream: Array) -> dict[str, Array]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    found: dict[str, Array] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: object, at_in: object, at_out: Any) -> None:
            found[name] = at_out[0].numpy()

        return hook

    for name, module in model.model.named_modules():
        if name.endswith("_proj"):
            module.register_full_backward_hook(keep(f"model.{name}.weight"))
    states = model.model(torch.from_numpy(tokens.astype(np.int64))).last_hidden_state
    (states * torch.from_numpy(upstream)).sum().backward()
    return found


def test_norm_of_a_row_of_zeros_has_a_finite_gradient() -> None:
    """Its limit: gain over the root of epsilon."""
    slope = np.ones((1, 8), np.float32)
    found = rms_norm_backward(np.zeros((1, 8), np.float32), 2 * slope[0], 1e-6, slope)
    assert np.allclose(found, 2 / math.sqrt(1e-6), rtol=1e-6)
    assert not rms_norm(np.zeros((1, 8), np.float32), slope[0], 1e-6).any()
