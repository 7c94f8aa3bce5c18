"""Where a bundle can run. Each backend says in one sentence why it is available or is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from uq.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.formats.checkpoint import Checkpoint
    from uq.kernels.numerics import Numerics
    from uq.kernels.session import BatchSession, Session


DEVICES = ("auto", "vulkan", "vulkan:N", "vulkan:NAME", "npu", "npu-emulator", "cpu", "reference")
EMULATED = ("", "npu1", "npu2")


@dataclass(frozen=True)
class Options:
    """How a bundle is opened.

    Attributes:
        max_context: tokens that a KV cache can hold.
        threads: None takes one per core.
        numerics: what is kept in integers beside the weights; None: nothing.
        speculate: check guessed tokens where a greedy text repeats itself.
    """

    max_context: int
    threads: int | None = None
    numerics: Numerics | None = None
    speculate: bool = False


Opener = Callable[["Bundle", Options], "Session"]
BatchOpener = Callable[["Bundle", int, Options], "BatchSession"]


@dataclass(frozen=True)
class Backend:
    """One way of running a bundle.

    Attributes:
        reason: one sentence, for `uq doctor` and for the error when it is asked for in vain.
        opener: (bundle, options) -> Session; None when it is not available.
        batch_opener: (bundle, slots, options) -> BatchSession; None when it is not available.
        preferred: `auto` takes it where it is available.
    """

    name: str
    reason: str
    opener: Opener | None = None
    batch_opener: BatchOpener | None = None
    preferred: bool = True

    @property
    def available(self) -> bool:
        return self.opener is not None


def backends() -> tuple[Backend, ...]:
    """All backends, the fastest first."""
    return (_vulkan(""), _npu(), _npu_emulator(""), _cpu())


def _backend(name: str, wish: str) -> Backend:
    """One backend; `wish` names one of its several devices."""
    if name == "vulkan":
        return _vulkan(wish)
    if name == "npu-emulator":
        return _npu_emulator(wish)
    if name == "reference":
        return _reference()
    return _npu() if name == "npu" else _cpu()


def open_session(
    bundle: Bundle,
    device: str = "auto",
    *,
    max_context: int,
    threads: int | None = None,
    numerics: Numerics | None = None,
    speculate: bool = False,
) -> Session:
    """Run a bundle on `device`, or on the fastest available one for `auto`.

    Args: as in `Options`.

    Raises:
        DeviceError: the device is not available; the message says why.
        UsageError: no such device, or it has no such numerics.
    """
    options = Options(max_context, threads, numerics, speculate)

    def opened(backend: Backend) -> Session | None:
        return backend.opener and backend.opener(bundle, options)

    return _opened(device, opened)


def is_device(text: str) -> bool:
    """Whether `text` is one of `DEVICES`; vulkan has several to choose from, the emulator two."""
    name, colon, wish = text.partition(":")
    if name == "npu-emulator":
        return wish in EMULATED[bool(colon) :]
    return bool(wish) and name == "vulkan" if colon else name in DEVICES


def device_numerics(device: str, numerics: Numerics) -> Numerics:
    """What a device keeps in integers when it is asked for `numerics`: a GPU that is asked for by
    name what its kernels have, any other device nothing."""
    from uq.kernels.numerics import FLOAT
    from uq.kernels.vulkan.engine import has_numerics

    is_gpu = device.partition(":")[0] == "vulkan"
    return numerics if is_gpu and has_numerics(numerics) else FLOAT


def open_reference(checkpoint: Checkpoint, device: str, *, max_context: int) -> Session:
    """Run a checkpoint in floating point: on a GPU as it is stored, else in float32.

    Args:
        device: `auto` takes a GPU where the weights fit, else the CPU.

    Raises:
        DeviceError: the device is not available, or has too little memory.
        UsageError: no such device.
    """
    from uq.kernels.reference import ReferenceSession
    from uq.kernels.vulkan import open_float

    name, _, wish = device.partition(":")
    if not is_device(device):
        raise UsageError(f"--reference-device {device} is not known; use {', '.join(DEVICES)}")
    if name.startswith("npu"):
        raise DeviceError(f"--reference-device {device}: it has no floating point; use cpu")
    if name == "vulkan":
        return open_float(checkpoint, wish, max_context=max_context)
    if name == "auto" and _vulkan("").preferred:
        try:
            return open_float(checkpoint, max_context=max_context)
        except DeviceError as error:
            print(f"reference: {error}; it runs on the CPU", file=sys.stderr)
    return ReferenceSession(checkpoint, max_context=max_context)


def open_batch(
    bundle: Bundle,
    device: str = "auto",
    *,
    slots: int,
    max_context: int,
    threads: int | None = None,
    numerics: Numerics | None = None,
) -> BatchSession:
    """Run several sequences of a bundle together, as `open_session` chooses the device.

    Args:
        slots: sequences at a time; the others are those of `Options`, for each sequence.

    Raises:
        DeviceError: the device is not available; the message says why.
        UsageError: no such device or numerics, or too many slots.
    """
    options = Options(max_context, threads, numerics)

    def opened(backend: Backend) -> BatchSession | None:
        return backend.batch_opener and backend.batch_opener(bundle, slots, options)

    return _opened(device, opened)


S = TypeVar("S")


def _opened(device: str, open_it: Callable[[Backend], S | None]) -> S:
    """What `open_it` makes of the device, or of the fastest one that it makes something of."""
    if not is_device(device):
        raise UsageError(f"--device {device} is not known; use {', '.join(DEVICES)}")
    name, _, wish = device.partition(":")
    if name == "auto":
        return _fastest(open_it)
    backend = _backend(name, wish)
    if (opened := open_it(backend)) is None:
        raise DeviceError(f"--device {device}: {backend.reason}; use --device cpu")
    return opened


def _fastest(open_it: Callable[[Backend], S | None]) -> S:
    for backend in (*backends(), _reference()):
        if not backend.preferred:
            continue
        try:
            if (opened := open_it(backend)) is not None:
                return opened
        except DeviceError as error:
            print(f"{backend.name}: {error}; trying the next device", file=sys.stderr)
    raise DeviceError("no device can run this bundle")


def first_run_note(device: str) -> str | None:
    """What a person should know before a long silence: the CPU kernels are compiled once."""
    if device not in ("auto", "cpu"):
        return None
    from uq.kernels.cpu import kernels_are_compiled

    if kernels_are_compiled():
        return None
    return "compiling the kernels for this processor, once; about half a minute"


def _vulkan(wish: str) -> Backend:
    from uq.kernels.vulkan.device import choose

    try:
        gpu = choose(wish)
    except DeviceError as error:
        return Backend("vulkan", str(error), preferred=False)

    def open_it(bundle: Bundle, options: Options) -> Session:
        from uq.kernels.vulkan import open_vulkan

        return open_vulkan(
            bundle,
            wish,
            max_context=options.max_context,
            numerics=options.numerics,
            speculate=options.speculate,
        )

    def open_batch(bundle: Bundle, slots: int, options: Options) -> BatchSession:
        from uq.kernels.vulkan import open_vulkan_batch

        return open_vulkan_batch(
            bundle, wish, slots=slots, max_context=options.max_context, numerics=options.numerics
        )

    return Backend("vulkan", gpu.summary, open_it, open_batch, preferred=gpu.kind != "cpu")


def _npu() -> Backend:
    """`auto` does not take it: nothing of it has run on an NPU yet."""
    if (missing := _without("xdsl", "pyxrt")) is not None:
        return Backend("npu", missing, preferred=False)

    def open_it(bundle: Bundle, options: Options) -> Session:
        from uq.kernels.npu.hybrid import open_npu

        return open_npu(bundle, **_npu_options(options))

    reason = "attention runs there, by designs compiled into the bundle; tried on no NPU yet"
    return Backend("npu", reason, open_it, _no_npu_batch, preferred=False)


def _npu_emulator(wish: str) -> Backend:
    """`auto` never takes it: it is for tests, and slow."""
    if (missing := _without("xdsl")) is not None:
        return Backend("npu-emulator", missing, preferred=False)

    def open_it(bundle: Bundle, options: Options) -> Session:
        from uq.kernels.npu.hybrid import open_emulated

        return open_emulated(bundle, wish, **_npu_options(options))

    reason = "attention as an NPU would compute it, without a clock"
    return Backend("npu-emulator", reason, open_it, _no_npu_batch, preferred=False)


ADVICE = {
    "xdsl": "run: pip install 'unicorn-quant[npu]'",
    "pyxrt": "XRT's Python module; run: uq doctor",
}


def _without(*modules: str) -> str | None:
    """What is missing of some modules, and the remedy; None when all are there."""
    for name in modules:
        there = sys.modules[name] if name in sys.modules else find_spec(name)
        if there is None:
            return f"{name} is not installed: {ADVICE[name]}"
    return None


def _npu_options(options: Options) -> dict[str, Any]:
    if options.speculate:
        raise UsageError("the NPU does not check guessed tokens; use --device vulkan")
    return {
        "max_context": options.max_context,
        "threads": options.threads,
        "numerics": options.numerics,
    }


def _no_npu_batch(bundle: Bundle, slots: int, options: Options) -> BatchSession:
    raise UsageError("the NPU runs one sequence; use --device cpu or vulkan for several")


def _cpu() -> Backend:
    return Backend("cpu", "it runs on every machine", _open_cpu, _open_cpu_batch)


def _open_cpu(bundle: Bundle, options: Options) -> Session:
    from uq.kernels.cpu import open_cpu

    _check_cpu(options)
    return open_cpu(bundle, max_context=options.max_context, threads=options.threads)


def _open_cpu_batch(bundle: Bundle, slots: int, options: Options) -> BatchSession:
    import uq.kernels.cpu  # noqa: F401  # before numba: it says how threads wait
    from uq.kernels.cpu.batch import CpuBatch

    _check_cpu(options)
    return CpuBatch(
        bundle.config,
        bundle,
        slots=slots,
        max_context=options.max_context,
        threads=options.threads,
    )


def _reference() -> Backend:
    """What runs every model, for those that no other device computes yet."""

    def open_it(bundle: Bundle, options: Options) -> Session:
        from uq.kernels.numerics import FLOAT
        from uq.kernels.reference import ReferenceSession
        from uq.kernels.weights import BundleWeights

        if options.speculate:
            raise UsageError("the reference does not check guessed tokens; use --device vulkan")
        return ReferenceSession(
            BundleWeights(bundle),
            max_context=options.max_context,
            numerics=options.numerics or FLOAT,
        )

    return Backend("reference", "float32 on dequantized weights, in NumPy: slow", open_it)


def _check_cpu(options: Options) -> None:
    from uq.kernels.numerics import FLOAT

    if options.numerics not in (None, FLOAT):
        raise UsageError(
            "the CPU keeps inputs of linears, keys and values in float32; use --device vulkan for "
            "--activations and --kv"
        )
    if options.speculate:
        raise UsageError("the CPU does not check guessed tokens; use --device vulkan")
