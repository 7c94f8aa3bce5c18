"""Attention by the kernel's twin, or by softmax in float64, in the place of an NPU's runs.

Both read the buffers that a run is given, so what they get is what an NPU gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.formats.pack import unpack_pairs
from uq.kernels.npu.hybrid.attention import Start
from uq.kernels.npu.kernels.attention import twin
from uq.kernels.npu.kernels.attention.plan import Plan

Void = NDArray[np.void]


@dataclass(frozen=True)
class Unpacked:
    """Codes of queries (jobs, rows of all lanes, dim), and the keys of each head."""

    queries: NDArray[np.int16]
    heads: list[twin.Keys]

    @classmethod
    def of(cls, plan: Plan, queries: Void, blocks: Void) -> Unpacked:
        variant = plan.variant
        m, k, n = variant.tiles.score
        high, low = (
            np.stack([_flat(block, variant.rows, variant.head_dim, m, k) for block in limb])
            for limb in (_each(queries, "high"), _each(queries, "low"))
        )
        shape = (len(queries), -1, variant.head_dim)
        heads = []
        for mine in blocks:
            keys, values = (_codes(mine[name], variant.kv_bits) for name in ("keys", "values"))
            turned = [_flat(b, variant.head_dim, variant.keys, k, n).T for b in keys]
            straight = [
                _flat(b, variant.keys, variant.head_dim, *variant.tiles.mix[1:]) for b in values
            ]
            scales = mine["scale"].reshape(-1), mine["weight"].reshape(-1)
            heads.append(twin.Keys(np.concatenate(turned), np.concatenate(straight), *scales))
        return cls((high * np.int16(256) + low).reshape(shape), heads)


def _each(queries: Void, limb: str) -> NDArray[np.int8]:
    codes: NDArray[np.int8] = queries[limb]
    return codes.reshape(-1, codes.shape[-1])


def _codes(blocks: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    return blocks.view(np.int8) if bits == 8 else unpack_pairs(blocks)


def _flat(block: NDArray[np.int8], rows: int, cols: int, r: int, c: int) -> NDArray[np.int8]:
    """A block of (r, c) tiles as a matrix (rows, cols)."""
    return block.reshape(rows // r, cols // c, r, c).swapaxes(1, 2).reshape(rows, cols)


def by_twin(plan: Plan, queries: Void, blocks: Void) -> Void:
    given = Unpacked.of(plan, queries, blocks)
    return twin.attention(plan, queries, given.queries, given.heads)


def by_softmax(plan: Plan, queries: Void, blocks: Void) -> Void:
    """Exact up to bfloat16 rows and the 14 bits of their weights."""
    given, outputs = (
        Unpacked.of(plan, queries, blocks),
        np.zeros(queries.shape, plan.variant.output),
    )
    jobs = [job for column in plan.jobs for job in column]
    for job, packed, codes, out in zip(jobs, queries, given.queries, outputs, strict=True):
        keys = given.heads[job.kv_head]
        step = packed["step"][:, None] * np.arange(plan.variant.rows)
        position = (packed["position"][:, None] + step).reshape(-1, 1)
        end = (job.first + job.blocks) * plan.variant.keys
        distance = position - np.arange(job.first * plan.variant.keys, end)
        part = slice(end - distance.shape[1], end)
        seen = (distance >= 0) & (distance < packed["window"][0])
        scores = codes.astype(np.float64) @ keys.keys[part].T.astype(np.float64)
        scores = scores * packed["scale"].reshape(-1, 1) * keys.scale[part]
        if cap := float(packed["cap"][0]):
            scores = cap * np.tanh(scores / cap)
        scores = np.where(seen, scores, -1e30)
        highest = np.ceil(scores.max(axis=1, keepdims=True))
        weights = np.where(seen, np.exp2(scores - highest), 0)
        total = weights.sum(axis=1)
        values = keys.values[part] * (keys.weight[part, None] / 32768)
        mixed = weights @ values / np.where(total, total, 1)[:, None]
        shape = out["rows"].shape
        words = mixed.astype(np.float32).view(np.uint32)
        out["rows"] = ((words + 0x8000) >> 16).astype(np.uint16).reshape(shape)
        out["maximum"] = (256 * np.maximum(highest, -1e6)).reshape(shape[:2])
        out["weights"] = np.rint(total * 16384).reshape(shape[:2])
    return outputs


@dataclass(frozen=True)
class Done:
    """A run that was over when it was started."""

    def wait(self, timeout: int) -> None:
        """Nothing is under way."""


def starting(compute: Callable[[Plan, Void, Void], Void]) -> Start:
    """What starts runs of a session, if `compute` stands for the NPU."""

    def start(plan: Plan, arrays: Sequence[NDArray[Any]]) -> Done:
        queries, blocks, outputs = arrays
        outputs[...] = compute(plan, queries, blocks)
        return Done()

    return start
