"""The order in which codes and scales lie in a bundle: permutations that a kernel reads directly.

Every layout cuts a weight into row blocks and stores them one after the other, so a tensor can be
written and read in pieces of whole row blocks. A block is described by a numpy dtype: its fields
are the plane of codes and the plane of scales. Formulas: `formats/README.md`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from uq.formats.pack import pack_pairs, pack_quads, unpack_pairs, unpack_quads
from uq.formats.spec import QuantTensor, Spec

CHUNK = 1 << 18  # codes permuted at a time, so that the temporaries stay in the cache

Codes = NDArray[np.int8]
Scales = NDArray[np.float16]


class Layout(ABC):
    """An invertible order of codes and scales: `untile(tile(t)) == t`, bit for bit.

    Attributes:
        name: how the manifest calls it.
        alignment: of a tensor's first byte in its file; a block's size is a multiple of it.
    """

    name: str
    alignment: int

    @abstractmethod
    def row_block(self, spec: Spec) -> int:
        """Rows of one block."""

    @abstractmethod
    def padded(self, cols: int) -> int:
        """Columns stored for `cols` columns."""

    @abstractmethod
    def block(self, cols: int, spec: Spec) -> np.dtype[np.void]:
        """One block of rows as a packed structure."""

    @abstractmethod
    def _fill(self, blocks: NDArray[np.void], codes: Codes, scales: Scales, spec: Spec) -> None:
        """Permute padded (rows, cols) codes and (rows, groups) scales into (n,) blocks."""

    @abstractmethod
    def _read(self, blocks: NDArray[np.void], spec: Spec) -> tuple[Codes, Scales]:
        """Inverse of `_fill`, padding included."""

    def block_count(self, rows: int, spec: Spec) -> int:
        return -(-rows // self.row_block(spec))

    def nbytes(self, rows: int, cols: int, spec: Spec) -> int:
        """Bytes of a tiled (rows, cols) weight, padding included."""
        return self.block_count(rows, spec) * self.block(cols, spec).itemsize

    def tile(self, tensor: QuantTensor) -> NDArray[np.uint8]:
        """Codes and scales in this layout's order.

        `tile` of rows `a:b` followed by `tile` of rows `b:c` is `tile` of rows `a:c` when `a` and
        `b` are multiples of `row_block`.

        Returns:
            (block_count, bytes of a block) uint8.

        Raises:
            ValueError: the columns do not divide by the group, or a code is off the grid.
        """
        spec, (rows, cols) = tensor.spec, tensor.shape
        height, wide = self.row_block(spec), self.padded(cols)
        if cols % spec.group:
            raise ValueError(f"{cols} columns do not divide by group {spec.group}")
        block = self.block(cols, spec)
        blocks = np.empty(self.block_count(rows, spec), block)
        step = self._chunk(cols, spec)
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            span = slice(start * height, (start + step) * height)
            codes = _pad(tensor.codes[span], len(part) * height, wide)
            if codes.min() < spec.qmin or codes.max() > spec.qmax:
                raise ValueError(f"codes outside {spec.qmin}..{spec.qmax}")
            scales = _pad(tensor.scales[span], len(part) * height, wide // spec.group)
            self._fill(part, codes, scales, spec)
        return blocks.view(np.uint8).reshape(len(blocks), block.itemsize)

    def untile(self, data: NDArray[np.uint8], shape: tuple[int, int], spec: Spec) -> QuantTensor:
        """Inverse of `tile`.

        Args:
            data: the bytes of a whole (rows, cols) weight, of any shape; may be read-only.

        Raises:
            ValueError: `data` is not `nbytes` long.
        """
        rows, cols = shape
        height, groups = self.row_block(spec), cols // spec.group
        blocks: NDArray[np.void] = data.reshape(-1).view(self.block(cols, spec))
        if len(blocks) != self.block_count(rows, spec):
            raise ValueError(f"{data.size} bytes, not {self.nbytes(rows, cols, spec)}")
        codes = np.empty(shape, np.int8)
        scales = np.empty((rows, groups), np.float16)
        step = self._chunk(cols, spec)
        for start in range(0, len(blocks), step):
            span = slice(start * height, min((start + step) * height, rows))
            count = span.stop - span.start
            part_codes, part_scales = self._read(blocks[start : start + step], spec)
            codes[span] = part_codes[:count, :cols]
            scales[span] = part_scales[:count, :groups]
        return QuantTensor(codes, scales, spec)

    def _chunk(self, cols: int, spec: Spec) -> int:
        """Blocks permuted at a time."""
        return max(1, CHUNK // (self.row_block(spec) * cols))


class RowLayout(Layout):
    """Each row by itself: its codes in order, then its scales. For tools and row look-up."""

    name = "row"
    alignment = 2

    def row_block(self, spec: Spec) -> int:
        return 1

    def padded(self, cols: int) -> int:
        return cols

    def block(self, cols: int, spec: Spec) -> np.dtype[np.void]:
        return _struct(
            codes=("u1", (cols * spec.bits // 8,)),
            scales=("<f2", (cols // spec.group,)),
        )

    def _fill(self, blocks: NDArray[np.void], codes: Codes, scales: Scales, spec: Spec) -> None:
        blocks["codes"] = pack_pairs(codes) if spec.bits == 4 else codes.view(np.uint8)
        blocks["scales"] = scales

    def _read(self, blocks: NDArray[np.void], spec: Spec) -> tuple[Codes, Scales]:
        codes = blocks["codes"]
        return unpack_pairs(codes) if spec.bits == 4 else codes.view(np.int8), blocks["scales"]


class LaneLayout(Layout):
    """Tiles of 16 rows x 128 columns for 64 lanes that load 16 bytes each, scales in the tile.

    Lane `4 * row + j` owns columns `32 * j .. 32 * j + 31` of its row: one load for INT4, two for
    INT8, whose second half lies in a second panel so that both loads are contiguous over the lanes.
    """

    name = "igpu"
    alignment = 32
    rows = 16
    cols = 128

    def row_block(self, spec: Spec) -> int:
        return self.rows

    def padded(self, cols: int) -> int:
        return -(-cols // self.cols) * self.cols

    def block(self, cols: int, spec: Spec) -> np.dtype[np.void]:
        tile = _struct(
            codes=("V16", (spec.bits // 4, self.rows, 4)),  # panel, row, 32-column piece
            scales=("<f2", (self.rows, self.cols // spec.group)),
        )
        return _struct(tiles=(tile, (self.padded(cols) // self.cols,)))

    def _fill(self, blocks: NDArray[np.void], codes: Codes, scales: Scales, spec: Spec) -> None:
        tiles = blocks["tiles"]  # (blocks, tiles)
        loads = (pack_quads(codes) if spec.bits == 4 else codes).view("V16")
        loads = loads.reshape(len(tiles), self.rows, tiles.shape[1], 4, -1)
        tiles["codes"] = loads.transpose(0, 2, 4, 1, 3)  # (blocks, tiles, panels, rows, pieces)
        scales = scales.reshape(len(tiles), self.rows, tiles.shape[1], -1)
        tiles["scales"] = scales.transpose(0, 2, 1, 3)  # (blocks, tiles, rows, groups)

    def _read(self, blocks: NDArray[np.void], spec: Spec) -> tuple[Codes, Scales]:
        tiles = blocks["tiles"]  # (blocks, tiles)
        rows = len(tiles) * self.rows
        loads = np.ascontiguousarray(tiles["codes"].transpose(0, 3, 1, 4, 2)).reshape(rows, -1)
        codes = unpack_quads(loads.view(np.uint8)) if spec.bits == 4 else loads.view(np.int8)
        return codes, tiles["scales"].transpose(0, 2, 1, 3).reshape(rows, -1)


class OperandLayout(Layout):
    """Operand B = W^T of the AI engine's matrix multiply: blocks of K inputs x N outputs, k-major.

    One row block is all that a core reads for N outputs: the scales first, then the codes, so that
    it can take the codes in pieces of any length. Blocks that follow each other along K are one
    k-major matrix, so the order does not depend on K.
    """

    alignment = 16

    def __init__(self, name: str, outputs: Mapping[int, int]) -> None:
        """`outputs`: bits -> N of the multiply."""
        self.name = name
        self._outputs = outputs

    def row_block(self, spec: Spec) -> int:
        return self._outputs[spec.bits]

    def padded(self, cols: int) -> int:
        return cols  # a group is a multiple of every K

    def block(self, cols: int, spec: Spec) -> np.dtype[np.void]:
        n = self._outputs[spec.bits]
        return _struct(
            scales=("<f2", (cols // spec.group, n)),
            codes=("u1", (cols, n * spec.bits // 8)),
        )

    def _fill(self, blocks: NDArray[np.void], codes: Codes, scales: Scales, spec: Spec) -> None:
        shape = (len(blocks), self.row_block(spec), -1)
        operand = np.ascontiguousarray(codes.reshape(shape).transpose(0, 2, 1))  # (blocks, in, n)
        blocks["codes"] = pack_pairs(operand) if spec.bits == 4 else operand.view(np.uint8)
        blocks["scales"] = scales.reshape(shape).transpose(0, 2, 1)

    def _read(self, blocks: NDArray[np.void], spec: Spec) -> tuple[Codes, Scales]:
        rows = len(blocks) * self.row_block(spec)
        stored = blocks["codes"]  # (blocks, in, bytes of n)
        operand = unpack_pairs(stored) if spec.bits == 4 else stored.view(np.int8)
        codes = operand.transpose(0, 2, 1).reshape(rows, -1)
        return codes, blocks["scales"].transpose(0, 2, 1).reshape(rows, -1)


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            RowLayout(),
            LaneLayout(),
            OperandLayout("npu-aie2", {4: 8, 8: 8}),  # multiplies 4x16x8 and 4x8x8
            OperandLayout("npu-aie2p", {4: 16, 8: 8}),  # multiplies 4x16x16 and 8x8x8
        )
    }
)


def _struct(**planes: tuple[DTypeLike, tuple[int, ...]]) -> np.dtype[np.void]:
    """A packed structure of arrays: name -> (element, shape)."""
    return np.dtype([(name, element, shape) for name, (element, shape) in planes.items()])


def _pad(values: NDArray[Any], rows: int, cols: int) -> NDArray[Any]:
    """Zeros below and to the right; C-contiguous. Nothing is copied when nothing is missing."""
    if values.shape == (rows, cols):
        return np.ascontiguousarray(values)
    padded = np.zeros((rows, cols), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded
