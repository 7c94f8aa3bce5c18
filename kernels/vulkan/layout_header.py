"""`layouts.glsl`: the sizes and offsets of the `igpu` tile, read off the layout's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from uq.formats.layouts import LAYOUTS, LaneLayout
from uq.formats.spec import BITS, GROUPS, SCALE_BITS, Spec

NAME = "layouts.glsl"


def layout_header() -> str:
    """The text of `layouts.glsl`, deterministic.

    Each macro takes (bits, group, scale_bits), which may be specialization constants: `TILE_BYTES`,
    one `*_OFFSET` for every plane of the tile, in bytes from the tile's start, and `STEPS_BYTES`,
    which the steps of a row block take behind its tiles.
    """
    layout = LAYOUTS["igpu"]
    assert isinstance(layout, LaneLayout)
    planes = dict.fromkeys(name for spec in _specs() for name in _tile(layout, spec).names or ())
    lines = [
        "#ifndef LAYOUTS_GLSL",
        "#define LAYOUTS_GLSL",
        "// Generated from formats/layouts.py.",
        f"#define TILE_ROWS {layout.rows}u",
        f"#define TILE_COLS {layout.cols}u",
        _macro("TILE_BYTES", lambda spec: _tile(layout, spec).itemsize),
        _macro("STEPS_BYTES", partial(_steps, layout)),
    ]
    lines += [
        _macro(f"{plane.upper()}_OFFSET", partial(_offset, layout, plane)) for plane in planes
    ]
    return "\n".join([*lines, "#endif", ""])


def _specs() -> list[Spec]:
    return [
        Spec(bits, group, scale_bits=scale_bits)
        for bits in BITS
        for group in GROUPS
        for scale_bits in SCALE_BITS
    ]


def _tile(layout: LaneLayout, spec: Spec) -> np.dtype[np.void]:
    """One tile as a packed structure of planes."""
    fields = layout.block(layout.cols, spec).fields
    assert fields is not None
    return fields["tiles"][0].base


def _steps(layout: LaneLayout, spec: Spec) -> int:
    return layout.block(layout.cols, spec).itemsize - _tile(layout, spec).itemsize


def _offset(layout: LaneLayout, plane: str, spec: Spec) -> int:
    fields = _tile(layout, spec).fields
    assert fields is not None
    return int(fields[plane][1]) if plane in fields else 0


def _macro(name: str, value: Callable[[Spec], int]) -> str:
    """`#define name(bits, group, scale_bits)`: a chain of choices that ends with the last value."""
    *first, last = _specs()
    choices = "".join(
        f"(bits) == {spec.bits} && (group) == {spec.group} && (scale_bits) == {spec.scale_bits} "
        f"? {value(spec)}u : "
        for spec in first
    )
    return f"#define {name}(bits, group, scale_bits) ({choices}{value(last)}u)"
