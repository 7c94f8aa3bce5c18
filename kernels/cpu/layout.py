"""Weights as the CPU kernels read them: 16 rows side by side, one in each 32-bit lane of a vector.

A chunk is 16 rows x 32 input channels: 4 (INT4) or 8 (INT8) vectors of 16 words, and word `i` of a
lane is word `i` of its row's 32 channels in the bundle's layout `igpu`. So loading a bundle is a
transposition of words:

    INT4: word i holds channels 8 i .. 8 i + 7; byte b has channel b below and channel b + 4 above,
          as code + 8, so that a code needs no sign extension
    INT8: word i holds channels 4 i .. 4 i + 3, one a byte

A row block is its chunks one after the other; the float16 scales lie apart, (groups, 16) a block.
All weights share one array: large pages, and one argument for any number of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numba import prange
from numpy.typing import NDArray

from uq.errors import DeviceError
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import Spec
from uq.kernels.cpu.llvm import CHUNK, LANES
from uq.kernels.elementwise import kernel

TILE = LAYOUTS["igpu"]
TILE_CHUNKS = 4  # chunks in one tile of `igpu`
ALIGNMENT = 64

# Columns of a `Linear`'s table of parts, one row for each weight.
CODES, SCALES, FIRST_BLOCK, BLOCKS, BITS, CHUNKS_PER_GROUP = range(6)


class Record(Protocol):
    """What a bundle says about a tiled weight."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def spec(self) -> Spec: ...

    @property
    def layout(self) -> str: ...


class WeightSource(Protocol):
    """Where a session's weights come from: a bundle, or the tests' weights in memory."""

    def raw(self, name: str) -> tuple[NDArray[np.uint8], Record]:
        """Bytes of a tiled weight."""
        ...

    def array(self, name: str) -> NDArray[np.float32]:
        """A norm's gain."""
        ...


@dataclass(frozen=True)
class Linear:
    """Weights that multiply the same input in one call; their outputs lie one after the other.

    Attributes:
        parts: (weights, 6) int64, columns as named above; offsets are bytes in the arena.
        cols: input channels.
        columns: of each weight, where its output begins; every weight fills whole blocks.
        width: of the output, padding included.
        nbytes: of codes and scales.
    """

    parts: NDArray[np.int64]
    cols: int
    columns: tuple[int, ...]
    width: int
    nbytes: int

    def rows(self, start: int, stop: int) -> tuple[Linear, int]:
        """The row blocks of a single weight that hold rows `start:stop`, and the first's row."""
        first, last = start // LANES, -(-stop // LANES)
        part = self.parts[:1].copy()
        chunks = self.cols // CHUNK
        part[0, CODES] += first * chunks * chunk_bytes(int(part[0, BITS]))
        part[0, SCALES] += first * chunks // part[0, CHUNKS_PER_GROUP] * 2 * LANES
        part[0, BLOCKS] = last - first
        nbytes = self.nbytes * (last - first) // int(self.parts[0, BLOCKS])
        return Linear(part, self.cols, (0,), (last - first) * LANES, nbytes), first * LANES


@dataclass(frozen=True)
class Arena:
    """Every weight of a model, packed."""

    data: NDArray[np.uint8]
    linears: Mapping[str, Linear]


@dataclass(frozen=True)
class Place:
    """Where a weight lies: `codes` and `scales` are bytes from the start of the arena."""

    record: Record
    codes: int

    @property
    def blocks(self) -> int:
        return -(-self.record.shape[0] // LANES)

    @property
    def words(self) -> tuple[int, int, int, int]:
        """Shape of the codes: (blocks, chunks, words, lanes)."""
        words = chunk_bytes(self.record.spec.bits) // (4 * LANES)
        return self.blocks, self.record.shape[1] // CHUNK, words, LANES

    @property
    def halves(self) -> tuple[int, int, int]:
        """Shape of the scales: (blocks, groups, lanes)."""
        return self.blocks, self.record.shape[1] // self.record.spec.group, LANES

    @property
    def scales(self) -> int:
        return self.codes + 4 * math.prod(self.words)

    @property
    def end(self) -> int:
        """Behind the scales, at the next cache line."""
        return -(-(self.scales + 2 * math.prod(self.halves)) // ALIGNMENT) * ALIGNMENT


def chunk_bytes(bits: int) -> int:
    """16 rows x 32 channels: a word of each row for every bit of a code."""
    return bits * LANES * 4


def pack(source: WeightSource, joined: Mapping[str, Sequence[str]]) -> Arena:
    """Read weights and lay them out for the kernels.

    Args:
        joined: name of a `Linear` -> canonical names of the weights in it.
    """
    places: dict[str, Place] = {}
    end = 0
    for name in (name for names in joined.values() for name in names):
        spec = source.raw(name)[1].spec
        if spec.bits not in (4, 8) or spec.zero_point:
            raise DeviceError(f"{name}: the CPU backend does not run {spec}; use 4 or 8 bits")
        places[name] = Place(source.raw(name)[1], end)
        end = places[name].end
    data = _aligned(end)
    for name, place in places.items():
        _pack_one(source.raw(name)[0], place, data)
    linears = {key: _linear([places[name] for name in names]) for key, names in joined.items()}
    return Arena(data, linears)


def _linear(places: Sequence[Place]) -> Linear:
    parts, columns, first = [], [], 0
    for place in places:
        spec = place.record.spec
        counts = (first, place.blocks, spec.bits, spec.group // CHUNK)
        parts.append([place.codes, place.scales, *counts])
        columns.append(first * LANES)
        first += place.blocks
    return Linear(
        parts=np.array(parts, np.int64),
        cols=places[0].record.shape[1],
        columns=tuple(columns),
        width=first * LANES,
        nbytes=sum(place.record.spec.nbytes(*place.record.shape) for place in places),
    )


def _pack_one(raw: NDArray[np.uint8], place: Place, data: NDArray[np.uint8]) -> None:
    shape, spec = place.record.shape, place.record.spec
    if place.record.layout != TILE.name:
        raw = TILE.tile(LAYOUTS[place.record.layout].untile(raw, shape, spec))
    tiles = raw.reshape(-1).view(TILE.block(shape[1], spec))["tiles"]  # (blocks, tiles)
    words = data[place.codes : place.scales].view(np.uint32).reshape(place.words)
    flip = np.uint32(0x88888888 if spec.bits == 4 else 0)  # two's complement to code + 8
    _transpose_words(_frozen(tiles["codes"].view("<u4")), flip, words)
    stop = place.scales + 2 * math.prod(place.halves)
    halves = data[place.scales : stop].view(np.uint16).reshape(place.halves)
    _transpose_scales(_frozen(tiles["scales"].view("<u2")), halves)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """Bytes that begin with a cache line, so that no vector load touches two."""
    data = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -data.ctypes.data % ALIGNMENT
    return data[start : start + nbytes]


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Read-only, as memory-mapped files are: one compiled variant serves both."""
    view = array.view()
    view.flags.writeable = False
    return view


@kernel()
def _transpose_line(line: NDArray[np.uint32], flip: np.uint32, words: NDArray[np.uint32]) -> None:
    """Words of one row of a tile into a lane: (chunks * 4) -> (chunks, 4, lane)."""
    for chunk in range(words.shape[0]):
        for word in range(4):
            words[chunk, word] = line[4 * chunk + word] ^ flip


@kernel(parallel=True)
def _transpose_words(tiles: NDArray[np.uint32], flip: np.uint32, words: NDArray[np.uint32]) -> None:
    """(blocks, tiles, panels, rows, chunks of a tile * 4) -> (blocks, chunks, panels * 4, rows)."""
    blocks, count, panels, rows, _ = tiles.shape
    for block in prange(blocks):
        for tile in range(count):
            first = tile * TILE_CHUNKS
            for panel in range(panels):
                out = words[block, first : first + TILE_CHUNKS, 4 * panel : 4 * panel + 4]
                for row in range(rows):
                    _transpose_line(tiles[block, tile, panel, row], flip, out[:, :, row])


@kernel(parallel=True)
def _transpose_scales(tiles: NDArray[np.uint16], halves: NDArray[np.uint16]) -> None:
    """(blocks, tiles, rows, groups of a tile) -> (blocks, groups, rows)."""
    blocks, groups, lanes = halves.shape
    per_tile = tiles.shape[3]
    for block in prange(blocks):
        for group in range(groups):
            for row in range(lanes):
                halves[block, group, row] = tiles[block, group // per_tile, row, group % per_tile]
