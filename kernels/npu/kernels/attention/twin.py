"""The kernel's arithmetic in numpy, integer for integer, and softmax attention in float64.

For each row: scores s = q . k in int32 (256 times those of the high limbs, and those of the low),
t = rint(256 s q_scale k_scale), capped before it is rounded where the model caps scores, in units
of 1/256 of a power of two, the running maximum m, a multiple of 256, weights w = 2^((t - m) / 256)
in 1 / 16384, and sums of w and of w v. m rises to the next multiple above the largest t, and by one
power of two more when the sum of weights reaches 2^23; sums are shifted right when it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.kernels.npu.kernels.attention.codes import LIMB, Array, Codes, QueryCodes, limbs
from uq.kernels.npu.kernels.attention.exp2_table import part, whole
from uq.kernels.npu.kernels.attention.plan import LANES, NO_WINDOW, Job, Plan
from uq.kernels.npu.kernels.attention.variant import Variant

Ints = NDArray[np.int64]
ONE, LOWEST, MASKED, FULL = 256, -(1 << 28), -(1 << 30), 1 << 23


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    factor: float,
    start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> NDArray[np.float64]:
    """Causal attention in float64: q (length, heads, dim), k and v (keys, kv_heads, dim)."""
    group = q.shape[1] // k.shape[1]
    wide, tall = (x.astype(np.float64).repeat(group, axis=1) for x in (k, v))
    out = np.empty(q.shape)
    positions = start + np.arange(len(q))[:, None]
    distance = positions - np.arange(len(k))
    seen = (distance >= 0) & (distance < (window or NO_WINDOW))
    for head in range(q.shape[1]):
        scores = q[:, head].astype(np.float64) @ wide[:, head].T * factor
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights @ tall[:, head] / weights.sum(axis=1, keepdims=True)
    return out


def powers(device: str) -> Ints:
    """(3841,) 2^(-distance / 256) in 1 / 16384 for every distance that a core meets."""
    distance = np.arange(15 * ONE + 1)
    if device == "npu1":
        product = whole()[distance >> 8] * part()[distance & 255]
        return _shifted(product, 14)
    rounded = _bfloat16(np.exp2(-distance.astype(np.float64) / ONE).astype(np.float32))
    return np.rint(rounded.astype(np.float64) * 16384).astype(np.int64)


def _shifted(x: Ints, bits: int) -> Ints:
    """x / 2^bits, ties to even."""
    return np.rint(x / float(1 << bits)).astype(np.int64)


def _bfloat16(x: Array) -> Array:
    word = x.view(np.uint32)
    kept = (word + 0x7FFF + ((word >> 16) & 1)) & np.uint32(0xFFFF0000)
    return kept.view(np.float32)


@dataclass
class Rows:
    """Sums of some rows while keys pass by."""

    sums: Ints  # (rows, dim)
    maximum: Ints  # (rows,)
    weights: Ints  # (rows,)

    @classmethod
    def empty(cls, rows: int, dim: int) -> Rows:
        zeros = np.zeros((rows, dim), np.int64)
        return cls(zeros, np.full(rows, LOWEST), np.zeros(rows, np.int64))

    def raise_to(self, maximum: Ints) -> None:
        shift = np.minimum((maximum - self.maximum) // ONE, 31)
        self.sums >>= shift[:, None]
        self.weights >>= shift
        self.maximum = maximum

    def merge(self, other: Rows) -> None:
        both = np.maximum(self.maximum, other.maximum) + ONE
        self.raise_to(both)
        other.raise_to(both)
        self.sums += other.sums
        self.weights += other.weights


@dataclass(frozen=True)
class Keys:
    """Of one KV head, padded to whole blocks; `weight` as packed."""

    keys: Codes
    values: Codes
    scale: Array
    weight: NDArray[np.int16]


def capped(t: Array, cap: np.float32) -> Array:
    """cap tanh(t / cap) in float32, operation by operation as the kernel; t where cap is 0."""
    if not cap > 0:
        return t
    one = np.float32(1)
    x = (t * (one / cap)).clip(np.float32(-4.97), np.float32(4.97))
    u = x * x
    top = ((u + np.float32(378)) * u + np.float32(17325)) * u + np.float32(135135)
    bottom = ((u * np.float32(28) + np.float32(3150)) * u + np.float32(62370)) * u
    scaled: Array = x * top * (one / (bottom + np.float32(135135))) * cap
    return scaled


def add_block(
    rows: Rows,
    q: QueryCodes,
    scale: Array,
    positions: Ints,
    window: int,
    keys: Keys,
    block: slice,
    power: Ints,
    cap: np.float32,
) -> None:
    """Let one block of keys pass by rows of queries (rows, dim)."""
    columns = keys.keys[block].astype(np.float32).T
    high, low = (limb.astype(np.float32) @ columns for limb in limbs(q))  # exact
    scores = high * np.float32(LIMB) + low  # rounded once, as the kernel's int32 to float
    factor = keys.scale[block] * scale[:, None]  # float32, as the kernel multiplies
    exponents = capped(scores * factor, cap)
    t = np.rint(exponents.astype(np.float64) * ONE).astype(np.int64)
    distance = positions[:, None] - np.arange(block.start, block.stop)
    t = np.where((distance >= 0) & (distance < window), t, MASKED)
    largest = -(-t.max(axis=1) // ONE) * ONE
    raised = rows.maximum + ONE * (rows.weights >= FULL)
    rows.raise_to(np.maximum(largest, raised))
    weights = power[np.minimum(rows.maximum[:, None] - t, 15 * ONE)]
    rows.weights += weights.sum(axis=1)
    weighted = _shifted(weights * keys.weight[block].astype(np.int64), 15)
    mixed = weighted.astype(np.float64) @ keys.values[block].astype(np.float64)
    rows.sums += mixed.astype(np.int64)


def finish(rows: Rows) -> NDArray[np.uint16]:
    """bfloat16 of sums / weights."""
    inverse = np.float32(1) / np.maximum(rows.weights, 1).astype(np.float32)
    ratio = rows.sums.astype(np.float32) * inverse[:, None]
    return (_bfloat16(ratio).view(np.uint32) >> 16).astype(np.uint16)


def job_rows(
    variant: Variant, job: Job, packed: NDArray[np.void], q: QueryCodes, keys: Keys
) -> Rows:
    """Every row of a job; q (rows of all its lanes, dim), `packed` its blocks of queries."""
    power = powers(variant.device)
    scale = packed["scale"].reshape(-1)
    steps = packed["step"][:, None] * np.arange(variant.rows)
    positions = (packed["position"][:, None] + steps).reshape(-1).astype(np.int64)
    window, cap = int(packed["window"][0]), np.float32(packed["cap"][0])
    parts = 1 if variant.form == "prefill" else LANES  # cores that share the keys
    cores = [Rows.empty(len(q), variant.head_dim) for _ in range(parts)]
    for index in range(job.blocks):
        first = (job.first + index) * variant.keys
        block = slice(first, first + variant.keys)
        add_block(cores[index % parts], q, scale, positions, window, keys, block, power, cap)
    for below, core in zip(cores, cores[1:], strict=False):
        core.merge(below)
    return cores[-1]


def attention(
    plan: Plan, packed: NDArray[np.void], q: QueryCodes, heads: list[Keys]
) -> NDArray[np.void]:
    """What the design writes for the packed queries.

    Args:
        q: (jobs, rows of all lanes, dim) codes in the order of the jobs, not in blocks.
        heads: the keys of each KV head.
    """
    variant = plan.variant
    outputs = np.zeros(packed.shape, variant.output)
    jobs = [job for column in plan.jobs for job in column]
    for index, job in enumerate(jobs):
        rows = job_rows(variant, job, packed[index], q[index], heads[job.kv_head])
        out, lanes = outputs[index], packed.shape[1]
        out["rows"] = finish(rows).reshape(lanes, variant.rows, variant.head_dim)
        out["maximum"] = rows.maximum.reshape(lanes, variant.rows)
        out["weights"] = rows.weights.reshape(lanes, variant.rows)
    return outputs
