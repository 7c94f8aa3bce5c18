"""What the calibration tokens are in front of layer 0: rows of the embeddings, on both paths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import EMBEDDING, PER_LAYER_EMBEDDING, GemmaConfig
from uq.formats.spec import Spec
from uq.kernels.altup import spread
from uq.kernels.per_layer import stored_tokens
from uq.kernels.weights import CheckpointWeights
from uq.quantize.calibration_engine import Spread, TokenRows
from uq.quantize.plan import Plan
from uq.quantize.scales import quantize_rtn

Array = NDArray[np.float32]


def token_rows(
    checkpoint: Checkpoint, plan: Plan, tokens: NDArray[np.int32]
) -> Iterator[TokenRows]:
    """Embedding rows of the sequences, `batch_tokens` tokens at a time."""
    weights = CheckpointWeights(checkpoint, resident=False)
    step = max(1, plan.gptq.work.batch_tokens // tokens.shape[1])
    for start in range(0, len(tokens), step):
        here = tokens[start : start + step]
        ids, places = np.unique(here, return_inverse=True)
        distinct, places = weights.embedding(ids), places.reshape(here.shape)
        rounded = quantize_rtn(distinct, plan.tensors[EMBEDDING].spec).dequantize()
        quantized, rows = rounded[places], distinct[places]
        if checkpoint.config.per_layer is None:
            yield TokenRows(quantized, rows if plan.corrected else None)
        else:
            table = plan.tensors[PER_LAYER_EMBEDDING].spec
            ours, theirs = (PerLayerRows(checkpoint, here, spec) for spec in (table, None))
            maker = stream_maker(weights, checkpoint.config)
            yield TokenRows(quantized, rows if plan.corrected else None, ours, theirs, maker)


def exact_rows(
    checkpoint: Checkpoint, weights: CheckpointWeights, tokens: NDArray[np.int32]
) -> TokenRows:
    """Of sequences on one path, nothing rounded."""
    rows, config = weights.embedding(tokens), checkpoint.config
    if config.per_layer is None:
        return TokenRows(rows)
    told = PerLayerRows(checkpoint, tokens, None)
    return TokenRows(rows, quantized_rows=told, spread=stream_maker(weights, config))


def stream_maker(weights: CheckpointWeights, config: GemmaConfig) -> Spread | None:
    """What makes the residual streams of embedded tokens, in models that have several."""
    return None if config.altup is None else partial(spread, config.altup, weights.whole)


class PerLayerRows:
    """A layer's part of the per-layer embedding for some tokens, read when it is asked for."""

    def __init__(
        self, checkpoint: Checkpoint, tokens: NDArray[np.int32], spec: Spec | None
    ) -> None:
        """`spec`: of the quantized table; None for the checkpoint's own."""
        self._checkpoint, self._spec, self._shape = checkpoint, spec, tokens.shape
        assert checkpoint.config.per_layer is not None
        ids = stored_tokens(checkpoint.config.per_layer, tokens)
        self._ids, self._inverse = np.unique(ids, return_inverse=True)

    def __call__(self, layer: int) -> Array:
        """(sequences, length, size), unscaled."""
        assert self._checkpoint.config.per_layer is not None
        size = self._checkpoint.config.per_layer.size
        part = slice(layer * size, (layer + 1) * size)
        rows = np.concatenate([self._row(int(token), part) for token in self._ids])
        return rows[self._inverse.reshape(self._shape)]

    def _row(self, token: int, part: slice) -> Array:
        row = self._checkpoint.per_layer_embedding(token, token + 1)
        if self._spec is not None:
            row = quantize_rtn(row, self._spec).dequantize()
        return row[:, part]
