"""Queries, keys and values in front of NPU attention: what their frame changes and loses."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_npu_attention import gemma_like, nrmse
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import GemmaConfig
from uq.kernels.attention import attend as attention_of_model
from uq.kernels.npu.kernels.attention import attend, codes
from uq.kernels.npu.kernels.attention.attend import Inputs
from uq.kernels.npu.kernels.attention.frame import Frame
from uq.kernels.npu.kernels.attention.plan import plan
from uq.kernels.npu.kernels.attention.twin import softmax_attention
from uq.kernels.npu.kernels.attention.variant import Variant
from uq.kernels.reference import ReferenceSession

Array = NDArray[np.float32]
EXAMPLE = plan(Variant("npu1", 128, 8), 4, 2, 60)


@pytest.mark.parametrize("first", [1, 2, 60])
def test_a_frame_changes_no_attention(first: int) -> None:
    """Not rounded, queries and keys in the frame of the first tokens have the same softmax."""
    q, k, v = gemma_like(0, EXAMPLE)
    frame = Frame.of(q[:first], k[:first])
    turned = codes.rotate(q / frame.balance.repeat(2, axis=0))
    keys = codes.rotate((k - frame.center) * frame.balance)
    ours = softmax_attention(turned, keys, v, factor=0.1)
    np.testing.assert_allclose(ours, softmax_attention(q, k, v, factor=0.1), atol=1e-5)


def test_keys_of_capped_scores_keep_their_mean() -> None:
    q, k, _ = gemma_like(0, EXAMPLE)
    assert not Frame.of(q, k, capped=True).center.any()
    assert Frame.of(q, k).center.any()


def test_channels_that_are_always_zero_stay_zero() -> None:
    """Some channels of the 270M have no gain."""
    q, k, _ = gemma_like(0, EXAMPLE)
    for x in (q, k):
        x[..., [5, 69]] = 0
    frame = Frame.of(q, k)
    assert all(np.isfinite(x).all() for x in (frame.balance, frame.triangles))
    assert nrmse(frame.floats(*frame.keys(k, 8)), k) < 0.02
    silent = Frame.of(0 * q, 0 * k)
    np.testing.assert_array_equal(silent.floats(*silent.keys(0 * k, 8)), 0 * k)


def test_limbs_are_the_code() -> None:
    given = np.arange(-127 * 256, 127 * 256 + 1, dtype=np.int16)
    high, low = codes.limbs(given)
    np.testing.assert_array_equal(256 * high.astype(int) + low, given)


@pytest.mark.parametrize(("bits", "bound"), [(16, 1e-4), (8, 0.009), (4, 0.12)])
def test_codes_are_close(bits: int, bound: float) -> None:
    """Of normal numbers, rows of 256."""
    x = np.random.default_rng(0).normal(size=(50, 256)).astype(np.float32)
    made, scale = codes.quantize(x, bits)
    assert nrmse(made * scale[:, None], x) < bound
    low, high = codes.RANGE[bits]
    assert made.min() >= low and made.max() <= high


@pytest.mark.parametrize("bits", [8, 4])
def test_feedback_lowers_the_error_that_queries_see(bits: int) -> None:
    rng = np.random.default_rng(1)
    q = rng.normal(size=(400, 8)) @ rng.normal(size=(8, 64)) + 0.3 * rng.normal(size=(400, 64))
    upper = np.linalg.cholesky(q.T @ q).T
    triangle = (upper / np.diag(upper)[:, None]).astype(np.float32)
    x = rng.normal(size=(100, 64)).astype(np.float32)
    plain, scale = codes.round_with_feedback(x, bits, np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(plain, codes.quantize(x, bits)[0])
    fed, same = codes.round_with_feedback(x, bits, triangle)
    np.testing.assert_array_equal(scale, same)
    errors = [np.linalg.norm((c * scale[:, None] - x) @ q.T) for c in (plain, fed)]
    assert errors[1] < 0.6 * errors[0]


class Enough(Exception):
    """The layers that are looked at have been computed."""


@pytest.mark.real
def test_attention_of_layers_of_the_real_model(real_gguf: Path) -> None:
    """By the twin: the INT8 path is within 1 % of float64 softmax on the model's own floats.

    Nine layers, a full one and the two with the largest errors among them.
    """
    seen: list[tuple[Array, ...]] = []

    def spy(config: GemmaConfig, layer: int, *qkv: Array) -> Array:
        seen.append(tuple(x[0].copy() for x in qkv))
        if layer == 8:
            raise Enough
        return attention_of_model(config, layer, *qkv)

    checkpoint = open_checkpoint(real_gguf)
    sample = Path(__file__).parents[1] / "benchmarks/texts/english.txt"
    ids = checkpoint.tokenizer().encode(sample.read_text(encoding="utf-8")[:2000])[:256]
    with mock.patch("uq.kernels.reference.attend", spy), pytest.raises(Enough):
        ReferenceSession(checkpoint).score(np.array([ids], np.int32))
    config = checkpoint.config
    factor = float(config.attention_scale)
    for layer, (q, k, v) in enumerate(seen):
        where = plan(Variant("npu2", config.head_dim, 8), q.shape[1], 1, len(q))
        inputs = Inputs.quantized(q, k, v, 8, factor)
        rows = attend.rows(where, inputs, attend.compute(where, inputs))
        assert nrmse(rows, softmax_attention(q, k, v, factor=factor)) < 0.01, layer
