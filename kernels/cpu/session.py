"""Runs a bundle on the CPU: one set of kernels for scoring, prefill and decoding.

All of them give a token the same bits, whatever the number of threads and however the tokens are
cut into calls. The residual stream, norms, attention and KV cache are float32; the input of every
linear is 16-bit fixed point for each 32 channels (`elementwise.Activations`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, GemmaConfig, layer_tensor
from uq.kernels.cpu.attention import attend_many, attend_one
from uq.kernels.cpu.cache import KVCache, RopeTable
from uq.kernels.cpu.elementwise import (
    Activations,
    add_and_norm,
    embed,
    enter_attention,
    gelu_product,
    norm,
    quantize_rows,
    softcap,
)
from uq.kernels.cpu.gemm import SCRATCH_BASE, SCRATCH_PER_TOKEN, gemm
from uq.kernels.cpu.gemv import gemv
from uq.kernels.cpu.intrinsics import TILE_LANES, TILE_ROWS, features
from uq.kernels.cpu.layout import Linear, WeightSource, pack
from uq.kernels.sampling import sample
from uq.kernels.session import Device, Sampling

Array = NDArray[np.float32]

BLOCK = 512  # tokens that run through the layers together
JOINED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NO_GAIN: Array = np.empty(0, np.float32)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Gains that the family does not have are empty.

    Attributes:
        next_gain: of the norm behind this layer: the next layer's first, or the final one.
    """

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    q_gain: Array
    k_gain: Array
    attention_gain: Array
    mlp_gain: Array
    branch_gain: Array
    next_gain: Array
    window: int
    rope: RopeTable


@dataclass(frozen=True)
class Work:
    """Activations of one block of tokens, (tokens, ...) each; see the kernels for their use."""

    hidden: Array
    normed: Array
    x: Activations
    qkv: Array
    queries: Array
    context: Array
    context_x: Activations
    branch: Array
    gate_up: Array
    gate_x: Activations


class CpuSession:
    """A quantized model on the CPU with one KV cache. See `uq.kernels.session.Session`."""

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
        """
        self.config = config
        self.max_context = _checked_context(max_context)
        self._threads = _checked_threads(threads)
        numba.set_num_threads(self._threads)
        arena = pack(source, _joined(config))
        self._data = arena.data
        self._table = arena.linears[EMBEDDING]
        self._head = self._table if config.tied_head else arena.linears[HEAD]
        self._first_gain = _gain(source, layer_tensor(0, "input_layernorm"))
        self._layers = _layers(config, source, arena.linears)
        self.device = _device(self._threads)
        self.cache = KVCache(config, self.max_context, BLOCK)
        self._work = _work(config, min(BLOCK, self.max_context), self._layers[0])
        self._one = _first(self._work, config, 1)
        self._scratch = _scratch(config, self._threads, self.max_context)
        self._logits: Array | None = None

    @property
    def next_logits(self) -> Array:
        """(vocab,) behind the last token of the KV cache.

        Raises:
            UsageError: the cache is empty.
        """
        if self._logits is None:
            raise UsageError("decode needs at least one token before it; call prefill first")
        return self._logits

    @property
    def bytes_per_token(self) -> int:
        layers = [layer.qkv.nbytes + layer.out.nbytes for layer in self._layers]
        layers += [layer.gate_up.nbytes + layer.down.nbytes for layer in self._layers]
        row = self._table.nbytes // self.config.vocab_size
        return sum(layers) + self._head.nbytes + row

    @property
    def position(self) -> int:
        return self.cache.position

    def score(self, tokens: NDArray[np.int32]) -> Array:
        numba.set_num_threads(self._threads)
        self._check(tokens)
        batch, length = tokens.shape
        hidden = np.empty((batch, length, self.config.hidden_size), np.float32)
        cache = KVCache(self.config, length, BLOCK)
        for sequence, out in zip(tokens, hidden, strict=True):
            cache.position = 0
            for first in range(0, length, self._block):
                work = self._forward(sequence[first : first + self._block], cache)
                out[first : first + self._block] = work.normed
        return hidden

    def logits(self, hidden: Array, start: int, stop: int) -> Array:
        numba.set_num_threads(self._threads)
        head, first = self._head.rows(start, stop)
        out = np.empty((len(hidden), head.width), np.float32)
        for row in range(0, len(hidden), self._block):
            rows = np.ascontiguousarray(hidden[row : row + self._block])
            x = self._work.x.first(len(rows))
            quantize_rows(rows, x.codes, x.scales, x.offsets)
            self._linear(head, x, out[row : row + self._block])
        self._cap(out)
        return np.ascontiguousarray(out[:, start - first : stop - first])

    def reset(self) -> None:
        self.cache.position = 0
        self._logits = None

    def prefill(self, tokens: Sequence[int]) -> None:
        numba.set_num_threads(self._threads)
        ids = np.asarray(tokens, np.int32)
        self._check(ids)
        room = self.max_context - self.position
        if ids.size > room:
            raise UsageError(
                f"{ids.size} tokens do not fit behind {self.position} in a context of "
                f"{self.max_context}; shorten the text or raise the maximum context"
            )
        for first in range(0, ids.size, self._block):
            work = self._forward(ids[first : first + self._block], self.cache)
        x = work.x
        last = Activations(x.codes[-1:], x.scales[-1:], x.offsets[-1:])
        out = np.empty((1, self._head.width), np.float32)
        self._linear(self._head, last, out)
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

    @property
    def _block(self) -> int:
        """Tokens that run through the layers together."""
        return len(self._work.hidden)

    def _forward(self, tokens: NDArray[np.int32], cache: KVCache) -> Work:
        """Run tokens through all layers and the final norm, and add them to the cache."""
        one = tokens.size == 1
        work = self._one if one else _first(self._work, self.config, tokens.size)
        x, eps = work.x, np.float32(self.config.rms_norm_eps)
        factor = np.float32(self.config.embed_scale)
        embed(tokens, self._data, self._table.parts, factor, work.hidden)
        norm(work.hidden, self._first_gain, eps, work.normed, x.codes, x.scales, x.offsets)
        for index, layer in enumerate(self._layers):
            self._attention(layer, cache, index, work)
            self._add(layer.attention_gain, layer.mlp_gain, work)
            self._mlp(layer, work)
            self._add(layer.branch_gain, layer.next_gain, work)
        cache.position += tokens.size
        return work

    def _attention(self, layer: Layer, cache: KVCache, index: int, work: Work) -> None:
        """work.branch = attention of work.x."""
        tokens, position = len(work.hidden), cache.position
        keys, values = cache.keys[index], cache.values[index]
        cos, sin = layer.rope.rows(position, position + tokens)
        eps = np.float32(self.config.rms_norm_eps)
        self._linear(layer.qkv, work.x, work.qkv)
        enter_attention(
            work.qkv,
            layer.qkv.columns,
            layer.q_gain,
            layer.k_gain,
            eps,
            cos,
            sin,
            position,
            work.queries,
            keys,
            values,
        )
        attend = attend_one if tokens == 1 else attend_many
        attend(
            work.queries,
            keys,
            values,
            position,
            layer.window,
            np.float32(self.config.attention_scale),
            np.float32(self.config.attn_softcap or 0.0),
            self._scratch,
            work.context,
        )
        x = work.context_x
        quantize_rows(work.context, x.codes, x.scales, x.offsets)
        self._linear(layer.out, x, work.branch)

    def _mlp(self, layer: Layer, work: Work) -> None:
        """work.branch = MLP of work.x."""
        self._linear(layer.gate_up, work.x, work.gate_up)
        x = work.gate_x
        gelu_product(work.gate_up, x.codes, x.scales, x.offsets)
        self._linear(layer.down, x, work.branch)

    def _add(self, branch_gain: Array, gain: Array, work: Work) -> None:
        """Add work.branch to the residual stream; work.x is the norm of the sum."""
        x, eps = work.x, np.float32(self.config.rms_norm_eps)
        add_and_norm(
            work.hidden,
            work.branch,
            branch_gain,
            gain,
            eps,
            work.normed,
            x.codes,
            x.scales,
            x.offsets,
        )

    def _linear(self, linear: Linear, x: Activations, out: Array) -> None:
        if len(out) == 1:
            gemv(self._data, linear.parts, x.codes, x.scales, x.offsets, out)
        else:
            gemm(self._data, linear.parts, x.codes, x.scales, out, self._scratch)

    def _cap(self, logits: Array) -> None:
        if self.config.final_softcap:
            softcap(logits, np.float32(self.config.final_softcap))

    def _check(self, tokens: NDArray[np.int32]) -> None:
        if tokens.size == 0:
            raise UsageError("there are no tokens to run; give at least one")
        outside = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if outside.size:
            raise UsageError(
                f"token {outside[0]} is not in the vocabulary of {self.config.vocab_size}; "
                "use the model's own tokenizer"
            )


def _joined(config: GemmaConfig) -> dict[str, list[str]]:
    """Name of a `Linear` -> canonical names of its weights."""
    joined = {EMBEDDING: [EMBEDDING]} | ({} if config.tied_head else {HEAD: [HEAD]})
    for layer in range(config.num_layers):
        for key, roles in JOINED.items():
            joined[f"{layer}.{key}"] = [layer_tensor(layer, role) for role in roles]
    return joined


def _gain(source: WeightSource, name: str) -> Array:
    return np.ascontiguousarray(source.array(name.removesuffix(".weight") + ".gain"), np.float32)


def _layers(
    config: GemmaConfig, source: WeightSource, linears: Mapping[str, Linear]
) -> tuple[Layer, ...]:
    ropes = {
        sliding: RopeTable(config.theta(layer), config.position_scale(layer), config.head_dim)
        for layer in range(config.num_layers)
        for sliding in [config.is_sliding(layer)]
    }

    def layer_at(index: int) -> Layer:
        def gain(role: str, present: bool = True) -> Array:
            return _gain(source, layer_tensor(index, role)) if present else NO_GAIN

        last = index + 1 == config.num_layers
        behind = FINAL_NORM if last else layer_tensor(index + 1, "input_layernorm")
        post, mlp = config.post_norms, "pre_feedforward_layernorm"
        return Layer(
            **{key: linears[f"{index}.{key}"] for key in JOINED},
            q_gain=gain("self_attn.q_norm", config.qk_norm),
            k_gain=gain("self_attn.k_norm", config.qk_norm),
            attention_gain=gain("post_attention_layernorm", post),
            mlp_gain=gain(mlp if post else "post_attention_layernorm"),
            branch_gain=gain("post_feedforward_layernorm", post),
            next_gain=_gain(source, behind),
            window=config.window(index) or 1 << 62,
            rope=ropes[config.is_sliding(index)],
        )

    return tuple(layer_at(index) for index in range(config.num_layers))


def _work(config: GemmaConfig, tokens: int, layer: Layer) -> Work:
    hidden, ffn, q_size = config.hidden_size, config.intermediate_size, config.q_size

    def floats(width: int) -> Array:
        return np.empty((tokens, width), np.float32)

    return Work(
        hidden=floats(hidden),
        normed=floats(hidden),
        x=Activations.empty(tokens, hidden),
        qkv=floats(layer.qkv.width),
        queries=floats(q_size),
        context=floats(q_size),
        context_x=Activations.empty(tokens, q_size),
        branch=floats(hidden),
        gate_up=floats(2 * ffn),
        gate_x=Activations.empty(tokens, ffn),
    )


def _first(work: Work, config: GemmaConfig, tokens: int) -> Work:
    """The first rows of every array; queries take the shape that attention wants."""
    group = config.num_heads // config.num_kv_heads
    shape = (config.num_kv_heads, tokens * group, config.head_dim)
    return Work(
        hidden=work.hidden[:tokens],
        normed=work.normed[:tokens],
        x=work.x.first(tokens),
        qkv=work.qkv[:tokens],
        queries=work.queries[:tokens].reshape(shape),
        context=work.context[:tokens],
        context_x=work.context_x.first(tokens),
        branch=work.branch[:tokens],
        gate_up=work.gate_up[:tokens],
        gate_x=work.gate_x.first(tokens),
    )


def _scratch(config: GemmaConfig, threads: int, context: int) -> Array:
    """Memory of each thread: enough for `gemm`, `attend_many` and, all together, `attend_one`."""
    keys = context + 2 * TILE_LANES + config.head_dim + TILE_LANES
    rows = max(TILE_ROWS, config.num_heads)
    matrix = SCRATCH_BASE + SCRATCH_PER_TOKEN * BLOCK
    return np.empty((threads, max(matrix, rows * keys)), np.float32)


def _checked_threads(threads: int | None) -> int:
    most = int(numba.config.NUMBA_NUM_THREADS)
    if threads is None:
        return most
    if not 1 <= threads <= most:
        raise UsageError(f"{threads} threads on a machine of {most}; use 1 to {most}")
    return threads


def _checked_context(max_context: int) -> int:
    if max_context < 1:
        raise UsageError(f"a context of {max_context} tokens; it must hold at least 1")
    return max_context


def _device(threads: int) -> Device:
    versions = (
        f"numba {numba.__version__} (LLVM {'.'.join(map(str, llvmlite.binding.llvm_version_info))})"
    )
    return Device(
        "cpu", _processor(), versions, (f"{threads} thread{'s' * (threads > 1)}", *features())
    )


def _processor() -> str:
    """The processor's own name where the system tells it, else LLVM's."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else llvmlite.binding.get_host_cpu_name()
