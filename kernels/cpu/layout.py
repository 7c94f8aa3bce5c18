"""Weights as the CPU kernels read them: 16 rows side by side, one in each 32-bit lane of a vector.

A chunk is 16 rows x 32 input channels: a vector of 16 words for every bit of a code. Word `i` of a
lane is word `i` of its row's 32 channels in the layout `igpu`, high bits behind nibbles. So
loading a bundle is a transposition of words:

    INT4: word i holds channels 8 i .. 8 i + 7; byte b has channel b below and channel b + 4 above
    INT5: words 0 .. 3 hold nibbles as INT4; byte b of word 4 has bit 4 of channels b, b + 4, ..
    INT6: the same with bits 4 and 5, in words 4 and 5 of 16 channels each
    INT8: word i holds channels 4 i .. 4 i + 3, one a byte

Codes but INT8's are stored less `qmin`, so that they need no sign extension. A row block is its
chunks one after the other. Its groups lie apart: 16 float16 scales and, where there are zero
points, 16 nibbles of them, each plus 8. Scales of 8 bits are 16 signed bytes instead, and in front
of a row block's groups lie the 16 float16 steps of its rows.

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

from uq.formats.layouts import LAYOUTS, TILE
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.cpu.llvm import CHUNK, LANES
from uq.kernels.elementwise import kernel

TILE_CHUNKS = 4  # chunks in one tile of `igpu`
ALIGNMENT = 64

# Bits -> what turns two's complement into code - qmin, in a word of nibbles and of high bits.
FLIPS = {
    4: (np.uint32(0x88888888), np.uint32(0)),
    5: (np.uint32(0), np.uint32(0xFFFFFFFF)),
    6: (np.uint32(0), np.uint32(0xAAAAAAAA)),
    8: (np.uint32(0), np.uint32(0)),
}
SCALE_BYTES = 2 * LANES  # of a group in a row block, or of a row block's steps
NARROW_BYTES = LANES  # of a group's scales of 8 bits
ZERO_BYTES = LANES // 2

# Columns of a `Linear`'s table of parts, one row for each weight. STEP_BYTES: 0 or SCALE_BYTES.
CODES, SCALES, FIRST_BLOCK, BLOCKS, BITS, CHUNKS_PER_GROUP, GROUP_BYTES, STEP_BYTES = range(8)


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
        """A norm's gain, or what is kept in float32."""
        ...

    def rows(self, name: str, start: int, stop: int) -> QuantTensor:
        """Rows of a weight that stays where it is; only of models with a per-layer embedding."""
        raise LookupError("no weight to read by row")


@dataclass(frozen=True)
class Linear:
    """Weights that multiply the same input in one call; their outputs lie one after the other.

    Attributes:
        parts: (weights, 8) int64, columns as named above; offsets are bytes in the arena.
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
        groups = chunks // part[0, CHUNKS_PER_GROUP]
        part[0, SCALES] += first * (part[0, STEP_BYTES] + groups * part[0, GROUP_BYTES])
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
    def group_bytes(self) -> int:
        spec = self.record.spec
        return (NARROW_BYTES if spec.row_step else SCALE_BYTES) + ZERO_BYTES * spec.zero_point

    @property
    def step_bytes(self) -> int:
        return SCALE_BYTES * self.record.spec.row_step

    @property
    def block(self) -> np.dtype[np.void]:
        """Steps, scales and zero points of a row block."""
        spec = self.record.spec
        scales = ("u1" if spec.row_step else "<u2", LANES)
        group = np.dtype(
            [("scales", *scales), ("zeros", "u1", ZERO_BYTES * spec.zero_point)],
        )
        groups = self.record.shape[1] // spec.group
        return np.dtype([("steps", "<u2", self.step_bytes // 2), ("groups", group, groups)])

    @property
    def scales(self) -> int:
        return self.codes + 4 * math.prod(self.words)

    @property
    def end(self) -> int:
        """Behind the scales, at the next cache line."""
        return -(-(self.scales + self.blocks * self.block.itemsize) // ALIGNMENT) * ALIGNMENT


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
        sizes = (place.group_bytes, place.step_bytes)
        parts.append([place.codes, place.scales, *counts, *sizes])
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
    row_blocks = raw.reshape(-1).view(TILE.block(shape[1], spec))
    tiles = row_blocks["tiles"]  # (blocks, tiles)
    words = data[place.codes : place.scales].view(np.uint32).reshape(place.words)
    low, high = words[:, :, : words.shape[2] - spec.high_bits], words[:, :, 4:]
    _transpose_words(_frozen(tiles["codes"].view("<u4")), FLIPS[spec.bits][0], low)
    if spec.high_bits:
        fields = tiles["high"].reshape(*tiles.shape, 1, LANES, -1)  # one panel
        _transpose_words(_frozen(fields), FLIPS[spec.bits][1], high)
    stop = place.scales + place.blocks * place.block.itemsize
    blocks = data[place.scales : stop].view(place.block)
    blocks["steps"] = row_blocks["steps"].view("<u2")
    groups = blocks["groups"]  # (blocks, groups)
    _transpose_scales(_frozen(tiles["scales"].view(groups["scales"].dtype)), groups["scales"])
    if spec.zero_point:
        per_tile = TILE_CHUNKS * CHUNK // spec.group
        _transpose_zeros(_frozen(tiles["zeros"]), per_tile, groups["zeros"])


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
    """Words of one row of a tile into a lane: (chunks * n) -> (chunks, n)."""
    chunks, count = words.shape
    for chunk in range(chunks):
        for word in range(count):
            words[chunk, word] = line[count * chunk + word] ^ flip


@kernel(parallel=True)
def _transpose_words(tiles: NDArray[np.uint32], flip: np.uint32, words: NDArray[np.uint32]) -> None:
    """(blocks, tiles, panels, rows, chunks of a tile * n) -> (blocks, chunks, panels * n, rows)."""
    blocks, count, panels, rows, line = tiles.shape
    n = line // TILE_CHUNKS
    for block in prange(blocks):
        for tile in range(count):
            first = tile * TILE_CHUNKS
            for panel in range(panels):
                out = words[block, first : first + TILE_CHUNKS, n * panel : n * panel + n]
                for row in range(rows):
                    _transpose_line(tiles[block, tile, panel, row], flip, out[:, :, row])


@kernel(parallel=True)
def _transpose_scales(tiles: NDArray[Any], scales: NDArray[Any]) -> None:
    """(blocks, tiles, rows, groups of a tile) -> (blocks, groups, rows), of one type."""
    blocks, groups, _ = scales.shape
    per_tile = tiles.shape[3]
    for block in prange(blocks):
        for group in range(groups):
            for row in range(LANES):
                scales[block, group, row] = tiles[block, group // per_tile, row, group % per_tile]


@kernel(parallel=True)
def _transpose_zeros(tiles: NDArray[np.uint8], per_tile: int, zeros: NDArray[np.uint8]) -> None:
    """Nibbles (blocks, tiles, rows * groups of a tile) -> (blocks, groups, rows / 2)."""
    blocks, groups, _ = zeros.shape
    for block in prange(blocks):
        for group in range(groups):
            zeros[block, group] = 0
            for row in range(LANES):
                number = row * per_tile + group % per_tile
                byte = tiles[block, group // per_tile, number // 2]
                nibble = (byte >> 4 * (number % 2) & 15) ^ 8  # two's complement to nibble + 8
                zeros[block, group, row // 2] |= nibble << 4 * (row % 2)
