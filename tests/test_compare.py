"""Reports side by side: the figures of each, and what cannot be compared."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server.server import HubServer
from tests.test_report import HOSTILE, REPORT
from uq.cli import main
from uq.errors import BundleError
from uq.formats.bundle import open_bundle
from uq.validate import plots
from uq.validate.compare import compare
from uq.validate.compare_html import render_comparison
from uq.validate.files import save_report
from uq.validate.plots import LIGHT
from uq.validate.report import Report

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def original(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle()


@pytest.fixture
def reported(original: Path, tmp_path: Path) -> Make:
    """Factory of bundles of a name, with a report of given figures."""

    def make(name: str, *, kld: float = 0.048, bits: float = 4.75, **changes: Any) -> Path:
        folder = Path(shutil.copytree(original, tmp_path / "bundles" / name))
        sha256 = open_bundle(folder, verify="lazy").sha256
        facts = replace(REPORT.bundle, name=name, sha256=sha256, bits_per_weight=bits)
        divergence = replace(REPORT.kld, mean=kld)
        report: Report = replace(REPORT, bundle=facts, kld=divergence, **changes)
        save_report(report, folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def no_report_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uq.validate.files.render_html", lambda report: "")


def test_table_has_a_line_for_each_bundle_the_most_lost_first(
    reported: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    good, poor = reported("good", kld=0.01, bits=8.5), reported("poor", kld=0.2, bits=4.5)
    assert main(["compare", str(good), str(poor)]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["poor", "4.500"] and "0.20000 ± 0.00040" in first
    assert second.split()[:2] == ["good", "8.500"] and "61.5" in second


def test_json_holds_the_whole_reports(reported: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [reported("a"), reported("b", kld=0.01)]
    assert main(["compare", *map(str, folders), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["label"] for entry in found["bundles"]] == ["a", "b"]
    stored = [json.loads((folder / "report.json").read_text()) for folder in folders]
    assert [entry["report"] for entry in found["bundles"]] == stored
    assert found["warnings"] == []


def test_page_labels_every_point(reported: Make, tmp_path: Path) -> None:
    folders = [reported(name, kld=kld) for name, kld in (("one", 0.01), ("two", 0.1))]
    assert main(["compare", *map(str, folders), "--html", str(tmp_path / "page.html")]) == 0
    drawn = re.findall(r"<svg.*?</svg>", (tmp_path / "page.html").read_text(), re.DOTALL)
    assert len(drawn) == 2
    for plot in drawn:
        assert ">one<" in plot and ">two<" in plot


def test_divergences_decades_apart_have_few_ticks(reported: Make) -> None:
    folders = [reported("a", kld=0.002, speed=None), reported("b", kld=0.9, speed=None)]
    ticks = re.findall(r">([0-9.]+)</text>", render_comparison(compare(folders)))
    assert {"0.01", "0.1", "1"} <= set(ticks) and len(ticks) < 30


def test_page_without_speeds_has_one_plot(reported: Make) -> None:
    page = render_comparison(compare([reported("a", speed=None), reported("b", speed=None)]))
    assert page.count("<svg") == 1


def test_page_escapes_names(reported: Make) -> None:
    reference = replace(REPORT.reference, id=HOSTILE)
    page = render_comparison(compare([reported("a", reference=reference)]))
    assert "<script>" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": replace(REPORT.reference, id="other")}, "different references"),
        ({"text": replace(REPORT.text, context=1024)}, "different texts or windows"),
        ({"text": replace(REPORT.text, format="chat")}, "different texts or windows"),
        ({"device": replace(REPORT.device, name="other")}, "different devices"),
        ({"speed": None}, "different contexts or batches"),
    ],
)
def test_what_cannot_be_compared_is_said(
    reported: Make, changes: dict[str, Any], words: str
) -> None:
    (warning,) = compare([reported("a"), reported("b", **changes)]).warnings
    assert words in warning


def test_bundles_of_one_name_are_told_apart_by_their_path(reported: Make, tmp_path: Path) -> None:
    first = reported("same")
    second = Path(shutil.copytree(first, tmp_path / "elsewhere" / "same"))
    labels = [entry.label for entry in compare([first, second]).entries]
    assert labels == [str(first), str(second)]
    with pytest.raises(BundleError, match="given twice"):
        compare([first, first])


def test_bundle_without_a_report_is_refused(original: Path) -> None:
    with pytest.raises(BundleError, match="no report; run uq validate"):
        compare([original])


def test_report_of_other_bytes_is_refused(reported: Make) -> None:
    folder = reported("a")
    save_report(REPORT, folder)
    with pytest.raises(BundleError, match="its report belongs to other bytes"):
        compare([folder])


def test_bundle_on_the_hub_is_compared_without_its_weights(hub: HubServer, reported: Make) -> None:
    local = reported("a")
    hub.store.add_folder("maker/b", reported("b"))
    assert len(compare([local, "maker/b"]).entries) == 2
    assert not hub.requests("GET", "safetensors")


def test_colours_of_single_figures_are_those_of_the_page() -> None:
    style = Path(plots.__file__).with_name("style.html.j2").read_text().partition("@media")[0]
    assert all(f"{variable}: {colour};" in style for variable, colour in LIGHT.items())
