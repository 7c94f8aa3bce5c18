"""The order in which codes, scales and zero points lie in a bundle; kernels read it directly.

Formulas: `formats/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from uq.formats.layout import Blocks, Layout
from uq.formats.pack import (
    join_planes,
    pack_fields,
    pack_masks,
    pack_pairs,
    pack_quads,
    unpack_fields,
    unpack_masks,
    unpack_pairs,
    unpack_quads,
)
from uq.formats.row_scales import join_scales, split_scales
from uq.formats.spec import QuantTensor, Spec

PIECE = 32  # columns: the smallest group

Codes = NDArray[np.int8]
Halves = NDArray[np.float16]


class RowLayout(Layout):
    """Each row by itself: its codes in order, then its scales. For tools and row look-up."""

    name = "row"
    alignment = 2

    def row_block(self, spec: Spec) -> int:
        return 1

    def padded(self, cols: int) -> int:
        return cols

    def block(self, cols: int, spec: Spec) -> np.dtype[np.void]:
        groups = cols // spec.group
        return _struct(
            codes=("u1", (cols * _low_bits(spec) // 8,)),
            high=("u1", (cols * spec.high_bits // 8,)),
            steps=("<f2", (int(spec.row_step),)),
            scales=(_scale_type(spec), (groups,)),
            unused=("u1", (groups % 2 * spec.row_step,)),
            zeros=("u1", (2 * -(-groups // 4) * spec.zero_point,)),
        )

    def _fill(self, blocks: Blocks, tensor: QuantTensor) -> None:
        _pack_in_order(tensor.codes, tensor.spec, blocks)
        blocks["scales"] = _stored_scales(tensor, blocks["steps"])
        blocks["unused"] = 0
        if tensor.zeros is not None:
            _pack_zeros(tensor.zeros, tensor.spec, blocks["zeros"])

    def _read(self, blocks: Blocks, spec: Spec) -> QuantTensor:
        codes = _unpack_in_order(blocks, spec)
        scales = _half_scales(blocks["scales"], blocks["steps"])
        zeros = _unpack_zeros(blocks["zeros"], spec, scales.shape[1])
        return QuantTensor(codes, scales, spec, zeros)


class LaneLayout(Layout):
    """Tiles of 16 rows x 128 columns for 64 lanes that load 16 bytes each, scales in the tile.

    Lane `4 * row + j` owns columns `32 * j .. 32 * j + 31` of its row: one load for INT4, two for
    INT8, whose second half lies in a second panel so that both loads are contiguous over the lanes,
    and for INT5 and INT6 a second load of 4 or 8 bytes.
    """

    name = "igpu"
    alignment = 16
    rows = 16
    cols = 128

    def row_block(self, spec: Spec) -> int:
        return self.rows

    def padded(self, cols: int) -> int:
        return -(-cols // self.cols) * self.cols

    def block(self, cols: int, spec: Spec) -> np.dtype[np.void]:
        groups = self.cols // spec.group
        tile = _struct(
            codes=("V16", (_low_bits(spec) // 4, self.rows, 4)),  # panel, row, 32-column piece
            high=("<u4", (self.rows, 4, spec.high_bits)),
            scales=(_scale_type(spec), (self.rows, groups)),
            zeros=("u1", (max(16, 8 * groups) * spec.zero_point,)),
        )
        return _struct(
            tiles=(tile, (self.padded(cols) // self.cols,)),
            steps=("<f2", (self.rows * spec.row_step,)),
        )

    def _fill(self, blocks: Blocks, tensor: QuantTensor) -> None:
        tiles, spec = blocks["tiles"], tensor.spec  # (blocks, tiles)
        shape = (len(tiles), self.rows, tiles.shape[1])
        codes = tensor.codes
        loads = (codes if spec.bits == 8 else pack_quads(codes)).view("V16").reshape(*shape, 4, -1)
        tiles["codes"] = loads.transpose(0, 2, 4, 1, 3)  # (blocks, tiles, panels, rows, pieces)
        tiles["scales"] = _by_tile(_stored_scales(tensor, blocks["steps"]), shape)
        if spec.high_bits:
            words = pack_fields(codes, spec.high_bits).reshape(*shape, 4, -1)
            tiles["high"] = words.transpose(0, 2, 1, 3, 4)
        if tensor.zeros is not None:
            zeros = _by_tile(tensor.zeros, shape)  # (blocks, tiles, rows, groups)
            _pack_zeros(zeros.reshape(*tiles.shape, -1), spec, tiles["zeros"])

    def _read(self, blocks: Blocks, spec: Spec) -> QuantTensor:
        tiles = blocks["tiles"]  # (blocks, tiles)
        rows = len(tiles) * self.rows
        loads = np.ascontiguousarray(tiles["codes"].transpose(0, 3, 1, 4, 2)).reshape(rows, -1)
        codes = loads.view(np.int8) if spec.bits == 8 else unpack_quads(loads.view(np.uint8))
        if spec.high_bits:
            words = tiles["high"].transpose(0, 2, 1, 3, 4).reshape(rows, -1)
            join_planes(codes, unpack_fields(words, spec.high_bits), spec.high_bits)
        steps = blocks["steps"][:, None, :, None]
        scales = _half_scales(tiles["scales"], steps)  # (blocks, tiles, rows, groups)
        zeros = _unpack_zeros(tiles["zeros"], spec, self.rows * scales.shape[3])
        if zeros is not None:
            zeros = _by_row(zeros.reshape(scales.shape))
        return QuantTensor(codes, _by_row(scales), spec, zeros)


class OperandLayout(Layout):
    """Operand B = W^T of the AI engine's matrix multiply: blocks of K inputs x N outputs, k-major.

    One row block is all that a core reads for N outputs: the scales first, then the codes, so that
    it can take the codes in pieces of any length. Blocks that follow each other along K are one
    k-major matrix, so the order does not depend on K. The high bits of INT5 and INT6 come behind
    the nibbles of every 32 columns, as the masks with which the engine selects lanes.
    """

    alignment = 16

    def __init__(self, name: str, nibble_outputs: int) -> None:
        """`nibble_outputs`: N of the multiply that takes four-bit codes; INT8's is 8."""
        self.name = name
        self._nibble_outputs = nibble_outputs

    def row_block(self, spec: Spec) -> int:
        return 8 if spec.bits == 8 else self._nibble_outputs

    def padded(self, cols: int) -> int:
        return cols  # a group is a multiple of every K

    def block(self, cols: int, spec: Spec) -> np.dtype[np.void]:
        n, groups = self.row_block(spec), cols // spec.group
        piece = _struct(
            codes=("u1", (PIECE * n * _low_bits(spec) // 8,)),
            high=("u1", (PIECE * n * spec.high_bits // 8,)),
        )
        return _struct(
            steps=("<f2", (n * spec.row_step,)),
            scales=(_scale_type(spec), (groups, n)),
            unused=("u1", (-n * groups % 16 * spec.row_step,)),
            zeros=("u1", (16 * -(-groups * n // 32) * spec.zero_point,)),
            pieces=(piece, (cols // PIECE,)),
        )

    def _fill(self, blocks: Blocks, tensor: QuantTensor) -> None:
        pieces = blocks["pieces"]  # (blocks, pieces)
        shape = (len(blocks), self.row_block(tensor.spec), -1)
        operand = np.ascontiguousarray(tensor.codes.reshape(shape).transpose(0, 2, 1))
        _pack_in_order(operand.reshape(*pieces.shape, -1), tensor.spec, pieces)
        scales = _stored_scales(tensor, blocks["steps"])
        blocks["scales"] = scales.reshape(shape).transpose(0, 2, 1)
        blocks["unused"] = 0
        if tensor.zeros is not None:
            zeros = tensor.zeros.reshape(shape).transpose(0, 2, 1)  # (blocks, groups, n)
            _pack_zeros(zeros.reshape(len(blocks), -1), tensor.spec, blocks["zeros"])

    def _read(self, blocks: Blocks, spec: Spec) -> QuantTensor:
        n = self.row_block(spec)
        scales = _half_scales(blocks["scales"], blocks["steps"][:, None])  # (blocks, groups, n)
        operand = _unpack_in_order(blocks["pieces"], spec).reshape(len(blocks), -1, n)
        zeros = _unpack_zeros(blocks["zeros"], spec, scales.shape[1] * n)
        if zeros is not None:
            zeros = _outputs_first(zeros.reshape(scales.shape))
        return QuantTensor(_outputs_first(operand), _outputs_first(scales), spec, zeros)


TILE = LaneLayout()
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            RowLayout(),
            TILE,
            OperandLayout("npu-aie2", 8),  # multiplies 4x16x8 and 4x8x8
            OperandLayout("npu-aie2p", 16),  # multiplies 4x16x16 and 8x8x8
        )
    }
)


def _struct(**planes: tuple[DTypeLike, tuple[int, ...]]) -> np.dtype[np.void]:
    """A packed structure of arrays: name -> (element, shape). Empty ones are fields of no bytes."""
    return np.dtype([(name, element, shape) for name, (element, shape) in planes.items()])


def _scale_type(spec: Spec) -> str:
    return "i1" if spec.row_step else "<f2"


def _stored_scales(tensor: QuantTensor, steps: Halves) -> Halves | Codes:
    """(rows, groups) scales as they are stored; fills the steps of their rows, where there are."""
    if not tensor.spec.row_step:
        return tensor.scales
    found, multiples = split_scales(tensor.scales)
    steps[:] = found.reshape(steps.shape)
    return multiples


def _half_scales(stored: Halves | Codes, steps: Halves) -> Halves:
    """Inverse of `_stored_scales`; `steps` broadcasts, and is empty where there are none."""
    if stored.dtype == np.float16:
        return stored.view(np.float16)
    return join_scales(steps, stored.view(np.int8))


def _low_bits(spec: Spec) -> int:
    """Bits of a code in the plane `codes`."""
    return spec.bits - spec.high_bits


def _pack_in_order(codes: Codes, spec: Spec, out: Blocks) -> None:
    """Fill the planes `codes` and `high` with codes (..., n) as they follow each other."""
    out["codes"] = codes.view(np.uint8) if spec.bits == 8 else pack_pairs(codes)
    if spec.high_bits:
        out["high"] = pack_masks(codes, spec.high_bits)


def _unpack_in_order(planes: Blocks, spec: Spec) -> Codes:
    """Inverse of `_pack_in_order`."""
    if spec.bits == 8:
        whole: Codes = planes["codes"].view(np.int8)
        return whole
    codes = unpack_pairs(planes["codes"])
    if spec.high_bits:
        join_planes(codes, unpack_masks(planes["high"], spec.high_bits), spec.high_bits)
    return codes


def _pack_zeros(zeros: Codes, spec: Spec, out: NDArray[np.uint8]) -> None:
    """Zero points (..., n) as nibbles in units of the step, filled up with zero bytes."""
    nibbles = np.zeros((*out.shape[:-1], 2 * out.shape[-1]), np.int8)
    nibbles[..., : zeros.shape[-1]] = zeros // spec.zero_step
    out[...] = pack_pairs(nibbles)


def _unpack_zeros(packed: NDArray[np.uint8], spec: Spec, count: int) -> Codes | None:
    """Inverse of `_pack_zeros`: the first `count` zero points."""
    if not spec.zero_point:
        return None
    return unpack_pairs(packed)[..., :count] * np.int8(spec.zero_step)


def _by_tile(values: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[Any]:
    """(rows, groups) -> (blocks, tiles, rows and groups of a tile); `shape` ends with the tiles."""
    return values.reshape(*shape, -1).transpose(0, 2, 1, 3)


def _by_row(values: NDArray[Any]) -> NDArray[Any]:
    """Inverse of `_by_tile`."""
    blocks, _, rows, _ = values.shape
    return values.transpose(0, 2, 1, 3).reshape(blocks * rows, -1)


def _outputs_first(values: NDArray[Any]) -> NDArray[Any]:
    """(blocks, inputs or groups, n) -> (blocks * n, inputs or groups)."""
    blocks, inner, n = values.shape
    return values.transpose(0, 2, 1).reshape(blocks * n, inner)
