"""Moments as attention takes them, against sums over all pairs of positions in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import GemmaConfig
from uq.formats.journal import Journal
from uq.progress import SilentProgress
from uq.quantize.attended import KEYS, attended_statistics
from uq.quantize.gptq import Statistics
from uq.quantize.job import plan_of, prepared
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.plan import ATTENDED, RECIPES
from uq.quantize.record import identity_of

Array = NDArray[np.float32]
Exact = NDArray[np.float64]
LENGTH = 20


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    """The second layer has a window of 6 keys, or sees all; two heads share a key head."""
    folder = tiny_checkpoint(family=request.param, dtype="f32", window=6, pattern=2)
    return open_checkpoint(folder)


def paths(checkpoint: Checkpoint) -> tuple[Array, Array]:
    rng = np.random.default_rng(2)
    exact = rng.standard_normal((5, LENGTH, checkpoint.config.hidden_size))
    quantized = exact + 0.1 * rng.standard_normal(exact.shape)
    return quantized.astype(np.float32), exact.astype(np.float32)


def shared_statistics(quantized: Array, exact: Array) -> Statistics:
    x, e = (a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (quantized, exact))
    return Statistics(x.T @ x / len(x), (e - x).T @ x / len(x))


def attention(config: GemmaConfig, layer: int, weights: Any, x: Exact) -> Exact:
    """(heads, length, length) of one sequence, as the papers write it."""
    heads, dim, length = config.num_heads, config.head_dim, len(x)
    turned = {}
    for name in "qk":
        y = (x @ weights[f"self_attn.{name}_proj"].T.astype(np.float64)).reshape(length, -1, dim)
        if config.qk_norm:
            size = np.sqrt((y * y).mean(-1, keepdims=True) + config.rms_norm_eps)
            y = y / size * weights[f"self_attn.{name}_norm"].astype(np.float64)
        angle = np.outer(
            np.arange(length) * config.position_scale(layer),
            config.theta(layer) ** (-np.arange(dim // 2) / (dim // 2)),
        )[:, None]
        first, second = y[..., : dim // 2], y[..., dim // 2 :]
        turned[name] = np.concatenate(
            [
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ],
            -1,
        )
    found = np.zeros((heads, length, length))
    window, cap = config.window(layer) or length, config.attn_softcap
    for head in range(heads):
        key = head * config.num_kv_heads // heads
        for i in range(length):
            seen = range(max(0, i - window + 1), i + 1)
            scores = turned["k"][seen, key] @ turned["q"][i, head] * config.attention_scale
            if cap:
                scores = cap * np.tanh(scores / cap)
            share = np.exp(scores - scores.max())
            found[head, i, seen] = share / share.sum()
    return found


def twin(checkpoint: Checkpoint, layer: int, quantized: Array, exact: Array) -> tuple[Any, Any]:
    """Sums over pairs of second moments, of the inputs and of what they lack with the inputs."""
    n = checkpoint.config.hidden_size
    hessian, cross = np.zeros((n, n)), np.zeros((n, n))
    weights = checkpoint.layer(layer)
    for x, e in zip(quantized.astype(np.float64), exact.astype(np.float64), strict=True):
        for share in attention(checkpoint.config, layer, weights, e):
            for here in share:  # of one query
                off, lost = x - here @ x, (e - x) - here @ (e - x)
                hessian += (here[:, None] * off).T @ off
                cross += (here[:, None] * lost).T @ off
    return hessian, cross


@pytest.mark.parametrize("layer", [0, 1])
def test_moments_of_all_pairs(checkpoint: Checkpoint, layer: int) -> None:
    quantized, exact = paths(checkpoint)
    shared = shared_statistics(quantized, exact)
    weights = checkpoint.layer(layer)
    found = attended_statistics(
        checkpoint.config, layer, weights, [(quantized, exact)], shared, 0.75
    )
    hessian, cross = twin(checkpoint, layer, quantized[::2], exact[::2])
    unit = np.trace(shared.hessian) / np.trace(hessian)
    assert found.keys() == {KEYS}
    assert shared.cross is not None
    close(found[KEYS].hessian, 0.75 * unit * hessian + 0.25 * shared.hessian)
    close(found[KEYS].cross, 0.75 * unit * cross + 0.25 * shared.cross)
    np.testing.assert_array_equal(found[KEYS].hessian, found[KEYS].hessian.T)


def close(found: Any, wanted: Exact) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_batches_change_no_bit(checkpoint: Checkpoint) -> None:
    quantized, exact = paths(checkpoint)
    shared, weights = shared_statistics(quantized, exact), checkpoint.layer(0)

    def of(*ends: int) -> dict[str, Statistics]:
        batches = zip(np.split(quantized, ends), np.split(exact, ends), strict=True)
        return attended_statistics(checkpoint.config, 0, weights, batches, shared, 0.5)

    whole = of()
    for parts in (of(1, 2, 3, 4), of(3), of(2, 3)):
        for role, found in whole.items():
            np.testing.assert_array_equal(parts[role].hessian, found.hessian)
            np.testing.assert_array_equal(parts[role].cross, found.cross)


def test_keys_without_a_choice_have_no_moments_of_their_own(checkpoint: Checkpoint) -> None:
    """Of one key softmax makes 1, whatever its error."""
    quantized, exact = (x[:, :1] for x in paths(checkpoint))
    shared = shared_statistics(quantized, exact)
    weights = checkpoint.layer(0)
    found = attended_statistics(checkpoint.config, 0, weights, [(quantized, exact)], shared, 0.5)
    assert found == {}
    silent = Statistics(0 * shared.hessian, 0 * shared.hessian)
    nothing = [(0 * quantized, 0 * exact)]
    assert attended_statistics(checkpoint.config, 0, weights, nothing, silent, 0.5) == {}


def test_recipes_of_few_bits_take_them(
    tiny_checkpoint: Callable[..., Path], shipped_recipes: None
) -> None:
    config = open_checkpoint(tiny_checkpoint()).config
    for name in RECIPES:
        part = 0.0 if name == "int8" else ATTENDED
        assert plan_of(config, QuantizeOptions(name)).gptq.attended == part
        assert plan_of(config, QuantizeOptions(name, curvature=True)).gptq.attended == ATTENDED
        assert plan_of(config, QuantizeOptions(name, curvature=False)).gptq.attended == 0


def options(**more: Any) -> QuantizeOptions:
    return QuantizeOptions(group=32, calibration_tokens=128, calibration_length=32, **more)


def test_same_bytes_at_any_number_of_threads(
    tiny_checkpoint: Callable[..., Path], shipped_recipes: None, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint())
    bundles = [
        quantize(checkpoint, tmp_path / str(number), options(threads=threads))
        for number, threads in enumerate((1, 2))
    ]
    files = sorted(path.name for path in bundles[0].iterdir())
    for other in bundles[1:]:
        assert sorted(path.name for path in other.iterdir()) == files
        for name in files:
            assert (other / name).read_bytes() == (bundles[0] / name).read_bytes(), name


def test_work_begun_without_is_not_continued(
    tiny_checkpoint: Callable[..., Path], shipped_recipes: None, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint())
    job = prepared(checkpoint, options(), SilentProgress(), None, None)
    without = replace(job.plan, gptq=replace(job.plan.gptq, attended=0.0))
    before, now = (
        Journal.begin(identity_of(checkpoint, job.text, plan, job.options, job.tools), 3)
        for plan in (without, job.plan)
    )
    with pytest.raises(UsageError, match="begun with attended nothing, now 0.5"):
        before.require_same(now, tmp_path)
