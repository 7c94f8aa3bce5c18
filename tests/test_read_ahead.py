"""Blocks fetched ahead of use: the same bytes, little held, failures forgotten."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from uq.errors import HubError
from uq.formats.checkpoint import read_ahead as module
from uq.formats.checkpoint.fetched import Fetched
from uq.formats.checkpoint.read_ahead import BlockReader, cut, read_ahead
from uq.formats.checkpoint.tensors import TensorInfo

CONTENT = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)


@dataclass
class Slow:
    """A file in memory that remembers what was asked of it, and fails while told to."""

    name: str = "weights"
    asked: list[tuple[int, int]] = field(default_factory=list)
    down: bool = False
    size: int = CONTENT.size
    version: str = ""
    stated_sha256: str | None = None

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        if self.down:
            raise HubError("the network is down")
        self.asked.append((offset, nbytes))
        return CONTENT[offset : offset + nbytes]

    def sha256(self) -> str:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "BLOCK", 100)
    yield


def tensor(file: Slow, name: str, offset: int, nbytes: int) -> TensorInfo:
    return TensorInfo(name, file, offset, (nbytes,), "bf16", nbytes)


def reader_of(file: Slow, ahead: int, fetched: Fetched | None = None) -> BlockReader:
    return BlockReader(list(cut([tensor(file, "all", 0, file.size)])), ahead, fetched or Fetched())


def test_any_bytes_are_those_of_the_file() -> None:
    reader, rng = reader_of(Slow(), 500), np.random.default_rng(1)
    spans = np.sort(rng.integers(0, CONTENT.size, (300, 2)), axis=1)
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda span: reader.read("weights", span[0], span[1] - span[0] + 1), spans)
        for (start, stop), part in zip(spans, parts, strict=True):
            assert_array_equal(part, CONTENT[start : stop + 1])


def test_reading_on_fetches_each_block_once() -> None:
    file = Slow()
    reader = reader_of(file, 500)
    for start in range(0, CONTENT.size, 40):
        reader.read("weights", start, 40)
    assert sorted(file.asked) == [(start, 100) for start in range(0, CONTENT.size, 100)]


def test_what_is_kept_on_the_disk_is_fetched_once(tmp_path: Path) -> None:
    file, fetched = Slow(), Fetched()
    fetched.keep_in(tmp_path, CONTENT.size)
    reader = reader_of(file, 500, fetched)
    starts = range(0, CONTENT.size, 100)
    for start in (*starts, *reversed(starts), *starts):
        part = reader.read("weights", start, 100)
        assert_array_equal(part, CONTENT[start : start + 100])
    assert sorted(file.asked) == [(start, 100) for start in starts]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_disk_that_fails_costs_fetching_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    file, fetched = Slow(), Fetched()
    fetched.keep_in(tmp_path, CONTENT.size)
    monkeypatch.setattr(os, call, fail)
    for _ in range(2):
        assert_array_equal(fetched.read(file, 200, 50), CONTENT[200:250])
    assert file.asked == [(200, 50)] * 2


def test_a_full_disk_gets_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, fetched, pwrite = Slow(), Fetched(), os.pwrite
    fetched.keep_in(tmp_path, CONTENT.size)
    fetched.read(file, 0, 100)
    assert fetched._file is not None
    kept = os.dup(fetched._file.fileno())
    assert os.fstat(kept).st_size == 100
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:10], at))
    assert_array_equal(fetched.read(file, 100, 100), CONTENT[100:200])
    assert os.fstat(kept).st_size == 0
    os.close(kept)
    assert_array_equal(fetched.read(file, 0, 100), CONTENT[:100])


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path) -> None:
    file, fetched = Slow(), Fetched()
    fetched.keep_in(tmp_path, 250)
    for start in (0, 100, 200, 0, 100, 200):
        assert_array_equal(fetched.read(file, start, 100), CONTENT[start : start + 100])
    assert file.asked == [(0, 100), (100, 100), (200, 100), (200, 100)]


def test_blocks_follow_the_order_of_reading() -> None:
    file = Slow()
    late, early = tensor(file, "late", 0, 250), tensor(file, "early", 250, 150)
    tensors = read_ahead({"late": late, "early": early}, [["early"], ["late"]], 300, Fetched())
    tensors["early"].file.read(250, 150)
    tensors["late"].file.read(0, 250)
    assert set(file.asked) == {(250, 100), (350, 50), (0, 100), (100, 100), (200, 50)}


def test_a_single_look_fetches_nothing_ahead() -> None:
    file = Slow()
    reader_of(file, 5000).read("weights", 4321, 10)
    assert file.asked == [(4300, 100)]


def test_parts_of_a_step_are_fetched_once_in_any_order() -> None:
    file, rng = Slow(), np.random.default_rng(2)
    layers = [[f"{n}-{m}" for m in range(5)] for n in range(6)]
    places = {name: 130 * index for index, name in enumerate(sum(layers, []))}
    tensors = {name: tensor(file, name, start, 130) for name, start in places.items()}
    found = read_ahead(tensors, layers, 5 * 130, Fetched())
    for layer in layers:
        for name in rng.permutation(layer):
            start = places[name]
            assert_array_equal(found[name].file.read(start, 130), CONTENT[start : start + 130])
    assert len(file.asked) == len(set(file.asked)) == 6 * 7


def test_reading_on_fetches_ahead_more_and_more() -> None:
    file = Slow()
    reader = reader_of(file, 500)
    lead = []
    for block in range(12):
        reader.read("weights", 100 * block, 100)
        lead.append(max(reader._held) - block)
    assert lead == [0, 1, 2, 3, 4, *[5] * 7]


def test_little_is_held() -> None:
    reader = reader_of(Slow(), 500)
    for start in range(0, CONTENT.size, 100):
        reader.read("weights", start, 100)
        done = [future for future in reader._held.values() if future.done()]
        assert 100 * len(done) <= 2 * 500 + 100


def test_failed_block_is_asked_for_again() -> None:
    file = Slow(down=True)
    reader = reader_of(file, 500)
    with pytest.raises(HubError, match="network is down"):
        reader.read("weights", 0, 150)
    file.down = False
    assert_array_equal(reader.read("weights", 0, 150), CONTENT[:150])


def test_tensors_that_touch_share_blocks() -> None:
    file = Slow()
    parts = [tensor(file, "a", 0, 30), tensor(file, "b", 30, 30), tensor(file, "c", 70, 30)]
    assert [(block.start, block.stop) for block in cut(parts)] == [(0, 60), (70, 100)]
