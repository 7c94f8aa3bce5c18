"""The grids that a recipe of several may choose from."""

from __future__ import annotations

from dataclasses import replace

from uq.formats.spec import SPECS, Spec

# Scales of 8 bits lose nearly nothing; INT8 loses so little that its smallest form serves.
CANDIDATES = tuple(
    replace(spec, scale_bits=8)
    for spec in SPECS
    if spec.bits < 6 or (not spec.zero_point and spec.bits == 6)
) + (Spec(8, 64, scale_bits=8),)


def candidates(cols: int) -> list[Spec]:
    """Grids that fit the columns of a tensor."""
    return [spec for spec in CANDIDATES if cols % spec.group == 0]
