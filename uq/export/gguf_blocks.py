"""Grids of a bundle as GGML blocks of 32 weights, with the bundle's own codes and scales.

| block | a weight is | holds exactly |
|---|---|---|
| Q4_0 | `d * (q - 8)`, q of 4 bits | INT4 |
| Q5_0 | `d * (q - 16)`, q of 5 bits | INT5 |
| Q8_0 | `d * q`, q of 8 bits | every grid: codes less zero points are in -127..127 |
| Q4_1, Q5_1 | `d * q + m` | INT4, INT5 with zero points, where all `m` are float16 numbers |

`d` and `m` are float16. A group of 64 or 128 becomes blocks that repeat its scale.
Block layouts: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
SYMMETRIC = {4: "Q4_0", 5: "Q5_0"}
WITH_MINIMA = {4: "Q4_1", 5: "Q5_1"}  # of grids with zero points


def block_type(spec: Spec, *, minima: bool) -> str:
    """The smallest block that holds a grid.

    Args:
        minima: float16 holds the minima of the tensor, or may round them.
    """
    if spec.zero_point:
        return WITH_MINIMA.get(spec.bits, "Q8_0") if minima else "Q8_0"
    return SYMMETRIC.get(spec.bits, "Q8_0")


def minima(tensor: QuantTensor) -> NDArray[np.float32]:
    """(out, in // group): the weight of the lowest code of each group, exact."""
    zeros = np.zeros(tensor.scales.shape, np.int8) if tensor.zeros is None else tensor.zeros
    lowest: NDArray[np.float32] = tensor.spec.qmin - zeros.astype(np.float32)
    return lowest * tensor.scales.astype(np.float32)


def has_float16_minima(pieces: Iterable[QuantTensor]) -> bool:
    """Whether float16 holds the minima of every group."""
    return all((values == half(values)).all() for values in map(minima, pieces))


def half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The nearest float16; infinite where there is none."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def to_blocks(tensor: QuantTensor, kind: str) -> NDArray[np.uint8]:
    """(rows, blocks, bytes of a block) uint8."""
    rows, cols = tensor.shape
    header = [_repeated(tensor, tensor.scales)]
    if kind == "Q8_0":
        body = [tensor.levels().view(np.uint8)]
    else:
        body = _planes(tensor.codes, tensor.spec)
        if kind.endswith("_1"):
            header.append(_repeated(tensor, half(minima(tensor))))
    parts = [part.reshape(rows, cols // BLOCK, -1) for part in (*header, *body)]
    return np.concatenate(parts, axis=2)


def stored_values(tensor: QuantTensor, kind: str) -> NDArray[np.float32]:
    """(out, in): what the blocks say, to compare it with `dequantize()`."""
    if not kind.endswith("_1"):
        return tensor.dequantize()
    rows, cols = tensor.shape
    steps = (tensor.codes.astype(np.float32) - tensor.spec.qmin).reshape(
        rows, -1, tensor.spec.group
    )
    steps *= tensor.scales.astype(np.float32)[:, :, None]
    steps += half(minima(tensor)).astype(np.float32)[:, :, None]
    return steps.reshape(rows, cols)


def _repeated(tensor: QuantTensor, values: NDArray[np.float16]) -> NDArray[np.uint8]:
    """One value a group -> the bytes of one a block."""
    return np.repeat(values, tensor.spec.group // BLOCK, axis=1).view(np.uint8)


def _planes(codes: NDArray[np.int8], spec: Spec) -> list[NDArray[np.uint8]]:
    """High bits (INT5), a mask of 32 bits a block; nibbles: weight i beside weight i + 16."""
    steps = (codes - np.int8(spec.qmin)).view(np.uint8).reshape(-1, BLOCK)
    low, high = np.hsplit(steps & np.uint8(15), 2)
    nibbles = low | high << np.uint8(4)
    if spec.bits == 4:
        return [nibbles]
    return [np.packbits(steps >> np.uint8(4), axis=1, bitorder="little"), nibbles]
