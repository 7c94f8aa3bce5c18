"""`uq bench` on tiny bundles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vulkan_lab import no_messages  # noqa: F401
from uq.cli import main
from uq.formats.bundle import open_bundle
from uq.validate.bench import BenchOptions, bench
from uq.validate.integers import IntegerLoss
from uq.validate.report import Estimate

SHORT = ("--prompt", "5", "--generate", "3", "--repeats", "2")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle(layers=2)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UQ_CACHE", str(tmp_path))


def test_a_gpu_is_held_against_its_own_memory(bundle: Path) -> None:
    options = BenchOptions("vulkan", prompt=5, generate=3, repeats=2, kernels=True)
    found = bench(open_bundle(bundle), options)
    speed = found.speed
    assert found.device.backend == "vulkan"
    assert speed.decode_ceiling_tps == pytest.approx(
        speed.bandwidth_gb_s * 1e9 / speed.bytes_per_token
    )
    assert found.share_of_ceiling == speed.decode_tps.median / speed.decode_ceiling_tps
    assert not speed.weights_fit_cache  # what a GPU's caches hold is not known
    assert found.prompts is not None
    assert found.prompts.tps == found.prompts.rate / found.prompts.operations > 0
    assert "Prefill's is the measured arithmetic" in str(found)
    assert {"attention", "head", "between dispatches"} <= {stage.label for stage in found.stages}
    assert sum(stage.share for stage in found.stages) == pytest.approx(1)


def test_kernels_and_trace(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "step.json"
    command = ["bench", str(bundle), "--device", "vulkan", *SHORT, "--by-kernel"]
    assert main([*command, "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    assert "3 behind 5" in shown and "GB/s" in shown and "attention output" in shown
    rows = {event["tid"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert rows == {"GPU", "host"}


def test_several_sequences_on_a_gpu(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle), "--device", "vulkan", *SHORT, "--batch", "3"]) == 0
    shown, told = capsys.readouterr()
    assert "batch decode" in shown and "3 sequences together" in shown
    labels = "speed", "speed of 3 sequences"
    assert all(f"{label} 1/3 warm-up, prefill" in told for label in labels)
    assert all(f"{label} 2/3 run 1, prefill" in told for label in labels)


def test_json_of_the_cpu(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", str(bundle), "--device", "cpu", *SHORT, "--batch", "3", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["backend"] == "cpu" and found["stages"] == []
    assert found["speed"]["decode_tps"]["min"] <= found["speed"]["decode_tps"]["max"]
    batch = found["batch"]
    assert (batch["sequences"], batch["prompt"], batch["generated"]) == (3, 5, 3)
    assert batch["decode_tps"]["min"] <= batch["decode_tps"]["median"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--by-kernel",), "has no clock for its kernels; use --device vulkan"),
        (("--trace", "no/such/step.json"), "there is no such folder; make it"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bundle: Path,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", str(bundle), "--device", "cpu", *SHORT, *options]) != 0
    assert message in capsys.readouterr().err


def test_integers_beside_the_weights_are_held_against_the_float_run(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(bundle), "--device", "vulkan", *SHORT, "--json"]
    assert main([*command, "--activations", "int8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "INT8 activations" in found["device"]["features"]
    assert found["integer_loss"]["tokens"] == 127
    assert 0 < found["integer_loss"]["kld"]["value"] < 0.1


def test_the_loss_of_integers_in_a_sentence() -> None:
    loss = IntegerLoss(Estimate(0.00219, 0.00005), 127)
    assert str(loss) == (
        "Mean KL to the same device's float run: 0.0022 ± 5e-05 over 127 tokens of text."
    )
