"""Rows, tables and the command of the quality benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality.calibration import draw
from benchmarks.quality.peers.uq import Uq
from benchmarks.quality.render import BEGIN, END, markdown, splice
from benchmarks.quality.results import (
    DrawResult,
    Figure,
    Results,
    RowResult,
    Sizes,
    TextFacts,
    TextScores,
    completed,
)
from benchmarks.quality.rows import all_rows, extra_row
from benchmarks.quality.source import prepare
from benchmarks.quality.steps import Cost
from uq.errors import UsageError
from uq.formats.checkpoint import open_checkpoint
from uq.quantize.plan import RECIPES

Tiny = Callable[..., Path]
COST = Cost(90.0, 2**30, "a machine")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint(dtype="f16")


def test_every_recipe_is_a_row(folder: Path) -> None:
    config = open_checkpoint(folder).config
    names = [row.name for row in all_rows(config, ["g64=--group 64"])]
    assert {f"uq {name}" for name in RECIPES} | {"uq rtn", "g64"} <= set(names)


def test_arguments_say_whether_a_row_is_calibrated(folder: Path) -> None:
    config = open_checkpoint(folder).config
    assert extra_row("g64=--group 64", config).calibrated
    assert not extra_row("fast=--group 64 --method rtn", config).calibrated


def test_another_calibration_text_is_another_row(folder: Path, tmp_path: Path) -> None:
    reference, text = prepare(str(folder), tmp_path), tmp_path / "text.txt"
    drawn = draw(0, reference.checkpoint.tokenizer(), 128, tmp_path)
    row = extra_row(f"own=--calibration {text}", reference.checkpoint.config)
    keys = set()
    for content in ("one", "another"):
        text.write_text(content)
        (step,) = Uq(reference, 128).steps(row, drawn)
        keys.add(step.key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["--group 64"], "expected NAME=ARGUMENTS"),
        (["a=--group 65"], "row 'a'"),
        (["uq rtn=--group 64"], "already a row 'uq rtn'"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        all_rows(open_checkpoint(folder).config, rows)


def scores(kld: float) -> TextScores:
    return TextScores(
        Figure(kld, 0.01), 1.5, Figure(80, 1), Figure(1.25, 0.02), (kld, 2 * kld, 3 * kld)
    )


def results(*rows: RowResult) -> Results:
    texts = (TextFacts("words", 3, 93, "ab"),)
    return Results(1, "0.1.0", "2026-01-01", "a machine", "m", "cd", 64, 128, 2, "two", texts, rows)


SIZES = Sizes(6.5, 4.5, 2_000_000, "INT8 g64", "INT4 g32")
DRAWS = tuple(DrawResult(n, SIZES, COST, {"words": scores(0.2 + 0.1 * n)}) for n in range(2))
ROWS = (
    RowResult("one", "uq", (), False, DRAWS[:1]),
    RowResult("two", "uq", (), True, DRAWS),
    RowResult("other", "uq", (), False, (DrawResult(0, SIZES, COST, {}),)),
    RowResult("none", "llama.cpp", (), False, (), "no tools"),
)


@pytest.mark.parametrize(
    "line",
    [
        "| row | bits, linears | bits, all | MB | KL words |",
        "| one | 4.500 | 6.500 | 2.0 | 0.2000 ± 0.0100 |",
        "| two | 4.500 | 6.500 | 2.0 | 0.2500 ± 0.0100 (0.2000 to 0.3000) |",
        "| one | 0.2000 ± 0.0100 | 1.500 | 80.00 | 1.2500 ± 0.0200 |",
        "| one | 1.50 | 1024 | INT4 g32 | INT8 g64 | a machine |",
        "| one | -0.1000 ± 0.0289, lower in 3 of 3 |",
        "| other | not run |",
        "| other | 4.500 | 6.500 | 2.0 | not run |",
        "- none: no tools",
    ],
)
def test_tables(line: str) -> None:
    assert line in markdown(results(*ROWS)).splitlines()


def test_small_divergences_show_two_figures() -> None:
    draw = replace(DRAWS[0], texts={"words": scores(0.000088)})
    table = markdown(results(replace(ROWS[0], draws=(draw,))))
    assert "| one | 4.500 | 6.500 | 2.0 | 0.000088 ± 0.010000 |" in table.splitlines()


def test_results_are_read_as_they_are_written() -> None:
    found = results(*ROWS)
    assert Results.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_draws_of_another_machine_complete_a_table() -> None:
    here = results(replace(ROWS[1], draws=DRAWS[1:]), replace(ROWS[3], not_run="not chosen"))
    there = results(replace(ROWS[1], draws=DRAWS[:1]), replace(ROWS[3], draws=DRAWS))
    two, none = completed(here, there).rows
    assert two.draws == DRAWS
    assert (none.draws, none.not_run) == (DRAWS, None)


def test_a_draw_that_is_measured_here_stays() -> None:
    other = replace(DRAWS[0], texts={"words": scores(9.0)})
    (row,) = completed(results(ROWS[0]), results(replace(ROWS[0], draws=(other,)))).rows
    assert row == ROWS[0]


def test_scores_on_other_windows_are_left_out() -> None:
    there = replace(results(ROWS[1]), texts=(TextFacts("words", 3, 93, "other"),))
    assert completed(results(ROWS[3]), there).rows == (ROWS[3],)


def test_figures_of_another_model_are_refused() -> None:
    there = replace(results(ROWS[1]), reference_sha256="ef")
    with pytest.raises(UsageError, match="reference_sha256 is ef, here it is cd"):
        completed(results(), there)


def test_tables_replace_what_is_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for content in ("new\n", "newer\n"):
        splice(page, content)
        assert page.read_text() == f"before\n{BEGIN}\n{content}{END}\nafter\n"


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(BEGIN)
    with pytest.raises(UsageError, match="has no lines"):
        splice(tmp_path / "page.md", "x")


def test_the_command_writes_json_and_tables(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(["the time of the world was two years"] * 120)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "words.txt").write_text(words)
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    options: dict[str, Any] = {
        "--model": folder, "--texts": tmp_path / "texts", "--text": "words", "--windows": 1,
        "--draws": 1, "--only": "^uq rtn$", "--work": tmp_path / "work", "--doc": page,
    }  # fmt: skip
    assert command.main([str(word) for pair in options.items() for word in pair]) == 0
    found = json.loads((tmp_path / "work" / "quality.json").read_text())
    by_name = {row["name"]: row for row in found["rows"]}
    assert by_name["uq rtn"]["draws"][0]["texts"]["words"]["kld"]["value"] > 0
    assert by_name["uq int4"]["not_run"] == "not chosen (--only)"
    assert "GGUF" in by_name["llama.cpp Q4_0"]["not_run"]
    assert "| uq rtn |" in page.read_text() and "| uq rtn |" in capsys.readouterr().out


def test_a_wrong_row_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder), "--work", str(tmp_path), "--row", "nameless"]
    assert command.main(options) == 2
    assert capsys.readouterr().err.count("\n") == 1
