"""What some layers do beside attention and MLP: experts, the per-layer embedding, a product of low
rank, a sparse gate, a scalar.

Tokens are independent here, too: every product of floats is a sum over one row in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError
from uq.formats.config import (
    ALTUP,
    EXPERTS,
    FULL_HEADS,
    LAUREL,
    LAYER_SCALAR,
    MLP_WIDTHS,
    PER_LAYER,
    PER_LAYER_EMBEDDING,
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    SHARED_KEYS,
    SPARSITY,
    VALUE_NORM,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.manifest import gain_name
from uq.kernels.cpu.elementwise import Activations, gelu_product, keep_largest, quantize_rows
from uq.kernels.cpu.layout import Linear, WeightSource
from uq.kernels.cpu.llvm import CHUNK, LANES
from uq.kernels.cpu.products import float_linear, multiplied
from uq.kernels.elementwise import gelu_product as float_gelu_product
from uq.kernels.experts import DOWN, GATE_UP, by_expert, choose
from uq.kernels.per_layer import stored_tokens
from uq.kernels.products import flat, rms_norm

if TYPE_CHECKING:
    from uq.kernels.cpu.model import Work

Array = NDArray[np.float32]
Multiply = Callable[[Linear, Activations, Array], None]

# What `GemmaConfig.extensions` names and this backend computes.
COMPUTED = frozenset(
    {
        *(FULL_HEADS, VALUE_NORM, SHARED_KEYS, MLP_WIDTHS, PER_LAYER, LAYER_SCALAR, EXPERTS),
        *(ALTUP, LAUREL, SPARSITY),
    }
)
LAUREL_SHARE = np.float32(math.sqrt(0.5))  # of attention's sum in layers that have a Laurel


@dataclass
class Beside:
    """What goes with a block of tokens through the layers, beside the residual stream.

    Attributes:
        inputs: (layers, tokens, size) of the per-layer embedding.
        streams: (tokens, streams, hidden), in models with alternating updates.
    """

    inputs: Array | None = None
    streams: Array | None = None


def has_extras(config: GemmaConfig) -> bool:
    """Whether layers do more than attention and MLP, of whatever shapes."""
    parts = config.layer_scalar, config.per_layer, config.experts
    return any((*parts, config.laurel_rank, config.activation_sparsity))


class Extras:
    """What one layer does besides.

    Attributes:
        scalar: what the residual stream is multiplied by in the end.
        per_layer_gain: of the norm behind the per-layer branch; empty without one.
    """

    def __init__(
        self,
        config: GemmaConfig,
        source: WeightSource,
        linears: Mapping[str, Linear],
        layer: int,
    ) -> None:
        """Raises DeviceError: the rows of an expert do not fill whole blocks."""

        def kept(role: str) -> Array:
            return np.ascontiguousarray(source.array(layer_tensor(layer, role)), np.float32)

        def gain(role: str) -> Array:
            return source.array(gain_name(layer_tensor(layer, role)))

        self.scalar = kept("layer_scalar")[0] if config.layer_scalar else np.float32(1)
        self.per_layer_gain = np.empty(0, np.float32)
        self._projections: tuple[Array, ...] = ()
        if config.per_layer:
            self.per_layer_gain = gain("post_per_layer_input_norm")
            self._projections = kept("per_layer_input_gate"), kept("per_layer_projection")
        self._low_rank: tuple[Array, ...] = ()
        if config.laurel_rank:
            self._low_rank = kept("laurel.linear_left"), kept("laurel.linear_right")
            self._low_rank_gain, self._eps = gain("laurel.post_laurel_norm"), config.rms_norm_eps
        share = config.sparsity(layer)
        self._quantile = np.float32(NormalDist().inv_cdf(share)) if share else None
        self._experts = None
        if config.experts:
            stacks = linears[f"{layer}.{GATE_UP}"], linears[f"{layer}.{DOWN}"]
            self._experts = LayerExperts(config, stacks, kept, gain)

    @property
    def active_bytes(self) -> int:
        """Bytes that a token reads."""
        experts = self._experts.active_bytes if self._experts else 0
        return experts + sum(weight.nbytes for weight in (*self._projections, *self._low_rank))

    def add_low_rank(self, work: Work) -> None:
        """work.hidden, in front of attention, gets the Laurel's part of what stands behind it:
        all but attention's output. Attention's gain holds its share.
        """
        if not self._low_rank:
            return
        left, right = self._low_rank
        low = multiplied(multiplied(work.normed, left), right)
        hidden = work.hidden
        hidden += rms_norm(low, self._low_rank_gain, self._eps)
        hidden += work.normed
        hidden *= LAUREL_SHARE

    def thin(self, gate_up: Array) -> None:
        """The gate of a sparse layer keeps what exceeds its threshold."""
        if self._quantile is not None:
            keep_largest(gate_up, self._quantile)

    def join_experts(self, work: Work, multiply: Multiply) -> None:
        """work.branch, the output of the MLP, becomes that of MLP and experts."""
        if self._experts:
            self._experts.join(work, multiply)

    def per_layer_branch(self, work: Work, inputs: Array) -> None:
        """work.branch = what a layer makes of its per-layer input (tokens, size)."""
        into, back = self._projections
        gate = multiplied(work.hidden, into)
        float_gelu_product(gate, inputs)
        float_linear(gate, back, work.branch)


class LayerExperts:
    """The experts of a layer. Only the weights of those that some token chose are read."""

    def __init__(
        self,
        config: GemmaConfig,
        stacks: tuple[Linear, Linear],
        kept: Callable[[str], Array],
        gain: Callable[[str], Array],
    ) -> None:
        assert config.experts is not None
        self._sizes, self._eps = config.experts, config.rms_norm_eps
        self._gate_up = self._split(stacks[0], 2 * config.experts.intermediate_size)
        self._down = self._split(stacks[1], config.hidden_size)
        self._router_gain = kept("router.scale") * np.float32(config.hidden_size**-0.5)
        self._router, self._scale = kept("router.proj"), kept("router.per_expert_scale")
        names = ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2")
        self._mlp_gain, self._input_gain = map(gain, names)
        self._output_gain = gain("post_feedforward_layernorm_2")

    @property
    def active_bytes(self) -> int:
        one = self._gate_up[0].nbytes + self._down[0].nbytes
        return self._sizes.active * one + self._router.nbytes

    def join(self, work: Work, multiply: Multiply) -> None:
        """`Extras.join_experts`."""
        router_x = rms_norm(work.hidden, self._router_gain, self._eps)
        routed = choose(self._sizes, multiplied(router_x, self._router), self._scale)
        x = rms_norm(work.hidden, self._input_gain, self._eps)
        out = np.zeros_like(x)
        for number, tokens, shares in by_expert(*routed):
            out[tokens] += self._output(number, x[tokens], multiply) * shares[:, None]
        mlp = rms_norm(work.branch, self._mlp_gain, self._eps)
        np.add(mlp, rms_norm(out, self._output_gain, self._eps), out=work.branch)

    def _output(self, number: int, x: Array, multiply: Multiply) -> Array:
        """(tokens, hidden) of one expert for the tokens of x."""
        gate_up, down = self._gate_up[number], self._down[number]
        codes = Activations.empty(*x.shape)
        quantize_rows(x, *codes.arrays)
        both = np.empty((len(x), gate_up.width), np.float32)
        multiply(gate_up, codes, both)
        hidden = Activations.empty(len(x), down.cols)
        gelu_product(both, *hidden.arrays)
        out = np.empty((len(x), down.width), np.float32)
        multiply(down, hidden, out)
        return out

    def _split(self, stack: Linear, rows: int) -> list[Linear]:
        """Every expert's part of a stack of `rows` rows each."""
        if rows % LANES or stack.cols % CHUNK:
            raise DeviceError(
                f"the CPU kernels need experts of {LANES} rows or a multiple, not {rows}; "
                "use --device reference"
            )
        numbers = range(self._sizes.count)
        return [stack.rows(number * rows, (number + 1) * rows)[0] for number in numbers]


class PerLayerTable:
    """The per-layer embedding, read by row from where it lies, and its projection."""

    def __init__(self, config: GemmaConfig, source: WeightSource) -> None:
        assert config.per_layer is not None
        self._table, self._size = config.per_layer, config.per_layer.size
        self._layers = config.num_layers
        self._eps, self._factor = config.rms_norm_eps, np.float32(config.hidden_size**-0.5)
        self._source = source
        projection = source.array(f"{PER_LAYER_PROJECTION}.weight")
        self._projection = np.ascontiguousarray(projection, np.float32)
        self._gain = source.array(gain_name(f"{PER_LAYER_NORM}.weight"))

    @property
    def active_bytes(self) -> int:
        return self._projection.nbytes

    def inputs(self, tokens: NDArray[np.int32], embedded: Array) -> Array:
        """(layers, tokens, size) for each layer.

        Args:
            embedded: (tokens, hidden) in front of layer 0.
        """
        shape = (len(tokens), self._layers, self._size)
        projected = multiplied(embedded, self._projection) * self._factor
        out = rms_norm(projected.reshape(shape), self._gain, self._eps)
        out += self._rows(tokens).reshape(shape) * np.float32(math.sqrt(self._size))
        out *= np.float32(math.sqrt(0.5))
        return np.ascontiguousarray(out.swapaxes(0, 1))

    def _rows(self, tokens: NDArray[np.int32]) -> Array:
        ids, inverse = np.unique(stored_tokens(self._table, tokens), return_inverse=True)
        found = [
            self._source.rows(PER_LAYER_EMBEDDING, int(token), int(token) + 1).dequantize()
            for token in ids
        ]
        return flat(np.concatenate(found))[inverse]
