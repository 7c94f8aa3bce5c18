"""The linear's arithmetic in numpy: int32 in a group, float32 sums over groups in order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor

Array = NDArray[np.float32]


def quantize_inputs(x: Array, group: int) -> tuple[NDArray[np.int8], Array]:
    """(tokens, inputs) as codes -127..127 and (tokens, groups) scales."""
    groups = x.reshape(len(x), -1, group)
    scale = (np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32)
    codes = np.rint(groups / np.where(scale == 0, np.float32(1), scale))
    return codes.astype(np.int8).reshape(x.shape), scale[..., 0]


def linear(codes: NDArray[np.int8], scale: Array, weight: QuantTensor) -> Array:
    """(tokens, outputs), bit for bit what the cores give when floats are IEEE single precision."""
    group = weight.spec.group
    y = np.zeros((len(codes), len(weight.codes)), np.float32)
    for index in range(weight.scales.shape[1]):
        part = slice(index * group, (index + 1) * group)
        products = codes[:, part].astype(np.float32) @ weight.codes[:, part].T.astype(np.float32)
        both = weight.scales[:, index].astype(np.float32) * scale[:, index, None]
        y += products * both
    return y
