"""What a device computes and stores in integers beside the weights, on the float32 reference.

The integers are those of a device's kernels and so are their products: int8 times int8 and the sums
over a group are exact in float32. Only the sums over groups are rounded in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.config import GemmaConfig
from uq.kernels.kv_format import KVFormat

Array = NDArray[np.float32]

LEAST = np.float32(1e-30)  # as in shaders/activations.glsl: 127 / x is finite above


@dataclass(frozen=True)
class Int8Activations:
    """Inputs of linears in 8 bits, as kernels with integer dot products take them.

    Of each group of `group` neighbouring channels of a token, with one float32 scale:
    scale = max|x| / 127, code = round(x * (127 / max|x|)), ties to even; 0 where max|x| <= `LEAST`.

    Attributes:
        head: the input of the head, too.
    """

    group: int = 32
    head: bool = True

    def rounded(self, x: Array) -> Array:
        """codes * scales of x (..., channels)."""
        groups = x.reshape(*x.shape[:-1], -1, self.group)
        peak = np.abs(groups).max(axis=-1, keepdims=True)
        factor = np.float32(127) / np.where(peak > LEAST, peak, np.float32(np.inf))
        codes = np.rint(groups * factor)
        codes *= peak / np.float32(127)
        return codes.reshape(x.shape)


@dataclass(frozen=True)
class Numerics:
    """What is not float32 when a model runs; None is float32."""

    activations: Int8Activations | None = None
    kv: KVFormat | None = None

    def linear_input(self, x: Array) -> Array:
        """What the linears of a layer are given for x."""
        return x if self.activations is None else self.activations.rounded(x)

    def head_input(self, x: Array) -> Array:
        """What the head is given for x."""
        return self.linear_input(x) if self.activations and self.activations.head else x

    def check(self, config: GemmaConfig) -> None:
        """Raises UsageError: a group does not divide the channels of the model."""
        if self.activations is not None:
            _check_group("hidden_size", config.hidden_size, self.activations.group)
            for layer in range(config.num_layers):
                _check_group("q_size", config.layer_q_size(layer), self.activations.group)
                size = config.layer_intermediate_size(layer)
                _check_group("intermediate_size", size, self.activations.group)
            if config.experts:
                size = config.experts.intermediate_size
                _check_group("moe_intermediate_size", size, self.activations.group)
        if self.kv is not None:
            for layer in range(config.num_layers):
                _check_group("head_dim", config.layer_head_dim(layer), self.kv.group)


FLOAT = Numerics()
ACTIVATIONS: Mapping[str, Int8Activations | None] = {"float": None, "int8": Int8Activations()}
KV: Mapping[str, KVFormat | None] = {
    "float": None,
    "int8": KVFormat(bits=8),
    "int4": KVFormat(bits=4, balanced=True, rotated=True, page=64),
}


def _check_group(name: str, channels: int, group: int) -> None:
    if channels % group:
        raise UsageError(f"{name} {channels} does not divide by {group}; use float for this model")
