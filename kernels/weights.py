"""Where the float32 weights of the reference come from: a checkpoint, or a bundle, dequantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.bundle import Bundle
from uq.formats.config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    PER_LAYER_EMBEDDING,
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.manifest import gain_name
from uq.formats.spec import QuantTensor

Array = NDArray[np.float32]
Weights = Mapping[str, Array]


class WeightSource(Protocol):
    """Float32 weights of a model, read in parts: a `Checkpoint`, or what stands in for one."""

    config: GemmaConfig

    def layer(self, index: int) -> Weights:
        """Role -> (out, in) linear, (size,) norm gain, or what is kept; without experts."""
        ...

    def expert(self, index: int, role: str, number: int) -> Array:
        """One expert's (out, in) of a linear that holds all; only of models with experts."""
        raise LookupError("no experts")

    def per_layer_embedding(self, start: int, stop: int) -> Array:
        """Rows `start:stop` of the per-layer embedding, (stop - start, layers * size); only of
        models that have one.
        """
        raise LookupError("no per-layer embedding")

    def whole(self, name: str) -> Array:
        """A tensor of no layer that is never quantized, by its canonical name; only of models
        that have some.
        """
        raise LookupError("no tensors of no layer that are kept")

    def embedding(self, start: int, stop: int) -> Array:
        """Rows `start:stop`, not multiplied by the embedding's scale."""
        ...

    def head(self, start: int, stop: int) -> Array:
        """Rows `start:stop` of the output matrix; the embedding's where they are tied."""
        ...

    def final_norm(self) -> Array:
        """Gain of the norm in front of the head: (hidden,)."""
        ...


class LayerWeights(dict[str, Array]):
    """Weights of a layer by role, and of its experts by role and number: `experts.down_proj.17`.

    An expert is read when it is asked for.
    """

    def __init__(self, source: WeightSource, layer: int, *, resident: bool) -> None:
        super().__init__(source.layer(layer))
        self._source, self._layer, self._resident = source, layer, resident

    def __missing__(self, key: str) -> Array:
        role, _, number = key.rpartition(".")
        if not number.isdecimal():
            raise KeyError(key)
        weight = self._source.expert(self._layer, role, int(number))
        if self._resident:
            self[key] = weight
        return weight


class CheckpointWeights:
    """Float32 weights of a checkpoint: read anew at each use, or kept once read."""

    def __init__(self, checkpoint: WeightSource, *, resident: bool) -> None:
        self._checkpoint = checkpoint
        self._resident = resident
        self._layers: dict[int, Weights] = {}
        self._tables: dict[str, Array] = {}
        self.final_norm: Array = checkpoint.final_norm()

    def layer(self, index: int) -> Weights:
        if not self._resident:
            return LayerWeights(self._checkpoint, index, resident=False)
        if index not in self._layers:
            self._layers[index] = LayerWeights(self._checkpoint, index, resident=True)
        return self._layers[index]

    def embedding(self, tokens: NDArray[np.int32]) -> Array:
        """Rows of the embedding, (*tokens.shape, hidden)."""
        if self._resident:
            return self._table("embedding")[tokens]
        return _rows_of(self._checkpoint.embedding, tokens)

    def per_layer_rows(self, tokens: NDArray[np.int32]) -> Array:
        """Rows of the per-layer embedding, (*tokens.shape, layers * size); never held whole."""
        return _rows_of(self._checkpoint.per_layer_embedding, tokens)

    def whole(self, name: str) -> Array:
        """A tensor of no layer that is never quantized, by its canonical name."""
        if not self._resident:
            return self._checkpoint.whole(name)
        if name not in self._tables:
            self._tables[name] = self._checkpoint.whole(name)
        return self._tables[name]

    def head_rows(self, ids: NDArray[np.intp]) -> Array:
        """Some rows of the output matrix: (ids, hidden)."""
        return np.concatenate([self.head(int(token), int(token) + 1) for token in ids])

    def head(self, start: int, stop: int) -> Array:
        if self._resident:
            tied = self._checkpoint.config.tied_head
            return self._table("embedding" if tied else "head")[start:stop]
        return self._checkpoint.head(start, stop)

    def _table(self, name: str) -> Array:
        if name not in self._tables:
            read = getattr(self._checkpoint, name)
            self._tables[name] = read(0, self._checkpoint.config.vocab_size)
        return self._tables[name]


def _rows_of(read: Callable[[int, int], Array], tokens: NDArray[np.int32]) -> Array:
    """(*tokens.shape, n), each row read once."""
    ids, inverse = np.unique(tokens, return_inverse=True)
    rows = [read(int(token), int(token) + 1) for token in ids]
    return np.concatenate(rows)[inverse.reshape(tokens.shape)]


class BundleWeights:
    """The dequantized weights of a bundle, read as a checkpoint is."""

    def __init__(self, bundle: Bundle) -> None:
        self.config: GemmaConfig = bundle.config
        self._bundle = bundle
        self._tables: dict[str, QuantTensor] = {}

    def layer(self, index: int) -> Weights:
        weights = {
            role: value.dequantize() if isinstance(value, QuantTensor) else value
            for role, value in self._bundle.layer(index).items()
        }
        return weights | self._model_part(index)

    def expert(self, index: int, role: str, number: int) -> Array:
        rows, name = self.config.expert_rows(index, role), layer_tensor(index, role)
        return self._bundle.rows(name, number * rows, (number + 1) * rows).dequantize()

    def per_layer_embedding(self, start: int, stop: int) -> Array:
        return self._bundle.rows(PER_LAYER_EMBEDDING, start, stop).dequantize()

    def whole(self, name: str) -> Array:
        return self._bundle.array(name)

    def embedding(self, start: int, stop: int) -> Array:
        return self._rows(EMBEDDING, start, stop)

    def head(self, start: int, stop: int) -> Array:
        return self._rows(EMBEDDING if self.config.tied_head else HEAD, start, stop)

    def final_norm(self) -> Array:
        return self._bundle.array(gain_name(FINAL_NORM))

    @cached_property
    def _projection(self) -> Array:
        """(layers * size, hidden), which every layer has a part of."""
        return self._bundle.array(f"{PER_LAYER_PROJECTION}.weight")

    def _model_part(self, index: int) -> dict[str, Array]:
        """What makes the layer's per-layer input, out of arrays of the whole model."""
        if self.config.per_layer is None:
            return {}
        size = self.config.per_layer.size
        return {
            PER_LAYER_PROJECTION: self._projection[index * size : (index + 1) * size],
            PER_LAYER_NORM: self._bundle.array(gain_name(f"{PER_LAYER_NORM}.weight")),
        }

    def _rows(self, name: str, start: int, stop: int) -> Array:
        if name not in self._tables:
            self._tables[name] = self._bundle.quant(name)
        return self._tables[name].rows(start, stop).dequantize()


def resident_parameters(config: GemmaConfig) -> int:
    """All but the per-layer embedding, which is read by row wherever it lies."""
    rows = config.table_shapes().get(PER_LAYER_EMBEDDING, (0, 0))
    return config.num_parameters() - rows[0] * rows[1]


def active_parameters(config: GemmaConfig) -> int:
    """Those that a token reads: of the experts the chosen ones, of the per-layer table a row."""
    count = resident_parameters(config) + config.table_shapes().get(PER_LAYER_EMBEDDING, (0, 0))[1]
    if config.experts is None:
        return count
    idle = config.experts.count - config.experts.active
    for layer in range(config.num_layers):
        shapes = config.linear_shapes(layer)
        for role in config.expert_roles(layer):
            count -= idle * config.expert_rows(layer, role) * shapes[role][1]
    return count
