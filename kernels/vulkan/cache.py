"""The KV cache as the kernels find it, by address, and the angles of RoPE."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError
from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.device import PhysicalGpu
from uq.kernels.vulkan.memory import Arena, Span, Transfers, aligned
from uq.kernels.vulkan.state import MOST_STEPS

GROUP = 32  # channels of a head that share a scale


@dataclass(frozen=True)
class CacheSize:
    """How much of which sequences is kept.

    A layer with a window has a ring: as many slots as the window and the tokens of a pass need.

    Attributes:
        capacity: tokens of each sequence.
        tokens: of a pass, at most.
        is_int8: codes with a float32 scale for each 32 channels, not float16.
    """

    config: GemmaConfig
    capacity: int
    tokens: int
    sequences: int = 1
    is_int8: bool = False

    @property
    def slots(self) -> tuple[int, ...]:
        """Tokens that each layer keeps of a sequence, or that the one keeps whose keys it reads."""
        # Tokens that were generated in vain may be taken back.
        more = self.tokens + MOST_STEPS
        windows = map(self.config.window, range(self.config.num_layers))
        return tuple(
            self.capacity if window is None else min(self.capacity, window + more)
            for window in windows
        )

    def plane_bytes(self, layer: int) -> tuple[int, int]:
        """Of a layer's keys, or values, and of their scales; of no layer that reads another's."""
        if self.config.kv_source(layer) != layer:
            return 0, 0
        size = self.config.layer_kv_size(layer)
        rows = self.sequences * self.slots[layer]
        return rows * size * (1 if self.is_int8 else 2), rows * (4 * size // GROUP) * self.is_int8

    @property
    def nbytes(self) -> int:
        """Device bytes of all keys and values."""
        return 2 * sum(sum(self.plane_bytes(layer)) for layer in range(self.config.num_layers))

    @property
    def arena_bytes(self) -> int:
        """With the tables of angles and the padding."""
        layers = self.config.num_layers
        most = max(map(self.config.layer_head_dim, range(layers)))
        tables = 2 * aligned(turn_bytes(most, self.capacity))
        return self.nbytes + tables + 4 * aligned(1) * layers

    def holds(self, length: int, written: int) -> bool:
        """Whether all that a token at `length` sees is there, when `written` tokens have been."""
        windows = map(self.config.window, range(self.config.num_layers))
        return all(
            window is None or length + 1 - window >= written - slots or written <= slots
            for window, slots in zip(windows, self.slots, strict=True)
        )


@dataclass(frozen=True)
class Cache:
    """Keys and values, (sequence, kv head, slot, dim) for each layer that has some; the others have
    those of the layer that they read.

    Attributes:
        key_scales, value_scales: (sequence, kv head, slot, dim / 32); where there are none, the
            keys and values again.
        turns: RoPE's (cos, sin) tables of sliding and of full layers.
    """

    size: CacheSize
    keys: tuple[Span, ...]
    values: tuple[Span, ...]
    key_scales: tuple[Span, ...]
    value_scales: tuple[Span, ...]
    turns: dict[bool, Span]

    @classmethod
    def take(cls, size: CacheSize, arena: Arena, transfers: Transfers) -> Cache:
        config = size.config
        turns = {}
        for layer in range(config.num_layers):
            if (sliding := config.is_sliding(layer)) not in turns:
                table = turn_table(config, layer, size.capacity)
                turns[sliding] = arena.take(table.nbytes)
                transfers.write(turns[sliding], table)

        rows, scales = zip(*map(size.plane_bytes, range(config.num_layers)), strict=True)

        def planes(sizes: tuple[int, ...]) -> tuple[Span, ...]:
            own = {layer: arena.take(nbytes) for layer, nbytes in enumerate(sizes) if nbytes}
            return tuple(own[config.kv_source(layer)] for layer in range(config.num_layers))

        keys, values = planes(rows), planes(rows)
        spans = (planes(scales), planes(scales)) if size.is_int8 else (keys, values)
        return cls(size, keys, values, *spans, turns)

    @property
    def suffix(self) -> str:
        """Of the names of modules that read it."""
        return "_int8" if self.size.is_int8 else ""

    def spans(self, layer: int) -> tuple[Span, Span, Span, Span]:
        """Keys, values and their scales, as kernels are given them."""
        keys, values = self.keys[layer], self.values[layer]
        return keys, values, self.key_scales[layer], self.value_scales[layer]


def check_memory(physical: PhysicalGpu, fixed: int, size: CacheSize) -> None:
    """Refuse a model before any of it is loaded.

    Args:
        fixed: bytes of weights and activations.

    Raises:
        DeviceError: with the KV cache they are more than the device has; with what would fit.
    """
    there, needed = physical.memory, fixed + size.arena_bytes
    if needed <= there:
        return
    most = longest(size, there - fixed)
    fitting = (
        f"a context of up to {most} tokens fits" if most else "no context fits: use fewer bits"
    )
    raise DeviceError(
        f"the model needs {needed / 2**30:.1f} GiB on {physical.name}, which has "
        f"{there / 2**30:.1f} GiB, {size.arena_bytes / 2**30:.1f} of it for {size.sequences} x "
        f"{size.capacity} tokens of context; {fitting}, or use --device cpu"
    )


def longest(size: CacheSize, room: int) -> int:
    """The greatest capacity, a multiple of 64, whose cache fits into `room` bytes."""
    capacities = range(0, size.capacity, 64)

    def bytes_of(capacity: int) -> int:
        return replace(size, capacity=capacity).arena_bytes

    return capacities[max(0, bisect_right(capacities, room, key=bytes_of) - 1)]


def turn_bytes(head_dim: int, capacity: int) -> int:
    return 4 * (256 + capacity // 256 + 1) * head_dim


def turn_table(config: GemmaConfig, layer: int, capacity: int) -> NDArray[np.float32]:
    """(cos, sin) of positions 0 .. 255, then of 0, 256, 512, ...: (rows, dim / 2, 2).

    Pairs that do not turn have the angle 0.

    A position's angle is the sum of two rows' angles. Angles are float64: float32 would lose a
    radian's fourth digit at a few thousand tokens (Su et al., RoFormer).
    """
    half = config.layer_head_dim(layer) // 2
    frequency = config.theta(layer) ** (-np.arange(half) / half) * config.position_scale(layer)
    frequency[config.rotary_pairs(layer) :] = 0
    coarse = 256 * np.arange(capacity // 256 + 1)
    angle = np.outer(np.concatenate([np.arange(256), coarse]), frequency)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
