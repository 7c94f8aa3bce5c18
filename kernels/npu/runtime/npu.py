"""An NPU: programs are opened in contexts of their own, and run on arrays.

The order is that of XDNA devices: `xclbin`, `register_xclbin`, `hw_context`, `kernel(context,
name)`, buffers by the group of their argument, run, wait with a timeout. `load_xclbin` is for FPGA
cards and never called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError, ToolMissing, UqError, UsageError
from uq.formats.xdna.metadata import GLOBAL
from uq.kernels.npu.runtime.faults import NpuTimeout, ended, refused
from uq.kernels.npu.runtime.pool import Pool
from uq.kernels.npu.runtime.program import FIRST_BUFFER, Program

RUN_TXN = 3  # the opcode of a run that executes an instruction stream
TIMEOUT = 10_000  # milliseconds; the driver gives up after some 2 s by itself
MAX_INT = 2**31 - 1  # scalars of pyxrt are C int
# How drivers name the NPUs, old and new.
NAMES = {
    "npu1": ("phoenix", "hawk", "npu1"),
    "npu2": ("strix", "krackan", "npu4", "npu5", "npu6", "emulated npu2"),
}
Bytes = NDArray[np.uint8]


def load_pyxrt() -> Any:
    """XRT's Python module.

    Raises:
        ToolMissing: it cannot be imported.
    """
    try:
        return importlib.import_module("pyxrt")
    except ImportError as error:
        raise ToolMissing(f"pyxrt cannot be imported ({error}); run: uq doctor") from error


class Npu:
    """A device, and the buffers that its programs share."""

    def __init__(
        self, xrt: Any, index: int = 0, explain: Callable[[], UqError | None] = lambda: None
    ) -> None:
        """
        Args:
            xrt: pyxrt, or what stands for it.
            explain: why the last run failed, if the machine itself can tell.

        Raises:
            DeviceError: there is no such device.
        """
        self.xrt = xrt
        self.explain = explain
        try:
            self.device = xrt.device(index)
            self.name = str(self.device.get_info(xrt.xrt_info_device.name))
        except RuntimeError as error:
            raise refused(f"NPU {index} cannot be opened", error) from error
        self.pool = Pool(xrt, self.device)

    @property
    def generation(self) -> str | None:
        """npu1 or npu2; None for a name that is not known here."""
        name = self.name.lower()
        return next((key for key, parts in NAMES.items() if any(p in name for p in parts)), None)

    def open(self, program: Program) -> Opened:
        """Give a program a context.

        Raises:
            DeviceError: it is for another NPU, or the driver refuses it.
        """
        if self.generation not in (None, program.generation):
            raise DeviceError(
                f"{program.xclbin} is for {program.generation}, and this NPU is {self.name}; "
                f"build the design for {self.generation}"
            )
        emulated = self.name.startswith("emulated")
        if program.emulated and not emulated:
            raise DeviceError(f"{program.xclbin} was made for the emulator; use: uq npu build")
        return Opened(self, program)


class Opened:
    """A program in its context. Leave it, or `close` it, to give the columns back."""

    def __init__(self, npu: Npu, program: Program) -> None:
        self.npu = npu
        self.program = program
        xrt = npu.xrt
        try:
            xclbin = xrt.xclbin(str(program.xclbin))
            uuid = npu.device.register_xclbin(xclbin)
            self._context = xrt.hw_context(npu.device, uuid)
            self._kernel = xrt.kernel(self._context, program.kernel.name)
        except RuntimeError as error:
            raise refused(f"{program.xclbin} cannot be opened", error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._kernel is None

    def close(self) -> None:
        """Without references XRT destroys the context."""
        self._kernel = self._context = None

    def run(self, arrays: Sequence[NDArray[Any]], *, timeout: int = TIMEOUT) -> None:
        """Run once. Every array is sent, and filled with what its buffer holds afterwards.

        Args: and Raises: as `start` and `Running.wait`.
        """
        self.start(arrays).wait(timeout)

    def start(
        self,
        arrays: Sequence[NDArray[Any]],
        *,
        results: int | None = None,
        instructions: bytes | None = None,
    ) -> Running:
        """Send arrays and start a run on them, which goes on while the caller works.

        Args:
            arrays: one for each argument of the design's sequence; C-contiguous and writable.
            results: this many arrays, the last ones, are not sent but filled, and the others are
                only sent; None sends and fills every one.
            instructions: of another sequence of the same design; None: the program's own.

        Raises:
            UsageError: too many arrays, or one that cannot be sent.
            DeviceError: the run cannot be started.
        """
        views = [_bytes(array, index) for index, array in enumerate(arrays)]
        self._check(views)
        code = self.program.instructions if instructions is None else instructions
        sent = len(views) - (results or 0)
        with ExitStack() as stack:
            program = self._take(stack, len(code), "cacheable", 1)
            self._send(program, code)
            data = [
                self._take(stack, len(view), "host_only", FIRST_BUFFER + index)
                for index, view in enumerate(views)
            ]
            for view, buffer in zip(views[:sent], data[:sent], strict=True):
                self._send(buffer, view)
            run = self._call((RUN_TXN, program, len(code), *data))
            first = 0 if results is None else sent
            fills = tuple(zip(views[first:], data[first:], strict=True))
            return Running(self, run, fills, stack.pop_all())

    def _check(self, views: Sequence[Bytes]) -> None:
        if self._kernel is None:
            raise UsageError(f"{self.program.xclbin}: the program was closed; open it again")
        if len(views) > (most := len(self.program.buffers)):
            raise UsageError(f"{len(views)} arrays for a kernel of {most} buffers")

    def _take(self, stack: ExitStack, nbytes: int, flags: str, argument: int) -> Any:
        """A buffer for an argument."""
        group = self._kernel.group_id(argument)
        return stack.enter_context(self.npu.pool.take(max(nbytes, 1), flags, group))

    def _send(self, buffer: Any, content: bytes | Bytes) -> None:
        buffer.write(content, 0)
        self.sync(buffer, "XCL_BO_SYNC_BO_TO_DEVICE", len(content))

    def sync(self, buffer: Any, direction: str, size: int) -> None:
        if size:
            buffer.sync(getattr(self.npu.xrt.xclBOSyncDirection, direction), size, 0)

    def _call(self, arguments: Sequence[Any]) -> Any:
        self._check_arguments(arguments)
        try:
            return self._kernel(*arguments)
        except RuntimeError as error:
            raise refused("the run could not be started", error) from error

    def _check_arguments(self, arguments: Sequence[Any]) -> None:
        """pyxrt's call drops an argument of a wrong type without a word, and runs."""
        for value, wanted in zip(arguments, self.program.kernel.arguments, strict=False):
            if wanted.qualifier == GLOBAL:
                right = isinstance(value, self.npu.xrt.bo)
            else:
                right = type(value) is int and 0 <= value <= MAX_INT
            if not right:
                kind = "buffer" if wanted.qualifier == GLOBAL else f"whole number up to {MAX_INT}"
                raise UsageError(f"argument {wanted.name} takes a {kind}, not {value!r}")


@dataclass(frozen=True)
class Running:
    """A run under way. Its buffers are its own until `wait` has seen its end.

    Attributes:
        fills: arrays' bytes, and the buffers that they are filled from.
        held: the buffers; given back to the pool when it is closed.
    """

    opened: Opened
    run: Any
    fills: tuple[tuple[Bytes, Any], ...]
    held: ExitStack

    def wait(self, timeout: int = TIMEOUT) -> None:
        """Fill the arrays. After a failure the buffers are dropped: the NPU may still write.

        Args:
            timeout: milliseconds.

        Raises:
            UsageError: a timeout that XRT does not take.
            NpuTimeout: no answer in time; the program must be opened again.
            DeviceError: the run failed.
        """
        if not 0 < timeout <= MAX_INT:
            raise UsageError(f"a timeout of {timeout} ms; use 1 to {MAX_INT}")
        try:
            state = self.run.wait(timeout)
        except RuntimeError as error:
            raise refused("the run broke off", error) from error
        name = str(getattr(state, "name", state)).removeprefix("ERT_CMD_STATE_")
        if name != "COMPLETED":
            fault = ended(name, timeout)
            if isinstance(fault, NpuTimeout):
                self.opened.close()
            raise self.opened.npu.explain() or fault
        for view, buffer in self.fills:
            self.opened.sync(buffer, "XCL_BO_SYNC_BO_FROM_DEVICE", len(view))
            view[:] = np.asarray(buffer.read(len(view), 0)).view(np.uint8)
        self.held.close()


def _bytes(array: NDArray[Any], index: int) -> Bytes:
    """The array's own memory."""
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise UsageError(f"array {index} is {type(array).__name__}; use a numpy array of numbers")
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise UsageError(f"array {index} must be C-contiguous and writable; copy it")
    return array.reshape(-1).view(np.uint8)
