"""A comparison as one HTML file: the table and two plots, each point labelled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uq.validate.compare import HEAD, HEAD_SPEED, Comparison, Entry, row
from uq.validate.html import environment
from uq.validate.plots import ACCENT, INK, NARROW, STYLE, as_svg, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TALL = 3.8  # inches


def render_comparison(comparison: Comparison) -> str:
    """A complete page that asks nobody for anything; equal for equal comparisons."""
    import matplotlib
    from markupsafe import Markup

    with matplotlib.rc_context(STYLE):
        plots = {"divergence": divergence_plot(comparison)}
        if any(entry.report.speed for entry in comparison.entries):
            plots["speed"] = speed_plot(comparison)
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            comparison=comparison,
            head=HEAD + HEAD_SPEED,
            rows=[row(entry) for entry in comparison.entries],
            plots={name: Markup(svg) for name, svg in plots.items()},
        )
    )


def divergence_plot(comparison: Comparison) -> str:
    """Mean KL divergence against bits per weight; whiskers of one standard error.

    The axis is logarithmic where the greatest is more than ten times the least.
    """
    from matplotlib.ticker import LogLocator

    figure, (axes,) = canvas(NARROW, TALL)
    points = [
        (entry, entry.report.kld.mean, (entry.report.kld.stderr, entry.report.kld.stderr))
        for entry in comparison.entries
    ]
    means = [value for _, value, _ in points]
    if 0 < 10 * min(means) < max(means):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_title("Mean KL divergence (nats)")
    _scatter(axes, points)
    return as_svg(figure, "divergence", _words("KL divergence", points))


def speed_plot(comparison: Comparison) -> str:
    """Decode speed against bits per weight; whiskers from the slowest run to the fastest."""
    figure, (axes,) = canvas(NARROW, TALL)
    points = [
        (entry, rate.median, (rate.median - rate.min, rate.max - rate.median))
        for entry in comparison.entries
        if entry.report.speed and (rate := entry.report.speed.decode_tps)
    ]
    axes.set_title("Decode (tokens/s)")
    _scatter(axes, points)
    axes.set_ylim(bottom=0)
    return as_svg(figure, "speed", _words("Decode tokens/s", points))


Point = tuple[Entry, float, tuple[float, float]]


def _scatter(axes: Axes, points: list[Point]) -> None:
    """Points with whiskers; labels beside them, above and below in turn, from left to right."""
    axes.set_xlabel("bits per weight")
    axes.margins(0.25, 0.2)
    ordered = sorted(points, key=lambda point: point[0].report.bundle.bits_per_weight)
    for number, (entry, value, (below, above)) in enumerate(ordered):
        bits = entry.report.bundle.bits_per_weight
        axes.errorbar(
            bits, value, [[below], [above]], fmt="o", color=ACCENT, ecolor=INK,
            elinewidth=1, capsize=2, markersize=5,
        )  # fmt: skip
        axes.annotate(
            entry.label,
            (bits, value),
            (5, -12 if number % 2 else 6),
            textcoords="offset points",
            fontsize=7,
        )


def _words(what: str, points: list[Point]) -> str:
    parts = (
        f"{entry.label} {value:.4g} at {entry.report.bundle.bits_per_weight:.2f} bits"
        for entry, value, _ in points
    )
    return f"{what} against bits per weight: " + "; ".join(parts)
