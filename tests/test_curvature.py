"""The curvature of the outputs against autograd, and the gradient of the loss against its law."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_backward import plain_model, torch_gradients
from tests.test_reference import all_logits
from uq.errors import UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import layer_tensor
from uq.kernels.reference import ReferenceSession, soft_cap
from uq.kernels.weights import BundleWeights
from uq.progress import LineProgress, SilentProgress
from uq.quantize import curvature
from uq.quantize.backward import Slope
from uq.quantize.calibrate import NumpyEngine
from uq.quantize.curvature import curvature_bytes, measure_curvature
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.plan import WorkSizes
from uq.quantize.pullbacks import rms_norm_backward
from uq.quantize.spool import Spool
from uq.quantize.text import read_text, token_sequences

Array = NDArray[np.float32]
WORK = WorkSizes(batch_tokens=40)


def test_means_of_the_gradients_of_transformers(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch by batch, in blocks of rows; q_proj has two."""
    folder = tiny_checkpoint(dtype="f32")
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 512, (8, 20)).astype(np.int32)
    upstream = rng.standard_normal((4, 20, 128)).astype(np.float32)
    checkpoint = open_checkpoint(folder)
    eps, gain = checkpoint.config.rms_norm_eps, checkpoint.final_norm()

    def slopes(config: object, source: object, hidden: list[Array]) -> list[Slope]:
        parts = zip(hidden, np.split(upstream, len(hidden)), strict=True)
        return [Slope(rms_norm_backward(h, gain, eps, u)) for h, u in parts]

    monkeypatch.setattr(curvature, "_loss_slopes", slopes)
    monkeypatch.setattr("uq.quantize.gptq.OUTPUTS", 64)
    monkeypatch.setattr(curvature, "CLIP", np.float32(np.inf))
    found = measure_curvature(checkpoint, tokens, WORK, tmp_path, SilentProgress())
    theirs = torch_gradients(plain_model(folder), tokens[::2], upstream)
    for role, shape in checkpoint.config.linear_shapes(1).items():
        if role in curvature.NORMED:
            continue
        name = layer_tensor(1, role)
        blocks = found.blocks(name, shape, WORK.row_numbers)
        assert blocks is not None and len(blocks) == -(-shape[0] // 64)
        flat = theirs[name].reshape(-1, shape[0])
        whole = flat.T @ flat / (flat**2).sum() * shape[0]
        for index, block in enumerate(blocks):
            here = slice(64 * index, 64 * (index + 1))
            np.testing.assert_allclose(block, whole[here, here], atol=1e-3 * abs(whole).max())


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gradients_of_drawn_tokens_have_the_moments_of_the_fisher_information(
    tiny_checkpoint: Callable[..., Path], family: str
) -> None:
    """Mean 0, and second moments J^T (diag(p) - p p^T) J with J the slope of the logits."""
    checkpoint = open_checkpoint(tiny_checkpoint(family=family))
    rng = np.random.default_rng(0)
    head = rng.standard_normal((30, 8)).astype(np.float32)
    state = rng.standard_normal(8).astype(np.float32)
    draws = 40_000
    found = curvature._head_slope(checkpoint.config, head, np.tile(state, (draws, 1)), rng)
    raw = head.astype(np.float64) @ state
    logits = soft_cap(checkpoint.config, raw.astype(np.float32))
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum()
    cap = checkpoint.config.final_softcap
    jacobian = head * (1 - np.tanh(raw / cap) ** 2)[:, None] if cap else head
    fisher = jacobian.T @ (np.diag(chances) - np.outer(chances, chances)) @ jacobian
    size = np.sqrt(np.trace(fisher))
    assert np.linalg.norm(found.mean(axis=0)) < 4 * size / np.sqrt(draws)
    error = np.linalg.norm(found.T @ found / draws - fisher) / np.linalg.norm(fisher)
    assert error < 0.05


def test_large_gradients_are_shortened() -> None:
    slopes = np.full((5, 4), [[1], [1], [-1], [0], [100]], np.float32)
    expected = np.full((5, 4), [[1], [1], [-1], [0], [curvature.CLIP]], np.float32)
    np.testing.assert_allclose(curvature._capped(slopes), expected, rtol=1e-6)


def test_what_is_not_finite_is_left_out(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint())
    broken = lambda config, source, hidden: [Slope(np.full_like(h, np.nan)) for h in hidden]  # noqa: E731
    monkeypatch.setattr(curvature, "_loss_slopes", broken)
    tokens = np.ones((2, 20), np.int32)
    found = measure_curvature(checkpoint, tokens, WORK, tmp_path, SilentProgress())
    assert found.blocks(layer_tensor(0, "mlp.up_proj"), (256, 128), 1 << 20) is None


@pytest.fixture
def tiny(
    tiny_checkpoint: Callable[..., Path],
    tiny_gemma4: Callable[..., Path],
    tiny_gemma3n: Callable[..., Path],
) -> Callable[[str], Path]:
    """Factory of a folder by the name of its family, with all that its models have."""

    def write(family: str) -> Path:
        if family == "gemma4":
            return tiny_gemma4("all")
        return tiny_gemma3n("plain") if family == "gemma3n" else tiny_checkpoint(dtype="f32")

    return write


FAMILIES = pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma3n"])


@FAMILIES
def test_what_waits_on_the_disk_is_counted(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    written = []

    class Counted(Spool):
        def __setitem__(self, key: Hashable, array: Array) -> None:
            written.append(array.nbytes)
            super().__setitem__(key, array)

    monkeypatch.setattr(curvature, "Spool", Counted)
    checkpoint = open_checkpoint(tiny(family))
    tokens = np.random.default_rng(0).integers(0, 480, (4, 20)).astype(np.int32)
    measure_curvature(checkpoint, tokens, WORK, tmp_path, SilentProgress())
    assert sum(written) == curvature_bytes(checkpoint.config, tokens.size, WORK.row_numbers)
    assert not list(tmp_path.iterdir())


FEW = QuantizeOptions(group=32, calibration_tokens=8192, calibration_length=128)
TOGETHER = replace(FEW, curvature=True)


@FAMILIES
def test_bundles_diverge_less_with_it_and_have_the_same_bytes_again(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    checkpoint = open_checkpoint(tiny(family))

    def bundle(name: str, options: QuantizeOptions) -> Bundle:
        return open_bundle(quantize(checkpoint, tmp_path / name, options))

    alone, together = bundle("alone", FEW), bundle("together", replace(TOGETHER, threads=1))
    assert bundle("again", replace(TOGETHER, threads=2)).sha256 == together.sha256
    assert together.manifest.options["curvature"] is True
    assert "curvature" not in alone.manifest.options
    assert divergence(checkpoint, together) < 0.99 * divergence(checkpoint, alone)


def test_each_part_counts_its_own_steps(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint, said = open_checkpoint(tiny_checkpoint(layers=2)), StringIO()
    options = replace(TOGETHER, calibration_tokens=160, calibration_length=40)
    quantize(checkpoint, tmp_path / "b", options, LineProgress(said))
    steps = [line.split()[:2] for line in said.getvalue().splitlines() if "/" in line.split()[1]]
    assert [step for step in steps if step[0] == "gradients"][-1] == ["gradients", "4/4"]
    assert steps[-3:] == [["quantize", f"{number}/3"] for number in (1, 2, 3)]


def divergence(checkpoint: Checkpoint, bundle: Bundle) -> float:
    """Mean KL divergence on other windows of the calibration text."""
    text, tokenizer = read_text(None), checkpoint.tokenizer()
    tokens = token_sequences(tokenizer, text, sequences=16, length=100, seed=9)
    logs = []
    for weights in (checkpoint, BundleWeights(bundle)):
        session = ReferenceSession(weights)
        logits = all_logits(session, session.score(tokens)).astype(np.float64)
        logs.append(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    return float(np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rtn"}, "--curvature is for --method gptq"),
        ({"calibrate_layers": "independently"}, "--curvature needs layers calibrated in order"),
    ],
)
def test_options_that_it_does_not_go_with_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    options = replace(TOGETHER, **changes)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        quantize(open_checkpoint(tiny_checkpoint()), tmp_path / "b", options)
    assert not list(tmp_path.iterdir())


def test_another_engine_than_the_cpu_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint())
    with pytest.raises(UsageError, match="measured on the CPU only; add --device cpu"):
        quantize(checkpoint, tmp_path / "b", TOGETHER, engine=NumpyEngine())
