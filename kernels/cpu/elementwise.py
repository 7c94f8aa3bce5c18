"""What lies between the matrix products: norms, gate, RoPE, the 16-bit activations.

Tokens are independent: nothing is added up across tokens or threads, so the bits depend on neither
the batch nor the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
from numba import prange
from numpy.typing import NDArray

from uq.kernels.cpu.intrinsics import address, quantize_chunk
from uq.kernels.cpu.llvm import CHUNK, LANES
from uq.kernels.cpu.tiles import TILE_LANES
from uq.kernels.elementwise import FAST, exp32, kernel

_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_GELU_SCALE = np.float32(2.0 * np.sqrt(2.0 / np.pi))
_GELU_CUBE = np.float32(0.044715)


def per_token(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a loop over tokens, the rows of its first argument.

    Many tokens run on all threads. One runs on the caller's: the others would only be waited for,
    and for long when the machine is busy.
    """
    many = kernel(parallel=True)(function)
    serial = FunctionType(function.__code__, function.__globals__, function.__name__)
    # numba's cache tells functions apart by this name and not by their options.
    serial.__qualname__ = f"{function.__qualname__}_serial"
    one = kernel()(serial)

    @wraps(function)
    def run(tokens: NDArray[Any], *args: Any) -> None:
        (one if len(tokens) == 1 else many)(tokens, *args)

    return run


Scalar = TypeVar("Scalar", bound=np.generic)


def _narrow(array: NDArray[Scalar], rows: int, cols: int) -> NDArray[Scalar]:
    """The beginning of an array's memory in another shape."""
    return array.reshape(-1)[: rows * cols].reshape(rows, cols)


@dataclass(frozen=True)
class Activations:
    """The input of a linear as 16-bit fixed point: value = code * scale of its chunk.

    Attributes:
        codes: (tokens, cols) int16 in PAIR_ORDER.
        scales: (tokens, cols / 32) float32.
        offsets: (tokens, cols / 32) int32, -8 times the sum of a chunk's codes: what a zero point
            eight above the lowest code takes away.
    """

    codes: NDArray[np.int16]
    scales: NDArray[np.float32]
    offsets: NDArray[np.int32]

    @classmethod
    def empty(cls, tokens: int, cols: int) -> Activations:
        chunks = (tokens, cols // CHUNK)
        codes = np.empty((tokens, cols), np.int16)
        return cls(codes, np.empty(chunks, np.float32), np.empty(chunks, np.int32))

    def rows(self, start: int, stop: int) -> Activations:
        """The activations of tokens `start:stop`."""
        span = slice(start, stop)
        return Activations(self.codes[span], self.scales[span], self.offsets[span])

    def narrow(self, tokens: int, cols: int) -> Activations:
        """The same memory as activations of at most as many tokens and columns."""
        chunks = cols // CHUNK
        return Activations(
            _narrow(self.codes, tokens, cols),
            _narrow(self.scales, tokens, chunks),
            _narrow(self.offsets, tokens, chunks),
        )

    @property
    def arrays(self) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.int32]]:
        return self.codes, self.scales, self.offsets


@kernel()
def _quantize_row(
    x: NDArray[np.float32],
    codes: NDArray[np.int16],
    scales: NDArray[np.float32],
    offsets: NDArray[np.int32],
) -> None:
    for chunk in range(scales.size):
        first = chunk * CHUNK
        scale, total = quantize_chunk(address(x) + 4 * first, address(codes) + 2 * first)
        scales[chunk] = scale
        offsets[chunk] = -8 * total


@kernel(fastmath=FAST)
def _norm_factor(x: NDArray[np.float32], eps: np.float32) -> np.float32:
    """1 / sqrt(mean(x^2) + eps)."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    factor: np.float32 = _ONE / np.sqrt(total / np.float32(x.size) + eps)
    return factor


@per_token
def quantize_rows(
    x: NDArray[np.float32],
    codes: NDArray[np.int16],
    scales: NDArray[np.float32],
    offsets: NDArray[np.int32],
) -> None:
    """`Activations` of x (tokens, cols)."""
    for token in prange(x.shape[0]):
        _quantize_row(x[token], codes[token], scales[token], offsets[token])


@kernel(fastmath=FAST)
def _add_branch(
    hidden: NDArray[np.float32],
    branch: NDArray[np.float32],
    gain: NDArray[np.float32],
    eps: np.float32,
) -> None:
    if gain.size == 0:
        for i in range(hidden.size):
            hidden[i] += branch[i]
        return
    factor = _norm_factor(branch, eps)
    for i in range(hidden.size):
        hidden[i] += branch[i] * factor * gain[i]


@kernel(fastmath=FAST)
def _norm_row(
    x: NDArray[np.float32], gain: NDArray[np.float32], eps: np.float32, out: NDArray[np.float32]
) -> None:
    factor = _norm_factor(x, eps)
    for i in range(x.size):
        out[i] = x[i] * factor * gain[i]


@per_token
def norm(
    hidden: NDArray[np.float32],
    gain: NDArray[np.float32],
    eps: np.float32,
    normed: NDArray[np.float32],
    codes: NDArray[np.int16],
    scales: NDArray[np.float32],
    offsets: NDArray[np.int32],
) -> None:
    """normed = RMS norm of hidden (tokens, n), and its `Activations`."""
    for token in prange(hidden.shape[0]):
        _norm_row(hidden[token], gain, eps, normed[token])
        _quantize_row(normed[token], codes[token], scales[token], offsets[token])


@per_token
def add_and_norm(
    hidden: NDArray[np.float32],
    branch: NDArray[np.float32],
    branch_gain: NDArray[np.float32],
    gain: NDArray[np.float32],
    eps: np.float32,
    normed: NDArray[np.float32],
    codes: NDArray[np.int16],
    scales: NDArray[np.float32],
    offsets: NDArray[np.int32],
) -> None:
    """hidden += branch, normed first unless `branch_gain` is empty; then `norm` of the sum."""
    for token in prange(hidden.shape[0]):
        _add_branch(hidden[token], branch[token], branch_gain, eps)
        _norm_row(hidden[token], gain, eps, normed[token])
        _quantize_row(normed[token], codes[token], scales[token], offsets[token])


@kernel(fastmath=FAST)
def _gelu_row(gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
    """gate = gelu(gate) * up, gelu in its tanh form: x / (1 + exp(-2 u))."""
    for i in range(gate.size):
        x = gate[i]
        u2 = _GELU_SCALE * (x + _GELU_CUBE * x * x * x)
        gate[i] = x / (_ONE + exp32(-u2)) * up[i]


@per_token
def gelu_product(
    gate_up: NDArray[np.float32],
    codes: NDArray[np.int16],
    scales: NDArray[np.float32],
    offsets: NDArray[np.int32],
) -> None:
    """`Activations` of gelu(gate) * up; gate_up (tokens, 2 n), its first half overwritten."""
    n = gate_up.shape[1] // 2
    for token in prange(gate_up.shape[0]):
        gate = gate_up[token, :n]
        _gelu_row(gate, gate_up[token, n:])
        _quantize_row(gate, codes[token], scales[token], offsets[token])


@kernel(fastmath=FAST)
def _keep_row(gate: NDArray[np.float32], quantile: np.float32) -> None:
    """gate = max(gate - mean - quantile * deviation, 0); the sums in float64."""
    total = 0.0
    for i in range(gate.size):
        total += gate[i]
    mean = total / gate.size
    squares = 0.0
    for i in range(gate.size):
        squares += (gate[i] - mean) * (gate[i] - mean)
    threshold = np.float32(mean + quantile * np.sqrt(squares / gate.size))
    for i in range(gate.size):
        gate[i] = max(gate[i] - threshold, np.float32(0))


@per_token
def keep_largest(gate_up: NDArray[np.float32], quantile: np.float32) -> None:
    """In place, of gate_up (tokens, 2 n): `uq.kernels.laurel.keep_largest` of the first n."""
    n = gate_up.shape[1] // 2
    for token in prange(gate_up.shape[0]):
        _keep_row(gate_up[token, :n], quantile)


@kernel(fastmath=FAST)
def _head_row(
    x: NDArray[np.float32],
    gain: NDArray[np.float32],
    eps: np.float32,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """QK-norm (unless `gain` is empty) and RoPE, half-split, of one head."""
    half = cos.size
    if gain.size:
        _norm_row(x, gain, eps, x)
    for i in range(half):
        low, high = x[i], x[half + i]
        out[i] = low * cos[i] - high * sin[i]
        out[half + i] = high * cos[i] + low * sin[i]


@kernel()
def enter_token(
    token: int,
    qkv: NDArray[np.float32],
    columns: tuple[int, int, int],
    gains: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]],
    eps: np.float32,
    turn: tuple[NDArray[np.float32], NDArray[np.float32]],
    position: int,
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
) -> None:
    """`enter_attention` of row `token`: `turn` is its cos and sin, (dim / 2,) each."""
    kv_heads, blocks, dim, _ = keys.shape
    slot = position % (blocks * TILE_LANES)
    group = queries.shape[1] // qkv.shape[0]
    for head in range(kv_heads):
        for member in range(group):
            at = columns[0] + (head * group + member) * dim
            out = queries[head, token * group + member]
            _head_row(qkv[token, at : at + dim], gains[0], eps, turn[0], turn[1], out)
        if columns[1] < 0:
            continue
        at = columns[2] + head * dim  # in front of the keys' norm, where both are one projection
        v = qkv[token, at : at + dim]
        factor = _norm_factor(v, eps) if gains[2].size else _ONE
        for i in range(dim):
            value = v[i] * factor * gains[2][i] if gains[2].size else v[i]
            values[head, i // TILE_LANES, slot, i % TILE_LANES] = value
        k = qkv[token, columns[1] + head * dim : columns[1] + (head + 1) * dim]
        _head_row(k, gains[1], eps, turn[0], turn[1], k)
        for i in range(dim):
            keys[head, slot // TILE_LANES, i, slot % TILE_LANES] = k[i]


@per_token
def enter_attention(
    qkv: NDArray[np.float32],
    columns: tuple[int, int, int],
    gains: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]],
    eps: np.float32,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    position: int,
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
) -> None:
    """From the projections of new tokens to queries and KV cache.

    Args:
        qkv: (tokens, width); q, k, v begin at `columns`, k and v at -1 where there are none.
            Overwritten where there is a norm.
        gains: of queries, keys and values, (dim,) each, or empty.
        cos, sin: (tokens, dim / 2) of the new tokens.
        position: of the first new token.
        queries: (kv_heads, tokens * group, dim) out: queries that share a key head together.
        keys: (kv_heads, slots / 32, dim, 32) and values (kv_heads, dim / 32, slots, 32): a layer of
            the cache; position p lies in slot p % slots.
    """
    for token in prange(qkv.shape[0]):
        turn = (cos[token], sin[token])
        enter_token(token, qkv, columns, gains, eps, turn, position + token, queries, keys, values)


@kernel(parallel=True, fastmath=FAST)
def softcap(logits: NDArray[np.float32], cap: np.float32) -> None:
    """logits = cap * tanh(logits / cap) in place, tanh(u) = 1 - 2 / (1 + exp(2 u)); (n, vocab)."""
    for part in prange(logits.size // LANES):
        flat = logits.reshape(-1)[part * LANES : (part + 1) * LANES]
        for i in range(LANES):
            flat[i] = cap - _TWO * cap / (_ONE + exp32(_TWO * flat[i] / cap))
