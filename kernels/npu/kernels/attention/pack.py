"""Queries, keys and values as the kernel reads them, and its rows back into order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.pack import pack_pairs
from uq.kernels.npu.kernels.attention.codes import Array, Codes, QueryCodes, limbs, rotate
from uq.kernels.npu.kernels.attention.plan import LANES, NO_WINDOW, Lane, Plan

Index = NDArray[np.intp]
WEIGHT_ONE = 32767  # of the value with the largest scale


def pack_queries(
    plan: Plan, codes: QueryCodes, scale: Array, factor: float, softcap: float | None = None
) -> NDArray[np.void]:
    """Every job's blocks of queries, column by column, in order.

    Args:
        codes, scale: (length, heads, dim) and (length, heads).
        factor: what scores are multiplied by in front of exp, 1 / sqrt(head size) for example.
        softcap: scores s times `factor` become softcap tanh(s / softcap), as in Gemma 2.

    Raises:
        UsageError: a softcap that is not above 0.
    """
    variant = plan.variant
    per_job = LANES if variant.form == "prefill" else 1
    count = sum(len(jobs) for jobs in plan.jobs)
    blocks = np.zeros((count, per_job), variant.queries)
    blocks["window"] = plan.window or NO_WINDOW
    if softcap is not None:
        if not softcap > 0:
            raise UsageError(f"attention with a softcap of {softcap:g}; it is above 0")
        blocks["cap"] = cap = np.float32(softcap * np.log2(np.e))  # scores are powers of two
        blocks["inverse"] = np.float32(1) / cap
    blocks["position"] = -1  # lanes without queries see no key
    exponent = scale * np.float32(factor * np.log2(np.e))
    for packed, job in zip(blocks, (job for jobs in plan.jobs for job in jobs), strict=True):
        packed["blocks"] = job.blocks if variant.form == "prefill" else job.blocks // LANES
        packed["first"] = job.first * variant.keys
        for block, lane in zip(packed, job.lanes, strict=False):
            rows = rows_of(plan, lane)
            block["position"] = lane.position
            block["step"] = variant.form == "prefill"
            block["scale"][: len(rows[0])] = exponent[rows]
            whole = np.zeros((variant.rows, variant.head_dim), np.int16)
            whole[: len(rows[0])] = codes[rows]
            for name, limb in zip(("high", "low"), limbs(whole), strict=True):
                block[name] = blocked(limb, *variant.tiles.score[:2])
    return blocks


def rows_of(plan: Plan, lane: Lane) -> tuple[Index, Index]:
    """Index of a lane's rows in (length, heads)."""
    if plan.variant.form == "decode":
        return np.zeros(len(lane.heads), np.intp), np.array(lane.heads)
    first = lane.position - plan.start
    count = min(plan.variant.rows, plan.length - first)
    return np.arange(first, first + count), np.full(count, lane.heads[0])


def blocked(x: NDArray[Any], rows: int, cols: int) -> NDArray[Any]:
    """(r, c) as blocks of (rows, cols), block rows first, flat."""
    r, c = x.shape
    return x.reshape(r // rows, rows, c // cols, cols).swapaxes(1, 2).reshape(-1)


def pack_keys(
    plan: Plan,
    keys: tuple[Codes, Array],
    values: tuple[Codes, Array],
) -> tuple[NDArray[np.void], Array]:
    """Blocks of each KV head (kv_heads, stored), and the unit of each head's outputs.

    Args:
        keys, values: codes (keys, kv_heads, dim) and scales (keys, kv_heads).
    """
    variant, size = plan.variant, plan.stored * plan.variant.keys
    blocks = np.zeros((plan.kv_heads, plan.stored), variant.block)
    units = np.empty(plan.kv_heads, np.float32)
    _, k, n = variant.tiles.score
    for head in range(plan.kv_heads):
        ks, vs = (_padded(codes[:, head], size) for codes in (keys[0], values[0]))
        scale, value_scale = (_padded(s[:, head], size) for s in (keys[1], values[1]))
        weight, units[head] = weights_of(value_scale)
        for index, block in enumerate(blocks[head]):
            part = slice(index * variant.keys, (index + 1) * variant.keys)
            block["keys"] = _bytes(blocked(ks[part].T, k, n), variant.kv_bits)
            block["values"] = _bytes(blocked(vs[part], *variant.tiles.mix[1:]), variant.kv_bits)
            block["scale"], block["weight"] = scale[part], weight[part]
    return blocks, units


def weights_of(scale: Array) -> tuple[NDArray[np.int16], np.float32]:
    """Scales of values (keys,) as the kernel multiplies by them, and the unit of its outputs."""
    largest = np.abs(scale).max() or np.float32(1)
    weight = np.rint(scale / largest * WEIGHT_ONE).astype(np.int16)
    return weight, largest * np.float32((WEIGHT_ONE + 1) / WEIGHT_ONE)


def _padded(x: NDArray[Any], size: int) -> NDArray[Any]:
    out = np.zeros((size, *x.shape[1:]), x.dtype)
    out[: min(size, len(x))] = x[:size]
    return out


def _bytes(codes: Codes, bits: int) -> NDArray[np.uint8]:
    codes = np.ascontiguousarray(codes)
    return codes.view(np.uint8) if bits == 8 else pack_pairs(codes)


def unpack_rows(plan: Plan, outputs: NDArray[np.void], units: Array) -> Array:
    """(length, heads, dim) of the outputs (jobs, lanes) in the order of the queries, turned back.

    Parts of one row over different keys (decode) are merged: rows weighted by 2^m times the sum.
    """
    variant = plan.variant
    shape = (plan.length, plan.heads)
    total, weight = np.zeros((*shape, variant.head_dim)), np.zeros(shape)
    highest = int(outputs["maximum"].max())
    jobs = (job for column in plan.jobs for job in column)
    for packed, job in zip(outputs, jobs, strict=True):
        for block, lane in zip(packed, job.lanes, strict=False):
            rows = rows_of(plan, lane)
            count = len(rows[0])
            exponent = (block["maximum"][:count] - highest) / 256
            part = block["weights"][:count] * np.exp2(np.maximum(exponent, -1000))
            total[rows] += from_bfloat16(block["rows"][:count]) * part[:, None]
            weight[rows] += part
    mixed = total / np.where(weight > 0, weight, 1)[..., None]
    units = units.repeat(plan.heads // plan.kv_heads)
    return rotate((mixed * units[:, None]).astype(np.float32))


def from_bfloat16(bits: NDArray[np.uint16]) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)
