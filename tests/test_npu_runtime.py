"""The runtime over a strict double of pyxrt; no NPU took part."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uq.cli import main
from uq.errors import BundleError, DesignError, DeviceError, ToolMissing, UsageError
from uq.kernels.npu.kernels.passthrough.design import passthrough
from uq.kernels.npu.runtime.double import State, Xclbin, double
from uq.kernels.npu.runtime.emulated import emulated_npu, write_program
from uq.kernels.npu.runtime.faults import NpuTimeout
from uq.kernels.npu.runtime.npu import Npu, load_pyxrt
from uq.kernels.npu.runtime.program import Program, buffers_of, read_program
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.toolchain.job import Job, prepare

HERE = Path(__file__).parent


class Copier:
    """A machine whose kernel copies buffer 0 into buffer 1, and that can be told to fail."""

    name = "NPU Strix"

    def __init__(self, state: State = State.ERT_CMD_STATE_COMPLETED, refusal: str = "") -> None:
        self.state = state
        self.refusal = refusal
        self.runs: list[Mapping[int, Any]] = []

    def admit(self, xclbin: Xclbin) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)

    def execute(self, xclbin: Xclbin, arguments: Mapping[int, Any], timeout: int) -> State:
        self.runs.append(dict(arguments))
        arguments[4][:] = arguments[3]
        return self.state


def job(device: str = "npu2", nbytes: int = 4096) -> Job:
    source = parse_design(print_design(passthrough(device, nbytes)))
    return prepare(source, name="passthrough", sources=HERE)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """As `uq npu build` would leave it: not marked as made for the emulator."""
    write_program(job(), tmp_path)
    xclbin = tmp_path / "aie.xclbin"
    xclbin.write_bytes(xclbin.read_bytes().replace(b"uq emulator", bytes(11)))
    (tmp_path / "build.json").write_text(json.dumps({"buffers": [4096, 4096]}))
    return read_program(tmp_path)


def arrays() -> list[Any]:
    return [np.arange(1024, dtype=np.int32), np.zeros(1024, np.int32)]


@pytest.mark.parametrize("device", ["npu1", "npu2"])
@pytest.mark.parametrize("nbytes", [1024, 4096, 16384])
def test_passthrough_runs_in_the_emulator_through_the_same_runtime(
    device: str, nbytes: int, tmp_path: Path
) -> None:
    npu, emulator = emulated_npu(device)
    given = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    taken = np.zeros_like(given)
    with npu.open(emulator.program(job(device, nbytes), tmp_path)) as opened:
        opened.run([given, taken])
    np.testing.assert_array_equal(taken, given)


def test_what_the_machine_gets_is_what_mlir_aie_passes(program: Program) -> None:
    machine = Copier()
    data = arrays()
    Npu(double([machine])).open(program).run(data)
    np.testing.assert_array_equal(data[1], np.arange(1024))
    (seen,) = machine.runs
    assert (seen[0], seen[2]) == (3, len(program.instructions))
    assert seen[1][: seen[2]].tobytes() == program.instructions
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_buffers_are_used_again(program: Program) -> None:
    npu = Npu(double([Copier()]))
    with npu.open(program) as opened:
        for _ in range(5):
            opened.run(arrays())
    assert (npu.pool.made, npu.pool.nbytes) == (3, 3 * 4096)
    npu.pool.clear()
    assert npu.pool.nbytes == 0


def test_a_smaller_array_does_not_see_what_was_in_its_buffer(program: Program) -> None:
    npu = Npu(double([Copier()]))
    with npu.open(program) as opened:
        opened.run([np.full(4096, 7, np.uint8), np.zeros(4096, np.uint8)])
        small = [np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)]
        opened.run(small)
    np.testing.assert_array_equal(small[1], np.arange(100))


def test_a_timeout_gives_the_program_and_its_buffers_up(program: Program) -> None:
    npu = Npu(double([Copier(State.ERT_CMD_STATE_TIMEOUT)]))
    opened = npu.open(program)
    with pytest.raises(NpuTimeout, match="after 0.5 s the NPU did not answer in time.*uq doctor"):
        opened.run(arrays(), timeout=500)
    with pytest.raises(UsageError, match="was closed; open it again"):
        opened.run(arrays())
    made = npu.pool.made
    with pytest.raises(NpuTimeout):
        npu.open(program).run(arrays())
    assert npu.pool.made == 2 * made  # nothing of the first run came back


@pytest.mark.parametrize(
    "state", [s for s in State if s.name.removeprefix("ERT_CMD_STATE_") != "COMPLETED"]
)
def test_no_other_state_is_taken_for_success(state: State, program: Program) -> None:
    with pytest.raises(DeviceError, match="uq doctor"):
        Npu(double([Copier(state)])).open(program).run(arrays())


def test_two_runs_under_way_have_buffers_of_their_own(program: Program) -> None:
    """The double refuses whoever touches a buffer of a run that is under way."""
    machine = Copier()
    npu = Npu(double([machine]))
    opened = npu.open(program)
    first, second, third = arrays(), arrays(), arrays()
    second[0] += 7
    running = opened.start(first, results=1)
    other = opened.start(second, results=1)
    assert machine.runs == []  # the double computes at the last moment
    running.wait()
    opened.start(third, results=1).wait()
    other.wait()
    for given, taken in (first, second, third):
        np.testing.assert_array_equal(taken, given)
    assert npu.pool.made == 6  # two sets: the third run has that of the first


def test_results_are_not_sent_and_inputs_not_fetched(program: Program) -> None:
    given, taken = np.ones(1024, np.int32), np.full(1024, 5, np.int32)
    machine = Copier()
    running = Npu(double([machine])).open(program).start([given, taken], results=1)
    given[:] = 2  # of no effect: it was sent
    running.wait()
    assert (given == 2).all() and (taken == 1).all()


def test_a_run_takes_the_instructions_of_another_sequence(program: Program) -> None:
    machine = Copier()
    opened = Npu(double([machine])).open(program)
    opened.start(arrays(), instructions=b"12345678").wait()
    assert machine.runs[0][1][: machine.runs[0][2]].tobytes() == b"12345678"


def test_the_double_guards_buffers_of_a_run(program: Program) -> None:
    xrt = double([Copier()])
    device = xrt.device(0)
    uuid = device.register_xclbin(xrt.xclbin(str(program.xclbin)))
    kernel = xrt.kernel(xrt.hw_context(device, uuid), "MLIR_AIE")
    code, *data = (xrt.bo(device, 4096, xrt.bo.flags.host_only, 0) for _ in range(3))
    run = kernel(3, code, 16, *data)
    with pytest.raises(RuntimeError, match="belongs to a run that is under way"):
        data[0].write(b"1234", 0)
    run.wait(10)
    data[0].write(b"1234", 0)


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("DRM_IOCTL_AMDXDNA_CREATE_HWCTX IOCTL failed (err=-22): Invalid argument", "another NPU"),
        ("DRM_IOCTL_AMDXDNA_CREATE_HWCTX IOCTL failed (err=2): No such file", "signed ones only"),
        ("mmap(addr=0x7f2d, len=67108864) failed (err=-11): try again", "locked memory is limited"),
        ("something else", "XRT says: something else"),
    ],
)
def test_a_context_that_is_refused_is_explained(said: str, meaning: str, program: Program) -> None:
    with pytest.raises(DeviceError, match=meaning) as info:
        Npu(double([Copier(refusal=said)])).open(program)
    assert said in str(info.value) and "\n" not in str(info.value)


def test_no_device_is_one_line() -> None:
    with pytest.raises(DeviceError, match="NPU 0 cannot be opened; XRT says: No such device with"):
        Npu(double([]))


def test_pyxrt_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    with pytest.raises(ToolMissing, match="pyxrt cannot be imported .*; run: uq doctor"):
        load_pyxrt()


def test_a_program_for_another_npu_is_refused(tmp_path: Path) -> None:
    write_program(job("npu1"), tmp_path)
    with pytest.raises(DeviceError, match="is for npu1, and this NPU is NPU Strix; build"):
        Npu(double([Copier()])).open(read_program(tmp_path))


def test_a_program_of_the_emulator_reaches_no_npu(tmp_path: Path) -> None:
    write_program(job(), tmp_path)
    with pytest.raises(DeviceError, match="was made for the emulator; use: uq npu build"):
        Npu(double([Copier()])).open(read_program(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("aie.xclbin", None, "aie.xclbin: is missing; make it with: uq npu build"),
        ("aie.xclbin", b"xclbin2\0" + bytes(100), "aie.xclbin"),
        ("aie.xclbin", bytes.fromhex("4155504e") + bytes(60), "raw kernel .* build an xclbin"),
        ("insts.bin", b"", "insts.bin"),
        ("insts.bin", bytes.fromhex("000109060400000000000000 10000000"), "device generation 9"),
        ("build.json", b"[]", "is no record of uq npu build"),
        ("build.json", b'{"buffers": [-1]}', "buffers are"),
    ],
)
def test_damaged_files_are_refused(
    name: str, content: bytes | None, message: str, program: Program
) -> None:
    folder = program.xclbin.parent
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        read_program(folder)
        buffers_of(folder)


def test_kernels_that_are_not_there(program: Program) -> None:
    with pytest.raises(BundleError, match="no single kernel attention; there are MLIR_AIE"):
        read_program(program.xclbin.parent, kernel="attention")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2, 3]], "array 0 is list; use a numpy array"),
        ([np.zeros((4, 4))[:, 1]], "array 0 must be C-contiguous"),
        ([np.frombuffer(b"1234", np.uint8)], "array 0 must be C-contiguous and writable"),
        ([np.array([None])], "array 0 is ndarray"),
        ([np.zeros(4)] * 6, "6 arrays for a kernel of 5 buffers"),
    ],
)
def test_arrays_that_cannot_be_sent(given: list[Any], message: str, program: Program) -> None:
    machine = Copier()
    with pytest.raises(UsageError, match=message):
        Npu(double([machine])).open(program).run(given)
    assert machine.runs == []


@pytest.mark.parametrize("arguments", [(3, "code", 16), (3.0, None, 16), (True, None, 16)])
def test_arguments_are_checked_before_pyxrt_swallows_them(
    arguments: tuple[Any, ...], program: Program
) -> None:
    opened = Npu(double([Copier()])).open(program)
    with pytest.raises(UsageError, match="argument (opcode|instr) takes a"):
        opened._call(arguments)


def test_the_double_swallows_what_pyxrt_swallows(program: Program) -> None:
    xrt = double([Copier()])
    device = xrt.device(0)
    uuid = device.register_xclbin(xrt.xclbin(str(program.xclbin)))
    kernel = xrt.kernel(xrt.hw_context(device, uuid), "MLIR_AIE")
    assert kernel(3, "no buffer", 16).wait(10) is State.ERT_CMD_STATE_ERROR
    assert kernel(3, 2**40, 16).wait(10) is State.ERT_CMD_STATE_ERROR


@pytest.mark.parametrize(
    "misuse",
    [
        lambda xrt, device: xrt.device(1.5),
        lambda xrt, device: xrt.bo(device, "4096", xrt.bo.flags.normal, 0),
        lambda xrt, device: xrt.bo(device, 4096, 1, 0),
        lambda xrt, device: xrt.bo(None, 4096, xrt.bo.flags.normal, 0),
        lambda xrt, device: device.register_xclbin("file.xclbin"),
        lambda xrt, device: device.get_info("name"),
        lambda xrt, device: xrt.hw_context(device, "uuid"),
        lambda xrt, device: xrt.bo(device, 8, xrt.bo.flags.normal, 0).sync(0),
        lambda xrt, device: xrt.bo(device, 8, xrt.bo.flags.normal, 0).read(1.0, 0),
    ],
)
def test_the_double_refuses_wrong_types(misuse: Callable[[Any, Any], Any]) -> None:
    xrt = double([Copier()])
    with pytest.raises(TypeError):
        misuse(xrt, xrt.device(0))


def test_the_double_fails_as_xrt_does(program: Program, tmp_path: Path) -> None:
    xrt = double([Copier()])
    device = xrt.device(0)
    xclbin = xrt.xclbin(str(program.xclbin))
    with pytest.raises(RuntimeError, match="not registered"):
        xrt.hw_context(device, xclbin.get_uuid())
    with pytest.raises(RuntimeError, match="No such kernel"):
        xrt.kernel(xrt.hw_context(device, device.register_xclbin(xclbin)), "other")
    with pytest.raises(RuntimeError, match="failed to open xclbin"):
        xrt.xclbin(str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match="past buffer size"):
        xrt.bo(device, 8, xrt.bo.flags.normal, 0).write(bytes(9), 0)
    with pytest.warns(DeprecationWarning), pytest.raises(RuntimeError):
        device.load_xclbin(xclbin)


def test_memory_of_the_device_changes_by_sync_only() -> None:
    xrt = double([Copier()])
    buffer = xrt.bo(xrt.device(0), 4, xrt.bo.flags.host_only, 0)
    buffer.write(b"abcd", 0)
    assert buffer.on_device.tobytes() == bytes(4)
    buffer.sync(xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE)
    buffer.on_device[0] = 0
    assert buffer.read(4, 0).tobytes() == b"abcd"
    buffer.sync(xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE, 2, 0)
    assert bytes(buffer.map()) == b"\0bcd"


def test_a_design_of_the_other_npu_is_not_emulated(tmp_path: Path) -> None:
    _, emulator = emulated_npu("npu1")
    with pytest.raises(DesignError, match="is for npu2, not for emulated npu1"):
        emulator.program(job("npu2"), tmp_path)


def test_an_emulator_runs_no_design_that_it_was_not_given(tmp_path: Path) -> None:
    npu, _ = emulated_npu("npu2")
    write_program(job(), tmp_path)
    with pytest.raises(DeviceError, match="is not of a design that this emulator was given"):
        npu.open(read_program(tmp_path))


def test_the_command_runs_on_an_npu(
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pyxrt", double([Copier()]))
    np.save(tmp_path / "given.npy", np.arange(1024, dtype=np.int32))
    arguments = ["npu", "run", str(program.xclbin.parent), "--input", str(tmp_path / "given.npy")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "buffer 1: 4,096 bytes, written, equals buffer 0" in capsys.readouterr().out
    taken = np.load(tmp_path / "out/buffer1.npy")
    np.testing.assert_array_equal(taken.view(np.int32), np.arange(1024))
