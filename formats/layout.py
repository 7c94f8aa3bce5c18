"""What every layout has in common: blocks of rows, padding, and the checks before a permutation.

A layout cuts a weight into row blocks and stores them one after the other, so a tensor can be
written and read in pieces of whole row blocks. A block is described by a numpy dtype, whose fields
are planes: of codes, of the bits above their nibbles, of scales, of zero points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec

CHUNK = 1 << 18  # codes permuted at a time, so that the temporaries stay in the cache

Blocks = NDArray[np.void]


class Layout(ABC):
    """An invertible order of codes, scales and zero points: `untile(tile(t)) == t`, bit for bit.

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
    def _fill(self, blocks: Blocks, tensor: QuantTensor) -> None:
        """Permute a padded tensor into (n,) blocks."""

    @abstractmethod
    def _read(self, blocks: Blocks, spec: Spec) -> QuantTensor:
        """Inverse of `_fill`, padding included."""

    def block_count(self, rows: int, spec: Spec) -> int:
        return -(-rows // self.row_block(spec))

    def nbytes(self, rows: int, cols: int, spec: Spec) -> int:
        """Bytes of a tiled (rows, cols) weight, padding included."""
        return self.block_count(rows, spec) * self.block(cols, spec).itemsize

    def tile(self, tensor: QuantTensor) -> NDArray[np.uint8]:
        """Codes, scales and zero points in this layout's order.

        `tile` of rows `a:b` followed by `tile` of rows `b:c` is `tile` of rows `a:c` when `a` and
        `b` are multiples of `row_block`.

        Returns:
            (block_count, bytes of a block) uint8.

        Raises:
            ValueError: the columns do not divide by the group, or a code or zero point is off the
                grid.
        """
        spec, (rows, cols) = tensor.spec, tensor.shape
        if cols % spec.group:
            raise ValueError(f"{cols} columns do not divide by group {spec.group}")
        block, height = self.block(cols, spec), self.row_block(spec)
        blocks = np.empty(self.block_count(rows, spec), block)
        step = self._chunk(cols, spec)
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            piece = tensor.rows(start * height, (start + step) * height)
            _check(piece)
            self._fill(part, _padded(piece, len(part) * height, self.padded(cols)))
        return blocks.view(np.uint8).reshape(len(blocks), block.itemsize)

    def untile(self, data: NDArray[np.uint8], shape: tuple[int, int], spec: Spec) -> QuantTensor:
        """Inverse of `tile`.

        Args:
            data: the bytes of a whole (rows, cols) weight, of any shape; may be read-only.

        Raises:
            ValueError: `data` is not `nbytes` long.
        """
        rows, cols = shape
        blocks: Blocks = data.reshape(-1).view(self.block(cols, spec))
        if len(blocks) != self.block_count(rows, spec):
            raise ValueError(f"{data.size} bytes, not {self.nbytes(rows, cols, spec)}")
        whole = _empty(shape, spec)
        step, height = self._chunk(cols, spec), self.row_block(spec)
        for start in range(0, len(blocks), step):
            part = whole.rows(start * height, (start + step) * height)
            _crop(self._read(blocks[start : start + step], spec), part)
        return whole

    def _chunk(self, cols: int, spec: Spec) -> int:
        """Blocks permuted at a time."""
        return max(1, CHUNK // (self.row_block(spec) * cols))


def _check(tensor: QuantTensor) -> None:
    codes, zeros, spec = tensor.codes, tensor.zeros, tensor.spec
    highest = 127 if spec.bits == 8 else codes.max()  # int8 itself ends where INT8 does
    if codes.min() < spec.qmin or highest > spec.qmax:
        raise ValueError(f"codes outside {spec.qmin}..{spec.qmax}")
    if (zeros is not None) != spec.zero_point:
        raise ValueError(f"zero points {'missing' if zeros is None else 'given'} with {spec}")
    if zeros is None:
        return
    if zeros.min() < spec.qmin or zeros.max() > spec.qmax or (zeros % spec.zero_step).any():
        raise ValueError(
            f"zero points outside {spec.qmin}..{spec.qmax} in steps of {spec.zero_step}"
        )


def _padded(tensor: QuantTensor, rows: int, cols: int) -> QuantTensor:
    groups = cols // tensor.spec.group
    zeros = None if tensor.zeros is None else _pad(tensor.zeros, rows, groups)
    codes, scales = _pad(tensor.codes, rows, cols), _pad(tensor.scales, rows, groups)
    return QuantTensor(codes, scales, tensor.spec, zeros)


def _pad(values: NDArray[Any], rows: int, cols: int) -> NDArray[Any]:
    """Zeros below and to the right; C-contiguous. Nothing is copied when nothing is missing."""
    if values.shape == (rows, cols):
        return np.ascontiguousarray(values)
    padded = np.zeros((rows, cols), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


def _empty(shape: tuple[int, int], spec: Spec) -> QuantTensor:
    groups = (shape[0], shape[1] // spec.group)
    zeros = np.empty(groups, np.int8) if spec.zero_point else None
    return QuantTensor(np.empty(shape, np.int8), np.empty(groups, np.float16), spec, zeros)


def _crop(tensor: QuantTensor, out: QuantTensor) -> None:
    """Copy what is not padding."""
    rows, groups = out.scales.shape
    out.codes[:] = tensor.codes[:rows, : out.codes.shape[1]]
    out.scales[:] = tensor.scales[:rows, :groups]
    if out.zeros is not None and tensor.zeros is not None:
        out.zeros[:] = tensor.zeros[:rows, :groups]
