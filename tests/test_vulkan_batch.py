"""Sequences that run together on a GPU get what each gets alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_cpu_session import Source
from tests.vulkan_lab import no_messages  # noqa: F401
from uq.errors import UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.backends import open_batch
from uq.kernels.session import Piece, Sampling
from uq.kernels.vulkan.batch import VulkanBatch
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.runs import fitting
from uq.kernels.vulkan.sources import BundleSource
from uq.serve.job import Job, Update
from uq.serve.metrics import Metrics
from uq.serve.scheduler import Scheduler
from uq.serve.sequence import Sequence

GREEDY = Sampling()
ROOT = Path(__file__).parents[1]
CONTEXT = 96


@pytest.fixture(scope="module")
def gemma3(tiny_checkpoint: Callable[..., Path]) -> Source:
    return Source(open_checkpoint(tiny_checkpoint(layers=3, vocab=700)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def opened(source: Source, cache: Path, slots: int) -> VulkanBatch:
    return VulkanBatch(
        source.config,
        BundleSource(source),
        choose(),
        slots=slots,
        pipeline_cache=cache,
        max_context=CONTEXT,
    )


@pytest.fixture(scope="module")
def batch(gemma3: Source, cache: Path) -> Iterator[VulkanBatch]:
    """Shared: each test rewinds the slots that it uses."""
    batch = opened(gemma3, cache, 20)
    yield batch
    batch.close()


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> None:
    if "batch" in request.fixturenames:
        batch: VulkanBatch = request.getfixturevalue("batch")
        for slot in range(batch.slots):
            batch.rewind(slot, 0)


def text(source: Source, count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 700, count).tolist()
    return tokens


@pytest.mark.parametrize("slots", [3, 20])
def test_kernels_stay_within_their_buffers(tiny_bundle: Callable[..., Path], slots: int) -> None:
    """A process of its own, because it would end; it gives nothing back, so no layer looks on."""
    bundle = tiny_bundle(layers=3, vocab=700)
    command = [sys.executable, "-m", "tests.fenced", str(bundle), str(slots)]
    env = {key: value for key, value in os.environ.items() if key != "VK_INSTANCE_LAYERS"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "within its buffers\n"), done.stderr


def test_a_width_is_no_more_than_there_is_room_for() -> None:
    for widest in (16, 20, 50, 100, 512):
        found = [fitting(count, widest) for count in range(1, widest + 1)]
        assert all(count <= width <= widest for count, width in enumerate(found, 1))


def test_sequences_beyond_what_the_heads_allow_are_refused(
    tiny_checkpoint: Callable[..., Path], cache: Path
) -> None:
    source = Source(open_checkpoint(tiny_checkpoint(head_dim=8)))
    opened(source, cache, 16).close()
    with pytest.raises(UsageError, match="20 sequences of such heads at a time; use up to 16"):
        opened(source, cache, 20)


def alone(source: Source, tokens: list[int]) -> NDArray[np.float32]:
    """(tokens, hidden) of the CPU."""
    hidden: NDArray[np.float32] = source.session().score(np.array([tokens], np.int32))[0]
    return hidden


def assert_near(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Keys and values are float16."""
    assert np.linalg.norm(actual - expected) <= 2e-3 * np.linalg.norm(expected)


def test_pieces_of_any_length_run_together(batch: VulkanBatch, gemma3: Source) -> None:
    """Prompts, single tokens and both in one step, around the rings of the sliding layers."""
    texts = [text(gemma3, count, seed) for seed, count in enumerate((90, 7, 33, 64))]
    seen: list[list[NDArray[np.float32]]] = [[], [], [], []]
    rng = np.random.default_rng(1)
    while any(batch.length(slot) < len(text) for slot, text in enumerate(texts)):
        pieces = []
        for slot in rng.permutation(4)[: rng.integers(1, 5)].tolist():
            if rest := texts[slot][batch.length(slot) :][: rng.choice([1, 1, 2, 13, 40])]:
                pieces.append(Piece(slot, rest))
        if pieces:
            ends = np.cumsum([len(piece.tokens) for piece in pieces])
            parts = np.split(batch.extend(pieces), ends[:-1])
            for piece, rows in zip(pieces, parts, strict=True):
                seen[piece.slot].append(rows)
    for tokens, found in zip(texts, seen, strict=True):
        assert_near(np.concatenate(found), alone(gemma3, tokens))


@pytest.mark.mesa  # where there are matrix instructions up to four
def test_up_to_sixteen_tokens_have_the_bits_of_one(batch: VulkanBatch, gemma3: Source) -> None:
    prompts = [text(gemma3, 12, seed) for seed in range(5)]
    for slot in (0, 1, 2, 3, 4, 10, 11, 12, 13, 14):
        batch.extend([Piece(slot, prompts[slot % 10])])
    together = batch.extend([Piece(slot, [slot + 3]) for slot in range(5)])
    single = [batch.extend([Piece(10 + slot, [slot + 3])]) for slot in range(5)]
    np.testing.assert_array_equal(together, np.concatenate(single))


@pytest.mark.parametrize("count", [1, 3, 16, 20])
def test_sequences_write_what_each_writes_alone(
    batch: VulkanBatch, gemma3: Source, count: int
) -> None:
    """In GEMV up to 16, in GEMM beyond."""
    prompts = [text(gemma3, 4 + slot, slot) for slot in range(count)]
    batch.extend([Piece(slot, prompt[:-1]) for slot, prompt in enumerate(prompts)])
    firsts = [Piece(slot, prompt[-1:]) for slot, prompt in enumerate(prompts)]
    steps = 20 if count <= 16 else 5  # a GEMM on a software device takes its time
    found = batch.write(firsts, steps, GREEDY)
    for slot in {0, count // 2, count - 1}:
        cpu = gemma3.session()
        cpu.prefill(prompts[slot])
        assert found[slot].tolist() == list(cpu.decode(steps, GREEDY))
        assert batch.length(slot) == len(prompts[slot]) + steps - 1


def test_each_row_is_sampled_in_its_own_way(batch: VulkanBatch, gemma3: Source) -> None:
    cpu = gemma3.session()
    prompt = text(gemma3, 9, 3)
    hidden = batch.extend([Piece(0, prompt)])[-1:]
    ways = [GREEDY, *(Sampling(1.5, top_k=k, top_p=0.9, seed=k) for k in (0, 5, 40))]
    found = batch.choose(np.repeat(hidden, 4, axis=0), ways, [9] * 4)
    for token, way in zip(found, ways, strict=True):
        cpu.reset()
        cpu.prefill(prompt)
        assert [token] == list(cpu.decode(1, way))


@pytest.mark.parametrize(("length", "kept"), [(90, 90), (40, 40), (0, 0), (91, 0)])
def test_a_rewound_sequence_is_as_good_as_new(
    batch: VulkanBatch, gemma3: Source, length: int, kept: int
) -> None:
    """The rings are longer than this context."""
    tokens = text(gemma3, 90, 5)
    batch.extend([Piece(1, tokens)])
    assert batch.rewind(1, length) == kept == batch.length(1)
    hidden = batch.extend([Piece(0, [3]), Piece(1, [4, 5])])[1:]
    assert_near(hidden, alone(gemma3, [*tokens[:kept], 4, 5])[kept:])


def test_what_a_ring_has_lost_is_computed_anew(gemma3: Source, cache: Path) -> None:
    batch = opened(gemma3, cache, 2)
    size, config = batch._runs.cache.size, gemma3.config
    slots = min(size.slots)
    assert size.holds(5, slots) and size.holds(slots + 9, slots + 9)
    window = config.window(0)
    assert window and size.holds(window + 9 - 1, slots + 9)
    assert not size.holds(window + 9 - 2, slots + 9)
    batch.close()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece(0, [1]), Piece(0, [2])], "same slot"),
        ([Piece(0, [5]), Piece(1, [700])], "token 700 is not in the vocabulary"),
        ([Piece(0, [])], "there are no tokens"),
        ([Piece(0, [5] * 97)], "97 tokens do not fit behind 0 in a context of 96"),
        ([Piece(0, [5] * 600)], "600 tokens in one step; at most 512 fit"),
    ],
)
def test_an_impossible_step_is_refused(
    batch: VulkanBatch, pieces: list[Piece], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        batch.extend(pieces)
    assert batch.length(0) == 0


@pytest.mark.parametrize("slots", [0, 65])
def test_impossible_slots_are_refused(gemma3: Source, cache: Path, slots: int) -> None:
    with pytest.raises(UsageError, match=f"{slots} sequences at a time on a GPU; use 1 to 64"):
        opened(gemma3, cache, slots)


def test_the_server_batches_on_a_gpu(tiny_bundle: Callable[..., Path]) -> None:
    """Greedy and sampled jobs that come and go, with and without probabilities."""
    bundle = open_bundle(tiny_bundle())
    texts: list[list[list[int]]] = []
    for device in ("vulkan", "cpu"):
        scheduler = Scheduler(open_batch(bundle, device, slots=3, max_context=CONTEXT), Metrics())
        sequences = [Sequence(job, bundle.tokenizer(), ignore) for job in jobs()]
        scheduler.waiting.extend(sequences)
        while not scheduler.idle:
            scheduler.step()
        texts.append([sequence.tokens for sequence in sequences])
    assert texts[0] == texts[1]


def jobs() -> list[Job]:
    ways: list[dict[str, Any]] = [
        {"sampling": GREEDY},
        {"sampling": Sampling(1.2, top_k=30, top_p=0.9, seed=1)},
        {"sampling": GREEDY, "logprobs": 2},
        {"sampling": Sampling(0.9, seed=2), "logprobs": 1},
        {"sampling": GREEDY},
    ]
    prompts = [tuple(some_tokens(5 + 6 * index, index)) for index in range(len(ways))]
    return [Job(prompt, 12, **way) for prompt, way in zip(prompts, ways, strict=True)]


def some_tokens(count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 500, count).tolist()
    return tokens


def ignore(update: Update) -> None:
    pass
