"""The quantizer as a whole: what it writes, that it can be broken off, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from uq.errors import CheckpointError, UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, layer_tensor
from uq.formats.manifest import gain_name
from uq.formats.spec import Spec
from uq.kernels.reference import attention_input, embed
from uq.progress import SilentProgress
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.scales import quantize_rtn, weight_error
from uq.quantize.text import MIX, read_text, token_sequences

Tiny = Callable[..., Path]
RTN = QuantizeOptions(method="rtn")
GPTQ = QuantizeOptions(method="gptq", calibration_tokens=400)
INDEPENDENT = replace(GPTQ, calibrate_layers="independently", group=32)
DOWN = layer_tensor(1, "mlp.down_proj")


def bundle_of(folder: Path, out: Path, options: QuantizeOptions = RTN) -> Bundle:
    return open_bundle(quantize(open_checkpoint(folder), out, options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("target", ["igpu", "npu", "cpu"])
def test_rounded_bundle_holds_the_nearest_codes(
    family: str, target: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family=family, tied=family != "gemma2")
    checkpoint = open_checkpoint(folder)
    bundle = bundle_of(folder, tmp_path / "b", QuantizeOptions(method="rtn", targets=(target,)))
    assert bundle.config == checkpoint.config
    assert (HEAD in bundle.manifest.tensors) == (family == "gemma2")
    for name, record in bundle.manifest.tensors.items():
        weight = checkpoint.rows(name, 0, record.shape[0])
        expected = quantize_rtn(weight, record.spec)
        np.testing.assert_array_equal(bundle.quant(name).codes, expected.codes)
        np.testing.assert_array_equal(bundle.quant(name).scales, expected.scales)
        assert record.method == "rtn"
        assert record.relative_error == pytest.approx(weight_error(weight, expected), rel=1e-6)
    for layer in range(2):
        for role, gain in checkpoint.gains(layer).items():
            stored = bundle.array(gain_name(layer_tensor(layer, role)))
            np.testing.assert_array_equal(stored, gain)
    np.testing.assert_array_equal(bundle.array(gain_name(FINAL_NORM)), checkpoint.final_norm())


def test_manifest_says_where_everything_comes_from(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(shards=2, prefix="language_model.model.")
    checkpoint = open_checkpoint(folder)
    manifest = bundle_of(folder, tmp_path / "b", GPTQ).manifest
    assert manifest.provenance.id == str(folder)
    files = {name: (f.size, f.content) for name, f in manifest.provenance.files.items()}
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert files == {name: (sizes[name], file) for name, file in checkpoint.contents().items()}
    assert len(files) == 2
    assert manifest.left_out == ()
    assert manifest.calibration is not None and manifest.calibration.tokens == 400
    assert manifest.recipe == "int4" and set(manifest.tools) == {"python", "numpy", "numba"}
    assert set(checkpoint.assets()) <= set(manifest.files)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_gptq_follows_the_plan_and_lowers_the_output_error(
    family: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family=family, vocab=768)
    options = QuantizeOptions(calibration_tokens=2000)
    tensors = bundle_of(folder, tmp_path / "b", options).manifest.tensors
    assert tensors[EMBEDDING].method == "rtn"
    linears = [record for name, record in tensors.items() if name != EMBEDDING]
    assert {record.method for record in linears} == {"gptq"}
    nearest = weight_error(
        weight := open_checkpoint(folder).layer(1)["mlp.down_proj"],
        quantize_rtn(weight, Spec(4, 32)),
    )
    error = tensors[DOWN].relative_error
    assert error is not None and 0 < error < nearest


def test_rounding_with_a_text_weighs_the_inputs(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    text = str(MIX.with_name("manual.txt"))
    options = replace(RTN, calibration=text, calibration_tokens=400)
    bundle = bundle_of(folder, tmp_path / "b", options)
    checkpoint = open_checkpoint(folder)
    tokens = token_sequences(checkpoint.tokenizer(), read_text(text), sequences=1, length=400)
    rows = bundle.quant(EMBEDDING).dequantize()[tokens]
    weights = checkpoint.layer(0)
    x = attention_input(checkpoint.config, weights, embed(checkpoint.config, rows))
    importance = np.square(x, dtype=np.float64).mean((0, 1)).astype(np.float32)
    query = layer_tensor(0, "self_attn.q_proj")
    expected = quantize_rtn(weights["self_attn.q_proj"], Spec(4, 32), importance)
    stored = bundle.quant(query)
    assert bundle.manifest.tensors[query].method == "rtn"
    assert bundle.manifest.calibration is not None
    # The sums behind the importance run in another order: a tie may fall the other way.
    assert (stored.codes == expected.codes).mean() > 0.999
    assert (stored.codes != bundle_of(folder, tmp_path / "c").quant(query).codes).any()


class Killed(Exception):
    pass


class KillAt(SilentProgress):
    """Dies when a given tensor is begun."""

    def __init__(self, name: str, error: type[BaseException] = Killed) -> None:
        self._name = name
        self._error = error
        self.notes: list[str] = []

    def work(self, what: str) -> None:
        if what == self._name:
            raise self._error

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("options", "layer"), [(RTN, 2), (GPTQ, 1), (INDEPENDENT, 1)])
def test_a_killed_run_continues_to_the_same_bytes(
    options: QuantizeOptions, layer: int, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(layers=3)
    whole = bundle_of(folder, tmp_path / "whole", options)
    killer = KillAt(layer_tensor(layer, "mlp.up_proj"))
    with pytest.raises(Killed):
        quantize(open_checkpoint(folder), tmp_path / "b", options, killer)
    assert len(list((tmp_path / "b.partial").glob("*.safetensors"))) == 1 + layer
    continued = bundle_of(folder, tmp_path / "b", options)
    assert contents(continued.path) == contents(whole.path)


def test_an_interrupt_says_how_to_go_on(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    killer = KillAt(DOWN, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(open_checkpoint(tiny_checkpoint()), tmp_path / "b", GPTQ, killer)
    note = f"{tmp_path}/b.partial keeps 2 finished parts; the same command continues"
    assert killer.notes[-1].startswith(note)


def test_other_options_do_not_continue_a_killed_run(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint())
    with pytest.raises(Killed):
        quantize(checkpoint, tmp_path / "b", RTN, KillAt(DOWN))
    other = QuantizeOptions(method="rtn", group=32)
    with pytest.raises(UsageError, match="was begun with options.group null, now 32"):
        quantize(checkpoint, tmp_path / "b", other)
    again = QuantizeOptions(method="rtn", group=32, resume="restart")
    assert (
        open_bundle(quantize(checkpoint, tmp_path / "b", again)).manifest.tensors[DOWN].group == 32
    )


@pytest.mark.parametrize("options", ["method='rtn'", "calibration_tokens=1500"])
def test_bytes_do_not_depend_on_the_number_of_threads(
    options: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(hidden=256, ffn=512)
    script = (
        "import sys; from pathlib import Path\n"
        "from uq.formats.checkpoint import open_checkpoint\n"
        "from uq.quantize.pipeline import QuantizeOptions, quantize\n"
        f"options = QuantizeOptions({options}, threads=int(sys.argv[1]))\n"
        f"quantize(open_checkpoint({str(folder)!r}), Path(sys.argv[2]), options)\n"
    )
    for threads in ("1", "2"):
        # BLAS keeps one: how some of its kernels round follows from where it parts a product.
        limits = {"OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": threads}
        command = [sys.executable, "-c", script, threads, str(tmp_path / threads)]
        subprocess.run(command, env=os.environ | limits, check=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("options", [RTN, GPTQ])
def test_a_weight_that_is_not_a_number_is_named(
    options: QuantizeOptions, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    weight = np.ones((128, 256), np.float32)
    weight[3, 5] = np.nan
    checkpoint = open_checkpoint(tiny_checkpoint(extra={DOWN: weight}))
    with pytest.raises(CheckpointError, match=rf"{DOWN}\[3, 5\]: nan"):
        quantize(checkpoint, tmp_path / "b", options)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("options", [RTN, GPTQ])
def test_weights_beyond_the_scales_are_refused(
    options: QuantizeOptions, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    weight = np.full((128, 256), 1e7, np.float32)
    checkpoint = open_checkpoint(tiny_checkpoint(extra={DOWN: weight}, dtype="f32"))
    with pytest.raises(CheckpointError, match=f"{DOWN}: weights are too large for float16 scales"):
        quantize(checkpoint, tmp_path / "b", options)


def test_inputs_that_are_always_zero_fall_back_to_rounding(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    gate = layer_tensor(1, "mlp.gate_proj")
    folder = tiny_checkpoint(extra={gate: np.zeros((256, 128), np.float32)})
    progress = KillAt("never")
    out = quantize(open_checkpoint(folder), tmp_path / "b", GPTQ, progress)
    tensors = open_bundle(out).manifest.tensors
    assert tensors[DOWN].method == "rtn" and tensors[gate].method == "gptq"
    fallback = "every input of the calibration is zero; rounded to nearest"
    assert tensors[DOWN].fallback == fallback and tensors[gate].fallback is None
    assert progress.notes == [f"{DOWN}: {fallback}"]


def test_inputs_that_overflow_fall_back_to_rounding(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Everything behind the overflow has none either; what lies in front of it is calibrated."""
    gain = np.full(128, 3e38, np.float32)
    name = "model.layers.1.input_layernorm.weight"
    folder = tiny_checkpoint(extra={name: gain}, dtype="f32")
    out = quantize(open_checkpoint(folder), tmp_path / "b", GPTQ)
    records = open_bundle(out).manifest.tensors
    methods = {name: record.method for name, record in records.items() if "_proj" in name}
    assert {name.split(".")[2]: method for name, method in methods.items()} == {
        "0": "gptq",
        "1": "rtn",
    }
    reasons = {record.fallback for name, record in records.items() if ".layers.1." in name}
    assert reasons == {"an input of the calibration is not finite; rounded to nearest"}


def test_a_text_of_one_repeated_word_is_calibrated_on(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    """Every row of the inputs is almost the same: the Hessian has rank one, about."""
    text = tmp_path / "same.txt"
    text.write_text("time" * 3000)
    options = replace(GPTQ, calibration=str(text))
    checkpoint = open_checkpoint(tiny_checkpoint())
    out = open_bundle(quantize(checkpoint, tmp_path / "b", options))
    for name, record in out.manifest.tensors.items():
        assert record.fallback is None
        assert np.isfinite(out.quant(name).dequantize()).all()
        assert record.relative_error is not None and record.relative_error < 0.2


def test_an_existing_output_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="b: exists"):
        quantize(open_checkpoint(tiny_checkpoint()), tmp_path / "b", RTN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            QuantizeOptions(group=128),
            "self_attn.o_proj.weight: 192 columns .* use --group 32 or 64",
        ),
        (
            QuantizeOptions(recipe="int8", group=32, method="rtn", calibration="x.txt"),
            "--calibration: INT8 rounding uses no text; use --method gptq or fewer bits",
        ),
        (QuantizeOptions(calibration_tokens=1), "--calibration-tokens 1: use 2 or more"),
        (QuantizeOptions(calibration="none.txt"), "none.txt: cannot be read"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    options: QuantizeOptions, message: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(heads=6, kv_heads=2)
    with pytest.raises(UsageError, match=message):
        quantize(open_checkpoint(folder), tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


def test_a_short_calibration_text_leaves_nothing_behind(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("the city")
    options = QuantizeOptions(calibration=str(tmp_path / "short.txt"))
    with pytest.raises(UsageError, match="less than one calibration sequence of 512"):
        quantize(open_checkpoint(tiny_checkpoint()), tmp_path / "b", options)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.real
def test_the_real_model_keeps_sane_errors(real_bundle: Bundle) -> None:
    tensors = real_bundle.manifest.tensors
    errors = {name: record.relative_error for name, record in tensors.items()}
    assert len(errors) == 1 + 18 * 7
    assert errors.pop(EMBEDDING) < 0.01  # type: ignore[operator]
    assert all(error is not None and 0.05 < error < 0.15 for error in errors.values())
    assert real_bundle.bits_per_weight == pytest.approx(
        (167.8 * 8.25 + 100.3 * 4.5) / 268.1, abs=0.01
    )
