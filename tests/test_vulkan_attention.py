"""Attention of the decode path on Vulkan against softmax(Q K^T) V in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.vulkan_lab import Floats, Lab, no_messages  # noqa: F401
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.stages import ATTENTION_LANES, shared_queries
from uq.kernels.vulkan.state import ATTENTION_COUNTER, blank, views

Doubles = NDArray[np.float64]
WHOLE, PREPARE, ATTEND = range(3)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"))
    yield lab
    lab.close()


@dataclass(frozen=True)
class Case:
    """`position` tokens lie in the cache; `tokens` more come, in `parts` that are to be summed.

    A split takes `run` keys at least.
    """

    position: int
    tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    window: int = 0
    slots: int = 64
    cap: float = 0.0
    qk_norm: bool = True
    parts: int = 1
    run: int = 1

    @property
    def stride(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim


CASES = {
    "first token": Case(0),
    "second tile": Case(32),
    "last of a split": Case(63),
    "more than one split": Case(50),
    "all splits": Case(999, slots=1024),
    "window not yet full": Case(14, window=16),
    "window just full": Case(15, window=16),
    "window moved": Case(16, window=16),
    "ring wraps": Case(77, window=40, slots=56),
    "soft-capped, no norm": Case(45, cap=2.0, qk_norm=False),
    "one key head": Case(20, heads=8, kv_heads=1),
    "a key head each": Case(20, heads=3, kv_heads=3),
    "head of 24": Case(40, heads=4, dim=24),
    "head of 256": Case(70, heads=4, kv_heads=1, dim=256, slots=128),
    "some tokens": Case(10, tokens=5),
    "tokens over the ring's end": Case(70, tokens=16, window=40, slots=56),
    "long splits": Case(400, slots=1024, run=128),
    "long splits, head of 24": Case(130, heads=4, dim=24, slots=256, run=80),
    "long splits, head of 128": Case(300, dim=128, slots=512, run=128),
    "head of 512": Case(70, dim=512, slots=128),
    "ring wraps, head of 512": Case(230, dim=512, window=160, slots=192, run=80),
    "soft-capped, head of 512": Case(90, dim=512, cap=2.0, slots=128, run=50),
    "in parts": Case(20, parts=3),
    "tokens in parts": Case(10, tokens=5, parts=2),
    "tokens of an empty cache": Case(0, tokens=16, window=4, slots=20),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(lab: Lab, case: Case) -> None:
    rng = np.random.default_rng(case.position)
    parts = rng.standard_normal((case.parts, case.tokens, case.stride)).astype(np.float32)
    gains = 1 + 0.1 * rng.standard_normal((2, case.dim)).astype(np.float32)
    shape = (case.kv_heads, case.slots, case.dim)
    keys, values = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    spans = [lab.put(keys), lab.put(values)]
    actual = run(lab, case, parts, gains, "attention", spans * 2)
    expected = twin(
        case, parts.sum(axis=0), gains, keys.astype(np.float64), values.astype(np.float64)
    )
    assert np.abs(actual - expected).max() <= 2e-3 * np.abs(expected).max()


def test_infinite_values_stay_in_their_heads(lab: Lab) -> None:
    """The last split has 18 keys, the tile of the one before it ends behind them.

    What it finds there is what a workgroup of another head left in shared memory.
    """
    case = Case(512, heads=32, kv_heads=16, slots=520)
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((1, case.stride)).astype(np.float32)
    gains = np.ones((2, case.dim), np.float32)
    shape = (case.kv_heads, case.slots, case.dim)
    keys, values = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    infinite = qkv.copy()
    infinite.reshape(-1, case.dim)[-case.kv_heads :: 2] = np.inf
    actual = run(lab, case, infinite, gains, "attention", [lab.put(keys), lab.put(values)] * 2)
    expected = twin(case, qkv, gains, keys.astype(np.float64), values.astype(np.float64))
    grouped = (case.kv_heads, -1, case.dim)  # two heads of a key head
    errors = np.abs(actual - expected).reshape(grouped)[1::2]
    assert errors.max() <= 2e-3 * np.abs(expected).max()


def turns(case: Case, positions: NDArray[np.int64]) -> Doubles:
    half = case.dim // 2
    angle = np.outer(positions, 100.0 ** (-np.arange(half) / half))
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def run(
    lab: Lab,
    case: Case,
    qkv: Floats,
    gains: Floats,
    module: str,
    cache: list[Span],
) -> Floats:
    """(tokens, heads * dim), from the kernels in the way the session calls them.

    `cache`: keys, values and their scales.
    """
    table = turns(case, np.concatenate([np.arange(256), 256 * np.arange(8)])).astype(np.float32)
    state = blank()
    fields = views(state)
    fields["count"][0] = case.tokens
    fields["positions"][: case.tokens] = np.arange(case.tokens) + case.position
    queries = shared_queries(case.heads // case.kv_heads)
    x = lab.room(case.tokens * -(-case.heads * case.dim // 128) * 128)
    partials = lab.room(case.tokens * case.heads * 16 * case.dim)
    stats = lab.room(case.tokens * case.heads * 16 * 2)
    caches = [*cache, lab.put(table), partials, stats, x, lab.put(state)]
    push = addresses(lab.put(qkv), lab.put(gains[0]), lab.put(gains[1]), *caches)
    k = case.heads * case.dim
    push += words(case.stride, k, k + case.kv_heads * case.dim, ATTENTION_COUNTER)
    for mode in (WHOLE,) if case.tokens == 1 else (PREPARE, ATTEND):
        splits = 1 if mode == PREPARE else 16
        lab.run(
            module,
            push,
            *(splits, case.heads // queries, case.tokens),
            LANES=ATTENTION_LANES,
            FLOAT_X=True,
            MODE=mode,
            DIM=case.dim,
            HEADS=case.heads,
            KV_HEADS=case.kv_heads,
            QUERIES=queries,
            WINDOW=case.window,
            SLOTS=case.slots,
            SPLITS=16,
            QK_NORM=case.qk_norm,
            SCALE=case.dim**-0.5,
            CAP=case.cap,
            PARTS=1 if mode == ATTEND else case.parts,
            RUN=case.run,
        )
    padded = -(-case.heads * case.dim // 128) * 128
    found: Floats = lab.get(x, np.float32, case.tokens, padded)[:, : case.heads * case.dim]
    return found


def unchanged(x: Doubles) -> Doubles:
    return x


def twin(
    case: Case,
    qkv: Floats,
    gains: Floats,
    keys: Doubles,
    values: Doubles,
    kept: Callable[[Doubles], Doubles] = unchanged,
) -> Doubles:
    """`kept`: what the cache holds of keys and values that enter it."""
    out = np.empty((case.tokens, case.heads, case.dim))
    for token in range(case.tokens):
        position = case.position + token
        rows = qkv[token].astype(np.float64).reshape(-1, case.dim)
        q, k, v = np.split(rows, [case.heads, case.heads + case.kv_heads])
        q, k = (prepared(case, x, gain, position) for x, gain in zip((q, k), gains, strict=True))
        keys[:, position % case.slots], values[:, position % case.slots] = kept(k), kept(v)
        seen = np.arange(max(0, position + 1 - case.window) if case.window else 0, position + 1)
        for head in range(case.heads):
            group = head // (case.heads // case.kv_heads)
            scores = keys[group, seen % case.slots] @ q[head] * case.dim**-0.5
            if case.cap:
                scores = case.cap * np.tanh(scores / case.cap)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ values[group, seen % case.slots]
    return out.reshape(case.tokens, -1)


def prepared(case: Case, x: Doubles, gain: Floats, position: int) -> Doubles:
    if case.qk_norm:
        x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * gain
    cos, sin = np.moveaxis(turns(case, np.array([position]))[0], -1, 0)
    low, high = np.split(x, 2, axis=1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1)
