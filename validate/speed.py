"""Tokens per second of one sequence: a real prefill, then decoding behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import truediv
from statistics import median

import numpy as np

from uq.errors import UsageError
from uq.formats.config import GemmaConfig
from uq.kernels.session import Sampling, Session
from uq.progress import Progress, SilentProgress
from uq.validate.bandwidth import Ceiling
from uq.validate.report import Speed, Spread

GREEDY = Sampling()


@dataclass(frozen=True)
class Rates:
    """Measured tokens per second; the warm-up run is not among the repeats.

    Attributes:
        prompt: tokens of each prefill, so the context when decoding begins.
        generated: tokens of each decoding; an end of text does not stop it.
        bytes_per_token: weight bytes that the session reads to decode one token.
    """

    prefill_tps: Spread
    decode_tps: Spread
    prompt: int
    generated: int
    repeats: int
    bytes_per_token: int

    def beside(self, ceiling: Ceiling) -> Speed:
        """These rates with what a measured read bandwidth allows."""
        bandwidth, cache = ceiling.bandwidth_gb_s, ceiling.cache_bytes
        return Speed(
            prefill_tps=self.prefill_tps,
            decode_tps=self.decode_tps,
            batch=1,
            context=self.prompt,
            bytes_per_token=self.bytes_per_token,
            bandwidth_gb_s=bandwidth,
            decode_ceiling_tps=bandwidth * 1e9 / self.bytes_per_token,
            generated=self.generated,
            repeats=self.repeats,
            weights_fit_cache=cache is not None and self.bytes_per_token < cache,
        )


def measure_speed(
    session: Session,
    *,
    prompt: int = 512,
    generate: int = 64,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
    label: str = "speed",
) -> Rates:
    """Prefill `prompt` tokens and decode `generate` more, greedily, `repeats` times.

    The session's KV cache is emptied before every run and at the end.

    Args:
        progress: is told of every run, as `label`.

    Raises:
        UsageError: a count is below 1, or the session's context is too short.
    """
    if min(prompt, generate, repeats) < 1:
        raise UsageError(f"speed: {prompt=}, {generate=}, {repeats=}; each must be at least 1")
    if prompt + generate > session.max_context:
        raise UsageError(
            f"speed: {prompt} + {generate} tokens do not fit the context of "
            f"{session.max_context}; measure fewer or open the session with a longer context"
        )
    tokens = fixed_prompt(prompt, session.config)
    if session.probe is not None:  # passes grow, and large ones have kernels of their own
        session.reset()
        session.prefill(tokens)
    run = partial(_run, session, tokens, generate, clock)
    runs = repeated(run, repeats, (prompt, generate), progress or SilentProgress(), label)
    session.reset()
    return Rates(
        prefill_tps=_spread([prompt / prefill for prefill, _ in runs]),
        decode_tps=_spread([generate / decode for _, decode in runs]),
        prompt=prompt,
        generated=generate,
        repeats=repeats,
        bytes_per_token=session.bytes_per_token,
    )


def repeated(
    run: Callable[[], tuple[float, float]],
    repeats: int,
    tokens: tuple[int, int],
    progress: Progress,
    label: str,
) -> list[tuple[float, float]]:
    """Seconds of prefill and decoding in each of `repeats` runs, behind one that does not count.

    Args:
        tokens: of a prefill, and of a decoding.
    """
    progress.start(1 + repeats, label)
    runs = []
    for number in range(1 + repeats):
        progress.work(f"{tokens[0]} tokens of prefill, {tokens[1]} of decoding")
        runs.append(run())
        rates = dict(zip(("prefill", "decode"), map(truediv, tokens, runs[-1]), strict=True))
        progress.advance(f"run {number}" if number else "warm-up", **rates)
    progress.close()
    return runs[1:]


def _run(
    session: Session, tokens: Sequence[int], generate: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of one prefill and of one decoding behind it."""
    session.reset()
    began = clock()
    session.prefill(tokens)
    filled = clock()
    decoded = sum(1 for _ in session.decode(generate, GREEDY))
    ended = clock()
    if decoded != generate:
        raise UsageError(f"speed: the session decoded {decoded} of {generate} tokens; shorten both")
    return filled - began, ended - filled


def fixed_prompt(length: int, config: GemmaConfig) -> list[int]:
    """BOS and fixed random tokens: the time of dense layers does not depend on the text."""
    rng = np.random.default_rng(0)
    return [config.bos_token_id, *rng.integers(0, config.vocab_size, length - 1).tolist()]


def _spread(rates: list[float]) -> Spread:
    return Spread(median(rates), min(rates), max(rates))
