"""Figures and tables for a terminal."""

from __future__ import annotations

import pytest

from uq.text import duration, size, table


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (170 * 2**20, "170.0 MiB"),
        (1023 * 2**20, "1.0 GiB"),
        (5000 * 2**30, "5000.0 GiB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (4800, "1 h 20 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_align_right_and_text_left() -> None:
    rows = [("a", 1200, "1.5 GiB", "0.8.0"), ("bcd", 7, "", "10.20.1")]
    assert table(rows, head=("name", "n", "size", "version")) == (
        "name      n     size  version\na     1,200  1.5 GiB  0.8.0\nbcd       7           10.20.1"
    )


def test_a_table_without_rows_is_empty() -> None:
    assert table([]) == ""
    assert table([], head=("a", "b")) == "a  b"
