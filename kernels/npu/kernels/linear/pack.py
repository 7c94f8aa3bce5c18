"""Weights, inputs and outputs of the linear as the array reads and writes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.formats.layouts import LAYOUTS
from uq.formats.spec import QuantTensor
from uq.kernels.npu.kernels.linear.variant import CORES, LAYOUT, STEP, TOKENS, Linear


def pack_weight(linear: Linear, tensor: QuantTensor) -> NDArray[np.void]:
    """(quads, slices, cores) of a bundle's tensor, with empty blocks up to a whole quad.

    With one slice these are the bytes of the bundle. Otherwise the scales and the codes of a slice
    come together, block by block of a quad.
    """
    layout = LAYOUTS[LAYOUT[linear.device]]
    blocks = (
        layout.tile(tensor.expanded()).view(layout.block(linear.inputs, linear.spec)).reshape(-1)
    )
    packed = np.zeros((linear.quads * CORES, linear.slices), linear.weight)
    for name in ("scales", "pieces"):
        size = packed[name].shape[2]
        for index in range(linear.slices):
            part = blocks[name][:, index * size : (index + 1) * size]
            packed[name][: len(blocks), index, : part.shape[1]] = part
    return np.ascontiguousarray(
        packed.reshape(linear.quads, CORES, linear.slices).transpose(0, 2, 1)
    )


def pack_inputs(
    linear: Linear, codes: NDArray[np.int8], scale: NDArray[np.float32]
) -> NDArray[np.void]:
    """(columns, passes, slices) of (tokens, inputs) codes and (tokens, groups) scales."""
    passes, slices = -(-len(codes) // linear.rows), linear.slices
    packed = np.zeros((len(linear.runs), passes, slices), linear.input)
    tokens = passes * linear.rows - len(codes)
    quads = passes, linear.rows // TOKENS, TOKENS, slices
    rows = np.pad(codes, ((0, tokens), (0, slices * linear.sliced - linear.inputs)))
    groups = slices * linear.sliced // linear.spec.group - linear.groups
    scales = np.pad(scale, ((0, tokens), (0, groups)))
    # (passes, fours, token, slices, ...) to (passes, slices, fours, ..., token)
    packed["tokens"]["codes"] = rows.reshape(*quads, -1, STEP).transpose(0, 3, 1, 4, 2, 5)
    packed["tokens"]["scale"] = scales.reshape(*quads, -1).transpose(0, 3, 1, 4, 2)
    for column, run in enumerate(linear.runs):
        packed[column]["blocks"] = len(run)
    return packed


def unpack_outputs(linear: Linear, y: NDArray[np.float32], tokens: int) -> NDArray[np.float32]:
    """(tokens, outputs) of what the array wrote."""
    passes = -(-tokens // linear.rows)
    parts, start = [], 0
    for run in linear.runs:
        size = len(run) * passes * CORES * linear.rows * linear.width
        part = y.reshape(-1)[start : start + size]
        part = part.reshape(passes, len(run) * CORES, linear.rows, linear.width)
        parts.append(part.transpose(0, 2, 1, 3).reshape(passes * linear.rows, -1))
        start += size
    whole: NDArray[np.float32] = np.concatenate(parts, axis=1)[:tokens, : linear.outputs]
    return whole
