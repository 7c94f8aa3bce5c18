import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import DeviceError, UsageError
from uq.formats.config import FULL, GemmaConfig
from uq.kernels.session import Device, Sampling
from uq.validate.bandwidth import (
    BLOCK,
    Ceiling,
    _parallel_sum,
    buffer_size,
    measure_bandwidth,
)
from uq.validate.environment import last_level_cache
from uq.validate.report import Spread
from uq.validate.speed import measure_speed

GIB = 1 << 30
CONFIG = GemmaConfig(
    family="gemma3",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-6,
    query_pre_attn_scalar=8.0,
    sliding_window=16,
    layer_types=(FULL,),
    rope_theta=1e4,
    rope_local_theta=1e4,
    rope_scaling=1.0,
    attn_softcap=None,
    final_softcap=None,
    post_norms=True,
    qk_norm=True,
    tied_head=True,
    max_position_embeddings=64,
    bos_token_id=2,
    eos_token_ids=(1,),
    pad_token_id=0,
)


class ClockedSession:
    """Moves its own clock: 1 second per run of a prompt, then a given time per decoded token."""

    config = CONFIG
    device = Device("fake", "fake", "none")
    bytes_per_token = 2_000_000_000
    probe = None
    max_context = 48

    def __init__(self, seconds_per_token: Sequence[float]) -> None:
        self.now = 0.0
        self.position = 0
        self.runs = 0
        self.prompts: list[list[int]] = []
        self._seconds = seconds_per_token

    def clock(self) -> float:
        return self.now

    def reset(self) -> None:
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        assert self.position == 0
        self.prompts.append(list(tokens))
        self.position += len(tokens)
        self.now += 1.0
        self.runs += 1

    def decode(self, count: int, sampling: Sampling) -> Iterator[int]:
        assert sampling.temperature == 0
        for _ in range(count):
            self.now += self._seconds[self.runs - 1]
            self.position += 1
            yield 1  # end of text, which must not stop the measurement

    def score(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        raise AssertionError("a speed measurement does not score")

    def logits(self, hidden: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        raise AssertionError("a speed measurement asks for no logits")


def test_rates_are_exact_and_leave_the_warm_up_out() -> None:
    session = ClockedSession([9.0, 0.5, 0.25, 0.125])
    rates = measure_speed(session, prompt=32, generate=8, repeats=3, clock=session.clock)
    assert rates.prefill_tps == Spread(32.0, 32.0, 32.0)
    assert rates.decode_tps == Spread(median=4.0, min=2.0, max=8.0)
    assert session.runs == 4
    assert session.position == 0


def test_every_run_prefills_the_same_prompt_behind_bos() -> None:
    session = ClockedSession([1.0] * 3)
    measure_speed(session, prompt=32, generate=1, repeats=2, clock=session.clock)
    assert session.prompts[0][0] == CONFIG.bos_token_id
    assert len(session.prompts[0]) == 32
    assert session.prompts[0] == session.prompts[1] == session.prompts[2]


def test_the_ceiling_is_bandwidth_over_bytes_per_token() -> None:
    session = ClockedSession([1.0] * 2)
    rates = measure_speed(session, prompt=4, generate=1, repeats=1, clock=session.clock)
    speed = rates.beside(Ceiling(30.0, 1 << 20))
    assert speed.decode_ceiling_tps == 15.0
    assert (speed.batch, speed.context, speed.weights_fit_cache) == (1, 4, False)
    assert rates.beside(Ceiling(30.0, 4 * GIB)).weights_fit_cache


def test_a_context_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="40 . 9 tokens do not fit the context of 48"):
        measure_speed(ClockedSession([]), prompt=40, generate=9)


def test_every_word_of_the_buffer_is_read() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 63, (5, BLOCK), np.uint64)
    assert _parallel_sum(words) == words.sum(dtype=np.uint64)


def test_bandwidth_is_measured() -> None:
    bandwidth = measure_bandwidth(repeats=2)
    assert bandwidth.best >= bandwidth.median > 0
    assert bandwidth.buffer_bytes >= GIB // 4


def test_the_buffer_outgrows_the_cache_and_spares_memory() -> None:
    assert buffer_size(64 << 20, 64 * GIB) == GIB // 4
    assert buffer_size(256 << 20, 64 * GIB) == GIB
    assert buffer_size(256 << 20, 2 * GIB) == GIB // 2
    assert buffer_size(None, 64 * GIB) == GIB // 4


def test_too_little_memory_is_an_error_that_says_how_much() -> None:
    with pytest.raises(DeviceError, match="512 MiB"):
        buffer_size(None, GIB // 2)


def test_peak_memory_sees_an_allocation() -> None:
    """In a process of its own: this one may have held more before."""
    code = """
import numpy as np
from uq.validate.environment import peak_memory
before = peak_memory()
block = np.ones(before + (64 << 20), np.uint8)
assert peak_memory() - before > 32 << 20, (before, peak_memory())
assert block[-1] == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache(tmp_path) == 32 << 20
    assert last_level_cache(tmp_path / "absent") is None
