"""Address patterns: what a buffer descriptor, a FIFO layout and a transfer have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from xdsl.dialects.builtin import IntegerAttr, MemRefType
from xdsl.ir import Attribute, Operation, SSAValue

from uq.kernels.npu.dialect.attributes import Dimension, Direction, Padding
from uq.kernels.npu.dialect.dma import DmaBd
from uq.kernels.npu.dialect.sequence import DYNAMIC, MemcpyNd
from uq.kernels.npu.dialect.structure import Mem, MemTileDma, ShimDma
from uq.kernels.npu.dialect.tasks import ConfigureTask, ConfigureTaskFor
from uq.kernels.npu.dialect.text import flat, integer, memref_type
from uq.kernels.npu.model import Design, element_bits, elements, place_of
from uq.kernels.npu.resources import shim_of
from uq.kernels.npu.target import Kind, Place


@dataclass(frozen=True)
class Pattern:
    """One walk through a buffer, in elements of it.

    Attributes:
        dimensions: slowest first; empty for a linear walk of `length` elements.
        iteration: the dimension that repeats the whole walk, if the descriptor has one.
    """

    op: Operation
    place: Place
    kind: Kind
    buffer: MemRefType
    offset: int
    length: int
    dimensions: tuple[Dimension, ...]
    iteration: Dimension | None = None
    pads: tuple[Padding, ...] = ()
    direction: Direction | None = None

    @property
    def bits(self) -> int:
        return element_bits(self.buffer)

    @property
    def last(self) -> int:
        """The furthest element touched, from the start of the buffer."""
        walk = [*self.dimensions, *([self.iteration] if self.iteration else [])]
        if not self.dimensions:
            walk.append(Dimension(self.length, 1))
        return self.offset + sum(max(size - 1, 0) * stride for size, stride in walk)

    @property
    def linear(self) -> bool:
        """One contiguous run, whatever the number of dimensions it is written in."""
        steps = [dimension for dimension in self.dimensions if dimension.size > 1]
        return not steps or (len(steps) == 1 and steps[0] == (self.dimensions[-1].size, 1))


def patterns(design: Design) -> Iterator[Pattern]:
    """Every pattern of the design whose tile exists."""
    yield from _layouts(design)
    for op in design.ops(DmaBd):
        if (pattern := _descriptor(design, op)) is not None:
            yield pattern
    for copy in design.ops(MemcpyNd):
        if (pattern := transfer(design, copy)) is not None:
            yield pattern


def _layouts(design: Design) -> Iterator[Pattern]:
    for fifo in design.fifos.values():
        for end in (fifo.producer, *fifo.consumers):
            kind, layout = design.kind(end), fifo.layout(end).data
            if kind is not None and end is not None and layout:
                count = elements(fifo.element)
                yield Pattern(fifo.op, end, kind, fifo.element, 0, count, layout)


def _descriptor(design: Design, op: DmaBd) -> Pattern | None:
    place, kind = owner(design, op), design.kind(owner(design, op))
    if place is None or kind is None:
        return None
    layout = op.dimensions.data if op.dimensions else ()
    iteration = None
    if kind is Kind.SHIM and len(layout) == 4:
        iteration, layout = layout[0], layout[1:]
    length = integer(op.len)
    return Pattern(
        op,
        place,
        kind,
        memref_type(op.buffer),
        integer(op.offset) or 0,
        elements(memref_type(op.buffer)) if length is None else length,
        layout,
        iteration,
        op.pad_dimensions.data if op.pad_dimensions else (),
    )


def transfer(design: Design, op: MemcpyNd) -> Pattern | None:
    """None for an unknown FIFO, or for a list whose values are known at run time only."""
    place = shim_of(design, flat(op.metadata))
    lists = list_values(op)
    if place is None or lists is None or design.kind(place) is not Kind.SHIM:
        return None
    offsets, sizes, strides = lists
    walk = [Dimension(*pair) for pair in zip(sizes, strides, strict=True)]
    offset = sum(start * stride for start, stride in zip(offsets, strides, strict=True))
    length = prod(sizes[1:])
    kind = memref_type(op.memref)
    return Pattern(op, place, Kind.SHIM, kind, offset, length, tuple(walk[1:]), walk[0])


def list_values(op: MemcpyNd) -> tuple[list[int], list[int], list[int]] | None:
    """Offsets, sizes and strides, four each; operands count when they are constants."""
    dynamic = iter(op.dynamic)
    lists: list[list[int]] = []
    for attribute in (op.static_offsets, op.static_sizes, op.static_strides):
        values = [
            _constant(next(dynamic, None)) if value == DYNAMIC else int(value)
            for value in attribute.get_values()
        ]
        known = [value for value in values if value is not None]
        if len(values) != 4 or len(known) != 4:
            return None
        lists.append(known)
    return lists[0], lists[1], lists[2]


def _constant(value: SSAValue | None) -> int | None:
    owner = value.owner if value is not None else None
    attribute: Attribute | None = getattr(owner, "value", None)
    return attribute.value.data if isinstance(attribute, IntegerAttr) else None


def owner(design: Design, op: Operation) -> Place | None:
    """The tile whose DMA executes a descriptor: that of the program or task around it."""
    parent = op.parent_op()
    while parent is not None:
        if isinstance(parent, Mem | MemTileDma | ShimDma | ConfigureTask):
            return place_of(parent.tile)
        if isinstance(parent, ConfigureTaskFor):
            return shim_of(design, flat(parent.alloc))
        parent = parent.parent_op()
    return None
