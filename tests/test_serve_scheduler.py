"""Whoever else is served, a sequence gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uq.formats.bundle import Bundle, open_bundle
from uq.formats.tokenizer import Tokenizer
from uq.kernels.cpu.batch import CpuBatch
from uq.kernels.cpu.session import CpuSession
from uq.kernels.session import Piece, Sampling
from uq.serve.engine import Engine, QueueFull
from uq.serve.job import Job, Score, Update
from uq.serve.metrics import Metrics
from uq.serve.scheduler import Scheduler, common
from uq.serve.scores import score
from uq.serve.sequence import Sequence
from uq.serve.stops import StopText

CONTEXT = 256


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(tiny_bundle())


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return bundle.tokenizer()


@pytest.fixture(scope="module")
def single(bundle: Bundle) -> CpuSession:
    return CpuSession(bundle.config, bundle, max_context=CONTEXT)


class Run:
    """A scheduler, and what it reports of each job."""

    def __init__(self, bundle: Bundle, slots: int = 4) -> None:
        self.session = CpuBatch(bundle.config, bundle, slots=slots, max_context=CONTEXT)
        self.scheduler = Scheduler(self.session, Metrics())
        self.tokenizer = bundle.tokenizer()
        self.updates: list[list[Update]] = []
        self.sequences: list[Sequence] = []

    def add(self, job: Job) -> int:
        updates: list[Update] = []
        sequence = Sequence(job, self.tokenizer, updates.append)
        self.scheduler.waiting.append(sequence)
        self.updates.append(updates)
        self.sequences.append(sequence)
        return len(self.updates) - 1

    def finish(self) -> None:
        while not self.scheduler.idle:
            self.scheduler.step()

    def generated(self, index: int) -> list[int]:
        return self.sequences[index].tokens[len(self.sequences[index].job.prompt) :]

    def text(self, index: int) -> str:
        return "".join(update.text for update in self.updates[index])


@pytest.fixture
def run(bundle: Bundle) -> Run:
    return Run(bundle)


def random_job(rng: np.random.Generator) -> Job:
    prompt = rng.integers(6, 512, rng.integers(1, 150)).tolist()
    temperature = float(rng.choice([0.0, 1.0, 2.0]))
    return Job(
        prompt=(2, *prompt),
        max_tokens=int(rng.integers(1, 30)),
        sampling=Sampling(temperature, int(rng.choice([0, 20])), 0.9, int(rng.integers(100))),
        stream=bool(rng.integers(2)),
    )


def alone(single: CpuSession, tokenizer: Tokenizer, job: Job) -> list[int]:
    """What a session gives that runs nothing else, its end token included."""
    single.reset()
    single.prefill(job.prompt)
    tokens = []
    for token in single.decode(job.max_tokens, job.sampling):
        tokens.append(token)
        if token in tokenizer.eos:
            break
    return tokens


def test_every_sequence_gets_what_it_gets_alone(
    run: Run, single: CpuSession, tokenizer: Tokenizer
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        run.add(random_job(rng))
        for _ in range(rng.integers(0, 6)):
            run.scheduler.step()
    run.finish()
    for index, sequence in enumerate(run.sequences):
        expected = alone(single, tokenizer, sequence.job)
        assert run.generated(index) == expected
        assert run.text(index) == tokenizer.decode(expected)
        last = run.updates[index][-1]
        ended = expected[-1] in tokenizer.eos
        assert (last.finish, last.generated) == ("stop" if ended else "length", len(expected))


def test_steps_hold_many_sequences(run: Run) -> None:
    for seed in range(8):
        run.add(Job((2, 10, 20), 5, Sampling(1.0, 50, 1.0, seed)))
    steps = 0
    while not run.scheduler.idle:
        run.scheduler.step()
        steps += 1
    assert steps <= 2 * 6


def test_a_long_prompt_does_not_stop_those_that_write(bundle: Bundle, run: Run) -> None:
    writing = run.add(Job((2, 10), 100, Sampling()))
    run.scheduler.step()
    run.add(Job((2, *[9] * 200), 1, Sampling()))
    before = len(run.generated(writing))
    run.scheduler.step()
    assert len(run.generated(writing)) == before + 1
    assert run.session.length(1) == 128, "the prompt comes in pieces meanwhile"


def test_a_common_beginning_is_computed_once(
    run: Run, single: CpuSession, tokenizer: Tokenizer
) -> None:
    history = (2, *range(100, 160))
    first = run.add(Job(history, 8, Sampling(1.0, seed=1)))
    run.finish()
    longer = Job((*history, *run.generated(first), 7, 8, 9), 8, Sampling(1.0, seed=2))
    second = run.add(longer)
    third = run.add(Job(history, 8, Sampling(1.0, seed=3)))
    run.finish()
    assert run.generated(second) == alone(single, tokenizer, longer)
    assert run.generated(third) == alone(single, tokenizer, run.sequences[third].job)
    assert run.updates[second][-1].cached >= len(history)
    assert run.updates[third][-1].cached in (0, len(history) - 1)


def test_one_that_nobody_waits_for_leaves(run: Run) -> None:
    running, waiting = [run.add(Job((2, 10), 40, Sampling())) for _ in range(8)][::4]
    run.scheduler.step()
    run.sequences[running].gone = run.sequences[waiting].gone = True
    run.scheduler.step()
    assert len(run.generated(running)) == 1 and not run.generated(waiting)
    assert run.sequences[running] not in run.scheduler.running.values()
    assert run.sequences[waiting] not in run.scheduler.waiting
    run.finish()
    assert not run.updates[running] and not run.updates[waiting]


def test_a_failed_step_ends_those_that_run_and_no_other(
    run: Run, single: CpuSession, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job((2, 10, seed), 6, Sampling(1.0, seed=seed)) for seed in range(8)]
    indices = [run.add(job) for job in jobs]
    run.scheduler.step()

    def broken(pieces: list[Piece]) -> None:
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(run.session, "extend", broken)
        with pytest.raises(RuntimeError):
            run.scheduler.step()
    run.finish()
    struck = [index for index in indices if run.updates[index][-1].error]
    assert 1 <= len(struck) <= 4
    for index in set(indices) - set(struck):
        assert run.generated(index) == alone(single, tokenizer, jobs[index])
    for index in struck:
        assert run.updates[index][-1].error == "RuntimeError: lost"


def test_scores_are_those_of_the_whole_text(
    run: Run, single: CpuSession, tokenizer: Tokenizer
) -> None:
    prompt = (2, *np.random.default_rng(3).integers(6, 512, 140).tolist())
    plain = Job(prompt, 10, Sampling(1.0, seed=4), logprobs=3)
    run.add(random_job(np.random.default_rng(9)))
    echoed, later = run.add(replace(plain, echo=True)), run.add(plain)
    run.finish()
    tokens = [*prompt, *alone(single, tokenizer, plain)]
    hidden = single.score(np.array([tokens], np.int32))[0]
    expected = torch.from_numpy(single.logits(hidden, 0, 512)).double().log_softmax(-1).numpy()
    scores = list(run.updates[echoed][-1].scores)
    assert scores[0] == Score(2, None)
    assert [score.token for score in scores] == tokens
    for position, found in enumerate(scores[1:]):
        row = expected[position]
        assert found.logprob == pytest.approx(row[found.token], abs=1e-5)
        assert [index for index, _ in found.top] == (-row).argsort(kind="stable")[:3].tolist()
    assert list(run.updates[later][-1].scores) == scores[len(prompt) :]


def test_nothing_to_generate_is_over_with_the_prompt(run: Run) -> None:
    index = run.add(Job((2, 9, 9), 0, Sampling(), logprobs=1, echo=True))
    run.finish()
    (update,) = run.updates[index]
    assert update.finish == "length" and len(update.scores) == 3 and update.generated == 0


def test_a_stop_text_ends_the_text_in_front_of_it(run: Run, tokenizer: Tokenizer) -> None:
    whole = run.add(Job((2, 10, 11), 40, Sampling(1.0, seed=5)))
    run.finish()
    text = run.text(whole)
    stop = text[len(text) // 2 :][:2]
    for stream in (False, True):
        index = run.add(Job((2, 10, 11), 40, Sampling(1.0, seed=5), stop=(stop,), stream=stream))
        run.finish()
        assert run.text(index) == text[: text.index(stop)]
        assert run.updates[index][-1].finish == "stop"


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", max_size=3), max_size=3))
def test_stop_texts_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    found = StopText(stops)
    text = "".join(map(found.push, pieces)) + found.flush()
    whole = "".join(pieces)
    # The text is cut where the first stop text is complete, of several there the longest.
    ends = {
        end for stop in stops if stop for end in [whole.find(stop) + len(stop)] if stop in whole
    }
    assert found.reached == bool(ends)
    assert whole.startswith(text)
    if not ends:
        assert text == whole
    else:
        assert any(whole[len(text) :].startswith(stop) for stop in stops if stop)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_a_score_is_a_log_softmax(count: int) -> None:
    logits = np.random.default_rng(0).normal(0, 30, 5000).astype(np.float32)
    logits[7] = logits[4000] = logits.max() + 1
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    found = score(logits, 17, count)
    assert found.logprob == pytest.approx(expected[17].item(), abs=2e-5)
    top = (-logits).argsort(kind="stable")[:count]
    assert [index for index, _ in found.top] == top.tolist()
    np.testing.assert_allclose([value for _, value in found.top], expected[top], atol=2e-5)


@pytest.mark.parametrize(
    ("one", "other", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1)]
)
def test_the_common_beginning(one: list[int], other: list[int], length: int) -> None:
    assert common(one, other) == common(other, one) == length


def test_a_full_queue_takes_all_or_none(bundle: Bundle, tokenizer: Tokenizer) -> None:
    session = CpuBatch(bundle.config, bundle, slots=1, max_context=CONTEXT)
    engine = Engine(session, tokenizer, Metrics(), thread=ThreadPoolExecutor(1), queue=3)
    job = (Job((2, 3), 1, Sampling()), list[Update]().append)
    with pytest.raises(QueueFull):
        engine.submit([job] * 5)  # one has a slot
    engine.submit([job] * 3)
    with pytest.raises(QueueFull, match="3 of at most 3"):
        engine.submit([job] * 2)
    engine.submit([job])
