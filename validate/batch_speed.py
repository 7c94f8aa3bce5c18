"""Tokens per second of several sequences together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from uq.kernels.session import BatchSession, Piece, Sampling
from uq.progress import Progress, SilentProgress
from uq.validate.report import Spread
from uq.validate.speed import fixed_prompt, repeated

GREEDY = Sampling()


@dataclass(frozen=True)
class BatchRates:
    """Measured tokens per second of all sequences together; the warm-up is not among the repeats.

    Attributes:
        prompt, generated: tokens of each sequence.
    """

    sequences: int
    prefill_tps: Spread
    decode_tps: Spread
    prompt: int
    generated: int
    repeats: int


def measure_batch(
    session: BatchSession,
    *,
    prompt: int,
    generate: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> BatchRates:
    """Prefill `prompt` tokens and write `generate` more in every slot, `repeats` times.

    Raises:
        UsageError: the session's context is too short.
    """
    tokens = fixed_prompt(prompt, session.config)
    run = partial(_run, session, tokens, generate, clock)
    all_tokens = session.slots * prompt, session.slots * generate
    progress = progress or SilentProgress()
    runs = repeated(run, repeats, all_tokens, progress, f"speed of {session.slots} sequences")
    return BatchRates(
        sequences=session.slots,
        prefill_tps=_spread([session.slots * prompt / prefill for prefill, _ in runs]),
        decode_tps=_spread([session.slots * generate / decode for _, decode in runs]),
        prompt=prompt,
        generated=generate,
        repeats=repeats,
    )


def _run(
    session: BatchSession, tokens: Sequence[int], generate: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of all prefills and of the decoding behind them."""
    slots = range(session.slots)
    for slot in slots:
        session.rewind(slot, 0)
    began = clock()
    for slot in slots:
        for start in range(0, len(tokens), session.block):
            session.extend([Piece(slot, tokens[start : start + session.block])])
    filled = clock()
    session.write([Piece(slot, tokens[:1]) for slot in slots], generate, GREEDY)
    return filled - began, clock() - filled


def _spread(rates: list[float]) -> Spread:
    return Spread(median(rates), min(rates), max(rates))
