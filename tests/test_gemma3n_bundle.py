"""Bundles of Gemma 3n: made, opened, validated, and run by the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.test_gemma4_bundle import CALIBRATED, TEXT, divergence
from tests.test_reference import all_logits, random_tokens
from uq.errors import DeviceError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import PER_LAYER_EMBEDDING, layer_tensor
from uq.kernels.backends import open_session
from uq.kernels.reference import ReferenceSession
from uq.progress import SilentProgress
from uq.quantize.devices import open_engine
from uq.quantize.job import plan_of
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.shards import shard_bytes
from uq.validate.validate import ValidateOptions, validate


@pytest.fixture(scope="module")
def bundle(tiny_gemma3n: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Rounded to the nearest INT8 codes."""
    out = tmp_path_factory.mktemp("gemma3n-bundle") / "int8"
    options = QuantizeOptions(recipe="int8", method="rtn")
    return open_bundle(quantize(open_checkpoint(tiny_gemma3n("plain")), out, options))


def test_streams_and_products_of_low_rank_stay_in_float(bundle: Bundle) -> None:
    tensors, arrays = bundle.manifest.tensors, bundle.manifest.arrays
    assert tensors[PER_LAYER_EMBEDDING].shape == (500, 5 * 64)
    assert layer_tensor(4, "self_attn.k_proj") not in tensors
    assert arrays["model.altup_unembed_projections.2.weight"].shape == (64, 64)
    for role, shape in {
        "altup.prediction_coefs": (16, 4),
        "altup.correct_output_scale": (64,),
        "laurel.linear_left": (8, 64),
        "per_layer_projection": (64, 64),
    }.items():
        assert arrays[layer_tensor(0, role)].shape == shape


def test_the_room_that_is_asked_for_holds_all_tensors(bundle: Bundle) -> None:
    plan = plan_of(bundle.config, QuantizeOptions(recipe="int8", method="rtn"))
    files = {name: file.size for name, file in bundle.manifest.files.items()}
    shards = [size for name, size in sorted(files.items()) if name.endswith(".safetensors")]
    for stored, wanted in zip(shards, shard_bytes(bundle.config, plan), strict=True):
        assert 0 <= stored - wanted < 8192  # the header


def test_reference_device_runs_it(bundle: Bundle, tiny_gemma3n: Callable[..., Path]) -> None:
    """INT8 moves the logits by less than a tenth of their range."""
    session = open_session(bundle, "reference", max_context=64)
    truth = ReferenceSession(open_checkpoint(tiny_gemma3n("plain")))
    tokens = random_tokens(truth, 1, 40)
    ours, theirs = session.score(tokens), truth.score(tokens)
    assert isinstance(session, ReferenceSession)
    error = np.abs(all_logits(session, ours) - all_logits(truth, theirs)).max()
    assert error < 0.1 * np.abs(all_logits(truth, theirs)).max()


def test_report_names_every_kind(bundle: Bundle, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ValidateOptions(
        device="reference", reference_device="cpu", text=text, context=64, speed=False
    )
    report = validate(bundle, None, options)
    kinds = {size.kind for size in report.sizes}
    assert kinds == {"embedding", "per-layer embedding", "attention", "mlp", "other", "norms"}
    assert {error.name for error in report.layers} == set(bundle.manifest.tensors)


def test_a_device_says_what_it_cannot_compute(bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match="does not compute .* [(]gemma3n[)]; use --device"):
        open_session(bundle, "npu-emulator", max_context=64)


def test_streams_are_calibrated_here(tiny_gemma3n: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma3n("plain"))
    with pytest.raises(DeviceError, match="on a GPU does not compute .*; use --device cpu"):
        open_engine("vulkan", checkpoint.config, 8, 128, SilentProgress(), spill=tmp_path)


def test_a_broken_run_goes_on_to_the_same_bytes(
    tiny_gemma3n: Callable[..., Path], tmp_path: Path
) -> None:
    class Breaks(SilentProgress):
        def advance(self, step: str, **figures: float) -> None:
            if step == "layer 2":
                raise KeyboardInterrupt

    checkpoint = open_checkpoint(tiny_gemma3n("plain"))
    options = replace(CALIBRATED, calibration_tokens=128)
    whole = open_bundle(quantize(checkpoint, tmp_path / "whole", options))
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, tmp_path / "broken", options, Breaks())
    again = open_bundle(quantize(checkpoint, tmp_path / "broken", options))
    assert again.sha256 == whole.sha256


def test_gptq_loses_less_than_rounding(tiny_gemma3n: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma3n("plain"))
    lost = {}
    for method in ("rtn", "gptq"):
        options = replace(CALIBRATED, method=method)
        bundle = open_bundle(quantize(checkpoint, tmp_path / method, options))
        lost[method] = divergence(bundle, checkpoint)
    assert lost["gptq"] < 0.75 * lost["rtn"]
