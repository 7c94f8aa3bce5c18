import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from uq.errors import BundleError, ThresholdMissed
from uq.kernels.session import Device
from uq.validate.files import load_report, save_report
from uq.validate.html import render_html
from uq.validate.report import (
    BundleFacts,
    Curve,
    Environment,
    Estimate,
    KindSize,
    KldFacts,
    LayerError,
    Loss,
    Memory,
    ReferenceFacts,
    Report,
    Series,
    Speed,
    Spread,
    TextFacts,
    Threshold,
)
from uq.validate.table import WIDTH, format_report

SPREAD = Spread(61.5, 58.25, 63.0)
SPEED = Speed(SPREAD, SPREAD, 1, 512, 236_000_000, 31.25, 132.4, 64, 5, True)
HOSTILE = "$<script>alert(1)</script>$\"' onload=x {{ 7 * 7 }}"

REPORT = Report(
    schema=1,
    uq="0.1.0",
    bundle=BundleFacts("tiny-int4", "9f" * 32, 4.75, 250_000_000, "int4"),
    reference=ReferenceFacts("google/gemma-3-270m", None, "bf16"),
    text=TextFacts("evaluation.txt", "ab" * 32, 3, 765, 512),
    device=Device("cpu", "some CPU", "LLVM 20", ("avx2",)),
    perplexity=Estimate(25.5, 0.5),
    reference_perplexity=Estimate(25.0, 0.5),
    perplexity_ratio=Estimate(1.02, 0.001),
    kld=KldFacts(0.048, 0.0004, 0.018, 0.45, 1.6, 4.5),
    same_top_percent=92.5,
    rms_delta_p_percent=3.25,
    speed=SPEED,
    reference_speed=None,
    memory=Memory(3_000_000_000, 700_000_000),
    layers=(
        LayerError("model.embed_tokens.weight", 8, 32, 0.005, "rtn", None),
        LayerError("model.layers.0.self_attn.q_proj.weight", 4, 64, 0.085, "gptq", None),
        LayerError(
            "model.layers.1.self_attn.q_proj.weight", 4, 64, 0.0712, "rtn", "an input is zero"
        ),
    ),
    thresholds=(Threshold("max_kld", 0.05, 0.048, True),),
    losses=(
        Loss("weights", Estimate(0.048, 0.0004), 92.5, Estimate(1.02, 0.001)),
        Loss("+ INT4 KV cache", Estimate(0.0625, 0.0005), 91.25, Estimate(1.03, 0.002)),
    ),
    reference_device=Device("reference", "float32, numpy", "numpy 2.4"),
    sizes=(
        KindSize("embedding", 1000, 1062, 2000, 8.5),
        KindSize("attention", 2000, 1062, 4000, 4.25),
    ),
    series=Series((25.0, 26.0, 25.5), (24.5, 25.5, 25.0), Curve((1e-4, 0.1, 4.5), (1, 0.1, 1e-3))),
    environment=Environment(
        "2026-01-01T00:00:00+00:00", "uq validate x", "Linux", "3.11", "2", "0.6", 2, None
    ),
    warnings=(),
)
MISSED = replace(REPORT, thresholds=(*REPORT.thresholds, Threshold("min_tps", 100.0, 61.5, False)))


def test_the_report_survives_json() -> None:
    assert Report.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT


def test_the_names_that_programs_rely_on() -> None:
    data = REPORT.to_json()
    assert {name: names(value) for name, value in data.items() if name in PUBLIC} == PUBLIC
    assert list(data["layers"][0]) == [
        *("name", "bits", "group", "relative_error", "method", "fallback")
    ]
    assert list(data["thresholds"][0]) == ["name", "limit", "value", "passed"]
    assert list(data["speed"]["decode_tps"]) == ["median", "min", "max"]


def names(value: Any) -> list[str] | None:
    return list(value) if isinstance(value, dict) else None


PUBLIC: dict[str, list[str] | None] = {
    "schema": None,
    "uq": None,
    "bundle": ["name", "sha256", "bits_per_weight", "bytes", "recipe"],
    "reference": ["id", "revision", "dtype"],
    "text": ["name", "sha256", "chunks", "tokens_scored", "context", "format"],
    "device": ["backend", "name", "driver", "features", "attention"],
    "perplexity": ["value", "stderr"],
    "reference_perplexity": ["value", "stderr"],
    "perplexity_ratio": ["value", "stderr"],
    "kld": ["mean", "stderr", "median", "p99", "p99_9", "max"],
    "same_top_percent": None,
    "rms_delta_p_percent": None,
    "speed": [
        *("prefill_tps", "decode_tps", "batch", "context", "bytes_per_token"),
        *("bandwidth_gb_s", "decode_ceiling_tps", "generated", "repeats", "weights_fit_cache"),
    ],
    "reference_speed": None,
    "memory": ["peak_bytes", "bundle_peak_bytes"],
    "layers": None,
    "thresholds": None,
}


def test_a_missing_number_is_named() -> None:
    data = REPORT.to_json()
    del data["kld"]["p99"]
    with pytest.raises(BundleError, match="kld.*p99"):
        Report.from_json(data)


def test_another_schema_is_refused() -> None:
    with pytest.raises(BundleError, match="schema 2"):
        Report.from_json(REPORT.to_json() | {"schema": 2})


def test_check_raises_for_missed_limits_only() -> None:
    REPORT.check()
    with pytest.raises(ThresholdMissed, match=r"--min-tps 100: measured 61.5$"):
        MISSED.check()


def test_a_saved_report_is_read_back(tmp_path: Path) -> None:
    save_report(REPORT, tmp_path)
    assert load_report(tmp_path) == REPORT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_bundle_without_a_report_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="run uq validate"):
        load_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"schema": 1, "uq": "0.0.1"})])
def test_an_old_or_broken_report_says_in_one_line_how_to_get_another(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(BundleError, match=rf"; run uq validate {tmp_path} again$") as caught:
        load_report(tmp_path)
    assert "report.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_table_is_narrow_and_says_what_was_missed() -> None:
    text = format_report(replace(MISSED, reference_speed=SPEED))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "\x1b" not in text
    assert [line.split()[:2] for line in text.splitlines()[-2:]] == [
        ["PASS", "--max-kld"],
        ["MISS", "--min-tps"],
    ]


def test_notes_are_no_warnings() -> None:
    report = replace(REPORT, warnings=("the text is odd",), notes=("q_proj has int6 g64",))
    lines = format_report(report).splitlines()
    assert lines[-3:] == ["warning: the text is odd", "", "note: q_proj has int6 g64"]
    assert "q_proj has int6 g64" in Page(render_html(report)).text


def test_the_loss_of_each_part_is_in_the_table_and_on_the_page() -> None:
    lines = format_report(REPORT).splitlines()
    (row,) = [line for line in lines if line.startswith("+ INT4 KV cache")]
    assert row.split()[4:] == ["0.06250", "±", "0.00050", "91.25", "%", "1.0300", "±", "0.0020"]
    text = Page(render_html(REPORT)).text
    assert "+ INT4 KV cache" in text and "0.06250 ± 0.00050" in text
    for shown in (
        format_report(replace(REPORT, losses=())),
        render_html(replace(REPORT, losses=())),
    ):
        assert "emulated" not in shown


def test_colour_changes_nothing_but_colour() -> None:
    painted = format_report(MISSED, colour=True)
    assert "\x1b[31mMISS" in painted
    for code in ("\x1b[31m", "\x1b[32m", "\x1b[0m"):
        painted = painted.replace(code, "")
    assert painted == format_report(MISSED)


class Page(HTMLParser):
    """Collects what a browser would fetch or run, the ids, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_fetches_nothing() -> None:
    source = render_html(replace(REPORT, reference_speed=SPEED))
    page = Page(source)
    assert page.tags.count("svg") == 5
    assert [link for link in page.links if not link.startswith("#")] == []
    assert {"script", "link", "iframe", "img", "object"}.isdisjoint(page.tags)
    for word in ("@import", "url(http", "url(//", "url('", "http-equiv"):
        assert word not in source


def test_ids_of_the_figures_do_not_collide() -> None:
    page = Page(render_html(REPORT))
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_figures_follow_the_colour_scheme() -> None:
    source = render_html(REPORT)
    figures = source[source.index("<svg") :]
    assert "var(--accent)" in figures
    assert "#00000" not in figures


def test_hostile_names_are_shown_and_not_run() -> None:
    hostile = replace(
        REPORT,
        bundle=replace(REPORT.bundle, name=HOSTILE, recipe=HOSTILE),
        reference=replace(REPORT.reference, id=HOSTILE, dtype=HOSTILE),
        sizes=(replace(REPORT.sizes[0], kind=HOSTILE),),
        layers=(replace(REPORT.layers[0], name=HOSTILE), *REPORT.layers[1:]),
        environment=replace(REPORT.environment, command=HOSTILE),
        warnings=(HOSTILE,),
        notes=(HOSTILE,),
    )
    page = Page(render_html(hostile))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 7


def test_a_page_without_speeds_has_no_speed_figure() -> None:
    page = Page(render_html(replace(REPORT, speed=None)))
    assert page.tags.count("svg") == 4
    assert "Decode" not in page.text


def test_equal_reports_give_equal_pages() -> None:
    assert render_html(REPORT) == render_html(Report.from_json(REPORT.to_json()))
