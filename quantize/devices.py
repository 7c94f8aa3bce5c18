"""Which device calibrates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uq.errors import DeviceError, UqError
from uq.formats.config import GemmaConfig
from uq.kernels.session import require_known
from uq.progress import Progress
from uq.text import size

if TYPE_CHECKING:
    from uq.kernels.vulkan.device import PhysicalGpu
    from uq.quantize.vulkan_calibration import VulkanEngine

REAL = ("discrete", "integrated")  # kinds of GPU that `auto` takes


def open_engine(
    device: str, config: GemmaConfig, sequences: int, length: int, progress: Progress
) -> VulkanEngine | None:
    """The GPU that calibrates so many tokens, or None for main memory; one line says which.

    Args:
        device: `cpu`, `vulkan`, `vulkan:` and a number or a name, or `auto`, which takes a GPU with
            enough memory, else the CPU.

    Raises:
        DeviceError: the GPU that was asked for is not there, or has too little memory.
        UsageError: no GPU of that name.
    """
    if device == "cpu":
        return None
    if device != "auto":
        return _on_gpu(device.partition(":")[2], config, sequences, length, progress)
    try:
        if _chosen("").kind not in REAL:
            return None
    except UqError:  # no GPU: nothing to say
        return None
    try:
        return _on_gpu("", config, sequences, length, progress)
    except DeviceError as error:
        progress.note(f"calibration: on the CPU, because {error}")
        return None


def _on_gpu(
    wish: str, config: GemmaConfig, sequences: int, length: int, progress: Progress
) -> VulkanEngine:
    from uq.kernels.vulkan import pipeline_cache
    from uq.quantize.vulkan_calibration import VulkanEngine, device_bytes

    require_known(config, "calibration on a GPU", "use --device cpu")
    gpu = _chosen(wish)
    needed = device_bytes(config, sequences * length, length)
    if needed > gpu.memory:
        raise DeviceError(
            f"{gpu.name} has {size(gpu.memory)} of memory, and {size(needed)} are needed; use "
            "fewer --calibration-tokens or --device cpu"
        )
    progress.note(f"calibration: on {gpu.name}, with about {size(needed)} of its memory")
    return VulkanEngine(gpu, pipeline_cache())


def _chosen(wish: str) -> PhysicalGpu:
    from uq.kernels.vulkan.device import choose

    return choose(wish)
