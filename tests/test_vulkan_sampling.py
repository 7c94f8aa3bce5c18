"""The choice of a token on the GPU against `kernels.sampling`, and texts that end there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_cpu_session import Source, random_tokens
from tests.vulkan_lab import Floats, Lab, no_messages  # noqa: F401
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.sampling import candidates
from uq.kernels.session import Sampling
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.sources import BundleSource
from uq.kernels.vulkan.state import MOST_STEPS, blank, views

COLUMNS = 64
SETTINGS = {
    "plain": Sampling(temperature=1.0),
    "hot": Sampling(temperature=3.5),
    "cold": Sampling(temperature=0.01),
    "top-k": Sampling(temperature=0.8, top_k=7),
    "top-k of more than the groups": Sampling(temperature=2.0, top_k=300),
    "top-k beyond the vocabulary": Sampling(temperature=1.0, top_k=10**6, top_p=0.99),
    "top-k of one token": Sampling(temperature=1.0, top_k=1),
    "top-p": Sampling(temperature=1.2, top_p=0.7),
    "top-p of one token": Sampling(temperature=1.0, top_p=1e-9),
    "top-p of nearly all": Sampling(temperature=2.0, top_p=0.99999),
    "both": Sampling(temperature=1.5, top_k=20, top_p=0.6),
}
LOGITS: dict[str, Callable[[np.random.Generator, int], NDArray[Any]]] = {
    "normal": lambda rng, size: rng.normal(0, 3, (COLUMNS, size)),
    "equal": lambda rng, size: np.zeros((COLUMNS, size)),
    "few values": lambda rng, size: rng.integers(-3, 4, (COLUMNS, size)),
    "far apart": lambda rng, size: 1e4 * rng.normal(0, 1, (COLUMNS, size)),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"))
    yield lab
    lab.close()


def chosen(lab: Lab, logits: Floats, sampling: Sampling, numbers: Floats) -> list[int]:
    """A token for each row of logits, drawn by its number."""
    size = logits.shape[1]
    padded, groups = -(-size // 16) * 16, -(-size // 32)
    rows = np.full((COLUMNS, padded), 1e30, np.float32)  # nothing behind the vocabulary is read
    rows[:, :size] = logits
    state = blank()
    fields = views(state)
    fields["count"][0] = COLUMNS
    fields["temperatures"][:] = sampling.temperature
    fields["top_ks"][:], fields["top_ps"][:] = sampling.top_k, sampling.top_p
    fields["draws"].reshape(-1, MOST_STEPS)[:, 0] = numbers
    span = lab.put(state)
    push = addresses(lab.put(rows), lab.room(COLUMNS * groups), span)
    push += words(padded, size, groups, 0)
    lab.run("peaks", push, -(-groups * 8 // 64), COLUMNS, LANES=64)
    lab.run("sample", push, COLUMNS, LANES=128)
    tokens: list[int] = views(lab.get(span, np.uint32, state.size))["choices"].tolist()
    return tokens


@pytest.mark.parametrize("size", [700, 5003, 20])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_token_is_drawn_like_on_the_cpu(lab: Lab, name: str, kind: str, size: int) -> None:
    """Where the number falls within float32's rounding of a border, either side of it."""
    rng, sampling = np.random.default_rng(size), SETTINGS[name]
    logits = LOGITS[kind](rng, size).astype(np.float32)
    numbers = rng.random(COLUMNS).astype(np.float32)
    numbers[:3] = 0, 0.5, 1 - 2**-24
    for row, number, token in zip(
        logits, numbers, chosen(lab, logits, sampling, numbers), strict=True
    ):
        assert token in allowed(row, sampling, float(number))


def allowed(logits: Floats, sampling: Sampling, number: float) -> set[int]:
    """The tokens at `number` of the probabilities, by a cut as exact as float32 can make it."""
    found: set[int] = set()
    for nearly in (0, -2e-6, 2e-6):
        top_p = sampling.top_p + nearly if sampling.top_p < 1 else 1.0
        cut = replace(sampling, top_p=min(max(top_p, 1e-12), 1.0))
        ids, probabilities = candidates(logits, cut)
        ends = probabilities.cumsum()
        near = np.clip([number - 2e-6, number + 2e-6], 0, 1) * ends[-1]
        first, last = np.searchsorted(ends, near, side="right")
        found.update(ids[first : last + 1].tolist() or [int(ids[-1])])
    return found


def test_greedy_takes_the_first_of_the_greatest(lab: Lab) -> None:
    logits = np.random.default_rng(1).integers(-9, 10, (COLUMNS, 700)).astype(np.float32)
    found = chosen(lab, logits, Sampling(), np.zeros(COLUMNS, np.float32))
    assert found == logits.argmax(axis=1).tolist()


@pytest.fixture(scope="module")
def gemma2(tiny_checkpoint: Callable[..., Path]) -> Source:
    """With soft-capped logits."""
    options = {"final_logit_softcapping": 3.0}
    return Source(open_checkpoint(tiny_checkpoint(family="gemma2", vocab=700, config=options)))


@pytest.fixture(scope="module")
def session(gemma2: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VulkanSession]:
    """Shared: each test begins with `reset`."""
    folder = tmp_path_factory.mktemp("pipelines")
    source = BundleSource(gemma2)
    session = VulkanSession(gemma2.config, source, choose(), pipeline_cache=folder, max_context=128)
    yield session
    session.close()


@pytest.mark.parametrize("name", ["hot", "top-k", "top-p", "both"])
def test_a_drawn_text_is_that_of_the_cpu(session: VulkanSession, gemma2: Source, name: str) -> None:
    sampling, cpu = replace(SETTINGS[name], seed=7), gemma2.session()
    prompt = random_tokens(gemma2.config, 9).tolist()
    session.reset()
    for each in (session, cpu):
        each.prefill(prompt)
    assert list(session.decode(40, sampling)) == list(cpu.decode(40, sampling))


def test_the_way_of_choosing_may_change(session: VulkanSession, gemma2: Source) -> None:
    """Also behind tokens that were generated in vain, and behind a look at the logits."""
    ways = [SETTINGS["hot"], Sampling(), SETTINGS["both"], Sampling(), SETTINGS["hot"]]
    cpu = gemma2.session()
    session.reset()
    for each in (session, cpu):
        each.prefill([5, 6, 7])
    for count, way in enumerate(ways, 3):
        tokens = session.decode(40, way)
        found = [next(tokens) for _ in range(count)]
        tokens.close()  # type: ignore[attr-defined]
        assert found == list(cpu.decode(count, way))
        np.testing.assert_allclose(session.next_logits, cpu.next_logits, atol=1e-2)


def test_a_text_ends_on_the_device(gemma2: Source, tmp_path: Path) -> None:
    """Steps behind the token that ends it change nothing, and whoever wants more gets more."""
    cpu = gemma2.session()
    cpu.prefill([5, 6, 7])
    expected = list(cpu.decode(24, Sampling()))
    ends = (expected[4], expected[12])
    config = replace(gemma2.config, eos_token_ids=ends)
    session = VulkanSession(
        config, BundleSource(gemma2), choose(), pipeline_cache=tmp_path, max_context=64
    )
    session.prefill([5, 6, 7])
    generated: list[int] = []
    for token in session.decode(24, Sampling()):
        generated.append(token)
        if token in ends:
            assert session.position == 3 + len(generated)  # nothing behind it
    assert generated == expected
    session.close()
