"""A model with its attention on an NPU and the rest on the CPU.

The host norms, turns and quantizes queries, keys and values; the NPU computes INT8 queries over
INT8 or INT4 keys and values. Layers without a kernel run on the CPU whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from uq.formats.config import GemmaConfig
from uq.kernels.cpu.cache import KVCache, layer_shapes
from uq.kernels.cpu.layout import WeightSource
from uq.kernels.cpu.model import Array, Layer, Work
from uq.kernels.cpu.session import CpuSession
from uq.kernels.cpu.tiles import TILE_LANES
from uq.kernels.npu.hybrid.attention import NpuAttention
from uq.kernels.npu.hybrid.placement import described
from uq.kernels.npu.hybrid.store import Store
from uq.kernels.session import Device


@dataclass
class HybridCache(KVCache):
    """Keys and values of layers on the NPU are in `stores`; those in float32 pass through only."""

    stores: list[Store | None] = field(default_factory=list)


class NpuSession(CpuSession):
    """A quantized model on an NPU and the CPU. See `uq.kernels.session.Session`."""

    def __init__(
        self,
        config: GemmaConfig,
        source: WeightSource,
        attention: NpuAttention,
        obstacles: list[str | None],
        device: Device,
        *,
        max_context: int = 4096,
        threads: int | None = None,
    ) -> None:
        """
        Args:
            obstacles: of each layer, why its attention stays on the CPU, or None.
            device: the NPU.

        Raises:
            UsageError: `threads` or `max_context` is out of range.
        """
        self._npu, self._obstacles = attention, obstacles
        super().__init__(config, source, max_context=max_context, threads=threads)
        cpu = self.device
        self.device = replace(
            device,
            name=f"{device.name} for attention, {cpu.name}",
            driver=f"{device.driver}; {cpu.driver}",
            features=cpu.features,
            attention=described(obstacles, device.backend),
        )

    def _empty_cache(self, capacity: int) -> HybridCache:
        def shapes(layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
            kept = self._obstacles[layer] is not None
            size = capacity if kept else min(capacity, self._block)
            keys, values = layer_shapes(self.config, size, self._block)
            return keys[layer], values[layer]

        pairs = [shapes(layer) for layer in range(self.config.num_layers)]
        return HybridCache(
            [np.zeros(keys, np.float32) for keys, _ in pairs],
            [np.zeros(values, np.float32) for _, values in pairs],
            stores=[None if why else self._npu.store(capacity) for why in self._obstacles],
        )

    def _attend(self, cache: KVCache, layer: Layer, index: int, work: Work) -> None:
        store = cache.stores[index] if isinstance(cache, HybridCache) else None
        if store is None:
            super()._attend(cache, layer, index, work)
            return
        config, tokens = self.config, len(work.hidden)
        queries = self._enter(cache, layer, index, work)
        grouped = queries.reshape(config.num_kv_heads, tokens, -1, config.head_dim)
        q = grouped.swapaxes(0, 1).reshape(tokens, config.num_heads, config.head_dim)
        k, v = _entered(cache.keys[index], cache.values[index], cache.position, tokens)
        seen = cache.position, config.window(index)
        rows = self._npu.attend(store, *seen, q, k, v[..., : config.head_dim])
        work.context[:] = rows.reshape(tokens, -1)


def _entered(keys: Array, values: Array, position: int, tokens: int) -> tuple[Array, Array]:
    """Keys and values (tokens, kv_heads, dim) that were just put into a layer of the cache."""
    ring = values.shape[2]
    slots = np.arange(position, position + tokens) % ring
    k = keys[:, slots // TILE_LANES, :, slots % TILE_LANES]  # (tokens, kv_heads, dim)
    v = values[:, :, slots].transpose(2, 0, 1, 3)  # (tokens, kv_heads, dim / 32, 32)
    return k, v.reshape(tokens, len(values), -1)
