"""Attention of a session on an NPU: while it computes one part, the host prepares the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.npu.hybrid.reach import STEP, Reach
from uq.kernels.npu.hybrid.store import Store
from uq.kernels.npu.kernels.attention.codes import Array
from uq.kernels.npu.kernels.attention.frame import Frame
from uq.kernels.npu.kernels.attention.pack import pack_queries, unpack_rows
from uq.kernels.npu.kernels.attention.plan import Plan
from uq.kernels.npu.kernels.attention.variant import Form, Variant
from uq.kernels.npu.runtime.npu import TIMEOUT


class Waiting(Protocol):
    """A run under way."""

    def wait(self, timeout: int) -> None: ...


Start = Callable[[Plan, Sequence[NDArray[Any]]], Waiting]
PART = STEP  # tokens of a part
AHEAD = 2  # parts under way: one that the NPU computes, one that waits for it


@dataclass(frozen=True)
class Part:
    """A run under way, and what its outputs mean."""

    running: Waiting
    reach: Reach
    outputs: NDArray[np.void]
    units: Array
    tokens: int

    def rows(self, timeout: int) -> Array:
        """(tokens, heads, dim), once the NPU is done."""
        self.running.wait(timeout)
        return unpack_rows(self.reach.plan, self.outputs, self.units)[: self.tokens]


class NpuAttention:
    """The attention of every layer of a model, by one program for prefill and one for decoding."""

    def __init__(
        self, config: GemmaConfig, device: str, run: Start, bits: int, timeout: int = TIMEOUT
    ) -> None:
        """
        Args:
            device: npu1 or npu2.
            run: starts a plan on its queries, blocks of keys and values, and outputs, the last of
                which it fills.
            bits: of keys and values.
            timeout: milliseconds for one run.
        """
        self._config, self._run, self._timeout = config, run, timeout
        forms: tuple[Form, ...] = ("prefill", "decode")
        self._variants = {form: Variant(device, config.head_dim, bits, form) for form in forms}

    def store(self, capacity: int) -> Store:
        """For the keys and values of one layer."""
        return Store(self._variants["prefill"], self._config.num_kv_heads, capacity)

    def attend(
        self, store: Store, position: int, window: int | None, q: Array, k: Array, v: Array
    ) -> Array:
        """Rows of attention (tokens, heads, dim); keys and values enter the store.

        Args:
            position: of the first token.
            window: keys that a query sees, its own included; None for all.
            q: (tokens, heads, dim); k, v: (tokens, kv_heads, dim).

        Raises:
            NpuTimeout: the NPU did not answer; its program is opened again for the next call.
            DeviceError: a program cannot be opened, or a run failed.
        """
        if position == 0:
            store.frame = Frame.of(q, k, capped=self._config.attn_softcap is not None)
        under_way: deque[Part] = deque()
        rows: list[Array] = []
        for first in range(0, len(q), PART):
            part = slice(first, first + PART)
            store.append(position + first, k[part], v[part])
            under_way.append(self._start(store, position + first, window, q[part]))
            if len(under_way) == AHEAD:
                rows.append(under_way.popleft().rows(self._timeout))
        rows += [part.rows(self._timeout) for part in under_way]
        return np.concatenate(rows)

    def _start(self, store: Store, position: int, window: int | None, q: Array) -> Part:
        config, tokens = self._config, len(q)
        variant = self._variants["decode" if tokens == 1 else "prefill"]
        heads = config.num_heads, config.num_kv_heads
        reach = Reach.of(variant, *heads, position, tokens, window)
        plan = reach.plan
        padded = np.zeros((plan.length, *q.shape[1:]), np.float32)
        padded[:tokens] = q
        scaling = float(config.attention_scale), config.attn_softcap
        queries = pack_queries(plan, *store.frame.queries(padded), *scaling)
        reach.place(queries)
        blocks, units = store.blocks(reach.low, plan.stored)
        outputs = np.zeros(queries.shape, variant.output)
        running = self._run(plan, [queries, blocks, outputs])
        return Part(running, reach, outputs, units, tokens)
