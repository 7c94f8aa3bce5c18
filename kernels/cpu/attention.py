"""Attention over the KV cache: scores, softmax, weighted sum of values, in float32.

Keys lie 32 positions side by side and values 32 head dimensions side by side, so both products are
register tiles of broadcast query (or weight) times lanes. A layer with a window keeps a ring of
slots. Every query is computed as if it were alone: a token has the same bits in prefill as in
decoding.
"""

from __future__ import annotations

import numpy as np
from numba import get_thread_id, prange
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.cpu.intrinsics import address
from uq.kernels.cpu.tiles import TILE_LANES, TILE_ROWS, float_tile
from uq.kernels.elementwise import FAST, exp32, kernel

LANE_BYTES = 4 * TILE_LANES
_ONE, _TWO = np.float32(1.0), np.float32(2.0)

_wide, _narrow, _single = float_tile(TILE_ROWS), float_tile(4), float_tile(1)


def attention_scratch(config: GemmaConfig, context: int) -> int:
    """Float32 numbers of scratch that each thread needs."""
    rows = max(TILE_ROWS, config.num_heads)
    dim = max(config.layer_head_dim(layer) for layer in range(config.num_layers))
    return rows * (context + 2 * TILE_LANES + dim + TILE_LANES)


@kernel()
def _tiles(
    rows: int, x: int, x_row: int, w: int, w_step: int, count: int, out: int, out_row: int
) -> None:
    """out (rows, 32) += x (rows, count) times w (count, 32)."""
    while rows > 0:
        if rows >= TILE_ROWS:
            height = TILE_ROWS
            _wide(x, x_row, w, w_step, count, out, out_row)
        elif rows >= 4:
            height = 4
            _narrow(x, x_row, w, w_step, count, out, out_row)
        else:
            height = 1
            _single(x, x_row, w, w_step, count, out, out_row)
        x, out, rows = x + height * x_row, out + height * out_row, rows - height


@kernel(fastmath=FAST | {"nnan"})
def _peak(values: NDArray[np.float32]) -> np.float32:
    peak: np.float32 = values[0]
    for i in range(1, values.size):
        peak = max(peak, values[i])
    return peak


@kernel(fastmath=FAST)
def _softmax(scores: NDArray[np.float32], scale: np.float32, cap: np.float32) -> None:
    """Raw products to attention weights, in place; `cap` 0 is none."""
    for i in range(scores.size):
        scores[i] *= scale
    if cap > 0:
        for i in range(scores.size):
            scores[i] = cap - _TWO * cap / (_ONE + exp32(_TWO * scores[i] / cap))
    peak = _peak(scores)
    total = np.float32(0.0)
    for i in range(scores.size):
        scores[i] = exp32(scores[i] - peak)
        total += scores[i]
    for i in range(scores.size):
        scores[i] /= total


@kernel()
def _score_block(
    block: int, queries: NDArray[np.float32], keys: NDArray[np.float32], out: int, out_row: int
) -> None:
    """Raw products of queries (rows, dim) with the 32 positions of one block of a head's keys."""
    rows, dim = queries.shape
    w = address(keys) + block % keys.shape[0] * dim * LANE_BYTES
    _tiles(rows, address(queries), 4 * dim, w, LANE_BYTES, dim, out, out_row)


@kernel()
def _mix(
    rows: int,
    weights: int,
    weights_row: int,
    low: int,
    high: int,
    values: NDArray[np.float32],
    out: int,
    out_row: int,
) -> None:
    """out (rows, 32) += weights of positions low..high - 1 times 32 dimensions of their values."""
    slots = values.shape[0]
    position = low
    while position < high:
        slot = position % slots
        count = min(high - position, slots - slot)
        x, w = weights + 4 * (position - low), address(values) + slot * LANE_BYTES
        _tiles(rows, x, weights_row, w, LANE_BYTES, count, out, out_row)
        position += count


@kernel()
def _low(position: int, window: int) -> int:
    """First position that a query sees."""
    return max(0, position - window + 1)


@kernel()
def attend_tile(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    first: int,
    group: int,
    position: int,
    window: int,
    scale: np.float32,
    cap: np.float32,
    scratch: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Attention of a few queries (rows, dim) over one head; row r is that of token r // group.

    Args:
        first: row of the first query; `position`: of row 0.
        scratch: (n,) float32; its end is the result.

    Returns:
        (rows, padded dim) float32.
    """
    rows, wide = queries.shape[0], values.shape[0] * TILE_LANES
    start = _low(position + first // group, window)
    base = start // TILE_LANES * TILE_LANES  # position of the first score
    high = position + (first + rows - 1) // group + 1
    span = -(-(high - base) // TILE_LANES) * TILE_LANES
    scores = scratch[: rows * span].reshape(rows, span)
    mixed = scratch[rows * span :][: rows * wide].reshape(rows, wide)
    scores[:] = 0
    mixed[:] = 0
    for block in range(span // TILE_LANES):
        out = address(scores) + block * LANE_BYTES
        _score_block(base // TILE_LANES + block, queries, keys, out, 4 * span)
    for row in range(rows):
        own = position + (first + row) // group
        low = _low(own, window)
        scores[row, : low - base] = 0
        _softmax(scores[row, low - base : own + 1 - base], scale, cap)
        scores[row, own + 1 - base :] = 0
    weights = address(scores) + 4 * (start - base)
    for block in range(values.shape[0]):
        out = address(mixed) + block * LANE_BYTES
        _mix(rows, weights, 4 * span, start, high, values[block], out, 4 * wide)
    return mixed


@kernel(parallel=True)
def attend_many(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    position: int,
    window: int,
    scale: np.float32,
    cap: np.float32,
    scratch: NDArray[np.float32],
    context: NDArray[np.float32],
) -> None:
    """Causal attention of new tokens over the cache, which holds their own keys already.

    Args:
        queries: (kv_heads, tokens * group, dim) float32.
        keys, values: a layer of the cache, as in `enter_attention`.
        position: of the first token.
        window: number of keys that a query sees, its own included.
        scratch: (threads, attention_scratch) float32.
        context: (tokens, heads * dim) float32, out.
    """
    kv_heads, rows, dim = queries.shape
    group = rows // context.shape[0]
    per_head = -(-rows // TILE_ROWS)
    count = kv_heads * per_head
    for index in prange(count):
        # Later tokens see more keys: taking tiles from both ends in turn evens out the threads.
        item = index // 2 if index % 2 == 0 else count - 1 - index // 2
        head, first = item // per_head, item % per_head * TILE_ROWS
        tile, mine = queries[head, first : first + TILE_ROWS], scratch[get_thread_id()]
        seen = (first, group, position, window)
        mixed = attend_tile(tile, keys[head], values[head], *seen, scale, cap, mine)
        for row in range(tile.shape[0]):
            token, member = (first + row) // group, (first + row) % group
            column = (head * group + member) * dim
            context[token, column : column + dim] = mixed[row, :dim]


@kernel(parallel=True)
def attend_one(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    position: int,
    window: int,
    scale: np.float32,
    cap: np.float32,
    scratch: NDArray[np.float32],
    context: NDArray[np.float32],
) -> None:
    """`attend_many` for one token, parallel over keys and then over head dimensions.

    The threads share the scratch.
    """
    kv_heads, group, dim = queries.shape
    start = _low(position, window)
    first = start // TILE_LANES
    blocks = position // TILE_LANES + 1 - first
    span, wide = blocks * TILE_LANES, values.shape[1] * TILE_LANES
    heads = kv_heads * group
    flat = scratch.reshape(-1)
    scores = flat[: heads * span].reshape(kv_heads, group, span)
    mixed = flat[heads * span :][: heads * wide].reshape(kv_heads, group, wide)
    scores[:] = 0
    mixed[:] = 0
    for item in prange(kv_heads * blocks):
        head, block = item // blocks, item % blocks
        out = address(scores[head]) + block * LANE_BYTES
        _score_block(first + block, queries[head], keys[head], out, 4 * span)
    seen = start - first * TILE_LANES
    last = position + 1 - first * TILE_LANES
    for item in prange(heads):
        _softmax(scores[item // group, item % group, seen:last], scale, cap)
    for item in prange(kv_heads * values.shape[1]):
        head, block = item // values.shape[1], item % values.shape[1]
        weights, out = address(scores[head]) + 4 * seen, address(mixed[head]) + block * LANE_BYTES
        _mix(group, weights, 4 * span, start, position + 1, values[head, block], out, 4 * wide)
        for member in range(group):
            column = (head * group + member) * dim + block * TILE_LANES
            width = min(TILE_LANES, dim - block * TILE_LANES)
            piece = mixed[head, member, block * TILE_LANES :][:width]
            context[0, column : column + width] = piece
