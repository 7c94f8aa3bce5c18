"""The report in the folder of its bundle, outside the set of files that the manifest hashes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from uq.errors import BundleError, UsageError
from uq.formats.decode import parse_json
from uq.validate.html import render_html
from uq.validate.report import JSON_NAME, Report

HTML_NAME = "report.html"


def save_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into `folder`, each by one rename."""
    page = render_html(report)  # before anything is replaced
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    _replace(folder / JSON_NAME, text + "\n")
    _replace(folder / HTML_NAME, page)


def require_savable(folder: Path) -> None:
    """Refuse before a long computation what `save_report` would fail at behind it.

    Raises:
        UsageError: the folder cannot be written into.
        ModuleNotFoundError: what draws the plots is not installed.
    """
    import matplotlib  # noqa: F401

    if not os.access(folder, os.W_OK):
        raise UsageError(
            f"{folder}: no report can be written there; make it writable, or add --no-save"
        )


def load_report(folder: Path) -> Report:
    """Read the report that `save_report` left in a bundle's folder.

    Raises:
        BundleError: there is none, it is broken, or another version of uq wrote it.
    """
    path = folder / JSON_NAME
    if not path.is_file():
        raise BundleError(f"{path}: no report; run uq validate {folder} first")
    try:
        return Report.from_json(parse_json(path.read_bytes(), str(path)))
    except BundleError as error:
        raise BundleError(
            f"{error} (another version of uq wrote it, or it is damaged); "
            f"run uq validate {folder} again"
        ) from None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
