"""`--device npu` and `npu-emulator`: commands, reports, and what can be wrong. No NPU took part."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_npu_runtime import Copier
from uq.cli import main
from uq.errors import BundleError, DeviceError, UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.kernels.backends import backends, open_batch, open_session
from uq.kernels.cpu.session import CpuSession
from uq.kernels.npu.hybrid.designs import CarriedDesigns
from uq.kernels.npu.hybrid.session import NpuSession
from uq.kernels.npu.kernels.attention.design import attention
from uq.kernels.npu.kernels.attention.plan import Plan
from uq.kernels.npu.runtime.double import State, Xclbin, double
from uq.kernels.npu.runtime.emulated import Emulator, write_program
from uq.kernels.npu.runtime.faults import NpuTimeout
from uq.kernels.npu.source import parse_design
from uq.kernels.npu.toolchain.carried import (
    attention_job,
    attention_name,
    carried,
    carry,
    designs_for,
)
from uq.kernels.numerics import KV, Numerics
from uq.validate.assembly import NO_CLOCK


@pytest.fixture(scope="module")
def path(tiny_bundle: Callable[..., Path]) -> Path:
    """It carries no designs."""
    return tiny_bundle(head_dim=128, layers=1, pattern=1)


@pytest.fixture(scope="module")
def carrying(tiny_bundle: Callable[..., Path]) -> Path:
    """Designs for npu1, not compiled."""
    made = tiny_bundle(head_dim=128, layers=1, pattern=1)
    carry(made, list(designs_for(open_bundle(made).config, "npu1")))
    return made


@pytest.fixture(scope="module")
def compiled(carrying: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """As `uq npu build` leaves it; the emulator's xclbins stand for compiled ones."""
    made = tmp_path_factory.mktemp("compiled") / "bundle"
    made.mkdir()
    for file in carrying.rglob("*"):
        target = made / file.relative_to(carrying)
        target.mkdir() if file.is_dir() else target.write_bytes(file.read_bytes())
    index = json.loads((made / "npu/npu.json").read_text())
    for name, (job, _) in carried(made).items():
        folder = made / "npu" / name
        write_program(job, folder)
        xclbin = folder / "aie.xclbin"
        xclbin.write_bytes(xclbin.read_bytes().replace(b"uq emulator", bytes(11)))
        index["designs"][name]["state"] = "compiled"
        for file in (xclbin, folder / "insts.bin"):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            index["designs"][name]["files"][file.name] = digest
    (made / "npu/npu.json").write_text(json.dumps(index))
    return open_bundle(made)


class Phoenix(Copier):
    """An NPU whose runs end in a state and write nothing."""

    name = "NPU Phoenix"

    def execute(self, xclbin: Xclbin, arguments: Mapping[int, Any], timeout: int) -> State:
        return self.state


@pytest.fixture
def phoenix(monkeypatch: pytest.MonkeyPatch) -> Phoenix:
    machine = Phoenix()
    monkeypatch.setitem(sys.modules, "pyxrt", double([machine]))
    return machine


@pytest.fixture
def computing(compiled: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NPU by its name, computing as the emulator; it learns what reaches it."""
    machine = Emulator("npu1")
    machine.name = "NPU Phoenix"
    for job, _ in carried(compiled.path).values():
        machine.learn(job, parse_design(job.text).module)
    instructions = CarriedDesigns.instructions

    def learned(designs: CarriedDesigns, plan: Plan) -> bytes:
        machine.learn(attention_job(plan, attention_name(plan.variant)), attention(plan))
        return instructions(designs, plan)

    monkeypatch.setattr(CarriedDesigns, "instructions", learned)
    monkeypatch.setitem(sys.modules, "pyxrt", double([machine]))


def test_the_path_to_an_npu_is_that_to_its_emulator(compiled: Bundle, computing: None) -> None:
    """Designs from the bundle, instructions of other lengths than the compiled one."""
    sessions = [
        open_session(compiled, device, max_context=300) for device in ("npu", "npu-emulator:npu1")
    ]
    logits = []
    for session in sessions:
        assert isinstance(session, NpuSession)
        session.prefill(list(range(6, 150)))
        session.prefill([7])
        logits.append(session.next_logits)
    np.testing.assert_array_equal(logits[0], logits[1])
    assert (sessions[0].device.backend, sessions[0].device.attention[0].backend) == ("npu", "npu")
    assert sessions[0].device.name.startswith("NPU Phoenix for attention, ")


def test_generate_says_where_it_ran(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(path), "-p", "the time", "--max-tokens", "2"]
    assert main([*command, "--device", "npu-emulator:npu1", "--kv", "int4"]) == 0
    said = capsys.readouterr().err
    assert "attention of layer 0 on npu-emulator\n" in said
    assert "rates of the emulator: they say nothing about an NPU" in said


def test_the_report_says_where_layers_ran(
    path: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    reference = ["--reference", str(tiny_checkpoint(head_dim=128, layers=1, pattern=1))]
    options = ["--chunks", "2", "--context", "32", "--device", "npu-emulator:npu1", *reference]
    assert main(["validate", str(path), *options, "--json", "--no-save", "--no-speed"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"]["attention"] == [
        {"layers": "0", "backend": "npu-emulator", "reason": None}
    ]
    assert NO_CLOCK in report["warnings"]
    assert report["kld"]["mean"] < 0.05
    assert main(["validate", str(path), *options, "--min-tps", "1"]) == 2
    assert "--min-tps: the emulator has no clock" in capsys.readouterr().err


def test_bench_names_its_rates_the_emulators(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--prompt",
        "8",
        "--generate",
        "1",
        "--repeats",
        "1",
        "--device",
        "npu-emulator:npu1",
    ]
    assert main(["bench", str(path), *options]) == 0
    said = capsys.readouterr().out
    assert "attention of layer 0 on npu-emulator" in said
    assert "Rates of the emulator on this machine: they say nothing about an NPU." in said


def test_auto_takes_neither_npu_nor_emulator(path: Path, phoenix: Phoenix) -> None:
    offered = {backend.name: backend for backend in backends()}
    assert offered["npu"].available and offered["npu-emulator"].available
    assert not (offered["npu"].preferred or offered["npu-emulator"].preferred)
    assert type(open_session(open_bundle(path), max_context=8)) is CpuSession


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 64}, "no layer can run on the NPU: no attention kernel for head size 64"),
        ({"head_dim": 32, "family": "gemma"}, "head size 32; there are 128, 256; use --device cpu"),
    ],
)
def test_a_model_without_a_kernel(
    options: dict[str, str], message: str, tiny_bundle: Callable[..., Path]
) -> None:
    with pytest.raises(DeviceError, match=message):
        open_session(open_bundle(tiny_bundle(**options)), "npu-emulator", max_context=8)


@pytest.mark.parametrize("device", ["npu-emulator:npu3", "npu-emulator:", "npu:1"])
def test_unknown_devices(device: str, path: Path) -> None:
    with pytest.raises(UsageError, match=f"--device {device} is not known"):
        open_session(open_bundle(path), device, max_context=8)


def test_what_the_npu_does_not_do(path: Path) -> None:
    bundle = open_bundle(path)
    with pytest.raises(UsageError, match="the NPU runs one sequence"):
        open_batch(bundle, "npu-emulator", slots=2, max_context=8)
    with pytest.raises(UsageError, match="the NPU does not check guessed tokens"):
        open_session(bundle, "npu-emulator", max_context=8, speculate=True)


def test_without_pyxrt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    with pytest.raises(DeviceError, match="pyxrt is not installed: XRT's Python module; run: uq d"):
        open_session(open_bundle(path), "npu", max_context=8)


def test_without_an_npu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyxrt", double([]))
    with pytest.raises(DeviceError, match="NPU 0 cannot be opened; XRT says: No such device"):
        open_session(open_bundle(path), "npu", max_context=8)


def test_an_npu_that_is_not_known(path: Path, phoenix: Phoenix) -> None:
    phoenix.name = "NPU Medusa"
    with pytest.raises(DeviceError, match="the NPU NPU Medusa is not known; uq has kernels for ph"):
        open_session(open_bundle(path), "npu", max_context=8)


def test_a_bundle_that_carries_no_designs(path: Path, phoenix: Phoenix) -> None:
    with pytest.raises(BundleError, match=f"carries no designs for an NPU; .*npu build {path}"):
        open_session(open_bundle(path), "npu", max_context=8)


def test_designs_that_are_not_compiled(carrying: Path, phoenix: Phoenix) -> None:
    with pytest.raises(DeviceError, match=f"not compiled .* run: uq npu build {carrying}"):
        open_session(open_bundle(carrying), "npu", max_context=8)


def test_designs_of_the_other_npu(compiled: Bundle, phoenix: Phoenix) -> None:
    phoenix.name = "NPU Strix"
    session = open_session(compiled, "npu", max_context=8)
    with pytest.raises(BundleError, match="is not the design of this uq; run: .* --device npu2"):
        session.prefill([6])


def test_instructions_that_a_compiler_wrote_otherwise(
    compiled: Bundle, phoenix: Phoenix, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uq.kernels.npu.hybrid import designs

    monkeypatch.setattr(designs, "lower", lambda module, like=None: None)
    with pytest.raises(BundleError, match="mlir-aie wrote other instructions than uq"):
        open_session(compiled, "npu", max_context=8).prefill([6])


def test_a_context_that_is_refused(compiled: Bundle, phoenix: Phoenix) -> None:
    phoenix.refusal = "DRM_IOCTL_AMDXDNA_CREATE_HWCTX IOCTL failed (err=-22): Invalid argument"
    with pytest.raises(DeviceError, match="cannot be opened: the driver does not take this xclbin"):
        open_session(compiled, "npu", max_context=8).prefill([6])


def test_runs_that_fail(compiled: Bundle, phoenix: Phoenix) -> None:
    phoenix.state = State.ERT_CMD_STATE_ERROR
    session = open_session(compiled, "npu", max_context=8)
    with pytest.raises(DeviceError, match="reported an error while it ran the design"):
        session.prefill([6])
    phoenix.state = State.ERT_CMD_STATE_TIMEOUT
    for _ in range(2):  # the program is opened again
        with pytest.raises(NpuTimeout, match="the NPU did not answer in time"):
            session.prefill([6])


def test_keys_and_values_of_an_npu_are_int8_or_int4(path: Path) -> None:
    bundle = open_bundle(path)
    logits = []
    for kv in (KV["int8"], KV["int4"]):
        session = open_session(bundle, "npu-emulator:npu1", max_context=8, numerics=Numerics(kv=kv))
        session.prefill([6, 7, 8])
        assert isinstance(session, NpuSession)
        logits.append(session.next_logits)
    assert (logits[0] != logits[1]).any()
