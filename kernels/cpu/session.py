"""Runs a bundle on the CPU: one set of kernels for scoring, prefill and decoding.

All of them give a token the same bits, whatever the number of threads and however the tokens are
cut into calls. The residual stream, norms, attention and KV cache are float32; the input of every
linear is 16-bit fixed point, scaled for each 32 channels (`elementwise.Activations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import psutil
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.config import GemmaConfig
from uq.kernels.cpu.attention import attend_many, attend_one, attention_scratch
from uq.kernels.cpu.cache import KVCache
from uq.kernels.cpu.elementwise import (
    Activations,
    add_and_norm,
    enter_attention,
    gelu_product,
    norm,
    quantize_rows,
    softcap,
)
from uq.kernels.cpu.embedding import embed
from uq.kernels.cpu.extras import COMPUTED, Beside, Extras
from uq.kernels.cpu.gemm import gemm, gemm_scratch
from uq.kernels.cpu.gemv import gemv
from uq.kernels.cpu.layout import Linear, WeightSource
from uq.kernels.cpu.llvm import features
from uq.kernels.cpu.model import Array, Layer, Work, Workspace, load
from uq.kernels.sampling import sample
from uq.kernels.session import Device, Sampling, check_room, check_tokens, require_known

BLOCK = 512  # tokens that run through the layers together

Attend = Callable[[Layer, int, Work], None]  # of layer number ..., from work.qkv to work.context


class CpuSession:
    """A quantized model on the CPU with one KV cache. See `uq.kernels.session.Session`.

    Attributes:
        cache: keys and values of the sequence of `prefill` and `decode`.
    """

    def __init__(
        self,
        config: GemmaConfig,
        source: WeightSource,
        *,
        max_context: int = 4096,
        threads: int | None = None,
    ) -> None:
        """
        Raises:
            UsageError: `threads` or `max_context` is out of range.
            DeviceError: a layer has parts that the kernels do not compute.
        """
        require_known(config, "the CPU backend", "use --device reference", COMPUTED)
        self.config = config
        self.max_context = _checked_context(max_context)
        self._threads = _checked_threads(threads)
        numba.set_num_threads(self._threads)
        self._model = load(config, source)
        self._block = min(BLOCK, max_context)
        self._work = Workspace(config, self._model.layers, self._block)
        self._scratch = self._scratch_for(max_context)
        self.cache = self._empty_cache(max_context)
        self.device = _device(self._threads)
        self._logits: Array | None = None

    @property
    def probe(self) -> None:
        return None

    @property
    def bytes_per_token(self) -> int:
        row = self._model.table.nbytes // self.config.vocab_size
        return row + self._model.product_bytes

    @property
    def position(self) -> int:
        return self.cache.position

    @property
    def next_logits(self) -> Array:
        """(vocab,) behind the last token of the KV cache.

        Raises:
            UsageError: the cache is empty.
        """
        if self._logits is None:
            raise UsageError("decode needs at least one token before it; call prefill first")
        return self._logits

    def score(self, tokens: NDArray[np.int32]) -> Array:
        self._begin(tokens)
        batch, length = tokens.shape
        if length > self.max_context:
            self._scratch = self._scratch_for(length)
        out = np.empty((batch, length, self.config.hidden_size), np.float32)
        cache = self._empty_cache(length)
        for sequence, hidden in zip(np.ascontiguousarray(tokens, np.int32), out, strict=True):
            cache.position = 0
            for first in range(0, length, self._block):
                block = slice(first, first + self._block)
                hidden[block] = self._extend(sequence[block], cache).normed
        return out

    def logits(self, hidden: Array, start: int, stop: int) -> Array:
        numba.set_num_threads(self._threads)
        head, first = self._model.head.rows(start, stop)
        out = np.empty((len(hidden), head.width), np.float32)
        for row in range(0, len(hidden), self._block):
            block = np.ascontiguousarray(hidden[row : row + self._block])
            x = self._work.views(len(block))[0].x
            quantize_rows(block, *x.arrays)
            self._linear(head, x, out[row : row + self._block])
        self._cap(out)
        return np.ascontiguousarray(out[:, start - first : stop - first])

    def reset(self) -> None:
        self.cache.position = 0
        self._logits = None

    def prefill(self, tokens: Sequence[int]) -> None:
        ids = np.asarray(tokens, np.int32)
        self._begin(ids)
        check_room(ids.size, self.position, self.max_context)
        for first in range(0, ids.size, self._block):
            work = self._extend(ids[first : first + self._block], self.cache)
        tokens_in_block = len(work.hidden)
        out = np.empty((1, self._model.head.width), np.float32)
        self._linear(self._model.head, work.x.rows(tokens_in_block - 1, tokens_in_block), out)
        self._cap(out)
        self._logits = out[0, : self.config.vocab_size]

    def decode(self, count: int, sampling: Sampling) -> Iterator[int]:
        for _ in range(count):
            logits = self.next_logits
            if self.position == self.max_context:
                return
            token = sample(logits, sampling, self.position)
            self.prefill([token])
            yield token

    def _extend(self, tokens: NDArray[np.int32], cache: KVCache) -> Work:
        """Run tokens (n,) through the model and add them to the cache."""
        work = self._forward(tokens, partial(self._attend, cache))
        cache.position += tokens.size
        return work

    def _forward(self, tokens: NDArray[np.int32], attend: Attend) -> Work:
        """Run tokens (n,) through all layers and the final norm."""
        works = self._work.views(tokens.size)
        work = works[0]  # the stream is the same for every layer
        model, eps = self._model, np.float32(self.config.rms_norm_eps)
        factor = np.float32(self.config.embed_scale)
        embed(tokens, model.data, model.table.parts, factor, work.hidden)
        beside = model.enter(tokens, work.hidden)
        norm(work.hidden, model.first_gain, eps, work.normed, *work.x.arrays)
        for index, (layer, here) in enumerate(zip(model.layers, works, strict=True)):
            self._attention(layer, index, attend, here)
            if layer.extras:
                layer.extras.add_low_rank(here)
            self._add_branch(layer.attention_gain, layer.mlp_gain, here)
            self._mlp(layer, here)
            if layer.extras:
                layer.extras.join_experts(here, self._linear)
            self._add_branch(layer.branch_gain, layer.next_gain, here)
            if layer.extras:
                self._leave(index, layer.extras, here, beside)
        return work

    def _leave(self, index: int, extras: Extras, work: Work, beside: Beside) -> None:
        """What a layer does last; work.x = norm of the residual stream behind it."""
        gain, eps = self._model.layers[index].next_gain, np.float32(self.config.rms_norm_eps)
        if self._model.streams:
            self._model.streams.leave(index, extras, work, beside)
        elif beside.inputs is not None:
            extras.per_layer_branch(work, beside.inputs[index])
            self._add_branch(extras.per_layer_gain, gain, work)
        np.multiply(work.hidden, extras.scalar, out=work.hidden)
        norm(work.hidden, gain, eps, work.normed, *work.x.arrays)

    def _attention(self, layer: Layer, index: int, attend: Attend, work: Work) -> None:
        """work.branch = attention of work.x."""
        self._linear(layer.qkv, work.x, work.qkv)
        attend(layer, index, work)
        quantize_rows(work.context, *work.context_x.arrays)
        self._linear(layer.out, work.context_x, work.branch)

    def _attend(self, cache: KVCache, layer: Layer, index: int, work: Work) -> None:
        """work.context = attention of work.qkv, whose keys and values enter the cache."""
        config = self.config
        queries = self._enter(cache, layer, index, work)
        attend = attend_one if len(work.hidden) == 1 else attend_many
        scale, cap = np.float32(config.attention_scale), np.float32(config.attn_softcap or 0.0)
        seen = (cache.position, layer.window, scale, cap)
        keys, values = cache.keys[layer.source], cache.values[layer.source]
        attend(queries, keys, values, *seen, self._scratch, work.context)

    def _enter(self, cache: KVCache, layer: Layer, index: int, work: Work) -> Array:
        """Put keys and values of work.qkv into the cache; the queries, normed and turned.

        Returns:
            (kv_heads, tokens * group, dim): the queries that share a key head lie together.
        """
        config, position = self.config, cache.position
        queries = work.queries.reshape(layer.kv_heads, -1, layer.head_dim)
        turn = layer.rope.rows(position, position + len(work.hidden))
        eps, gains = np.float32(config.rms_norm_eps), layer.head_gains
        kept = cache.keys[layer.source], cache.values[layer.source]
        enter_attention(work.qkv, layer.columns, gains, eps, *turn, position, queries, *kept)
        return queries

    def _empty_cache(self, capacity: int) -> KVCache:
        return KVCache.empty(self.config, capacity, self._block)

    def _mlp(self, layer: Layer, work: Work) -> None:
        """work.branch = MLP of work.x."""
        self._linear(layer.gate_up, work.x, work.gate_up)
        if layer.extras:
            layer.extras.thin(work.gate_up)
        gelu_product(work.gate_up, *work.gate_x.arrays)
        self._linear(layer.down, work.gate_x, work.branch)

    def _add_branch(self, branch_gain: Array, gain: Array, work: Work) -> None:
        """Add work.branch to the residual stream; work.x = norm of the sum."""
        eps = np.float32(self.config.rms_norm_eps)
        gains = (branch_gain, gain)
        add_and_norm(work.hidden, work.branch, *gains, eps, work.normed, *work.x.arrays)

    def _linear(self, linear: Linear, x: Activations, out: Array) -> None:
        if len(out) == 1:
            gemv(self._model.data, linear.parts, *x.arrays, out)
        else:
            gemm(self._model.data, linear.parts, x.codes, x.scales, out, self._scratch)

    def _cap(self, logits: Array) -> None:
        if self.config.final_softcap:
            softcap(logits, np.float32(self.config.final_softcap))

    def _scratch_for(self, context: int) -> Array:
        """(threads, n) float32: working memory of the kernels."""
        needs = (gemm_scratch(self._block), attention_scratch(self.config, context))
        return np.empty((self._threads, max(needs)), np.float32)

    def _begin(self, tokens: NDArray[np.int32]) -> None:
        """Claim the threads; refuse token ids that do not exist."""
        numba.set_num_threads(self._threads)
        check_tokens(tokens, self.config.vocab_size)


def _checked_threads(threads: int | None) -> int:
    """By default one for every core: two threads of one core share what both wait for."""
    most = int(numba.config.NUMBA_NUM_THREADS)
    if threads is None:
        return min(psutil.cpu_count(logical=False) or most, most)
    if not 1 <= threads <= most:
        raise UsageError(f"{threads} threads on a machine of {most}; use 1 to {most}")
    return threads


def _checked_context(max_context: int) -> int:
    if max_context < 1:
        raise UsageError(f"a context of {max_context} tokens; it must hold at least 1")
    return max_context


def _device(threads: int) -> Device:
    llvm = ".".join(map(str, llvmlite.binding.llvm_version_info))
    count = f"{threads} thread{'s' * (threads > 1)}"
    found = (count, numba.threading_layer(), *features())
    return Device("cpu", _processor(), f"numba {numba.__version__} (LLVM {llvm})", found)


def _processor() -> str:
    """The processor's own name where the system tells it, else LLVM's."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else str(llvmlite.binding.get_host_cpu_name())
