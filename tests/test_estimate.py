"""Figures given before a run against the run itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from uq.errors import UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.quantize.estimate import estimate
from uq.quantize.pipeline import QuantizeOptions, quantize

UNDER, OVER = 1.1, 1.75  # how far off it may be; arrays of two threads do not always meet

Tiny = Callable[..., Path]
SCRIPT = """
import json, sys
from pathlib import Path
from uq.formats.checkpoint import open_checkpoint
from uq.quantize.estimate import estimate
from uq.quantize.pipeline import QuantizeOptions, quantize
options = QuantizeOptions(**json.loads(sys.argv[3]))
expected = estimate(open_checkpoint(sys.argv[1]), options).peak_memory
quantize(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), options)
# ru_maxrss would begin with the size of the process that started this one.
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(expected, 1024 * int(status["VmHWM"].split()[0]))
"""


def peak(source: Path, out: Path, **options: object) -> tuple[int, int]:
    """Estimated and measured peak of a process that estimates and then quantizes."""
    command = [sys.executable, "-c", SCRIPT, str(source), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected, measured = map(int, done.stdout.split())
    return expected, measured


@pytest.mark.parametrize("recipe", ["int4", "int5", "int8"])
@pytest.mark.parametrize("target", ["igpu", "npu"])
def test_size_and_bits_are_those_of_the_bundle(
    recipe: str, target: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tied=False))
    options = QuantizeOptions(recipe, method="rtn", targets=(target,))
    found = estimate(checkpoint, options)
    bundle = open_bundle(quantize(checkpoint, tmp_path / "b", options))
    assert found.bits_per_weight == pytest.approx(bundle.bits_per_weight, rel=1e-12)
    assert sum(kind.tensors for kind in found.kinds) == len(bundle.manifest.tensors)
    assert {kind.method for kind in found.kinds} == {"rtn"}


def test_text_and_json_show_every_kind(tiny_checkpoint: Tiny) -> None:
    found = estimate(open_checkpoint(tiny_checkpoint()), QuantizeOptions())
    text = str(found)
    assert "mlp.down_proj" in text and "memory: about" in text and "(estimate)" in text
    data = json.loads(json.dumps(found.to_json()))
    assert [kind["name"] for kind in data["kinds"]][:2] == ["embedding", "self_attn.q_proj"]
    assert data["seconds"] > 0 and data["peak_memory"] > 0


def test_calibration_costs_time_and_memory(tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(hidden=256, ffn=1024))
    nearest = estimate(checkpoint, QuantizeOptions(method="rtn"))
    few = estimate(checkpoint, QuantizeOptions(calibration_tokens=2048))
    many = estimate(checkpoint, QuantizeOptions(calibration_tokens=65536))
    assert nearest.peak_memory < few.peak_memory < many.peak_memory


def test_options_that_do_not_fit_are_refused(tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match="do not divide by group 128"):
        estimate(open_checkpoint(tiny_checkpoint(hidden=192)), QuantizeOptions(group=128))


def test_calibrated_memory_is_about_the_estimate(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(hidden=512, ffn=2048, layers=1)
    expected, measured = peak(folder, tmp_path / "b", calibration_tokens=2048)
    assert measured / UNDER < expected < measured * OVER


@pytest.mark.real
def test_memory_of_rounding_the_real_model_is_about_the_estimate(
    real_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UQ_CACHE", str(tmp_path / "cache"))  # the tokenizer is made, not found
    expected, measured = peak(real_gguf, tmp_path / "b", method="rtn")
    assert measured / UNDER < expected < measured * OVER
    assert measured < 1 << 30
