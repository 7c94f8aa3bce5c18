"""Calibration on a GPU beside calibration in main memory, on models of every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.vulkan_lab import assert_same_numbers, no_messages  # noqa: F401
from uq.cli import main
from uq.errors import DeviceError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import layer_tensor
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.products import flat
from uq.kernels.reference import embed, layer_forward
from uq.kernels.vulkan.api import DEVICE_LOST, check
from uq.kernels.vulkan.dense.stream import Stream
from uq.kernels.vulkan.device import choose
from uq.kernels.weights import CheckpointWeights
from uq.progress import SilentProgress
from uq.quantize import devices
from uq.quantize.calibrate import NumpyEngine
from uq.quantize.calibration_engine import (
    CalibrationEngine,
    QuantizedWeights,
    StageStatistics,
    TokenRows,
    Weights,
)
from uq.quantize.gptq import FactorizedStatistics, Statistics
from uq.quantize.plan import GptqOptions
from uq.quantize.scales import quantize_rtn
from uq.quantize.vulkan_engine import VulkanEngine, device_bytes
from uq.quantize.vulkan_gptq import DeviceSolver, DeviceStatistics

Array = NDArray[np.float32]
TOKENS = np.random.default_rng(0).integers(6, 512, (5, 24)).astype(np.int32)
SMALL = {"layers": 1, "ffn": 128, "dtype": "f32"}
SPEC = Spec(4, 32)
OPTIONS = GptqOptions(descents=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VulkanEngine]:
    made = VulkanEngine(choose(), tmp_path_factory.mktemp("pipelines"))
    yield made
    made.close()


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(family=request.param, **SMALL))


def rows(checkpoint: Checkpoint) -> list[TokenRows]:
    """Two batches, the second one smaller, behind a rounded embedding and a true one."""
    exact = CheckpointWeights(checkpoint, resident=False).embedding(TOKENS)
    rounded = quantize_rtn(flat(exact), Spec(4, 32)).dequantize().reshape(exact.shape)
    return [TokenRows(rounded[:3], exact[:3]), TokenRows(rounded[3:], exact[3:])]


def numbers(checkpoint: Checkpoint, engine: CalibrationEngine) -> list[dict[str, Array]]:
    """Each stage's statistics on the host, with weights that are rounded to nearest."""
    weights, found = checkpoint.layer(0), []

    def look(roles: Sequence[str], statistics: StageStatistics) -> Weights:
        found.append(on_host(statistics))
        return {role: quantize_rtn(weights[role], SPEC).dequantize() for role in roles}

    engine.begin(checkpoint.config, rows(checkpoint), OPTIONS).quantize_layer(0, weights, look)
    return found


def on_host(statistics: StageStatistics) -> dict[str, Array]:
    names = ("hessian", "cross", "wanted")
    matrices = {name: getattr(statistics, name) for name in names}
    if isinstance(statistics, DeviceStatistics):
        store, unit = statistics.workshop.store, np.float32(statistics.unit)
        matrices = {
            name: None if matrix is None else store.get(matrix) / unit
            for name, matrix in matrices.items()
        }
    return {name: matrix for name, matrix in matrices.items() if matrix is not None}


def test_statistics_are_those_of_main_memory(checkpoint: Checkpoint, engine: VulkanEngine) -> None:
    """Inputs are rounded to float16, and what corrects is a difference of two such."""
    pairs = zip(numbers(checkpoint, engine), numbers(checkpoint, NumpyEngine()), strict=True)
    for found, expected in pairs:
        assert found.keys() == expected.keys()
        for name, matrix in expected.items():
            bound = (2e-3 if name == "hessian" else 1e-2) * np.abs(matrix).max()
            np.testing.assert_allclose(found[name], matrix, rtol=0, atol=bound, err_msg=name)


def test_tokens_leave_a_layer_as_from_the_reference(
    checkpoint: Checkpoint, engine: VulkanEngine
) -> None:
    weights, config = checkpoint.layer(0), checkpoint.config
    run = engine.begin(config, rows(checkpoint), OPTIONS)
    run.pass_layer(0, weights, weights)
    assert engine.workshop is not None
    for pair, batch in zip(run._batches.pairs, rows(checkpoint), strict=True):
        assert pair.exact is not None and batch.exact is not None
        for chunk, before in ((pair.quantized, batch.quantized), (pair.exact, batch.exact)):
            expected = flat(layer_forward(config, 0, weights, embed(config, before)))
            found = engine.workshop.store.get(chunk.hidden)
            assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, scale_bits=8)], ids=str)
def test_codes_are_those_of_main_memory_on_the_same_statistics(
    tiny_checkpoint: Callable[..., Path], engine: VulkanEngine, spec: Spec
) -> None:
    """The device's statistics, in float64: what differs is at ties and what follows from them."""
    checkpoint = open_checkpoint(tiny_checkpoint(**SMALL))
    weights, shares = checkpoint.layer(0), []

    def compare(roles: Sequence[str], statistics: StageStatistics) -> Weights:
        scale = np.where(np.arange(len(statistics.importance)) % 3 == 0, 2, 1).astype(np.float32)
        host = {name: matrix.astype(np.float64) for name, matrix in on_host(statistics).items()}
        there = Statistics(host["hessian"], host.get("cross"), host.get("wanted"))
        both: list[Any] = [statistics, there]
        solvers = [each.rescaled(scale).factorize(OPTIONS.damping) for each in both]
        made: dict[str, QuantTensor] = {}
        for role in roles:
            here, there = (each.quantize(weights[role], spec, OPTIONS) for each in solvers)
            errors = [
                each.output_error(weights[role], tensor)
                for each, tensor in zip(solvers, (here, there), strict=True)
            ]
            assert errors[0] == pytest.approx(errors[1], rel=0.01)
            shares.append((here.codes == there.codes).mean())
            made[role] = here
        assert isinstance(solvers[0], DeviceSolver)
        assert isinstance(solvers[1], FactorizedStatistics)
        return QuantizedWeights(made, scale)

    engine.begin(checkpoint.config, rows(checkpoint), OPTIONS).quantize_layer(0, weights, compare)
    assert min(shares) > 0.97
    assert np.mean(shares) > 0.99


def test_tokens_go_on_with_what_was_found(
    tiny_checkpoint: Callable[..., Path], engine: VulkanEngine
) -> None:
    """Through weights that stay on the device, with columns that are divided again."""
    checkpoint = open_checkpoint(tiny_checkpoint(**SMALL))
    weights, found = dict(checkpoint.layer(0)), dict[str, Array]()

    def quantize(roles: Sequence[str], statistics: StageStatistics) -> Weights:
        scale = np.exp2(np.arange(len(statistics.importance)) % 3 - 1).astype(np.float32)
        solver = statistics.rescaled(scale).factorize(OPTIONS.damping)
        assert not isinstance(solver, str)
        options = replace(OPTIONS, descents=0, refit=False)
        made = {role: solver.quantize(weights[role], SPEC, options) for role in roles}
        found.update(QuantizedWeights(made, scale))
        return QuantizedWeights(made, scale)

    run = engine.begin(checkpoint.config, rows(checkpoint), OPTIONS)
    run.quantize_layer(0, weights, quantize)
    assert engine.workshop is not None
    hidden = engine.workshop.store.get(run._batches.pairs[0].quantized.hidden)
    before = embed(checkpoint.config, rows(checkpoint)[0].quantized)
    expected = flat(layer_forward(checkpoint.config, 0, weights | found, before))
    assert np.abs(hidden - expected).max() <= 2e-3 * np.abs(expected).max()


def test_inputs_that_are_not_finite_have_no_factor(
    tiny_checkpoint: Callable[..., Path], engine: VulkanEngine
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(**SMALL))
    broken = [replace(batch, quantized=batch.quantized * np.nan) for batch in rows(checkpoint)]
    reasons = []

    def look(roles: Sequence[str], statistics: StageStatistics) -> Weights:
        reasons.append(statistics.factorize(OPTIONS.damping))
        return {}

    run = engine.begin(checkpoint.config, broken, OPTIONS)
    run.quantize_layer(0, checkpoint.layer(0), look)
    assert set(reasons) == {"an input of the calibration is not finite"}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(layers=1, ffn=128)


def made(folder: Path, out: Path, device: str) -> int:
    # 32 tokens are few for 128 inputs: enough to see that the device is the one that was named.
    command = ["quantize", str(folder), "-o", str(out), "--device", device]
    return main([*command, "--calibration-tokens", "32", "--group", "32"])


def test_the_command_calibrates_where_it_is_told(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert made(folder, tmp_path / "gpu", "vulkan") == 0
    assert f"calibration: on {choose().name}, with about " in capfd.readouterr().err
    assert made(folder, tmp_path / "cpu", "cpu") == 0
    gpu, cpu = (open_bundle(tmp_path / name) for name in ("gpu", "cpu"))
    assert gpu.manifest.tools["calibration"] == f"vulkan {choose().name}"
    assert "calibration" not in cpu.manifest.tools
    names = gpu.config.linear_shapes(0)
    pairs = [[b.quant(layer_tensor(0, role)).codes for b in (gpu, cpu)] for role in names]
    assert min((one == two).mean() for one, two in pairs) > 0.5


@pytest.mark.mesa
def test_auto_takes_no_emulated_gpu(tmp_path: Path) -> None:
    config = open_checkpoint_config()
    assert devices.open_engine("auto", config, 4, 64, SilentProgress(), spill=tmp_path) is None


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, small = open_checkpoint_config(), replace(choose(), memory=1 << 20)
    monkeypatch.setattr(devices, "_chosen", lambda wish: small)
    with pytest.raises(DeviceError, match=r"1\.0 MiB of its 1\.0 MiB .* are needed, with the act"):
        devices.open_engine("vulkan", config, 4, 64, SilentProgress(), spill=tmp_path)


def test_auto_says_why_it_does_not_take_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(choose(), memory=1 << 20, kind="integrated")
    monkeypatch.setattr(devices, "_chosen", lambda wish: small)
    notes: list[str] = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "note", notes.append)
    config = open_checkpoint_config()
    found = devices.open_engine("auto", config, 4, 64, progress, spill=tmp_path)
    assert found is None
    assert len(notes) == 1
    assert notes[0].startswith(f"calibration: on the CPU, because {small.name}: 1.0 MiB of its")


def test_memory_of_a_large_model() -> None:
    """The 27B shape with 128 x 1024 tokens took 32.5 GiB."""
    shape = open_checkpoint_config("27b")
    whole = device_bytes(shape, 128 * 1024, 1024)
    assert 32.5 < whole / 2**30 < 45
    assert device_bytes(shape, 128 * 1024, 1024, on_disk=True) < 0.6 * whole


def test_activations_wait_on_the_disk_under_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_checkpoint_config()
    limit = device_bytes(config, 65536, 512, on_disk=True)
    large = replace(choose(), memory=1 << 40, kind="integrated")
    monkeypatch.setattr(devices, "_chosen", lambda wish: large)
    notes: list[str] = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "note", notes.append)
    for most in (limit, None):
        devices.open_engine("vulkan", config, 128, 512, progress, spill=tmp_path, limit=most)
    assert [note.endswith("; activations wait on the disk") for note in notes] == [True, False]


def test_the_memory_of_a_discrete_gpu_is_not_under_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(choose(), memory=1 << 40, kind="discrete")
    monkeypatch.setattr(devices, "_chosen", lambda wish: gpu)
    notes: list[str] = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "note", notes.append)
    config = open_checkpoint_config()
    devices.open_engine("vulkan", config, 128, 512, progress, spill=tmp_path, limit=1)
    assert not notes[0].endswith("; activations wait on the disk")


def test_what_waits_on_the_disk_comes_back_bit_for_bit(
    checkpoint: Checkpoint, engine: VulkanEngine, tmp_path: Path
) -> None:
    """Statistics of all stages, of two batches of which one is on the device at a time."""
    spilling = VulkanEngine(choose(), tmp_path / "pipelines", spill=tmp_path)
    try:
        found = numbers(checkpoint, spilling)
    finally:
        spilling.close()
    assert_same_numbers(found, numbers(checkpoint, engine))


def test_a_lost_device_leaves_what_is_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same device continues to the same bytes; another one is refused: its codes differ."""
    assert made(folder, tmp_path / "whole", "vulkan") == 0
    capfd.readouterr()
    with monkeypatch.context() as broken:
        broken.setattr(Stream, "read", lambda *_: check("QueueSubmit2", DEVICE_LOST))
        assert made(folder, tmp_path / "b", "vulkan") == 1
    lines = capfd.readouterr().err
    assert "b.partial keeps 1 finished parts; the same command continues" in lines
    assert "calibration on the GPU: the GPU stopped answering (device lost); the same" in lines
    assert made(folder, tmp_path / "b", "cpu") == 2
    assert f"was begun with tools.calibration vulkan {choose().name}" in capfd.readouterr().err
    assert made(folder, tmp_path / "b", "vulkan") == 0
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def open_checkpoint_config(name: str = "270m") -> Any:
    from benchmarks.shapes import shape_config

    return shape_config(name)


@pytest.mark.parametrize("device", ["gpu", "vulkan:", "npu"])
def test_a_device_that_cannot_calibrate(
    device: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(folder, tmp_path / "out", device) == 2
    assert f"invalid choice: '{device}' (choose from auto, cpu" in capsys.readouterr().err
