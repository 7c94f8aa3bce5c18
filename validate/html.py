"""The report as one HTML file that asks nobody for anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from uq.text import size
from uq.validate.plots import error_range, figures
from uq.validate.report import Report

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class Tile:
    """One headline figure: `value` large, `unit` behind it, `note` below."""

    label: str
    value: str
    unit: str
    note: str


def render_html(report: Report, drawn: dict[str, str] | None = None) -> str:
    """A complete page: styles and figures inline, every value escaped, equal for equal reports.

    Args:
        drawn: what `figures(report)` gave, where it was called already.
    """
    from markupsafe import Markup

    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            tiles=tiles(report),
            figures={name: Markup(svg) for name, svg in (drawn or figures(report)).items()},
            errors=[f"{100 * bound:.1f} %" for bound in error_range(report)],
            provenance=provenance(report),
            missed=[limit for limit in report.thresholds if not limit.passed],
        )
    )


def environment() -> jinja2.Environment:
    """Templates of this folder, every value escaped, every name known."""
    import jinja2

    loader = jinja2.PackageLoader("uq.validate", "")
    page = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page.filters["size"] = size
    return page


def tiles(report: Report) -> list[Tile]:
    """The six figures at the head of the page."""
    kld, ratio = report.kld, report.perplexity_ratio
    bf16 = 2 * sum(kind.weights for kind in report.sizes)
    weights = sum(kind.bytes for kind in report.sizes)
    folder = f"weights {size(weights)}, {bf16 / weights:.1f} × smaller than in bf16"
    compared = f"{report.perplexity.value:.3f} against {report.reference_perplexity.value:.3f}"
    value, unit = size(report.bundle.bytes).split()
    bits = f"{report.bundle.bits_per_weight:.2f}"
    return [
        Tile("KL divergence", f"{kld.mean:.4f}", "nats", f"± {kld.stderr:.4f}, mean per token"),
        Tile("Same top token", f"{report.same_top_percent:.2f}", "%", "as the reference"),
        Tile("Perplexity ratio", f"{ratio.value:.4f}", f"± {ratio.stderr:.4f}", compared),
        _speed_tile(report),
        Tile("Size", value, unit, folder),
        Tile("Bits per weight", bits, "", "scales and embedding included"),
    ]


def _speed_tile(report: Report) -> Tile:
    """Decode speed, or the memory of the process where no speed was measured."""
    ours, truth = report.speed, report.reference_speed
    if ours is None:
        value, unit = size(report.memory.bundle_peak_bytes).split()
        return Tile("Peak memory", value, unit, "before the reference was opened")
    note = f"{ours.decode_tps.median / ours.decode_ceiling_tps:.0%} of the memory ceiling"
    if truth is not None:
        factor = ours.decode_tps.median / truth.decode_tps.median
        note = f"{factor:.1f} × the float32 reference, {note}"
    return Tile("Decode", f"{ours.decode_tps.median:.1f}", "tokens/s", note)


def provenance(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (name, value) rows of the table that says where every figure comes from."""
    text, where, reference = report.text, report.environment, report.reference_device
    return {
        "Models": [
            ("bundle", report.bundle.name),
            ("recipe", report.bundle.recipe),
            ("manifest sha256", report.bundle.sha256),
            ("reference", report.reference.id),
            ("revision", report.reference.revision or "none"),
            ("stored as", f"{report.reference.dtype}, run in float32"),
        ],
        "Text": [
            ("name", text.name),
            ("sha256", text.sha256),
            ("chunks", f"{text.chunks} of {text.context} tokens"),
            ("tokens scored", f"{text.tokens_scored:,}"),
        ],
        "Device": [
            ("backend", report.device.backend),
            ("device", report.device.name),
            ("driver", report.device.driver),
            ("features", ", ".join(report.device.features) or "none"),
            *[("attention", str(place)) for place in report.device.attention],
            ("reference ran on", f"{reference.name}, {reference.driver}"),
        ],
        "Measurement": _measurement(report),
        "Run": [
            ("command", where.command),
            ("date", where.date),
            ("uq", report.uq),
            ("python, numpy, numba", f"{where.python}, {where.numpy}, {where.numba}"),
            ("system", where.system),
        ],
    }


def _measurement(report: Report) -> list[tuple[str, str]]:
    speed, cache = report.speed, report.environment.last_level_cache_bytes
    rows = [
        ("threads", str(report.environment.threads)),
        ("last-level cache", size(cache) if cache else "unknown"),
        ("peak memory, whole process", size(report.memory.peak_bytes)),
        ("peak before the reference was opened", size(report.memory.bundle_peak_bytes)),
    ]
    if speed is None:
        return rows
    return [
        *rows,
        ("batch, context", f"{speed.batch}, {speed.context} tokens"),
        ("decoded", f"{speed.generated} tokens, {speed.repeats} times behind one warm-up"),
        ("bytes per token", size(speed.bytes_per_token)),
        ("read bandwidth", f"{speed.bandwidth_gb_s:.1f} GB/s, measured in this run"),
    ]
