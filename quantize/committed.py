"""A layer of an unfinished bundle, as what follows will see it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.spec import QuantTensor
from uq.kernels.weights import Weights, WeightSource

Array = NDArray[np.float32]


class CommittedLayer(WeightSource):
    """A layer that an earlier run has quantized, beside the rest of its checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int,
        committed: Mapping[str, QuantTensor | NDArray[np.float32]],
    ) -> None:
        self.config = checkpoint.config
        self._checkpoint, self._layer, self._committed = checkpoint, layer, committed

    def layer(self, index: int) -> Weights:
        stacks = self.config.expert_roles(index)
        return self._checkpoint.model_part(index) | {
            role: value.dequantize() if isinstance(value, QuantTensor) else value
            for role, value in self._committed.items()
            if role not in stacks
        }

    def expert(self, index: int, role: str, number: int) -> Array:
        stack, rows = self._committed[role], self.config.expert_rows(index, role)
        assert isinstance(stack, QuantTensor)
        return stack.rows(number * rows, (number + 1) * rows).dequantize()

    def whole(self, name: str) -> Array:
        return self._checkpoint.whole(name)

    def embedding(self, start: int, stop: int) -> Array:
        return self._checkpoint.embedding(start, stop)

    def head(self, start: int, stop: int) -> Array:
        return self._checkpoint.head(start, stop)

    def final_norm(self) -> Array:
        return self._checkpoint.final_norm()
