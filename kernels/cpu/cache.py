"""What a sequence leaves behind for its later tokens: keys, values, and the angles of RoPE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.cpu.tiles import TILE_LANES

Array = NDArray[np.float32]


@dataclass
class KVCache:
    """Keys (after norm and RoPE) and values of one sequence in float32, as `attention` reads them.

    A layer with a window has a ring of slots: as many as its window and one block of new tokens.
    One that reads those of another layer has none.

    Attributes:
        keys, values: of each layer, in the shapes of `layer_shapes`.
        position: number of tokens.
    """

    keys: list[Array]
    values: list[Array]
    position: int = 0

    @classmethod
    def empty(cls, config: GemmaConfig, capacity: int, block: int) -> KVCache:
        """`block`: tokens that are added at once, at most."""
        keys, values = layer_shapes(config, capacity, block)
        return cls(
            [np.zeros(shape, np.float32) for shape in keys],
            [np.zeros(shape, np.float32) for shape in values],
        )


Shape = tuple[int, ...]


def layer_shapes(config: GemmaConfig, capacity: int, block: int) -> tuple[list[Shape], list[Shape]]:
    """Shapes of each layer's keys and of its values."""
    keys: list[Shape] = []
    values: list[Shape] = []
    for layer in range(config.num_layers):
        heads, dim = config.layer_kv_heads(layer), config.layer_head_dim(layer)
        window = config.window(layer)
        needed = capacity if window is None else min(capacity, window - 1 + block)
        if config.kv_source(layer) != layer:
            needed = 0
        blocks = -(-needed // TILE_LANES)
        keys.append((heads, blocks, dim, TILE_LANES))
        values.append((heads, -(-dim // TILE_LANES), blocks * TILE_LANES, TILE_LANES))
    return keys, values


class RopeTable:
    """cos and sin of position * theta^(-2 i / dim) (Su et al., RoFormer), made as they are needed.

    Angles are float64: float32 loses the fourth digit of a radian at a few thousand tokens.
    """

    def __init__(self, theta: float, position_scale: float, dim: int, pairs: int) -> None:
        """`pairs`: of components that turn, the first ones; the others stay as they are."""
        half = dim // 2
        self._frequency = theta ** (-np.arange(half) / half) * position_scale
        self._frequency[pairs:] = 0
        self._cos: Array = np.empty((0, half), np.float32)
        self._sin: Array = self._cos

    def rows(self, start: int, stop: int) -> tuple[Array, Array]:
        """cos and sin of positions `start:stop`, each (stop - start, dim / 2) float32."""
        known = len(self._cos)
        if stop > known:
            angle = np.outer(np.arange(known, max(stop, 2 * known, 256)), self._frequency)
            self._cos = np.concatenate([self._cos, np.cos(angle).astype(np.float32)])
            self._sin = np.concatenate([self._sin, np.sin(angle).astype(np.float32)])
        return self._cos[start:stop], self._sin[start:stop]
