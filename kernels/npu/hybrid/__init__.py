"""Models with their attention on an NPU, or in its emulator, and the rest on the CPU."""

from __future__ import annotations

from uq.errors import DeviceError, UsageError
from uq.formats.bundle import Bundle
from uq.kernels.npu.hybrid.attention import NpuAttention
from uq.kernels.npu.hybrid.designs import CarriedDesigns, Designs, EmulatedDesigns
from uq.kernels.npu.hybrid.placement import obstacle
from uq.kernels.npu.hybrid.programs import Programs
from uq.kernels.npu.hybrid.session import NpuSession
from uq.kernels.npu.runtime.emulated import emulated_npu
from uq.kernels.npu.runtime.npu import NAMES, Npu, load_pyxrt
from uq.kernels.npu.toolchain.carried import DEVICE_OF
from uq.kernels.numerics import Numerics
from uq.kernels.session import Device, require_known

EMULATED_BY_DEFAULT = "npu2"  # where neither the user nor the bundle's layout says which NPU


def open_npu(
    bundle: Bundle, *, max_context: int, threads: int | None, numerics: Numerics | None
) -> NpuSession:
    """On the first NPU, by the designs that the bundle carries compiled.

    Raises:
        ToolMissing: there is no pyxrt.
        DeviceError: no NPU, an unknown one, or designs that are not compiled.
        BundleError: the bundle carries no designs, or not those of this NPU.
    """
    npu = Npu(load_pyxrt())
    if npu.generation is None:
        known = ", ".join(name for names in NAMES.values() for name in names)
        raise DeviceError(f"the NPU {npu.name} is not known; uq has kernels for {known}")
    designs = CarriedDesigns(bundle.path, bundle.config, npu.generation)
    device = Device("npu", npu.name, "XRT")
    return _session(bundle, npu, designs, device, max_context, threads, numerics)


def open_emulated(
    bundle: Bundle,
    generation: str = "",
    *,
    max_context: int,
    threads: int | None,
    numerics: Numerics | None,
) -> NpuSession:
    """In the functional emulator, through the same runtime.

    Args:
        generation: npu1 or npu2; by default that of the bundle's layout, else npu2.
    """
    layouts = {record.layout for record in bundle.manifest.tensors.values()}
    named = [DEVICE_OF[layout] for layout in sorted(layouts) if layout in DEVICE_OF]
    npu, emulator = emulated_npu(generation or (named or [EMULATED_BY_DEFAULT])[0])
    device = Device("npu-emulator", npu.name, "functional emulator without a clock")
    designs = EmulatedDesigns(emulator)
    return _session(bundle, npu, designs, device, max_context, threads, numerics)


def _session(
    bundle: Bundle,
    npu: Npu,
    designs: Designs,
    device: Device,
    max_context: int,
    threads: int | None,
    numerics: Numerics | None,
) -> NpuSession:
    config, bits = bundle.config, _bits(numerics)
    assert npu.generation is not None
    require_known(config, "the NPU session", "use --device cpu")
    sizes = npu.generation, bits, max_context
    obstacles = [obstacle(config, layer, *sizes) for layer in range(config.num_layers)]
    if all(obstacles):
        raise DeviceError(f"no layer can run on the NPU: {obstacles[0]}; use --device cpu")
    attention = NpuAttention(config, npu.generation, Programs(npu, designs).start, bits)
    return NpuSession(
        config, bundle, attention, obstacles, device, max_context=max_context, threads=threads
    )


def _bits(numerics: Numerics | None) -> int:
    """Of keys and values: the kernels have no floating point."""
    if numerics is not None and numerics.activations is not None:
        raise UsageError("the NPU session keeps the inputs of linears as the CPU does")
    return 8 if numerics is None or numerics.kv is None else numerics.kv.bits
