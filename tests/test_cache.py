"""What is kept between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from uq.formats.checkpoint.cache import kept


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse() -> bytes:
    raise AssertionError("made again")


def test_content_is_made_once() -> None:
    assert kept("a/b.json", lambda: b"content") == b"content"
    assert kept("a/b.json", refuse) == b"content"


@pytest.mark.parametrize("at", [0, 31, 32, 38])
def test_a_damaged_file_is_made_again(own_cache: Path, at: int) -> None:
    kept("b.json", lambda: b"content")
    stored = bytearray((own_cache / "b.json").read_bytes())
    stored[at] ^= 1
    (own_cache / "b.json").write_bytes(stored)
    assert kept("b.json", lambda: b"content") == b"content"
    assert kept("b.json", refuse) == b"content"


def test_a_cache_that_cannot_be_written_is_done_without(own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert kept("b.json", lambda: b"content") == b"content"
    assert own_cache.read_text() == "a file where the folder should be"
