"""Where the float32 weights of the reference come from: a checkpoint, or a bundle, dequantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.bundle import Bundle
from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, GemmaConfig
from uq.formats.manifest import gain_name
from uq.formats.spec import QuantTensor

Array = NDArray[np.float32]
Weights = Mapping[str, Array]


class WeightSource(Protocol):
    """Float32 weights of a model, read in parts: a `Checkpoint`, or what stands in for one."""

    config: GemmaConfig

    def layer(self, index: int) -> Weights:
        """Role -> (out, in) linear, or (size,) norm gain."""
        ...

    def embedding(self, start: int, stop: int) -> Array:
        """Rows `start:stop`, not multiplied by the embedding's scale."""
        ...

    def head(self, start: int, stop: int) -> Array:
        """Rows `start:stop` of the output matrix; the embedding's where they are tied."""
        ...

    def final_norm(self) -> Array:
        """Gain of the norm in front of the head: (hidden,)."""
        ...


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
            return self._checkpoint.layer(index)
        if index not in self._layers:
            self._layers[index] = self._checkpoint.layer(index)
        return self._layers[index]

    def embedding(self, tokens: NDArray[np.int32]) -> Array:
        """Rows of the embedding, (*tokens.shape, hidden)."""
        if self._resident:
            return self._table("embedding")[tokens]
        ids, inverse = np.unique(tokens, return_inverse=True)
        rows = [self._checkpoint.embedding(int(token), int(token) + 1) for token in ids]
        return np.concatenate(rows)[inverse.reshape(tokens.shape)]

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


class BundleWeights:
    """The dequantized weights of a bundle, read as a checkpoint is."""

    def __init__(self, bundle: Bundle) -> None:
        self.config: GemmaConfig = bundle.config
        self._bundle = bundle
        self._tables: dict[str, QuantTensor] = {}

    def layer(self, index: int) -> Weights:
        return {
            role: value.dequantize() if isinstance(value, QuantTensor) else value
            for role, value in self._bundle.layer(index).items()
        }

    def embedding(self, start: int, stop: int) -> Array:
        return self._rows(EMBEDDING, start, stop)

    def head(self, start: int, stop: int) -> Array:
        return self._rows(EMBEDDING if self.config.tied_head else HEAD, start, stop)

    def final_norm(self) -> Array:
        return self._bundle.array(gain_name(FINAL_NORM))

    def _rows(self, name: str, start: int, stop: int) -> Array:
        if name not in self._tables:
            self._tables[name] = self._bundle.quant(name)
        return self._tables[name].rows(start, stop).dequantize()
