"""Figures and tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"\d[\d,]*(\.\d+)?( \w+)?")


def size(nbytes: float) -> str:
    """`834 B`, `12.3 MiB`, `1.5 GiB`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    units = ["KiB", "MiB", "GiB"]
    while (nbytes := nbytes / 1024) >= 1000 and len(units) > 1:
        del units[0]
    return f"{nbytes:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `1 h 20 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def table(rows: Iterable[Sequence[object]], *, head: Sequence[str] = ()) -> str:
    """Columns as wide as their widest cell; those of numbers are right-aligned."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    lines = [list(head), *cells] if head else cells
    numeric = [all(map(_is_number, column[bool(head) :])) for column in zip(*lines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return not cell or NUMBER.fullmatch(cell) is not None
