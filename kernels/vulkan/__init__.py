"""The Vulkan backend: GLSL sources in `shaders/`, SPIR-V modules in the package, their runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.kernels.vulkan.session import VulkanSession


def open_vulkan(bundle: Bundle, wish: str = "", *, max_context: int = 4096) -> VulkanSession:
    """Put a bundle on a GPU.

    Args:
        wish: number or part of the name of the device; nothing is the best one.
        max_context: tokens that the KV cache holds.

    Raises:
        DeviceError: no device, one that cannot run the kernels, or too little memory.
        UsageError: no device of that name; `max_context` is out of range.
    """
    from uq.formats.checkpoint.cache import cache_folder
    from uq.kernels.vulkan.device import choose
    from uq.kernels.vulkan.session import VulkanSession
    from uq.kernels.vulkan.sources import BundleSource

    folder, source = cache_folder() / "vulkan", BundleSource(bundle)
    return VulkanSession(
        bundle.config, source, choose(wish), pipeline_cache=folder, max_context=max_context
    )
