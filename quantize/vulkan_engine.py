"""A GPU that calibrates: opened for a calibration, and the memory that one takes of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from uq.formats.config import GemmaConfig
from uq.formats.spec import GROUPS
from uq.kernels.vulkan.dense.grids import SYSTEM_BYTES
from uq.kernels.vulkan.dense.matrix import padded
from uq.kernels.vulkan.dense.workshop import Workshop
from uq.kernels.vulkan.device import PhysicalGpu
from uq.kernels.vulkan.heaps import SHARING
from uq.quantize.calibration_engine import TokenRows
from uq.quantize.plan import GptqOptions, WorkSizes
from uq.quantize.vulkan_calibration import VulkanCalibration, explained
from uq.quantize.vulkan_waiting import OnDevice, OnDisk


class VulkanEngine:
    """Calibrates on one GPU, which is opened when a calibration begins."""

    def __init__(
        self,
        physical: PhysicalGpu,
        pipeline_cache: Path,
        *,
        spill: Path | None = None,
        timed: bool = False,
    ) -> None:
        """
        Args:
            spill: folder whose disk keeps the activations; None keeps them on the device. The
                bytes of the bundle are the same.
            timed: as of `Stream`.
        """
        self._physical, self._cache, self._timed = physical, pipeline_cache, timed
        self._spill = spill
        self.workshop: Workshop | None = None

    @property
    def name(self) -> str:
        return f"vulkan {self._physical.name}"

    @property
    def elsewhere(self) -> bool:
        return self._physical.kind not in SHARING

    def begin(
        self, config: GemmaConfig, rows: Iterable[TokenRows], options: GptqOptions
    ) -> VulkanCalibration:
        """Raises DeviceError: the device fails."""
        self.close()
        with explained():
            self.workshop = Workshop.open(self._physical, self._cache, timed=self._timed)
            waiting = None if self._spill is None else OnDisk(self.workshop.stream, self._spill)
            return VulkanCalibration(self.workshop, config, rows, options, waiting or OnDevice())

    def close(self) -> None:
        if self.workshop is not None:
            self.workshop.close()
        self.workshop = None


def device_bytes(config: GemmaConfig, tokens: int, length: int, *, on_disk: bool = False) -> int:
    """Of the device's memory for a calibration on two paths, about, from above.

    Args:
        on_disk: the activations of all batches but one wait there.
    """
    layers = range(config.num_layers)
    hidden = config.hidden_size
    ffn = max(config.layer_intermediate_size(layer) for layer in layers)
    q = max(config.layer_q_size(layer) for layer in layers)
    n, largest = padded(max(hidden, ffn, q)), padded(hidden) * padded(ffn)
    batch = max(WorkSizes().batch_tokens, length)
    held = min(tokens, batch) if on_disk else tokens
    streams = held * (3 * 4 * padded(hidden) + 2 * (padded(q) + padded(ffn)))
    streams += held * 2 * 2 * 2 * sum(_kv_width(config, layer) for layer in config.shared_sources)
    squares = 4 * (3 * n * n + padded(hidden) ** 2)
    layer = max(
        sum(padded(rows) * padded(cols) for rows, cols in config.linear_shapes(number).values())
        for number in layers
    )
    work = batch * (8 * padded(ffn) + 6 * config.num_heads * padded(length))
    systems = min(SYSTEM_BYTES, 4 * (n // min(GROUPS)) ** 2 * n)
    return 5 * (streams + squares + 10 * layer + 36 * largest + systems + work) // 4


def _kv_width(config: GemmaConfig, layer: int) -> int:
    """Columns of a layer's keys on the device, and of its values."""
    return config.layer_kv_heads(layer) * padded(config.layer_head_dim(layer))
