"""Results as Markdown, and the Markdown between the markers of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.quality.results import DrawResult, Results, RowResult, TextScores
from uq.errors import UsageError

BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
Number = Callable[[DrawResult], float]


def markdown(results: Results) -> str:
    """All tables of one run."""
    measured = [row for row in results.rows if row.draws]
    names = [text.name for text in results.texts]
    parts = [_preface(results), "### Mean KL divergence", _losses(measured, names)]
    for name in names:
        if rows := [row for row in measured if _scores(row, name)]:
            parts += [f"### {name}", _text(rows, name)]
    if base := next((row for row in measured if row.name == results.against), None):
        title = f"### KL minus that of {base.name}, window by window"
        parts += [title, _differences(measured, base, names)]
    parts += ["### Cost and grids", _costs(measured)]
    if skipped := [row for row in results.rows if not row.draws]:
        parts += ["### Not run", "\n".join(f"- {row.name}: {row.not_run}" for row in skipped)]
    return "\n\n".join(parts) + "\n"


def splice(page: Path, content: str) -> None:
    """Replace what stands between the markers of a page.

    Raises:
        UsageError: the page has no such markers.
    """
    text = page.read_text("utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{page}: has no lines {BEGIN} and {END} to write the tables between")
    page.write_text(f"{before}{BEGIN}\n{content}{END}{after}", "utf-8")


def _preface(results: Results) -> str:
    texts = ", ".join(f"{text.name} ({text.windows} windows)" for text in results.texts)
    return (
        f"Measured on {results.date}, {results.machine}, uq {results.uq}. Reference: "
        f"{results.reference} in float16. Windows of {results.context} tokens: {texts}. "
        f"Calibrated rows: {results.calibration_tokens:,} tokens, mean of up to "
        f"{results.draws} draws (smallest to largest)."
    )


def _losses(rows: Sequence[RowResult], texts: Sequence[str]) -> str:
    def cells(row: RowResult) -> list[str]:
        return [
            row.name,
            _mean(row, lambda draw: draw.sizes.body_bits, ".3f"),
            _mean(row, lambda draw: draw.sizes.bits, ".3f"),
            _mean(row, lambda draw: draw.sizes.nbytes / 1e6, ".1f") + _computed(row),
            *(_kld(row, name) for name in texts),
        ]

    head = ["row", "bits, linears", "bits, all", "MB", *(f"KL {name}" for name in texts)]
    return _table(head, [cells(row) for row in rows])


def _text(rows: Sequence[RowResult], name: str) -> str:
    def cells(row: RowResult) -> list[str]:
        scores = _scores(row, name)
        error = max(text.perplexity_ratio.stderr for text in scores)
        return [
            row.name,
            _kld(row, name),
            format(fmean(text.kld_p99_9 for text in scores), ".3f"),
            format(fmean(text.same_top_percent.value for text in scores), ".2f"),
            format(fmean(text.perplexity_ratio.value for text in scores), ".4f")
            + f" ± {error:.4f}",
        ]

    head = ["row", "KL", "KL, 99.9 %", "same top, %", "perplexity ratio"]
    return _table(head, [cells(row) for row in rows])


def _differences(rows: Sequence[RowResult], base: RowResult, texts: Sequence[str]) -> str:
    others = [row for row in rows if row is not base]
    lines = [[row.name, *(_difference(row, base, name) for name in texts)] for row in others]
    return _table(["row", *texts], lines)


def _difference(row: RowResult, base: RowResult, name: str) -> str:
    """Mean and standard error over the windows, and in how many of them the row loses less."""
    if not (_scores(row, name) and _scores(base, name)):
        return "not run"
    gaps = [a - b for a, b in zip(_windows(row, name), _windows(base, name), strict=True)]
    error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    wins = sum(gap < 0 for gap in gaps)
    return f"{fmean(gaps):+.4f} ± {error:.4f}, lower in {wins} of {len(gaps)}"


def _windows(row: RowResult, name: str) -> list[float]:
    """KL of each window, the mean of the draws."""
    draws = (text.kld_windows for text in _scores(row, name))
    return [fmean(values) for values in zip(*draws, strict=True)]


def _costs(rows: Sequence[RowResult]) -> str:
    def cells(row: RowResult) -> list[str]:
        sizes = row.draws[0].sizes
        return [
            row.name,
            _mean(row, lambda draw: draw.cost.seconds / 60, ".2f"),
            _mean(row, lambda draw: draw.cost.peak_bytes / 2**20, ".0f"),
            sizes.body,
            sizes.embedding,
            row.draws[0].cost.machine,
        ]

    head = ["row", "minutes", "peak MiB", "linears", "embedding and head", "machine"]
    return _table(head, [cells(row) for row in rows])


def _kld(row: RowResult, name: str) -> str:
    """Mean KL; the error is the largest of the draws', the spread that between them."""
    scores = _scores(row, name)
    if not scores:
        return "not run"
    values = [text.kld.value for text in scores]
    digits = _digits(fmean(values))

    def nats(value: float) -> str:
        return format(value, f".{digits}f")

    error = max(text.kld.stderr for text in scores)
    spread = f" ({nats(min(values))} to {nats(max(values))})" if len(values) > 1 else ""
    return f"{nats(fmean(values))} ± {nats(error)}{spread}"


def _digits(value: float) -> int:
    """Decimals: four, or as many as show two figures of a small value."""
    return max(4, 1 - math.floor(math.log10(value))) if value > 0 else 4


def _scores(row: RowResult, name: str) -> list[TextScores]:
    """Of every draw for which the text was scored."""
    return [draw.texts[name] for draw in row.draws if name in draw.texts]


def _mean(row: RowResult, number: Number, form: str) -> str:
    return format(fmean(number(draw) for draw in row.draws), form)


def _computed(row: RowResult) -> str:
    return " (computed)" if row.draws[0].sizes.computed else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
