"""Reports of several bundles side by side."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uq.errors import BundleError
from uq.formats.hub_bundle import download_report
from uq.formats.manifest import MANIFEST
from uq.text import size, table
from uq.validate.files import load_report
from uq.validate.report import Report

HEAD = ("bundle", "bits/weight", "size", "KL divergence", "same top", "PPL ratio")
HEAD_SPEED = ("decode t/s", "prefill t/s", "device")


@dataclass(frozen=True)
class Entry:
    """One bundle's report under a label that no other entry has."""

    label: str
    report: Report


@dataclass(frozen=True)
class Comparison:
    """Entries by falling divergence; `warnings` say where figures cannot be compared."""

    entries: tuple[Entry, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        bundles = [{"label": e.label, "report": e.report.to_json()} for e in self.entries]
        return {"bundles": bundles, "warnings": list(self.warnings)}

    def __str__(self) -> str:
        """A table, and one line for each warning."""
        rows = [row(entry) for entry in self.entries]
        return "\n".join(
            [table(rows, head=HEAD + HEAD_SPEED), *(f"warning: {line}" for line in self.warnings)]
        )


def compare(bundles: Sequence[str | Path]) -> Comparison:
    """Put the reports of bundles (folders, or names on the Hub) side by side.

    Of a bundle on the Hub, the report and the manifest alone are downloaded.

    Raises:
        BundleError: a bundle has no report, a broken one, or one of other bytes.
        HubError: the Hub refused or could not be reached.
    """
    folders = [path if path.exists() else download_report(str(path)) for path in map(Path, bundles)]
    reports = [checked_report(folder) for folder in folders]
    names = [report.bundle.name for report in reports]
    count = Counter(names)
    labels = [
        name if count[name] == 1 else str(given) for name, given in zip(names, bundles, strict=True)
    ]
    if len(set(labels)) < len(labels):
        twice = next(label for label, times in Counter(labels).items() if times > 1)
        raise BundleError(f"{twice}: given twice; name each bundle once")
    entries = [Entry(label, report) for label, report in zip(labels, reports, strict=True)]
    entries.sort(key=lambda entry: -entry.report.kld.mean)
    return Comparison(tuple(entries), tuple(differences(entries)))


def checked_report(folder: Path) -> Report:
    """The report in a bundle's folder, which needs to hold the manifest alone beside it.

    Raises:
        BundleError: there is none, or the bundle's bytes are not those that it was made from.
    """
    report = load_report(folder)
    if hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() != report.bundle.sha256:
        raise BundleError(
            f"{folder}: its report belongs to other bytes; run uq validate {folder} again"
        )
    return report


def differences(entries: Sequence[Entry]) -> Iterator[str]:
    """One sentence for each circumstance in which the reports differ and that moves the figures."""
    facts: dict[str, Callable[[Report], object]] = {
        "references, so divergences and ratios cannot be compared": lambda r: (
            r.reference.id,
            r.reference.revision,
        ),
        "texts or windows, so divergences and ratios cannot be compared": lambda r: (
            r.text.sha256,
            r.text.format,
            r.text.context,
            r.text.tokens_scored,
        ),
        "devices, so speeds cannot be compared": lambda r: (r.device.backend, r.device.name),
        "contexts or batches, so speeds cannot be compared": lambda r: (
            r.speed and (r.speed.context, r.speed.batch)
        ),
    }
    for what, fact in facts.items():
        if len({fact(entry.report) for entry in entries}) > 1:
            yield f"the bundles were measured with different {what}"


def row(entry: Entry) -> tuple[str, ...]:
    """Cells of the terminal's table."""
    report, speed = entry.report, entry.report.speed
    return (
        entry.label,
        f"{report.bundle.bits_per_weight:.3f}",
        size(report.bundle.bytes),
        f"{report.kld.mean:.5f} ± {report.kld.stderr:.5f}",
        f"{report.same_top_percent:.2f} %",
        f"{report.perplexity_ratio.value:.4f} ± {report.perplexity_ratio.stderr:.4f}",
        f"{speed.decode_tps.median:.1f}" if speed else "",
        f"{speed.prefill_tps.median:.1f}" if speed else "",
        report.device.name,
    )
