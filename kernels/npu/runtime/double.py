"""A strict double of pyxrt: its names, signatures, conversions and traps, over a machine of ours.

Behind it stands a `Machine`, which the emulator is and tests write. As in pyxrt: wrong types are a
TypeError, failures of XRT are RuntimeErrors, integers are C ints, `kernel(...)` drops arguments of
wrong types without a word, and `load_xclbin` warns that it is deprecated. Stricter than hardware:
host and device memory differ until a sync, a run that lacks an argument fails, and nobody touches a
buffer while a run has it. A run computes when it is awaited, the latest moment that hardware could.

Written after src/python/pybind11/src/pyxrt.cpp of XRT (August 2026).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from uq.errors import UqError
from uq.formats.xdna.metadata import GLOBAL, Kernel, parse_metadata
from uq.formats.xdna.records import Window
from uq.formats.xdna.sections import Connection, parse_table
from uq.formats.xdna.xclbin import Kind, parse_xclbin

INT = range(-(2**31), 2**31)


class State(IntEnum):
    """ert_cmd_state; 3, RUNNING, is not exported."""

    ERT_CMD_STATE_NEW = 1
    ERT_CMD_STATE_QUEUED = 2
    ERT_CMD_STATE_COMPLETED = 4
    ERT_CMD_STATE_ERROR = 5
    ERT_CMD_STATE_ABORT = 6
    ERT_CMD_STATE_SUBMITTED = 7
    ERT_CMD_STATE_TIMEOUT = 8
    ERT_CMD_STATE_NORESPONSE = 9
    ERT_CMD_STATE_SKERROR = 10
    ERT_CMD_STATE_SKCRASHED = 11


class Direction(Enum):
    """xclBOSyncDirection."""

    XCL_BO_SYNC_BO_TO_DEVICE = 0
    XCL_BO_SYNC_BO_FROM_DEVICE = 1
    XCL_BO_SYNC_BO_GMIO_TO_AIE = 2
    XCL_BO_SYNC_BO_AIE_TO_GMIO = 3


class Flags(Enum):
    """bo.flags."""

    normal = 0
    cacheable = 1
    device_only = 2
    host_only = 3
    p2p = 4
    svm = 5


@dataclass(frozen=True)
class Info:
    """A key of `device.get_info`; all values are text."""

    key: str


INFO = SimpleNamespace(name=Info("name"), bdf=Info("bdf"), platform=Info("platform"))


class Machine(Protocol):
    """What runs."""

    name: str

    def admit(self, xclbin: Xclbin) -> None:
        """Raises RuntimeError: there is no context for it."""
        ...

    def execute(self, xclbin: Xclbin, arguments: Mapping[int, Any], timeout: int) -> State:
        """Run a kernel on its arguments: integers, and the device's bytes of buffers."""
        ...


class Uuid:
    """uuid."""

    def __init__(self, text: str) -> None:
        _typed(text, str, "uuid")
        self._text = text

    def to_string(self) -> str:
        return self._text


class XclbinKernel:
    def __init__(self, kernel: Kernel) -> None:
        self.metadata = kernel

    def get_name(self) -> str:
        return self.metadata.name

    def get_num_args(self) -> int:
        return len(self.metadata.arguments)


class Xclbin:
    """xclbin."""

    def __init__(self, filename: str) -> None:
        path = Path(_typed(filename, str, "xclbin"))
        try:
            self.content = parse_xclbin(path.read_bytes(), path.name)
        except (OSError, UqError) as error:
            raise RuntimeError(f"failed to open xclbin file {path}: {error}") from error
        self.path = path
        self.kernels = [XclbinKernel(kernel) for kernel in self._metadata()]

    def get_kernels(self) -> list[XclbinKernel]:
        return self.kernels

    def get_uuid(self) -> Uuid:
        return Uuid(self.content.uuid.hex())

    def get_xsa_name(self) -> str:
        return self.content.platform

    def group(self, argument: int) -> int:
        """The memory of an argument."""
        section = self.content.find(Kind.CONNECTIVITY)
        rows = parse_table(Connection, Window.of(section.data, "connectivity")) if section else ()
        for row in rows:
            if row.argument == argument:
                return row.memory
        raise RuntimeError(f"no memory bank for argument {argument}")

    def _metadata(self) -> tuple[Kernel, ...]:
        section = self.content.find(Kind.EMBEDDED_METADATA)
        return parse_metadata(section.data, self.path.name) if section else ()


class Device:
    """device."""

    def __init__(self, machine: Machine | None, index: int | str) -> None:
        if machine is None:
            raise RuntimeError(f"No such device with index '{index}'")
        self._machine = machine
        self.registered: dict[str, Xclbin] = {}

    def register_xclbin(self, xclbin: Xclbin) -> Uuid:
        _typed(xclbin, Xclbin, "register_xclbin")
        uuid = xclbin.get_uuid()
        self.registered[uuid.to_string()] = xclbin
        return uuid

    def load_xclbin(self, xclbin: Xclbin | str) -> Uuid:
        warnings.warn("pyxrt.device.load_xclbin() is deprecated", DeprecationWarning, stacklevel=2)
        raise RuntimeError("load_xclbin is not supported on this device")

    def get_info(self, key: Info) -> str:
        _typed(key, Info, "get_info")
        return {INFO.name: self._machine.name, INFO.bdf: "0000:c5:00.1"}.get(key, "NA")

    @property
    def machine(self) -> Machine:
        return self._machine


class HwContext:
    """hw_context."""

    def __init__(self, device: Device, uuid: Uuid) -> None:
        _typed(device, Device, "hw_context")
        _typed(uuid, Uuid, "hw_context")
        if uuid.to_string() not in device.registered:
            raise RuntimeError("xclbin with that uuid is not registered")
        self.device = device
        self.xclbin = device.registered[uuid.to_string()]
        device.machine.admit(self.xclbin)


class Bo:
    """bo: host memory, and what the device has of it."""

    flags = Flags

    def __init__(self, device: Device | HwContext, size: int, flags: Flags, group: int) -> None:
        if not isinstance(device, Device | HwContext):
            raise TypeError("bo(): incompatible constructor arguments")
        _typed(flags, Flags, "bo")
        if not (_int(size) and _int(group)) or size <= 0:
            raise TypeError("bo(): incompatible constructor arguments")
        self._host = np.zeros(size, np.uint8)
        self.on_device = np.zeros(size, np.uint8)
        self.runs = 0  # that have it

    def size(self) -> int:
        return len(self._host)

    def write(self, data: Any, seek: int) -> None:
        content = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        self._inside(len(content), seek)
        self._host[seek : seek + len(content)] = content

    def read(self, size: int, skip: int) -> NDArray[np.int8]:
        self._inside(size, skip)
        return self._host[skip : skip + size].view(np.int8).copy()

    def map(self) -> memoryview:
        return self._host.data

    def sync(self, direction: Direction, size: int | None = None, offset: int = 0) -> None:
        _typed(direction, Direction, "sync")
        length = self.size() - offset if size is None else size
        self._inside(length, offset)
        part = slice(offset, offset + length)
        if direction is Direction.XCL_BO_SYNC_BO_TO_DEVICE:
            self.on_device[part] = self._host[part]
        elif direction is Direction.XCL_BO_SYNC_BO_FROM_DEVICE:
            self._host[part] = self.on_device[part]
        else:
            raise RuntimeError("GMIO is not supported on this device")

    def _inside(self, size: int, offset: int) -> None:
        if not (_int(size) and _int(offset)):
            raise TypeError("bo: incompatible function arguments")
        if self.runs:
            raise RuntimeError("the buffer belongs to a run that is under way")
        if size < 0 or offset < 0 or offset + size > self.size():
            raise RuntimeError("attempting to access past buffer size: Invalid argument")


class XrtKernel:
    """kernel."""

    def __init__(self, context: HwContext, name: str) -> None:
        _typed(context, HwContext, "kernel")
        _typed(name, str, "kernel")
        found = [kernel for kernel in context.xclbin.kernels if kernel.get_name() == name]
        if not found:
            raise RuntimeError(f"No such kernel '{name}'")
        self.context = context
        self.metadata = found[0].metadata

    def group_id(self, argument: int) -> int:
        if not _int(argument):
            raise TypeError("group_id(): incompatible function arguments")
        return self.context.xclbin.group(argument)

    def __call__(self, *arguments: Any) -> Run:
        """Takes what it can use and forgets the rest."""
        usable = {
            index: value
            for index, value in enumerate(arguments)
            if isinstance(value, Bo) or (isinstance(value, int) and value in INT)
        }
        return Run(self, usable)


class Run:
    """run, started."""

    def __init__(self, kernel: XrtKernel, arguments: Mapping[int, Any]) -> None:
        if len(arguments) > len(kernel.metadata.arguments):
            raise RuntimeError("Invalid argument index")
        self._kernel = kernel
        self._arguments = arguments
        self._state = State.ERT_CMD_STATE_SUBMITTED
        self._claim(1)

    def wait(self, timeout_ms: int = 0) -> State:
        """0 waits for ever."""
        if not _int(timeout_ms) or timeout_ms < 0:
            raise TypeError("wait(): incompatible function arguments")
        if self._state is State.ERT_CMD_STATE_SUBMITTED:
            self._state = self._go(timeout_ms)
            if self._state is State.ERT_CMD_STATE_COMPLETED:
                self._claim(-1)  # after any other end the device may still write
        return self._state

    def _claim(self, change: int) -> None:
        for value in self._arguments.values():
            if isinstance(value, Bo):
                value.runs += change

    def state(self) -> State:
        return self._state

    def _go(self, timeout: int) -> State:
        wanted = self._kernel.metadata.arguments
        for index, value in self._arguments.items():
            if (wanted[index].qualifier == GLOBAL) is not isinstance(value, Bo):
                return State.ERT_CMD_STATE_ERROR
        if any(index not in self._arguments for index in range(3)):
            return State.ERT_CMD_STATE_ERROR
        values = {
            index: value.on_device if isinstance(value, Bo) else value
            for index, value in self._arguments.items()
        }
        context = self._kernel.context
        return context.device.machine.execute(context.xclbin, values, timeout)


def double(machines: Sequence[Machine]) -> Any:
    """A module like pyxrt with these devices."""

    def device(index: int | str = 0) -> Device:
        if not isinstance(index, int | str):
            raise TypeError("device(): incompatible constructor arguments")
        there = isinstance(index, int) and 0 <= index < len(machines)
        return Device(machines[index] if there else None, index)  # type: ignore[index]

    return SimpleNamespace(
        device=device,
        xclbin=Xclbin,
        hw_context=HwContext,
        kernel=XrtKernel,
        bo=Bo,
        uuid=Uuid,
        ert_cmd_state=State,
        xclBOSyncDirection=Direction,
        xrt_info_device=INFO,
    )


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{where}(): incompatible function arguments: {value!r}")
    return value


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
