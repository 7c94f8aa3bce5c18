"""Which merges of a BPE vocabulary are ever used.

Merges are never undone, and those within a token's span do not see its neighbours. So a token is
always put together by the same last merge: the one that happens when it is encoded alone. One merge
per token is enough; Gemma's files list every pair whose parts are tokens, twice as many, and most
of the time it takes to load them goes into building that table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

MAX_TOKEN = 1024  # bytes; the work is quadratic in it; the longest of Gemma 3 has 93
EMPTY = -1
NEVER = np.int32(2**31 - 1)
Ids = NDArray[np.int32]
Offsets = NDArray[np.int64]


def concatenate(tokens: Sequence[bytes]) -> tuple[NDArray[np.uint8], Offsets]:
    """(bytes,) uint8 text of all tokens, and (tokens + 1,) int64 where each begins."""
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    return np.frombuffer(b"".join(tokens), np.uint8), np.concatenate(([0], ends))


@njit(nogil=True, cache=True)
def all_splits(data: NDArray[np.uint8], offsets: Offsets) -> tuple[Ids, Ids, Ids]:
    """Every way to split a token into two tokens.

    Returns:
        left, right, result: (n,) int32 token ids, ordered by result.
    """
    table = _index(data, offsets)
    count = 0
    left = np.empty(len(data), np.int32)
    right = np.empty(len(data), np.int32)
    result = np.empty(len(data), np.int32)
    for token in range(len(offsets) - 1):
        start, stop = offsets[token], offsets[token + 1]
        for at in range(start + 1, stop):
            if data[at] & 0xC0 == 0x80:  # within a character of UTF-8
                continue
            first = table[_slot(data, offsets, table, start, at)]
            second = table[_slot(data, offsets, table, at, stop)]
            if first != EMPTY and second != EMPTY:
                left[count], right[count], result[count] = first, second, token
                count += 1
    return left[:count], right[:count], result[:count]


@njit(nogil=True, cache=True)
def used_merges(
    data: NDArray[np.uint8], offsets: Offsets, left: Ids, right: Ids, result: Ids, rank: Ids
) -> NDArray[np.bool_]:
    """Encode every token alone and mark the merge that completes it.

    Args:
        data, offsets: the tokens, as `concatenate` gives them.
        left, right, result: (n,) int32, the merges.
        rank: (n,) int32; the lowest merges first, the leftmost of equals.

    Returns:
        (n,) bool.
    """
    texts = _index(data, offsets)
    pairs = _index_pairs(left, right)
    longest = 0
    for token in range(len(offsets) - 1):
        longest = max(longest, offsets[token + 1] - offsets[token])
    symbols = np.empty(longest + 1, np.int32)
    merges = np.empty(longest + 1, np.int32)
    ranks = np.empty(longest + 1, np.int32)
    used = np.zeros(len(left), np.bool_)
    for token in range(len(offsets) - 1):
        count = _characters(data, offsets, texts, offsets[token], offsets[token + 1], symbols)
        # merges[i] joins symbols i and i + 1.
        for i in range(count - 1):
            merges[i] = pairs[_pair_slot(pairs, left, right, symbols[i], symbols[i + 1])]
            ranks[i] = NEVER if merges[i] == EMPTY else rank[merges[i]]
        while count > 1:
            best = np.argmin(ranks[: count - 1])
            if ranks[best] == NEVER:
                break
            merge = merges[best]
            if count == 2:
                used[merge] = True
            symbols[best] = result[merge]
            count -= 1
            for i in range(best + 1, count):
                symbols[i] = symbols[i + 1]
                merges[i - 1], ranks[i - 1] = merges[i], ranks[i]
            for changed in (best - 1, best):
                if not 0 <= changed < count - 1:
                    continue
                first, second = symbols[changed], symbols[changed + 1]
                merges[changed] = pairs[_pair_slot(pairs, left, right, first, second)]
                ranks[changed] = NEVER if merges[changed] == EMPTY else rank[merges[changed]]
    return used


@njit(cache=True)
def _characters(
    data: NDArray[np.uint8], offsets: Offsets, texts: Ids, start: int, stop: int, symbols: Ids
) -> int:
    """Fill `symbols` with the tokens of single characters; returns how many."""
    count = 0
    at = start
    while at < stop:
        end = at + 1
        while end < stop and data[end] & 0xC0 == 0x80:
            end += 1
        symbols[count] = texts[_slot(data, offsets, texts, at, end)]
        count += 1
        at = end
    return count


# Open-addressing hash tables, at most a third full; EMPTY marks a free slot.


@njit(cache=True)
def _table(count: int) -> Ids:
    size = 1
    while size < 3 * count:
        size *= 2
    return np.full(size, EMPTY, np.int32)


@njit(cache=True)
def _index(data: NDArray[np.uint8], offsets: Offsets) -> Ids:
    """Text -> token; a later token replaces an equal earlier one."""
    table: Ids = _table(len(offsets) - 1)
    for token in range(len(offsets) - 1):
        table[_slot(data, offsets, table, offsets[token], offsets[token + 1])] = token
    return table


@njit(cache=True)
def _slot(
    data: NDArray[np.uint8], offsets: Offsets, table: Ids, start: int, stop: int
) -> np.uint64:
    """Slot of the text `data[start:stop]`, or the free slot where it would go."""
    value = np.uint64(0xCBF29CE484222325)  # FNV-1a
    for at in range(start, stop):
        value = (value ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
    mask = np.uint64(len(table) - 1)
    slot = (value ^ (value >> np.uint64(32))) & mask
    while True:
        token = table[slot]
        if token == EMPTY or _equal(data, start, stop, offsets[token], offsets[token + 1]):
            return slot
        slot = (slot + np.uint64(1)) & mask


@njit(cache=True)
def _equal(data: NDArray[np.uint8], start: int, stop: int, other: int, other_stop: int) -> bool:
    if stop - start != other_stop - other:
        return False
    for step in range(stop - start):  # noqa: SIM110, numba compiles no generators
        if data[start + step] != data[other + step]:
            return False
    return True


@njit(cache=True)
def _index_pairs(left: Ids, right: Ids) -> Ids:
    """Pair of tokens -> merge; the first of equals stays."""
    table: Ids = _table(len(left))
    for merge in range(len(left)):
        slot = _pair_slot(table, left, right, left[merge], right[merge])
        if table[slot] == EMPTY:
            table[slot] = merge
    return table


@njit(cache=True)
def _pair_slot(table: Ids, left: Ids, right: Ids, first: int, second: int) -> np.uint64:
    """Slot of the merge of two tokens, or the free slot where it would go."""
    value = (np.uint64(first) << np.uint64(32)) ^ np.uint64(second)
    value *= np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
    mask = np.uint64(len(table) - 1)
    slot = (value >> np.uint64(32)) & mask
    while True:
        merge = table[slot]
        if merge == EMPTY or (left[merge] == first and right[merge] == second):
            return slot
        slot = (slot + np.uint64(1)) & mask
