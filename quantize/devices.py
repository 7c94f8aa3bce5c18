"""Which device calibrates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uq.errors import DeviceError, UqError
from uq.formats.config import GemmaConfig
from uq.kernels.session import require_known
from uq.progress import Progress
from uq.text import size

if TYPE_CHECKING:
    from uq.kernels.vulkan.device import PhysicalGpu
    from uq.quantize.vulkan_engine import VulkanEngine

REAL = ("discrete", "integrated")  # kinds of GPU that `auto` takes


def open_engine(
    device: str,
    config: GemmaConfig,
    sequences: int,
    length: int,
    progress: Progress,
    *,
    spill: Path,
    limit: int | None = None,
) -> VulkanEngine | None:
    """The GPU that calibrates so many tokens, or None for main memory; one line says which.

    Args:
        spill: folder whose disk keeps the activations where the memory of the GPU is too small.
        limit: bytes of it, where it is the machine's own memory; None for all of it.
        device: `cpu`, `vulkan`, `vulkan:` and a number or a name, or `auto`, which takes a GPU with
            enough memory, else the CPU.

    Raises:
        DeviceError: the GPU that was asked for is not there, or has too little memory.
        UsageError: no GPU of that name.
    """
    if device == "cpu":
        return None
    if device != "auto":
        wish = device.partition(":")[2]
        return _on_gpu(wish, config, sequences * length, length, progress, spill, limit)
    try:
        if _chosen("").kind not in REAL:
            return None
    except UqError:  # no GPU: nothing to say
        return None
    try:
        return _on_gpu("", config, sequences * length, length, progress, spill, limit)
    except DeviceError as error:
        progress.note(f"calibration: on the CPU, because {error}")
        return None


def _on_gpu(
    wish: str,
    config: GemmaConfig,
    tokens: int,
    length: int,
    progress: Progress,
    spill: Path,
    limit: int | None,
) -> VulkanEngine:
    from uq.kernels.vulkan import pipeline_cache
    from uq.kernels.vulkan.heaps import SHARING
    from uq.quantize.vulkan_calibration import FOLLOWED
    from uq.quantize.vulkan_engine import VulkanEngine, device_bytes

    require_known(config, "calibration on a GPU", "use --device cpu", FOLLOWED)
    gpu = _chosen(wish)
    shared = gpu.kind in SHARING  # a discrete GPU's memory is not what the limit is about
    room = min(limit, gpu.memory) if limit is not None and shared else gpu.memory
    needed = device_bytes(config, tokens, length)
    on_disk = needed > room
    if on_disk:
        needed = device_bytes(config, tokens, length, on_disk=True)
    if needed > room:
        raise DeviceError(
            f"{gpu.name}: {size(room)} of its {size(gpu.memory)} of memory may be used, and "
            f"{size(needed)} are needed, with the activations on the disk; use --device cpu"
        )
    where = "; activations wait on the disk" if on_disk else ""
    progress.note(f"calibration: on {gpu.name}, with about {size(needed)} of its memory{where}")
    return VulkanEngine(gpu, pipeline_cache(), spill=spill if on_disk else None)


def _chosen(wish: str) -> PhysicalGpu:
    from uq.kernels.vulkan.device import choose

    return choose(wish)
