"""The report for a terminal: plain text, at most 100 columns."""

from __future__ import annotations

import os
from typing import TextIO

from uq.text import size, table
from uq.validate.report import Loss, Report, Speed, Spread, Threshold

WIDTH = 100
GREEN, RED, YELLOW, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[0m"


def format_report(report: Report, *, colour: bool = False) -> str:
    """Headline figures, speeds and limits as aligned text without a final line feed."""
    sections = [_head(report), _figures(report)]
    if report.losses:
        sections.append(_losses(report.losses))
    if report.thresholds:
        sections.append(_limits(report.thresholds, colour))
    if report.warnings:
        lines = [f"warning: {line}" for line in report.warnings]
        sections.append("\n".join(_paint(line, YELLOW, colour) for line in lines))
    if report.notes:
        sections.append("\n".join(f"note: {line}" for line in report.notes))
    return "\n\n".join(sections)


def wants_colour(stream: TextIO) -> bool:
    """On a terminal, unless `NO_COLOR` is set to anything (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def _head(report: Report) -> str:
    text = report.text
    return "\n".join(
        _shorten(line)
        for line in (
            f"{report.bundle.name} ({report.bundle.recipe}) on {report.device.name}",
            f"against {report.reference.id} ({report.reference.dtype}) in float32",
            f"over {text.tokens_scored:,} tokens of {text.name}: {text.chunks} chunks "
            f"of {text.context}{', as chats' if text.format == 'chat' else ''}",
            *map(str, report.device.attention),
        )
    )


def _figures(report: Report) -> str:
    kld, ratio = report.kld, report.perplexity_ratio
    rows = [
        ("KL divergence", f"{kld.mean:.5f} ± {kld.stderr:.5f} nats", _quantiles(report)),
        ("same top token", f"{report.same_top_percent:.2f} %", ""),
        ("RMS of Δp", f"{report.rms_delta_p_percent:.2f} %", ""),
        ("perplexity ratio", f"{ratio.value:.4f} ± {ratio.stderr:.4f}", _perplexities(report)),
        ("size", size(report.bundle.bytes), f"{report.bundle.bits_per_weight:.3f} bits per weight"),
    ]
    for name, speed in (("", report.speed), (" of the reference", report.reference_speed)):
        if speed is not None:
            rows += _speed_rows(name, speed)
    memory = report.memory
    alone = f"{size(memory.bundle_peak_bytes)} before the reference was opened"
    rows.append(("peak memory, whole process", size(memory.peak_bytes), alone))
    return table(rows)


def _losses(losses: tuple[Loss, ...]) -> str:
    rows = [
        (
            loss.name,
            f"{loss.kld.value:.5f} ± {loss.kld.stderr:.5f}",
            f"{loss.same_top_percent:.2f} %",
            f"{loss.perplexity_ratio.value:.4f} ± {loss.perplexity_ratio.stderr:.4f}",
        )
        for loss in losses
    ]
    head = ("loss of", "KL divergence", "same top token", "perplexity ratio")
    note = "integers emulated on the float32 reference; says nothing of a device's speed"
    return f"{table(rows, head=head)}\n{note}"


def _quantiles(report: Report) -> str:
    kld = report.kld
    return f"median {kld.median:.4f}, p99 {kld.p99:.3f}, p99.9 {kld.p99_9:.3f}, max {kld.max:.2f}"


def _perplexities(report: Report) -> str:
    ours, truth = report.perplexity, report.reference_perplexity
    return f"{ours.value:.3f} ± {ours.stderr:.3f} against {truth.value:.3f} ± {truth.stderr:.3f}"


def _speed_rows(name: str, speed: Speed) -> list[tuple[str, str, str]]:
    ceiling = f", ceiling {speed.decode_ceiling_tps:.1f} at {speed.bandwidth_gb_s:.1f} GB/s"
    return [
        (f"prefill{name}", _median(speed.prefill_tps), _range(speed.prefill_tps)),
        (f"decode{name}", _median(speed.decode_tps), _range(speed.decode_tps) + ceiling),
    ]


def _median(rate: Spread) -> str:
    return f"{rate.median:.1f} tokens/s"


def _range(rate: Spread) -> str:
    return f"{rate.min:.1f} to {rate.max:.1f}"


def _limits(thresholds: tuple[Threshold, ...], colour: bool) -> str:
    rows = [
        ("PASS" if limit.passed else "MISS", limit.option, f"{limit.value:.5g}", f"{limit.limit:g}")
        for limit in thresholds
    ]
    head, *lines = table(rows, head=("", "limit", "measured", "allowed")).splitlines()
    painted = [
        _paint(line, GREEN if limit.passed else RED, colour)
        for line, limit in zip(lines, thresholds, strict=True)
    ]
    return "\n".join([head, *painted])


def _shorten(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _paint(text: str, colour: str, wanted: bool) -> str:
    return f"{colour}{text}{PLAIN}" if wanted else text
