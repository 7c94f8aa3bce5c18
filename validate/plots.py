"""The figures of the HTML report as inline SVG whose colours follow the page's CSS variables."""

from __future__ import annotations

import re
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

from uq.text import size
from uq.validate.report import KindSize, Report, Speed, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stand for CSS variables: matplotlib writes them as they are, `_themed` replaces them.
VARIABLES = {
    "#000001": "--ink",
    "#000002": "--muted",
    "#000003": "--line",
    "#000004": "--accent",
    "#000005": "--second",
    "#000006": "--kind-1",
    "#000007": "--kind-2",
    "#000008": "--kind-3",
    "#000009": "--kind-4",
    "#00000a": "--kind-5",
    "#00000b": "--kind-6",
    "#00000c": "--kind-7",
    "#00000d": "--kind-8",
}
LIGHT = {  # as the page has them
    "--ink": "#1b1d22",
    "--muted": "#666b76",
    "--line": "#e3e3df",
    "--accent": "#2b5fd9",
    "--second": "#d9822b",
    "--kind-1": "#2b5fd9",
    "--kind-2": "#1f9e89",
    "--kind-3": "#d9a22b",
    "--kind-4": "#8a5bc7",
    "--kind-5": "#8b919c",
    "--kind-6": "#c7533f",
    "--kind-7": "#5b8a3a",
    "--kind-8": "#c75b9b",
}
INK, MUTED, LINE, ACCENT, SECOND, *KINDS = VARIABLES
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, in the page's font
    "svg.hashsalt": "uq",
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a name is a "$"
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.4,
}
NARROW, WIDE = 4.9, 10.0  # inches: one column of the page, both columns
CELL_LABELS = 28  # layers up to which a heat map cell has room for its figure


def figures(report: Report) -> dict[str, str]:
    """Name -> SVG element, deterministic for equal reports."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = {
            "kld": _kld(report),
            "perplexity": _perplexity(report),
            "errors": _errors(report),
            "sizes": _sizes(report),
        }
        if report.speed is not None:
            drawn["speed"] = _speed(report.speed, report.reference_speed)
        return drawn


def _kld(report: Report) -> str:
    """Share of tokens beyond a divergence: both axes logarithmic, since the tail is the point."""
    figure, (axes,) = canvas(NARROW, 3.1)
    curve, kld = report.series.kld_survival, report.kld
    visible = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if x > 0 and y > 0]
    xs, ys = [x for x, _ in visible], [y for _, y in visible]
    axes.set(xscale="log", yscale="log", xlabel="KL divergence of a token (nats)")
    axes.set_title("Share of tokens beyond it")
    axes.plot(xs, ys, color=ACCENT)
    axes.fill_between(xs, ys, min(ys, default=1), color=ACCENT, alpha=0.12, linewidth=0)
    for share, value, label in (
        (0.5, kld.median, "median"),
        (0.01, kld.p99, "p99"),
        (0.001, kld.p99_9, "p99.9"),
    ):
        if value > 0 and share >= curve.y[-1]:  # fewer tokens have no such quantile
            axes.plot(value, share, "o", color=ACCENT, markersize=4)
            axes.annotate(
                f"{label} {value:.3g}", (value, share), (6, 4), textcoords="offset points"
            )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    lowest = max(kld.median / 300, min(xs, default=1e-6))
    axes.set_xlim(lowest, max(kld.max, 2 * lowest) * 4)
    words = (
        f"Survival curve of the KL divergence: median {kld.median:.3g}, 99th percentile "
        f"{kld.p99:.3g}, 99.9th {kld.p99_9:.3g}, maximum {kld.max:.3g} nats"
    )
    return as_svg(figure, "kld", words)


def _perplexity(report: Report) -> str:
    """Per chunk: both perplexities above, their quotient below, where the difference is seen."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure, (above, below) = canvas(NARROW, 3.1, rows=2, heights=(3, 2), sharex=True)
    ours, truth = report.series.perplexity, report.series.reference_perplexity
    chunk = range(1, len(ours) + 1)
    above.plot(chunk, truth, color=SECOND, linewidth=2.4, label="reference")
    above.plot(chunk, ours, color=ACCENT, linewidth=1, label="bundle")
    above.set(yscale="log")
    above.set_title("Perplexity")
    above.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2, borderpad=0)
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter("{x:g}")
    above.yaxis.set_minor_formatter("")
    change = [100 * (a / b - 1) for a, b in zip(ours, truth, strict=True)]
    below.bar(chunk, change, color=ACCENT, width=0.8 if len(ours) < 80 else 1.0)
    below.axhline(0, color=MUTED, linewidth=0.6)
    below.set_title("Change against the reference (%)")
    below.set(xlim=(0.3, len(ours) + 0.7), xlabel=f"chunk of {report.text.context} tokens")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    words = (
        f"Perplexity of {len(ours)} chunks: bundle {report.perplexity.value:.2f} and reference "
        f"{report.reference_perplexity.value:.2f} over all"
    )
    return as_svg(figure, "perplexity", words)


def _errors(report: Report) -> str:
    """Heat map: one row per role, one column per layer."""
    cells = error_cells(report)
    roles, layers = list(cells), len(next(iter(cells.values()), ()))
    figure, (axes,) = canvas(WIDE, 0.75 + 0.24 * len(roles))
    least, most = error_range(report)
    for line, row in enumerate(cells.values()):
        for layer, error in enumerate(row):
            if error is not None:
                level = (error - least) / (most - least) if most > least else 0.0
                _cell(axes, layer, line, error, level, layers)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(len(roles) - 0.5, -0.5), xlabel="layer")
    axes.set_yticks(range(len(roles)), [role.rpartition(".")[2] for role in roles])
    axes.set_xticks(range(0, layers, 1 if layers <= CELL_LABELS else 4))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    words = f"Relative weight error by layer and role: {100 * least:.1f} to {100 * most:.1f} %"
    return as_svg(figure, "errors", words)


def _cell(axes: Axes, layer: int, line: int, error: float, level: float, layers: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (layer - 0.47, line - 0.44)
    axes.add_patch(Rectangle(corner, 0.94, 0.88, color=ACCENT, alpha=0.04 + 0.51 * level, lw=0))
    if layers <= CELL_LABELS:
        label = f"{100 * error:.1f}"
        axes.text(layer, line, label, ha="center", va="center", fontsize=7)


def error_cells(report: Report) -> dict[str, list[float | None]]:
    """Role -> relative error per layer, None where a layer has no such quantized tensor."""
    found: dict[str, dict[int, float]] = {}
    for tensor in report.layers:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", tensor.name)
        if match:
            found.setdefault(match[2], {})[int(match[1])] = tensor.relative_error
    layers = 1 + max((layer for row in found.values() for layer in row), default=-1)
    return {role: [row.get(layer) for layer in range(layers)] for role, row in found.items()}


def error_range(report: Report) -> tuple[float, float]:
    """Least and greatest error in the cells; zeros when there are none."""
    errors = [e for row in error_cells(report).values() for e in row if e is not None]
    return min(errors, default=0.0), max(errors, default=0.0)


def _sizes(report: Report) -> str:
    """One stacked bar each: the bundle, the reference as stored, the same weights in bf16."""
    figure, (axes,) = canvas(NARROW, 2.3)
    rows = {
        "bundle": [kind.bytes for kind in report.sizes],
        f"reference\n({report.reference.dtype})": [kind.reference_bytes for kind in report.sizes],
    }
    if report.reference.dtype != "bf16":
        rows["same weights\nin bf16"] = [2 * kind.weights for kind in report.sizes]
    for line, parts in enumerate(rows.values()):
        _stack(axes, line, parts, report.sizes if line == 0 else ())
        end = (sum(parts) / 2**20, line)
        axes.annotate(size(sum(parts)), end, (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel="MiB", xlim=(0, 1.18 * max(map(sum, rows.values())) / 2**20))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        ncols=len(report.sizes),
        borderpad=0,
        handlelength=0.9,
        columnspacing=1.2,
    )
    words = "Bytes by kind of tensor: " + "; ".join(
        f"{name.replace(chr(10), ' ')} {size(sum(parts))}" for name, parts in rows.items()
    )
    return as_svg(figure, "sizes", words)


def _stack(axes: Axes, line: int, parts: list[int], kinds: tuple[KindSize, ...]) -> None:
    left = 0.0
    for index, part in enumerate(parts):
        label = kinds[index].kind if kinds else None
        width = part / 2**20
        axes.barh(line, width, 0.62, left, color=KINDS[index % len(KINDS)], label=label)
        left += width


def _speed(ours: Speed, truth: Speed | None) -> str:
    """Decode beside its ceiling, and prefill: medians, with whiskers from slowest to fastest."""
    figure, (decode, prefill) = canvas(NARROW, 2.3, columns=2)
    speeds = {"bundle": ours} if truth is None else {"bundle": ours, "reference": truth}
    widest = max(speed.decode_ceiling_tps for speed in speeds.values())
    for line, (speed, colour) in enumerate(zip(speeds.values(), (ACCENT, SECOND), strict=False)):
        _rate(decode, line, speed.decode_tps, colour)
        _ceiling(decode, line, speed.decode_ceiling_tps, widest)
        _rate(prefill, line, speed.prefill_tps, colour)
    decode.set_title("Decode (tokens/s)")
    prefill.set_title("Prefill (tokens/s)")
    lines = range(len(speeds))
    names = [f"{name}\n{speed.decode_tps.median:.1f}" for name, speed in speeds.items()]
    decode.set_yticks(lines, names)
    prefill.set_yticks(lines, [f"{speed.prefill_tps.median:.1f}" for speed in speeds.values()])
    for axes in (decode, prefill):
        axes.set_ylim(len(speeds) - 0.6, -0.65)
        axes.set_xlim(0, 1.08 * axes.dataLim.xmax)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=4)
    words = "; ".join(
        f"{name} decode {speed.decode_tps.median:.1f}, prefill {speed.prefill_tps.median:.1f}"
        for name, speed in speeds.items()
    )
    return as_svg(figure, "speed", f"Tokens per second, median: {words}")


def _rate(axes: Axes, line: int, rate: Spread, colour: str) -> None:
    whisker = [[rate.median - rate.min], [rate.max - rate.median]]
    axes.barh(line, rate.median, 0.46, color=colour)
    axes.errorbar(rate.median, line, xerr=whisker, color=INK, linewidth=1, capsize=2)


def _ceiling(axes: Axes, line: int, tps: float, widest: float) -> None:
    axes.plot([tps, tps], [line - 0.3, line + 0.3], color=INK, linewidth=1.2, ls=(0, (2, 1)))
    side = "left" if tps < widest / 2 else "right"
    axes.text(tps, line - 0.33, f"ceiling {tps:.0f}", va="bottom", ha=side, color=MUTED)


def canvas(
    width: float,
    height: float,
    *,
    rows: int = 1,
    columns: int = 1,
    heights: tuple[int, ...] | None = None,
    sharex: bool = False,
) -> tuple[Figure, tuple[Axes, ...]]:
    """A figure of `width` x `height` inches and its axes, row by row; within `STYLE`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, sharex=sharex)
    return figure, tuple(grid.flat)


def as_svg(figure: Figure, name: str, words: str) -> str:
    """The figure as an element: CSS colours, ids of its own, `words` for who cannot see it."""
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    opening = f'<svg role="img" aria-label="{escape(words)}"'
    return opening + _themed(text).removeprefix("<svg")


def standalone(svg: str) -> str:
    """A figure as a file of its own: the colours of the page's light theme, on white."""
    for variable, colour in LIGHT.items():
        svg = svg.replace(f"var({variable})", colour)
    svg = svg.replace("inherit", "sans-serif")
    return svg.replace("<svg", '<svg style="background: #ffffff"', 1)


def _themed(svg: str) -> str:
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("'sans-serif'", "inherit").replace("sans-serif", "inherit")
