"""Weights for the device from a bundle, and from a checkpoint in floating point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, PER_LAYER_EMBEDDING, layer_tensor
from uq.formats.layouts import LAYOUTS, TILE
from uq.formats.manifest import gain_name
from uq.formats.spec import Spec
from uq.kernels.vulkan.weights import (
    FLOAT_BYTES,
    PIECES,
    TILE_COLS,
    TILE_ROWS,
    Kind,
    Weight,
    padded_rows,
    tiles_of,
)
from uq.kernels.weights import WeightSource

Array = NDArray[np.float32]

TABLE_ROWS = 1 << 13  # whole tiles


class Record(Protocol):
    """What a bundle says about a tiled weight."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def spec(self) -> Spec: ...

    @property
    def layout(self) -> str: ...


class Tiled(Protocol):
    """A bundle, or what offers its weights like one."""

    def raw(self, name: str) -> tuple[NDArray[np.uint8], Record]: ...

    def array(self, name: str) -> Array: ...


class BundleSource:
    """Codes and scales as they are stored; those of another layout are permuted."""

    def __init__(self, bundle: Tiled) -> None:
        self._bundle = bundle
        self.array = bundle.array

    def weight(self, name: str) -> Weight:
        raw, record = self._bundle.raw(name)
        mapped = raw if record.layout == TILE.name else None
        read = partial(_igpu_tiles, raw, record)
        return Weight(Kind.of(record.spec), record.shape, read, mapped)


def _igpu_tiles(raw: NDArray[np.uint8], record: Record) -> NDArray[np.uint8]:
    if record.layout == TILE.name:
        return raw
    return TILE.tile(LAYOUTS[record.layout].untile(raw, record.shape, record.spec))


class CheckpointSource:
    """A checkpoint as f16, bf16 or f32; the layer that was read last is kept."""

    def __init__(self, checkpoint: WeightSource, kind: str) -> None:
        self._checkpoint, self._kind = checkpoint, Kind(kind)
        config = self._config = checkpoint.config
        self._tables: dict[str, Callable[[int, int], Array]] = {
            EMBEDDING: checkpoint.embedding,
            HEAD: checkpoint.head,
            PER_LAYER_EMBEDDING: checkpoint.per_layer_embedding,
        }
        self._shapes = {HEAD: (config.vocab_size, config.hidden_size), **config.table_shapes()}
        self._places: dict[str, tuple[int, str]] = {}
        self._whole = {gain_name(name): name for name in config.model_norms()}
        self._whole |= {name: name for name in config.model_kept()}
        for layer in range(config.num_layers):
            for role, shape in config.linear_shapes(layer).items():
                self._shapes[layer_tensor(layer, role)] = shape
                self._places[layer_tensor(layer, role)] = layer, role
            for role in config.norm_shapes(layer):
                self._places[gain_name(layer_tensor(layer, role))] = layer, role
            for role in config.kept_shapes(layer):
                self._places[layer_tensor(layer, role)] = layer, role
        self._latest: tuple[int, Mapping[str, Array]] = (-1, {})

    def weight(self, name: str) -> Weight:
        return Weight(self._kind, self._shapes[name], partial(self._tiles, name))

    def array(self, name: str) -> Array:
        if name == gain_name(FINAL_NORM):
            return self._checkpoint.final_norm()
        if name in self._whole:
            return self._checkpoint.whole(self._whole[name])
        return self._of_layer(*self._places[name])

    def _tiles(self, name: str) -> NDArray[np.uint8]:
        if rows := self._tables.get(name):
            return self._table(rows, *self._shapes[name])
        layer, role = self._places[name]
        if role in self._config.expert_roles(layer):
            return self._experts(layer, role)
        return float_tiles(self._of_layer(layer, role), self._kind.name)

    def _experts(self, layer: int, role: str) -> NDArray[np.uint8]:
        """Tiles of a stack, of which an expert's rows fill whole ones."""
        assert self._config.experts is not None
        numbers = range(self._config.experts.count)
        stack = (self._checkpoint.expert(layer, role, number) for number in numbers)
        return np.concatenate([float_tiles(expert, self._kind.name) for expert in stack])

    def _table(self, rows: Callable[[int, int], Array], count: int, cols: int) -> NDArray[np.uint8]:
        """Tiles of a table, made of some rows at a time: all of it in float32 is gigabytes."""
        kind, done = self._kind, 0
        tiles = np.empty(kind.tiled_bytes(count, cols), np.uint8)
        for start in range(0, count, TABLE_ROWS):
            part = float_tiles(rows(start, min(start + TABLE_ROWS, count)), kind.name)
            tiles[done : done + part.size] = part
            done += part.size
        return tiles

    def _of_layer(self, layer: int, role: str) -> Array:
        if self._latest[0] != layer:
            self._latest = layer, self._checkpoint.layer(layer)
        return self._latest[1][role]


def float_tiles(values: Array, kind: str) -> NDArray[np.uint8]:
    """(rows, cols) in the order of `igpu`: panels of 64 loads of 16 bytes, four a row."""
    rows, cols = padded_rows(len(values)), tiles_of(values.shape[1]) * TILE_COLS
    padded = np.zeros((rows, cols), np.float32)
    padded[: len(values), : values.shape[1]] = values
    stored = _stored(padded, kind)
    load = 16 // FLOAT_BYTES[kind]
    loads = stored.reshape(rows // TILE_ROWS, TILE_ROWS, cols // TILE_COLS, PIECES, -1, load)
    tiled = np.ascontiguousarray(loads.transpose(0, 2, 4, 1, 3, 5))
    return tiled.reshape(-1).view(np.uint8)


def _stored(values: Array, kind: str) -> NDArray[np.float16] | NDArray[np.uint16] | Array:
    if kind == "f16":
        return values.astype(np.float16)
    if kind == "f32":
        return values
    bits = values.view(np.uint32)  # bf16: round to nearest, ties to even
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
