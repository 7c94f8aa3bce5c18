"""One model with a format of its own for every role: quantized, stored, resumed, and run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import EMBEDDING, HEAD, GemmaConfig, layer_tensor
from uq.formats.manifest import gain_name
from uq.formats.spec import Spec
from uq.kernels.cpu import open_cpu
from uq.kernels.cpu.twin import dequantized, hidden_states, logits
from uq.progress import SilentProgress
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.plan import Plan, make_plan
from uq.quantize.scales import weight_error

ROLES = {
    "self_attn.q_proj": Spec(5, 32, scale_bits=8),
    "self_attn.k_proj": Spec(6, 64, zero_point=True),
    "self_attn.v_proj": Spec(8, 64),
    "self_attn.o_proj": Spec(4, 128, zero_point=True),
    "mlp.gate_proj": Spec(5, 32, zero_point=True, scale_bits=8),
    "mlp.up_proj": Spec(4, 32),
    "mlp.down_proj": Spec(6, 128),
}
TABLE = Spec(6, 32)
SHAPE = {"family": "gemma3", "hidden": 128, "ffn": 256, "vocab": 700}
LARGEST = {4: 0.3, 5: 0.15, 6: 0.08, 8: 0.04}  # bits -> error that no weight of a bundle may have


def mixed_plan(config: GemmaConfig, options: QuantizeOptions) -> Plan:
    plan = make_plan(config, group=32, method=options.method)
    specs = {
        layer_tensor(layer, role): spec
        for layer in range(config.num_layers)
        for role, spec in ROLES.items()
    }
    specs |= {EMBEDDING: TABLE, HEAD: TABLE}
    tensors = {name: replace(old, spec=specs[name]) for name, old in plan.tensors.items()}
    return replace(plan, tensors=tensors)


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uq.quantize.job.plan_of", mixed_plan)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(**SHAPE, tied=False)


def options(method: str, threads: int | None = None) -> QuantizeOptions:
    return QuantizeOptions(method=method, calibration_tokens=400, threads=threads)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_tensor_gets_its_format(method: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    bundle = open_bundle(quantize(checkpoint, tmp_path / "b", options(method)))
    assert bundle.manifest.schema == 4
    assert bundle.manifest.tensors[EMBEDDING].spec == bundle.manifest.tensors[HEAD].spec == TABLE
    for layer in range(checkpoint.config.num_layers):
        for role, weight in checkpoint.layer(layer).items():
            if role in ROLES:
                tensor = bundle.quant(layer_tensor(layer, role))
                assert tensor.spec == ROLES[role]
                assert weight_error(weight, tensor) < LARGEST[tensor.spec.bits]


def twin_logits(bundle: Bundle, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    config, manifest = bundle.config, bundle.manifest
    norms = {gain: gain.removesuffix(".gain") + ".weight" for gain in manifest.arrays}
    gains = {norms[gain]: bundle.array(gain) for gain in manifest.arrays}
    assert {gain_name(norm) for norm in gains} == set(manifest.arrays)
    weights = dequantized({name: bundle.quant(name) for name in manifest.tensors}, gains)
    return logits(config, weights, hidden_states(config, weights, tokens))


@pytest.mark.parametrize("target", ["igpu", "npu", "cpu"])
def test_the_cpu_runs_the_bundle_as_its_dequantized_twin(
    target: str, folder: Path, tmp_path: Path
) -> None:
    asked = QuantizeOptions(method="rtn", targets=(target,))
    bundle = open_bundle(quantize(open_checkpoint(folder), tmp_path / "b", asked))
    tokens = np.random.default_rng(0).integers(0, bundle.config.vocab_size, 70, dtype=np.int32)
    expected = twin_logits(bundle, tokens)
    session = open_cpu(bundle, max_context=128)
    actual = session.logits(session.score(tokens[None])[0], 0, bundle.config.vocab_size)
    np.testing.assert_allclose(actual, expected, atol=5e-4 * np.abs(expected).max())
    session.prefill(tokens[:50].tolist())
    for token in tokens[50:]:
        session.prefill([int(token)])
    np.testing.assert_array_equal(session.next_logits, actual[-1])


class Killed(Exception):
    pass


class KillInLastLayer(SilentProgress):
    def work(self, what: str) -> None:
        if what == layer_tensor(1, "mlp.up_proj"):
            raise Killed


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_broken_run_goes_on_to_the_same_bytes(method: str, folder: Path, tmp_path: Path) -> None:
    checkpoint, asked = open_checkpoint(folder), options(method)
    with pytest.raises(Killed):
        quantize(checkpoint, tmp_path / "b", asked, KillInLastLayer())
    assert (tmp_path / "b.partial" / "model-00002-of-00003.safetensors").exists()
    broken = open_bundle(quantize(checkpoint, tmp_path / "b", asked))
    whole = open_bundle(quantize(checkpoint, tmp_path / "c", options(method, threads=1)))
    assert broken.sha256 == whole.sha256
