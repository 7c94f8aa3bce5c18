"""Bundles of Gemma 4: made, opened, validated, and run with all that their layers have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.gemma4 import VARIANTS
from tests.test_reference import all_logits, random_tokens
from uq.cli import main
from uq.errors import DeviceError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import FULL, PER_LAYER_EMBEDDING, SLIDING, layer_tensor
from uq.formats.manifest import expected_tensors
from uq.formats.sensitive import sensitivities
from uq.kernels.backends import open_session
from uq.kernels.npu.toolchain.carried import designs_for
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import BundleWeights
from uq.progress import SilentProgress
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.text import read_text, token_sequences
from uq.validate.validate import ValidateOptions, validate

# The default mix is large: cut into tokens it takes longer than such a model.
ENGLISH = str(Path(__file__).parents[1] / "benchmarks" / "texts" / "english.txt")
CALIBRATED = QuantizeOptions(
    recipe="int4",
    method="gptq",
    group=32,
    calibration=ENGLISH,
    calibration_tokens=1024,
    calibration_length=128,
)
MIXED = replace(CALIBRATED, group=None)
FOUR_TYPES = [SLIDING, FULL] * 2
TEXT = "the year of the city and the time of his year " * 12


@pytest.fixture(scope="module")
def bundles(
    tiny_gemma4: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """Every variant, rounded to the nearest INT8 codes."""
    root = tmp_path_factory.mktemp("gemma4-bundles")
    options = QuantizeOptions(recipe="int8", method="rtn")
    return {
        variant: open_bundle(
            quantize(open_checkpoint(tiny_gemma4(variant)), root / variant, options)
        )
        for variant in VARIANTS
    }


def test_every_tensor_of_the_family_is_there(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["all"]
    tensors, arrays = bundle.manifest.tensors, bundle.manifest.arrays
    assert tensors[PER_LAYER_EMBEDDING].shape == (512, 6 * 32)
    assert tensors[layer_tensor(1, "experts.gate_up_proj")].shape == (8 * 64, 64)
    assert layer_tensor(5, "self_attn.k_proj") not in tensors
    assert arrays[layer_tensor(0, "router.proj")].shape == (8, 64)
    assert arrays[layer_tensor(0, "layer_scalar")].shape == (1,)
    assert bundle.manifest.schema == 3


def test_some_rows_are_those_of_the_whole(bundles: dict[str, Bundle]) -> None:
    name = layer_tensor(1, "experts.down_proj")
    whole = bundles["experts"].quant(name).dequantize()
    for start, stop in ((0, 1), (5, 70), (448, 512)):
        rows = bundles["experts"].rows(name, start, stop).dequantize()
        np.testing.assert_array_equal(rows, whole[start:stop])


@pytest.mark.parametrize("variant", ["small", "large"])
def test_reference_device_runs_it(
    bundles: dict[str, Bundle], tiny_gemma4: Callable[..., Path], variant: str
) -> None:
    """INT8 moves the logits by less than a tenth of their range."""
    session = open_session(bundles[variant], "reference", max_context=64)
    truth = ReferenceSession(open_checkpoint(tiny_gemma4(variant)))
    tokens = random_tokens(truth, 1, 40)
    ours, theirs = session.score(tokens), truth.score(tokens)
    assert isinstance(session, ReferenceSession)
    error = np.abs(all_logits(session, ours) - all_logits(truth, theirs)).max()
    assert error < 0.1 * np.abs(all_logits(truth, theirs)).max()


def test_weights_of_a_bundle_are_near_those_of_the_checkpoint(
    bundles: dict[str, Bundle], tiny_gemma4: Callable[..., Path]
) -> None:
    checkpoint, weights = open_checkpoint(tiny_gemma4("all")), BundleWeights(bundles["all"])
    exact = checkpoint.layer(5)
    found = weights.layer(5)
    assert set(found) == set(exact)
    for role, weight in exact.items():
        np.testing.assert_allclose(found[role], weight, atol=0.02)
    for role in ("experts.gate_up_proj", "experts.down_proj"):
        expert = checkpoint.expert(5, role, 7)
        np.testing.assert_allclose(weights.expert(5, role, 7), expert, atol=0.02)
    rows = checkpoint.per_layer_embedding(3, 9)
    np.testing.assert_allclose(weights.per_layer_embedding(3, 9), rows, atol=0.02)


def test_report_names_every_kind(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ValidateOptions(
        device="reference", reference_device="cpu", text=text, context=64, speed=False
    )
    report = validate(bundles["all"], None, options)
    kinds = {size.kind for size in report.sizes}
    assert kinds == {
        "embedding", "per-layer embedding", "attention", "mlp", "experts", "other", "norms"
    }  # fmt: skip
    errors = {error.name: error.relative_error for error in report.layers}
    assert set(errors) == set(bundles["all"].manifest.tensors)
    assert 0.001 < errors[layer_tensor(0, "experts.gate_up_proj")] < 0.01


def test_inspect_shows_what_the_layers_have(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(bundles["all"].path)]) == 0
    text = capsys.readouterr().out
    assert "4 heads of 32, 1 KV, in full layers of 64, 1 KV" in text
    assert "the last 3 layers read keys and values of others" in text
    assert "3 of 8, MLP 32" in text
    assert "layernorm_2" not in text  # all norms are one kind


def test_no_npu_design_is_made_for_it(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(DeviceError, match="NPU session does not compute .*; use --device cpu"):
        list(designs_for(bundles["large"].config, "npu2"))


def test_a_device_says_what_it_cannot_compute(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(DeviceError, match="NPU session does not compute .*; use --device cpu"):
        open_session(bundles["experts"], "npu-emulator", max_context=64)


@pytest.mark.parametrize("variant", ["small", "large", "experts"])
def test_gptq_loses_less_than_rounding(
    tiny_gemma4: Callable[..., Path], tmp_path: Path, variant: str
) -> None:
    checkpoint = open_checkpoint(tiny_gemma4(variant))
    lost = {}
    for method in ("rtn", "gptq"):
        options = replace(CALIBRATED, method=method)
        bundle = open_bundle(quantize(checkpoint, tmp_path / method, options))
        lost[method] = divergence(bundle, checkpoint)
        assert all(tensor.fallback is None for tensor in bundle.manifest.tensors.values())
    assert lost["gptq"] < 0.75 * lost["rtn"]


def test_experts_that_saw_too_few_tokens_are_named(
    tiny_gemma4: Callable[..., Path], tmp_path: Path
) -> None:
    few = replace(CALIBRATED, calibration_tokens=12, calibration_length=12)
    checkpoint = open_checkpoint(tiny_gemma4("experts"))
    bundle = open_bundle(quantize(checkpoint, tmp_path / "out", few))
    fallback = bundle.manifest.tensors[layer_tensor(0, "experts.gate_up_proj")].fallback
    assert fallback is not None
    assert re.fullmatch(
        r"experts \d(, \d)* saw too few calibration tokens; rounded to nearest", fallback
    )


def test_a_broken_run_goes_on_to_the_same_bytes(
    tiny_gemma4: Callable[..., Path], tmp_path: Path
) -> None:
    class Breaks(SilentProgress):
        def advance(self, step: str, **figures: float) -> None:
            if step == "layer 2":
                raise KeyboardInterrupt

    four = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": FOUR_TYPES}
    checkpoint = open_checkpoint(tiny_gemma4("all", text=four))
    options = replace(CALIBRATED, calibration_tokens=128)
    whole = open_bundle(quantize(checkpoint, tmp_path / "whole", options))
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, tmp_path / "broken", options, Breaks())
    again = open_bundle(quantize(checkpoint, tmp_path / "broken", options))
    assert again.sha256 == whole.sha256


def planted(folder: Path) -> dict[str, NDArray[np.float32] | None]:
    """Other weights for a checkpoint: in two matrices of layer 2 a column of each group is 60 times
    as large, and its input 60 times as small.
    """
    weights = load_file(folder / "model.safetensors")
    found: dict[str, NDArray[np.float32] | None] = {}
    for rows, columns in (
        ("mlp.up_proj", "mlp.down_proj"),
        ("per_layer_input_gate", "per_layer_projection"),
    ):
        before, behind = (f"model.layers.2.{role}.weight" for role in (rows, columns))
        weights[before][::32] /= 60
        weights[behind][:, ::32] *= 60
        found |= {name: weights[name] for name in (before, behind)}
    return found


def test_what_breaks_at_4_bits_is_named_and_protected(
    tiny_gemma4: Callable[..., Path], tmp_path: Path
) -> None:
    class Notes(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    checkpoint = open_checkpoint(tiny_gemma4("small", extra=planted(tiny_gemma4("small"))))
    mixed = open_bundle(quantize(checkpoint, tmp_path / "mixed", MIXED, Notes()))
    plain = open_bundle(quantize(checkpoint, tmp_path / "plain", CALIBRATED))
    linear, kept = (layer_tensor(2, role) for role in ("mlp.down_proj", "per_layer_projection"))
    sensitive = mixed.manifest.options["sensitive"]
    assert isinstance(sensitive, dict) and set(list(sensitive)[:2]) == {linear, kept}
    told = "\n".join(notes)
    assert sensitivities(mixed.manifest) == [note for note in notes if "plain 4 bits" in note]
    assert re.search(rf"{kept}: plain 4 bits would cost [0-9.]+ nats .*; it stays in float32", told)
    assert re.search(rf"{linear}: plain 4 bits would cost .*; it has int[568]", told)
    sizes = [sum(f.size for f in found.manifest.files.values()) for found in (mixed, plain)]
    assert sizes[0] <= sizes[1]
    assert divergence(mixed, checkpoint) < 0.7 * divergence(plain, checkpoint)


def test_bits_per_weight_of_tables_and_experts(
    tiny_gemma4: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_gemma4("all"))
    options = replace(MIXED, bpw=8.0, calibration_tokens=256, targets=("cpu",))
    tensors = open_bundle(quantize(checkpoint, tmp_path / "out", options)).manifest.tensors
    assert set(tensors) == set(expected_tensors(checkpoint.config)[0])
    assert len({tensor.spec for tensor in tensors.values()}) > 1
    arrays = sum(math.prod(shape) for shape in expected_tensors(checkpoint.config)[1].values())
    taken = 32 * arrays + 8 * sum(t.spec.nbytes(*t.shape) for t in tensors.values())
    assert 7.5 < taken / checkpoint.config.num_parameters() <= 8.0


def divergence(bundle: Bundle, checkpoint: Checkpoint) -> float:
    """Mean KL divergence on the calibration text, of windows that did not calibrate."""
    text = read_text(ENGLISH)
    tokens = token_sequences(checkpoint.tokenizer(), text, sequences=8, length=100, seed=5)
    sessions = ReferenceSession(checkpoint), ReferenceSession(BundleWeights(bundle))
    logits = [all_logits(session, session.score(tokens)) for session in sessions]
    truth, ours = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in logits)
    return float((np.exp(truth) * (truth - ours)).sum(axis=-1).mean())
