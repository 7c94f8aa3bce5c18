"""The Vulkan backend: GLSL sources in `shaders/`, SPIR-V modules in the package, their runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from uq.formats.bundle import Bundle
    from uq.formats.checkpoint import Checkpoint
    from uq.formats.config import GemmaConfig
    from uq.kernels.numerics import Numerics
    from uq.kernels.vulkan.batch import VulkanBatch
    from uq.kernels.vulkan.session import VulkanSession
    from uq.kernels.vulkan.weights import Source


def open_vulkan(
    bundle: Bundle,
    wish: str = "",
    *,
    max_context: int = 4096,
    numerics: Numerics | None = None,
    speculate: bool = False,
) -> VulkanSession:
    """Put a bundle on a GPU.

    Args:
        wish: number or part of the name of the device; nothing is the best one.
        max_context: tokens that the KV cache holds.
        numerics: with INT8 activations, or INT8 keys and values; None: 16 bits.
        speculate: check guessed tokens where the text repeats itself.

    Raises:
        DeviceError: no device, one that cannot run the kernels, or too little memory.
        UsageError: no device of that name; `max_context` is out of range; no such numerics.
    """
    from uq.kernels.vulkan.sources import BundleSource

    return _open(bundle.config, BundleSource(bundle), wish, max_context, numerics, speculate)


def open_vulkan_batch(
    bundle: Bundle,
    wish: str = "",
    *,
    slots: int,
    max_context: int = 4096,
    numerics: Numerics | None = None,
) -> VulkanBatch:
    """Put a bundle on a GPU to run several sequences together.

    Args:
        slots: sequences at a time.
        max_context: tokens that each of their KV caches holds.

    Raises: as `open_vulkan`, and UsageError: `slots` is out of range.
    """
    from uq.kernels.numerics import FLOAT
    from uq.kernels.vulkan.batch import VulkanBatch
    from uq.kernels.vulkan.device import choose
    from uq.kernels.vulkan.sources import BundleSource

    return VulkanBatch(
        bundle.config,
        BundleSource(bundle),
        choose(wish),
        slots=slots,
        pipeline_cache=pipeline_cache(),
        max_context=max_context,
        numerics=numerics or FLOAT,
    )


def open_float(checkpoint: Checkpoint, wish: str = "", *, max_context: int = 4096) -> VulkanSession:
    """Put a checkpoint on a GPU as it is: in float16 or bfloat16, any other kind in float32.

    Raises: as `open_vulkan`, and CheckpointError: the checkpoint is broken.
    """
    from uq.kernels.vulkan.sources import CheckpointSource

    kind = checkpoint.dtype if checkpoint.dtype in ("f16", "bf16") else "f32"
    return _open(checkpoint.config, CheckpointSource(checkpoint, kind), wish, max_context)


def _open(
    config: GemmaConfig,
    source: Source,
    wish: str,
    max_context: int,
    numerics: Numerics | None = None,
    speculate: bool = False,
) -> VulkanSession:
    from uq.kernels.numerics import FLOAT
    from uq.kernels.vulkan.device import choose
    from uq.kernels.vulkan.session import VulkanSession

    return VulkanSession(
        config,
        source,
        choose(wish),
        pipeline_cache=pipeline_cache(),
        max_context=max_context,
        numerics=numerics or FLOAT,
        speculate=speculate,
    )


def pipeline_cache() -> Path:
    """Folder of the drivers' compiled kernels."""
    from uq.formats.checkpoint.cache import cache_folder

    return cache_folder() / "vulkan"
