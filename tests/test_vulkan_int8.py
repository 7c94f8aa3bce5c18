"""The INT8 KV cache on Vulkan: kernels against float64 twins, models against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import test_vulkan_attention as few
from tests import test_vulkan_prefill as many
from tests.test_cpu_session import MODELS, Source, random_tokens
from tests.test_vulkan_prefill import emulated  # noqa: F401
from tests.vulkan_lab import Floats, Lab, no_messages  # noqa: F401
from uq.errors import UsageError
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.kv_format import KVFormat
from uq.kernels.numerics import KV, Int8Activations, Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Piece, Sampling
from uq.kernels.vulkan.batch import VulkanBatch
from uq.kernels.vulkan.cache import CacheSize
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.sources import BundleSource, CheckpointSource

Doubles = NDArray[np.float64]
INT8_KV = Numerics(kv=KV["int8"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"))
    yield lab
    lab.close()


@dataclass(frozen=True)
class Plane:
    """Keys or values, (kv heads, slots, dim), as codes and a scale for each 32 channels."""

    codes: NDArray[np.int8]
    scales: Floats

    @classmethod
    def random(cls, rng: np.random.Generator, *shape: int) -> Plane:
        codes = rng.integers(-127, 128, shape, np.int8)
        groups = (*shape[:-1], shape[-1] // 32)
        scales = rng.uniform(0.005, 0.02, groups).astype(np.float16).astype(np.float32)
        return cls(codes, scales)

    @property
    def values(self) -> Doubles:
        scales: Doubles = np.repeat(self.scales.astype(np.float64), 32, axis=-1)
        return self.codes * scales


def rounded(x: Doubles) -> Doubles:
    """What the cache holds of x: the same as the emulation of `uq validate --kv int8`."""
    kept: Doubles = KVFormat(bits=8).values(x.astype(np.float32)).astype(np.float64)
    return kept


def spans(lab: Lab, keys: Plane, values: Plane) -> list[Span]:
    return [lab.put(part) for part in (keys.codes, values.codes, keys.scales, values.scales)]


FEW = {name: case for name, case in few.CASES.items() if case.dim % 32 == 0}


@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
def test_attention(lab: Lab, case: few.Case) -> None:
    """A code of a new key at a tie may be the other one: half of 1/127 of the greatest of 32."""
    rng = np.random.default_rng(case.position)
    parts = rng.standard_normal((case.parts, case.tokens, case.stride)).astype(np.float32)
    gains = 1 + 0.1 * rng.standard_normal((2, case.dim)).astype(np.float32)
    shape = (case.kv_heads, case.slots, case.dim)
    keys, values = (Plane.random(rng, *shape) for _ in range(2))
    stored = spans(lab, keys, values)
    actual = few.run(lab, case, parts, gains, "attention_int8", stored)
    expected = few.twin(case, parts.sum(axis=0), gains, keys.values, values.values, rounded)
    assert np.abs(actual - expected).max() <= 2e-3 * np.abs(expected).max()


def test_new_values_enter_the_cache_bit_for_bit(lab: Lab) -> None:
    """Values are neither normed nor turned, so nothing was rounded before. Zeros, too, and scales
    that are subnormal numbers of float16."""
    case = few.Case(5, tokens=3, dim=64)
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((3, case.stride)).astype(np.float32)
    qkv[1, -64:] = 0
    qkv[2, -96:] *= 1e-3
    shape = (case.kv_heads, case.slots, case.dim)
    stored = spans(lab, *(Plane.random(rng, *shape) for _ in range(2)))
    few.run(lab, case, qkv, np.ones((2, 64), np.float32), "attention_int8", stored)
    v = qkv[:, -2 * 64 :].reshape(3, 2, 2, 32)
    scales = (np.abs(v).max(axis=-1) / np.float32(127)).astype(np.float16).astype(np.float32)
    divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.rint(v / divisors).clip(-127, 127).astype(np.int8).reshape(3, 2, 64)
    found = lab.get(stored[1], np.int8, *shape)[:, 5:8].swapaxes(0, 1)
    np.testing.assert_array_equal(found, codes)
    found = lab.get(stored[3], np.float32, *shape[:2], 2)[:, 5:8].swapaxes(0, 1)
    np.testing.assert_array_equal(found, scales)


MANY = {name: case for name, case in many.CASES.items() if case.dim % 32 == 0}


@pytest.mark.parametrize("case", MANY.values(), ids=MANY)
def test_attention_of_many_tokens(lab: Lab, case: many.Case) -> None:
    """On their way the keys and values are rounded to float16: 2^-11 of each."""
    rng = np.random.default_rng(case.position)
    queries = rng.standard_normal((case.tokens, case.heads, case.dim)).astype(np.float32)
    shape = (case.kv_heads, case.slots, case.dim)
    keys, values = (Plane.random(rng, *shape) for _ in range(2))
    cache = spans(lab, keys, values)
    actual = many.attend(lab, case, queries, "attention_prefill_int8", cache)
    expected = many.attention_twin(case, queries, keys.values, values.values)
    assert np.abs(actual - expected).max() <= 2e-3 * np.abs(expected).max()


def test_attention_with_matrix_instructions(lab: Lab, emulated: None) -> None:  # noqa: F811
    case = many.CASES["behind others"]
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((case.tokens, case.heads, case.dim)).astype(np.float32)
    shape = (case.kv_heads, case.slots, case.dim)
    keys, values = (Plane.random(rng, *shape) for _ in range(2))
    cache = spans(lab, keys, values)
    expected = many.attention_twin(case, queries, keys.values, values.values)
    for module in many.matrix_modules(lab, "attention_matrix_int8"):
        actual = many.attend_by_blocks(lab, case, queries, module, cache)
        assert np.abs(actual - expected).max() <= 3e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3 many heads"])
def test_a_model_answers_like_the_emulation(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Hidden states differ from the float32 reference's by much more than from its INT8 twin's."""
    checkpoint = open_checkpoint(tiny_checkpoint(**MODELS[name]))
    session = VulkanSession(
        checkpoint.config,
        CheckpointSource(checkpoint, "f32"),
        choose(),
        pipeline_cache=tmp_path,
        max_context=64,
        numerics=INT8_KV,
    )
    tokens = random_tokens(checkpoint.config, 2, 40)
    actual = session.score(tokens)
    twin = ReferenceSession(checkpoint, numerics=INT8_KV).score(tokens)
    exact = ReferenceSession(checkpoint).score(tokens)
    loss = np.linalg.norm(twin - exact)
    assert loss > 0 and np.linalg.norm(actual - twin) <= 0.5 * loss
    session.close()


def test_a_batch_writes_what_a_session_writes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = Source(open_checkpoint(tiny_checkpoint(layers=3)))
    made: dict[str, Any] = {"pipeline_cache": tmp_path, "max_context": 64, "numerics": INT8_KV}
    model = (source.config, BundleSource(source), choose())
    session, batch = VulkanSession(*model, **made), VulkanBatch(*model, slots=2, **made)
    prompt = random_tokens(source.config, 20).tolist()
    session.prefill(prompt)
    batch.extend([Piece(1, prompt[:-1])])
    found = batch.write([Piece(1, prompt[-1:])], 12, Sampling())
    assert found[0].tolist() == list(session.decode(12, Sampling()))
    for part in (session, batch):
        part.close()


def test_the_cache_needs_little_more_than_half(tiny_checkpoint: Callable[..., Path]) -> None:
    config = open_checkpoint(tiny_checkpoint()).config
    full, small = (CacheSize(config, 4096, 64, is_int8=is_int8) for is_int8 in (False, True))
    assert small.nbytes == full.nbytes * 9 // 16


@pytest.mark.parametrize(
    ("numerics", "message"),
    [
        (Numerics(kv=KV["int4"]), "in groups of 32, and no other integers"),
        (Numerics(Int8Activations(group=64)), "in groups of 32, and no other integers"),
        (INT8_KV, "head_dim 24 does not divide by 32"),
    ],
)
def test_other_integers_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, numerics: Numerics, message: str
) -> None:
    source = Source(open_checkpoint(tiny_checkpoint(**MODELS["gemma odd sizes"])))
    with pytest.raises(UsageError, match=message):
        VulkanSession(
            source.config,
            BundleSource(source),
            choose(),
            pipeline_cache=tmp_path,
            numerics=numerics,
        )
