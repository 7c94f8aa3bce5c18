"""From float queries, keys and values to the rows of attention, by the emulator or by the twin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.kernels.npu.emulator import run
from uq.kernels.npu.kernels.attention import twin
from uq.kernels.npu.kernels.attention.codes import Array, Codes, QueryCodes, quantize, rotate
from uq.kernels.npu.kernels.attention.design import attention
from uq.kernels.npu.kernels.attention.frame import Frame
from uq.kernels.npu.kernels.attention.pack import pack_keys, pack_queries, rows_of, unpack_rows
from uq.kernels.npu.kernels.attention.plan import Plan


@dataclass(frozen=True)
class Inputs:
    """What a plan computes on: codes and scales of a row (dim) each.

    Attributes:
        queries: (length, heads, dim) int16 and (length, heads).
        keys, values: (keys, kv_heads, dim) int8 and (keys, kv_heads).
        frame: in which the queries and keys are; the values are rotated.
        factor: what scores are multiplied by in front of exp.
        softcap: scores s times `factor` become softcap tanh(s / softcap); None leaves them.
    """

    queries: tuple[QueryCodes, Array]
    keys: tuple[Codes, Array]
    values: tuple[Codes, Array]
    frame: Frame
    factor: float
    softcap: float | None = None

    @classmethod
    def quantized(
        cls,
        q: Array,
        k: Array,
        v: Array,
        kv_bits: int,
        factor: float,
        softcap: float | None = None,
    ) -> Inputs:
        """In the frame of the first tokens."""
        frame = Frame.of(q, k, capped=softcap is not None)
        values = quantize(rotate(v), kv_bits)
        return cls(frame.queries(q), frame.keys(k, kv_bits), values, frame, factor, softcap)

    def stored(self) -> tuple[Array, Array]:
        """Keys and values that the codes stand for."""
        codes, scale = self.values
        return self.frame.floats(*self.keys), rotate(codes * scale[..., None])


def emulate(plan: Plan, inputs: Inputs) -> NDArray[np.void]:
    """Run the design; the outputs (jobs, lanes) as the array writes them."""
    queries, blocks, _ = packed(plan, inputs)
    outputs = np.zeros(queries.shape, plan.variant.output)
    run(attention(plan), [queries, blocks, outputs], plan.variant.kernels())
    return outputs


def compute(plan: Plan, inputs: Inputs) -> NDArray[np.void]:
    """The same by the twin, from codes and scales as they are, not from packed blocks of codes."""
    queries, blocks, _ = packed(plan, inputs)
    variant, jobs = plan.variant, [job for column in plan.jobs for job in column]
    shape = (*queries.shape, variant.rows, variant.head_dim)
    q = np.zeros(shape, np.int16)
    for index, job in enumerate(jobs):
        for number, lane in enumerate(job.lanes):
            index_of = rows_of(plan, lane)
            q[index, number, : len(index_of[0])] = inputs.queries[0][index_of]
    size = plan.stored * variant.keys
    heads = []
    for head in range(plan.kv_heads):
        codes = np.zeros((2, size, variant.head_dim), np.int8)
        for which, (given, _) in enumerate((inputs.keys, inputs.values)):
            count = min(size, len(given))
            codes[which, :count] = given[:count, head]
        scale, weight = (blocks[head][name].reshape(-1) for name in ("scale", "weight"))
        heads.append(twin.Keys(codes[0], codes[1], scale, weight))
    return twin.attention(plan, queries, q.reshape(len(jobs), -1, variant.head_dim), heads)


def packed(plan: Plan, inputs: Inputs) -> tuple[NDArray[np.void], NDArray[np.void], Array]:
    """Queries, blocks of keys and values, and the unit of each KV head's outputs."""
    queries = pack_queries(plan, *inputs.queries, inputs.factor, inputs.softcap)
    return queries, *pack_keys(plan, inputs.keys, inputs.values)


def rows(plan: Plan, inputs: Inputs, outputs: NDArray[np.void]) -> Array:
    """(length, heads, dim) in order, as floats."""
    _, _, units = packed(plan, inputs)
    return unpack_rows(plan, outputs, units)
