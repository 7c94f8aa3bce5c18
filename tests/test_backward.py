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
from uq.kernels.weights import CheckpointWeights
from uq.quantize import curvature
from uq.quantize.backward import LayerGradient, Slope
from uq.quantize.expert_backward import pass_back
from uq.quantize.paths import pass_layer
from uq.quantize.pullbacks import rms_norm_backward

Array = NDArray[np.float32]
FULL = "full_attention"


WINDOW = 6  # behind which some keys are hidden
SHAPE = (2, 20)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "vaultgemma"])
def test_gradients_of_transformers(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    """At every linear's output."""
    folder = tiny_checkpoint(family=family, dtype="f32", window=WINDOW)
    require_same(folder, plain_model(folder), 128)


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("small", {}),
        ("large", {}),
        ("experts", {}),
        ("all", {}),
        # Two layers of each kind read the keys of one that comes before.
        ("small", {"num_hidden_layers": 8, "layer_types": [*["sliding_attention"] * 3, FULL] * 2}),
    ],
)
def test_gradients_of_gemma4(
    tiny_gemma4: Callable[..., Path], variant: str, text: dict[str, Any]
) -> None:
    from tests.gemma4 import loaded_model

    folder = tiny_gemma4(variant, text={"sliding_window": WINDOW, **text})
    require_same(folder, loaded_model(folder), 64)


@pytest.mark.parametrize("variant", ["plain", "other"])
def test_gradients_of_gemma3n(tiny_gemma3n: Callable[..., Path], variant: str) -> None:
    from tests.gemma3n import loaded_model

    folder = tiny_gemma3n(variant, text={"sliding_window": WINDOW})
    require_same(folder, loaded_model(folder), 64)


def require_same(folder: Path, model: Any, hidden: int) -> None:
    """The gradients at the outputs of all linears are those of autograd."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 480, SHAPE).astype(np.int32)
    upstream = rng.standard_normal((*SHAPE, hidden)).astype(np.float32)
    ours, theirs = gradients(folder, tokens, upstream), torch_gradients(model, tokens, upstream)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = np.abs(ours[name] - expected).max() / np.abs(expected).max()
        assert error < 2e-4, name


def gradients(folder: Path, tokens: NDArray[np.int32], upstream: Array) -> dict[str, Array]:
    """Gradient at every linear's output of the sum of `upstream` times the final states."""
    checkpoint = open_checkpoint(folder)
    config, source = checkpoint.config, CheckpointWeights(checkpoint, resident=False)
    texts = [curvature._started(checkpoint, source, part) for part in np.split(tokens, 2)]
    streams = []
    for layer in range(config.num_layers):
        streams.append([text.stream for text in texts])
        pass_layer(config, layer, checkpoint.layer(layer), checkpoint, texts)
    slopes = [
        Slope(curvature._end(config, source, text.stream)[1](part))
        for text, part in zip(texts, np.split(upstream, 2), strict=True)
    ]
    found: dict[str, list[Array]] = {}
    for layer in reversed(range(config.num_layers)):

        def visit(role: str, out: Array, at_out: Array, layer: int = layer) -> None:
            assert out.shape == at_out.shape
            found.setdefault(layer_tensor(layer, role), []).append(at_out)

        weights = checkpoint.layer(layer)
        pairs = zip(texts, slopes, strict=True)
        layers = [LayerGradient(config, layer, weights, t.beside, s, visit) for t, s in pairs]
        pass_back(layers, checkpoint, streams[layer].__getitem__)
    assert not any(slope.shared for slope in slopes)
    return {name: np.reshape(parts, (*tokens.shape, -1)) for name, parts in found.items()}


def plain_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def torch_gradients(model: Any, tokens: NDArray[np.int32], upstream: Array) -> dict[str, Array]:
    import torch

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
