"""Grids of a bundle in the layout `pack-quantized` of compressed-tensors.

Codes are packed into 32-bit words, the first in the lowest bits, as unsigned numbers: code + 8 with
4 bits, code + 128 with 8. Zero points are packed likewise along the rows. Scales are as they are.
vLLM has kernels for 4 and for 8 bits, so every other grid becomes levels (codes less zero points)
of 8 bits, which hold it exactly. So do grids with zero points, unless these are asked for:
transformers 5.23 with compressed-tensors 0.20 cannot load packed ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec

Words = NDArray[np.int32]


@dataclass(frozen=True)
class Scheme:
    """How a linear is stored: `bits` 4 or 8; `symmetric` without zero points."""

    bits: int
    group: int
    symmetric: bool

    def __str__(self) -> str:
        return f"W{self.bits}A16 g{self.group}" + ("" if self.symmetric else " with zero points")

    def to_json(self) -> dict[str, Any]:
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
        }


def common_scheme(specs: Iterable[Spec], *, zero_points: bool) -> Scheme:
    """The smallest scheme that holds all of these grids: linears that vLLM fuses have one.

    Args:
        zero_points: schemes may have zero points.
    """
    specs = list(specs)
    group = min(spec.group for spec in specs)  # divides the others, whose scales are repeated
    symmetric = not any(spec.zero_point for spec in specs)
    if all(spec.bits == 4 for spec in specs) and (symmetric or zero_points):
        return Scheme(4, group, symmetric)
    return Scheme(8, group, symmetric=True)


def packed_codes(tensor: QuantTensor, scheme: Scheme) -> Words:
    """(out, in * bits / 32) int32."""
    if scheme.bits == 8:
        return (tensor.levels().view(np.uint8) ^ np.uint8(128)).view("<i4")
    return _nibbles(tensor.codes).view("<i4")


def repeated_scales(tensor: QuantTensor, scheme: Scheme) -> NDArray[np.float16]:
    """(out, in // group of the scheme) float16."""
    return np.repeat(tensor.scales, tensor.spec.group // scheme.group, axis=1)


def packed_zeros(tensor: QuantTensor, scheme: Scheme) -> Words:
    """(out / 8 rounded up, in // group of the scheme) int32."""
    rows, groups = tensor.scales.shape
    zeros = np.zeros((rows, groups), np.int8) if tensor.zeros is None else tensor.zeros
    zeros = np.repeat(zeros, tensor.spec.group // scheme.group, axis=1)
    filled = np.full((zeros.shape[1], -(-rows // 8) * 8), -8, np.int8)  # stored as 0
    filled[:, :rows] = zeros.T
    return np.ascontiguousarray(_nibbles(filled).view("<i4").T)


def _nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """-8..7 -> 0..15, two a byte."""
    steps = (codes + np.int8(8)).view(np.uint8)
    return steps[:, ::2] | steps[:, 1::2] << np.uint8(4)
