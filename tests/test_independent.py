"""Layers calibrated on what the floating-point layers make of the text, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from uq.cli import main
from uq.errors import UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import layer_tensor
from uq.formats.entries import QuantEntry, TiledRows
from uq.kernels.weights import LayerWeights
from uq.progress import SilentProgress
from uq.quantize import job
from uq.quantize.calibrate import Calibration
from uq.quantize.calibration_engine import TokenRows
from uq.quantize.job import plan_of
from uq.quantize.layers import LayerQuantizer
from uq.quantize.memory import Fitted, Footprint
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.text import read_text, token_sequences
from uq.quantize.token_rows import token_rows

OPTIONS = QuantizeOptions(
    group=32,
    calibration_tokens=240,
    calibration_length=80,
    calibrate_layers="independently",
)
SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

SPARSE = {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(layers=3, hidden=64, ffn=128, head_dim=16)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(open_checkpoint(model), tmp_path_factory.mktemp("whole") / "b", OPTIONS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "gemma4", "gemma4 experts"])
def test_a_layer_is_calibrated_behind_floating_point_layers(
    model: Path,
    tiny_gemma3n: Callable[..., Path],
    tiny_gemma4: Callable[..., Path],
    tmp_path: Path,
    name: str,
) -> None:
    """The tokens go through the layers before as through quantized ones that lose nothing."""
    folders = {
        "gemma3": lambda: model,
        "gemma3n": lambda: tiny_gemma3n("plain", text=SHARING | SPARSE),
        "gemma4": lambda: tiny_gemma4("small", text=SHARING),
        "gemma4 experts": lambda: tiny_gemma4("experts"),
    }
    checkpoint = open_checkpoint(folders[name]())
    bundle = open_bundle(quantize(checkpoint, tmp_path / "b", OPTIONS))
    plan = plan_of(checkpoint.config, OPTIONS)
    tokens = token_sequences(checkpoint.tokenizer(), read_text(None), sequences=3, length=80)
    run = Calibration(
        checkpoint.config, map(lossless, token_rows(checkpoint, plan, tokens)), plan.gptq
    )
    last = checkpoint.config.num_layers - 1
    for layer in range(last):
        weights = (LayerWeights(checkpoint, layer, resident=False) for _ in range(2))
        run.pass_layer(layer, *weights)
    quantizer = LayerQuantizer(checkpoint, plan, SilentProgress(), {})
    for entry in quantizer.quantize(last, checkpoint.layer(last), run):
        if isinstance(entry, QuantEntry):
            blocks = [
                part if isinstance(part, TiledRows) else TiledRows.of(part, entry.layout)
                for part in entry.blocks
            ]
            stored, _ = bundle.raw(entry.name)
            assert_array_equal(stored, np.concatenate([block.data for block in blocks]))


def lossless(rows: TokenRows) -> TokenRows:
    assert rows.exact is not None
    return replace(rows, quantized=rows.exact, quantized_rows=rows.exact_rows)


def test_the_bundle_says_so_and_is_another_one(model: Path, bundle: Path, tmp_path: Path) -> None:
    in_order = replace(OPTIONS, calibrate_layers="in-order")
    other = open_bundle(quantize(open_checkpoint(model), tmp_path / "b", in_order))
    here = open_bundle(bundle)
    assert here.manifest.options["calibrate_layers"] == "independently"
    assert other.manifest.options["calibrate_layers"] == "in-order"
    name = layer_tensor(2, "mlp.up_proj")
    assert (here.quant(name).codes != other.quant(name).codes).any()


def test_bytes_are_the_same_when_the_text_waits_on_the_disk(
    model: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = Footprint(1 << 20, 1 << 20)
    monkeypatch.setattr(job, "fit", lambda _, plan, *__: Fitted(plan, needed, spills=True))
    assert contents(quantize(open_checkpoint(model), tmp_path / "b", OPTIONS)) == contents(bundle)


def test_what_calibrates_nothing_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(model), "-o", str(tmp_path / "b"), "--method", "rtn"]
    assert main([*words, "--calibrate-layers", "independently"]) == 2
    assert "nothing is calibrated; use --method gptq" in capsys.readouterr().err
    with pytest.raises(UsageError, match="'sideways' is not known; use in-order or independently"):
        quantize(
            open_checkpoint(model), tmp_path / "b", replace(OPTIONS, calibrate_layers="sideways")
        )
