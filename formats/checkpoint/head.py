"""Whether a stored head is the embedding, as a configuration that ties the two says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from uq.errors import CheckpointError
from uq.formats.checkpoint.tensors import TensorInfo, is_readable, read_rows
from uq.formats.config import EMBEDDING, HEAD

ROWS = 2048  # of both that are compared at a time


def tied(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors with the matrix that both names stand for as the embedding, and no head.

    Reads both where both are stored. Fine-tunes whose head was trained alone often keep the
    configuration of their base, and transformers then ties nothing.

    Raises:
        CheckpointError: head and embedding differ, or a value is NaN or infinite.
    """
    found = dict(tensors)
    head = found.pop(HEAD, None)
    if head is None:
        return found
    embedding = found.setdefault(EMBEDDING, head)
    if not _same(embedding, head):
        raise CheckpointError(
            f"{head.where}: differs from the embedding, but config.json ties them; if the head was "
            'trained, set "tie_word_embeddings": false there, else remove this tensor'
        )
    return found


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    if one == other:
        return True
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    if not (is_readable(one.dtype) and is_readable(other.dtype)):
        return False
    rows = one.shape[0]
    blocks = ((start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))
    return all(
        np.array_equal(read_rows(one, start, stop), read_rows(other, start, stop))
        for start, stop in blocks
    )
