"""What grids cost: against models with one tensor rounded, run by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_gemma4_bundle import ENGLISH
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import EMBEDDING, HEAD, PER_LAYER_EMBEDDING, GemmaConfig, layer_tensor
from uq.formats.spec import Spec
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import CheckpointWeights, Weights, WeightSource
from uq.progress import SilentProgress
from uq.quantize import probes
from uq.quantize.candidates import candidates
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.plan import GptqOptions
from uq.quantize.probes import (
    LINEAR_PROBE,
    TABLE_PROBE,
    Probes,
    probe_spec,
    table_names,
)
from uq.quantize.scales import quantize_rtn
from uq.quantize.sensitivity import balance, measure_costs

Array = NDArray[np.float32]
TOKENS = np.random.default_rng(0).integers(6, 512, (4, 128)).astype(np.int32)
SILENT = SilentProgress()


class Rounded(WeightSource):
    """A checkpoint with one tensor on its probe grid."""

    def __init__(self, inner: Checkpoint, name: str, bits: int) -> None:
        self.inner, self.name, self.bits = inner, name, bits
        self.config: GemmaConfig = inner.config

    def layer(self, index: int) -> Weights:
        return {
            role: self._round(layer_tensor(index, role), weight)
            for role, weight in self.inner.layer(index).items()
        }

    def embedding(self, start: int, stop: int) -> Array:
        return self._round(EMBEDDING, self.inner.embedding(start, stop))

    def head(self, start: int, stop: int) -> Array:
        name = EMBEDDING if self.config.tied_head else HEAD
        return self._round(name, self.inner.head(start, stop))

    def final_norm(self) -> Array:
        return self.inner.final_norm()

    def expert(self, index: int, role: str, number: int) -> Array:
        return self._round(layer_tensor(index, role), self.inner.expert(index, role, number))

    def per_layer_embedding(self, start: int, stop: int) -> Array:
        return self._round(PER_LAYER_EMBEDDING, self.inner.per_layer_embedding(start, stop))

    def whole(self, name: str) -> Array:
        return self.inner.whole(name)

    def _round(self, name: str, weight: Array) -> Array:
        if name != self.name:
            return weight
        return quantize_rtn(weight, probe_spec(self.bits, weight.shape[1])).dequantize()


def log_softmax(session: ReferenceSession, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    hidden = session.score(tokens)[:, probes.POSITIONS]
    logits = session.logits(hidden, 0, session.config.vocab_size).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_the_likeliest_tokens_are_found_block_by_block(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "TOKEN_BLOCK", 100)
    checkpoint = open_checkpoint(tiny_checkpoint())
    source = CheckpointWeights(checkpoint, resident=False)
    states = np.random.default_rng(0).standard_normal((7, 128)).astype(np.float32)
    found = probes.likeliest(checkpoint.config, source, 3 * states, 40)
    logits = 3.0 * states.astype(np.float64) @ source.head(0, 512).T
    chances = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    assert found.tolist() == sorted(np.argsort(-chances.sum(axis=0))[:40])


def divergence_by_hand(
    checkpoint: Checkpoint, name: str, bits: int, tokens: NDArray[np.int32] = TOKENS
) -> float:
    exact = log_softmax(ReferenceSession(checkpoint), tokens)
    rounded = log_softmax(ReferenceSession(Rounded(checkpoint, name, bits)), tokens)
    return float(np.mean(np.sum(np.exp(exact) * (exact - rounded), axis=-1)))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(family="gemma2", tied=request.param, dtype="f32"))


def test_probes_diverge_like_models_with_one_rounded_tensor(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    source = CheckpointWeights(checkpoint, resident=False)
    models = Probes(config, source, TOKENS, tables=True)
    for layer in range(config.num_layers):
        models.walk(layer, checkpoint.layer(layer), checkpoint)
    found = models.divergences()
    tables = table_names(config)
    assert len(found) == len(tables) + 7 * config.num_layers
    names = [*tables, layer_tensor(0, "self_attn.v_proj"), layer_tensor(1, "mlp.down_proj")]
    for name in names:
        bits = TABLE_PROBE if name in tables else LINEAR_PROBE
        by_hand = divergence_by_hand(checkpoint, name, bits)
        assert found[name].mean() == pytest.approx(by_hand, rel=1e-2)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "gemma4",
            [
                PER_LAYER_EMBEDDING,
                layer_tensor(1, "experts.gate_up_proj"),
                layer_tensor(2, "self_attn.k_proj"),  # which later layers read
                layer_tensor(3, "router.proj"),
                layer_tensor(0, "per_layer_projection"),
            ],
        ),
        (
            "gemma3n",
            [
                EMBEDDING,
                layer_tensor(2, "self_attn.v_proj"),
                layer_tensor(1, "laurel.linear_left"),
                layer_tensor(4, "altup.modality_router"),
            ],
        ),
    ],
)
def test_probes_of_newer_families_diverge_like_models_with_one_rounded_tensor(
    tiny_gemma4: Callable[..., Path],
    tiny_gemma3n: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    names: list[str],
) -> None:
    monkeypatch.setattr(probes, "KEPT_LAYERS", probes.PROBED_LAYERS)
    folder = tiny_gemma4("all") if family == "gemma4" else tiny_gemma3n("plain")
    checkpoint = open_checkpoint(folder)
    source = CheckpointWeights(checkpoint, resident=False)
    tokens = TOKENS[:2, :40]
    models = Probes(checkpoint.config, source, tokens, tables=True)
    for layer in range(checkpoint.config.num_layers):
        models.walk(layer, checkpoint.layer(layer), checkpoint)
    found = models.divergences()
    for name in names:
        bits = TABLE_PROBE if name in table_names(checkpoint.config) else LINEAR_PROBE
        by_hand = divergence_by_hand(checkpoint, name, bits, tokens)
        assert found[name].mean() == pytest.approx(by_hand, rel=1e-2)


def test_layers_between_probed_ones_get_a_like_divergence(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(layers=5, dtype="f32"))
    config = checkpoint.config
    source = CheckpointWeights(checkpoint, resident=False)

    def divergences() -> dict[str, float]:
        models = Probes(config, source, TOKENS, tables=False)
        for layer in range(config.num_layers):
            models.walk(layer, checkpoint.layer(layer), checkpoint)
        return {name: float(found.mean()) for name, found in models.divergences().items()}

    measured = divergences()
    monkeypatch.setattr(probes, "PROBED_LAYERS", 3)
    found = divergences()
    assert probes.probed_layers(range(5), 3) == [0, 2, 4] and set(found) == set(measured)
    for name, divergence in measured.items():
        layer = int(name.split(".")[2])
        bound = 1.001 if layer % 2 == 0 else 2.0
        assert divergence / bound < found[name] < divergence * bound


def test_windows_have_the_same_say_whatever_rounding_costs_there() -> None:
    found = balance({"a": np.array([2.0, 8.0]), "b": np.array([1.0, 16.0])})
    assert found["a"] == pytest.approx(found["b"])


def test_a_window_where_nothing_is_lost_does_not_decide() -> None:
    found = balance({"a": np.array([1.0, 1.0, 0.0]), "b": np.array([2.0, 2.0, 1e-9])})
    assert found["b"] / found["a"] == pytest.approx(2.0, rel=1e-6)


def test_more_bits_and_smaller_groups_cost_less(checkpoint: Checkpoint) -> None:
    costs = measure_costs(checkpoint, TOKENS, GptqOptions(), tables=True, progress=SILENT).costs
    for choices in costs.values():
        groups = sorted({spec.group for spec in choices})
        for bits in (4, 5):
            small, large = (Spec(bits, group, scale_bits=8) for group in (groups[0], groups[-1]))
            assert choices[small] < choices[large]
            assert choices[replace(small, bits=bits + 1)] < choices[small] / 2


def test_costs_cover_the_grids_that_fit(checkpoint: Checkpoint) -> None:
    costs = measure_costs(checkpoint, TOKENS, GptqOptions(), tables=False, progress=SILENT).costs
    assert EMBEDDING not in costs
    for name, choices in costs.items():
        cols = checkpoint.tensors[name].shape[1]
        assert list(choices) == candidates(cols)


def test_a_budget_is_spent_and_measured_once(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UQ_CACHE", str(tmp_path / "cache"))
    source = open_checkpoint(tiny_checkpoint())
    options = QuantizeOptions(bpw=6.0, calibration=ENGLISH, calibration_tokens=600)
    bundle = open_bundle(quantize(source, tmp_path / "a", options))
    weights = source.config.num_parameters()
    assert (
        5.5
        < 8
        * sum(record.spec.nbytes(*record.shape) for record in bundle.manifest.tensors.values())
        / weights
        <= 6.0
    )
    assert len({record.spec for record in bundle.manifest.tensors.values()}) > 1

    def measured_again(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("uq.quantize.mixing.measure_costs", measured_again)
    again = open_bundle(quantize(source, tmp_path / "b", replace(options, bpw=5.5)))
    assert again.nbytes < bundle.nbytes
    same = open_bundle(quantize(source, tmp_path / "c", options))
    assert same.sha256 == bundle.sha256
