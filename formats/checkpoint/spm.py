"""How SentencePiece's merging puts each token of a vocabulary together."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

EMPTY = -1
NO_SCORE = np.float32(-np.inf)


@njit(cache=True)
def last_splits(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], scores: NDArray[np.float32]
) -> NDArray[np.int32]:
    """Where the last merge joins each token when it is encoded alone.

    Args:
        data: (bytes,) uint8, the UTF-8 text of all tokens one after another.
        offsets: (tokens + 1,) int64, where each begins in `data`.
        scores: (tokens,) float32; the pair whose concatenation scores best merges first, the
            leftmost of equals.

    Returns:
        (tokens,) int32: length in bytes of the left part; 0 for a single character and for a
        token that merging never reaches.
    """
    count = len(offsets) - 1
    table = _index(data, offsets)
    longest = np.max(np.diff(offsets))
    bounds = np.empty(longest + 1, np.int64)
    joined = np.empty(longest + 1, np.float32)
    splits = np.zeros(count, np.int32)
    for token in range(count):
        splits[token] = _last_split(
            data, offsets, scores, table, offsets[token], offsets[token + 1], bounds, joined
        )
    return splits


@njit(cache=True)
def _last_split(data, offsets, scores, table, start, stop, bounds, joined):  # type: ignore[no-untyped-def]
    # Symbol i spans bytes bounds[i]:bounds[i + 1]; joined[i] scores its union with symbol i + 1.
    symbols = 0
    for at in range(start, stop):
        if data[at] & 0xC0 != 0x80:  # not a continuation byte of UTF-8
            bounds[symbols] = at
            symbols += 1
    bounds[symbols] = stop
    for i in range(symbols - 1):
        joined[i] = _score(data, offsets, scores, table, bounds[i], bounds[i + 2])
    while symbols > 2:
        best = np.argmax(joined[: symbols - 1])
        if joined[best] == NO_SCORE:
            return 0
        symbols -= 1
        bounds[best + 1 : symbols + 1] = bounds[best + 2 : symbols + 2].copy()
        joined[best : symbols - 1] = joined[best + 1 : symbols].copy()
        for changed in (best - 1, best):
            if 0 <= changed < symbols - 1:
                start_left, stop_right = bounds[changed], bounds[changed + 2]
                joined[changed] = _score(data, offsets, scores, table, start_left, stop_right)
    return bounds[1] - start if symbols == 2 else 0


@njit(cache=True)
def _score(data, offsets, scores, table, start, stop):  # type: ignore[no-untyped-def]
    token = table[_slot(data, offsets, table, start, stop)]
    return NO_SCORE if token == EMPTY else scores[token]


@njit(cache=True)
def _index(data, offsets):  # type: ignore[no-untyped-def]
    """Open-addressing hash table: text -> token. A later token replaces an equal earlier one."""
    count = len(offsets) - 1
    size = 1
    while size < 3 * count:
        size *= 2
    table = np.full(size, EMPTY, np.int32)
    for token in range(count):
        table[_slot(data, offsets, table, offsets[token], offsets[token + 1])] = token
    return table


@njit(cache=True)
def _slot(data, offsets, table, start, stop):  # type: ignore[no-untyped-def]
    """Slot of the text `data[start:stop]`, or the empty slot where it would go."""
    mask = np.uint64(len(table) - 1)
    slot = _hash(data, start, stop) & mask
    while True:
        token = table[slot]
        if token == EMPTY or _equal(data, start, stop, offsets[token], offsets[token + 1]):
            return slot
        slot = (slot + np.uint64(1)) & mask


@njit(cache=True)
def _hash(data, start, stop):  # type: ignore[no-untyped-def]
    """FNV-1a, 64 bits, folded."""
    value = np.uint64(0xCBF29CE484222325)
    for at in range(start, stop):
        value = (value ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
    return value ^ (value >> np.uint64(32))


@njit(cache=True)
def _equal(data, start, stop, other_start, other_stop):  # type: ignore[no-untyped-def]
    return np.array_equal(data[start:stop], data[other_start:other_stop])
