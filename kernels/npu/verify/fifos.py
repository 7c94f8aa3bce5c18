"""Rules for object FIFOs and the links between them."""

from __future__ import annotations

from collections.abc import Iterator

from uq.kernels.npu.dialect.sequence import MemcpyNd
from uq.kernels.npu.dialect.tasks import ConfigureTaskFor
from uq.kernels.npu.dialect.text import flat
from uq.kernels.npu.model import Design, Fifo, FifoLink, elements, nbytes
from uq.kernels.npu.resources import lowered_depth
from uq.kernels.npu.target import WORD, Kind
from uq.kernels.npu.verify.rule import (
    AIE_VERIFIER,
    FIFO_PASS,
    SILENT,
    Problem,
    rule,
    rules_in,
)


@rule("fifo.consumers", "An object FIFO has a consumer.", AIE_VERIFIER)
def fifo_consumers(design: Design) -> Iterator[Problem]:
    for fifo in design.fifos.values():
        if not fifo.consumers:
            yield Problem(fifo.op, f"@{fifo.name} has no consumer")


@rule(
    "fifo.depth",
    "An object FIFO has a depth of 1 or more, for each end if it is a list.",
    AIE_VERIFIER,
)
def fifo_depth(design: Design) -> Iterator[Problem]:
    for fifo in design.fifos.values():
        ends = 1 + len(fifo.consumers)
        if len(fifo.depths) not in (1, ends) or min(fifo.depths, default=0) < 1:
            wanted = f"one depth, or a list of {ends}, each 1 or more"
            yield Problem(fifo.op, f"@{fifo.name}: depth {list(fifo.depths)}; write {wanted}")


@rule("fifo.object", "An object is made of whole 4-byte words.", FIFO_PASS)
def fifo_object(design: Design) -> Iterator[Problem]:
    for fifo in design.fifos.values():
        size = nbytes(fifo.element)
        if size % WORD or not size:
            yield Problem(fifo.op, f"@{fifo.name}: objects of {size} bytes, not of whole words")


@rule(
    "fifo.depth-reduced",
    "The FIFO pass gives a core what it acquires plus one; a larger single depth has no effect.",
    FIFO_PASS,
    severity="warning",
)
def fifo_depth_reduced(design: Design) -> Iterator[Problem]:
    for fifo in design.fifos.values():
        for end in (fifo.producer, *fifo.consumers):
            got, asked = lowered_depth(design, fifo, end), fifo.end_depth(end)
            if got < asked:
                ends = ", ".join(str(asked) for _ in (fifo.producer, *fifo.consumers))
                text = f"@{fifo.name}: core {end} gets {got} of {asked} objects"
                yield Problem(fifo.op, f"{text}; write the depth as [{ends}] to keep them")


@rule("fifo.filled", "A FIFO that begins at a shim tile is filled by the runtime sequence.", SILENT)
def fifo_filled(design: Design) -> Iterator[Problem]:
    for fifo in _untouched(design):
        if design.kind(fifo.producer) is Kind.SHIM:
            yield Problem(fifo.op, f"@{fifo.name} is never filled: its consumers wait for ever")


@rule("fifo.drained", "A FIFO that ends at a shim tile is drained by the runtime sequence.", SILENT)
def fifo_drained(design: Design) -> Iterator[Problem]:
    for fifo in _untouched(design):
        if any(design.kind(end) is Kind.SHIM for end in fifo.consumers):
            yield Problem(
                fifo.op, f"@{fifo.name} is never drained: its producer stops when it is full"
            )


@rule("fifo.acquired", "A core at the end of a FIFO uses it.", SILENT)
def fifo_acquired(design: Design) -> Iterator[Problem]:
    for fifo in design.fifos.values():
        for end in (fifo.producer, *fifo.consumers):
            if design.kind(end) is not Kind.CORE or design.link_at(fifo, end) is not None:
                continue
            core = design.core_at.get(end) if end else None
            if core and not core.most_acquired(fifo.name):
                verb = "fills" if end == fifo.producer else "empties"
                yield Problem(fifo.op, f"core {end} never {verb} @{fifo.name}")


@rule("link.symbol", "A link names object FIFOs of the device.", AIE_VERIFIER)
def link_symbol(design: Design) -> Iterator[Problem]:
    for link in design.links:
        for symbol in (*link.op.inputs, *link.op.outputs):
            if flat(symbol) not in design.fifos:
                yield Problem(link.op, f"@{flat(symbol)} is not an object FIFO of this device")


@rule("link.tile", "Linked FIFOs meet in one tile.", AIE_VERIFIER)
def link_tile(design: Design) -> Iterator[Problem]:
    for link in _complete(design):
        if link.place is None:
            yield Problem(link.op, "no tile is the end of all inputs and the start of all outputs")


@rule(
    "link.kind",
    "A link joins many into one, distributes one to many, or forwards one.",
    AIE_VERIFIER,
)
def link_kind(design: Design) -> Iterator[Problem]:
    for link in design.links:
        counts = len(link.op.inputs), len(link.op.outputs)
        if 1 not in counts or 0 in counts:
            yield Problem(link.op, f"{counts[0]} inputs and {counts[1]} outputs")


@rule("link.once", "A FIFO is linked once at each end.", AIE_VERIFIER)
def link_once(design: Design) -> Iterator[Problem]:
    seen: set[tuple[str, str]] = set()
    for link in design.links:
        for role, fifos in (("input", link.inputs), ("output", link.outputs)):
            for fifo in fifos:
                if (role, fifo.name) in seen:
                    yield Problem(link.op, f"@{fifo.name} is the {role} of two links")
                seen.add((role, fifo.name))


@rule("link.offsets", "A distribute or join has one offset for each part.", AIE_VERIFIER)
def link_offsets(design: Design) -> Iterator[Problem]:
    for link in _complete(design):
        for what, fifos, offsets in _sides(link):
            allowed = (len(fifos),) if len(fifos) > 1 else (0, 1)
            if len(offsets) not in allowed:
                yield Problem(link.op, f"{len(offsets)} offsets for {len(fifos)} {what}")


@rule("link.parts", "The parts of a link lie inside the whole object, on 4-byte words.", FIFO_PASS)
def link_parts(design: Design) -> Iterator[Problem]:
    for link in _complete(design):
        whole = elements(link.whole.element)
        for _, fifos, offsets in _sides(link):
            for fifo, offset in zip(fifos, offsets, strict=False):
                end = offset + elements(fifo.element)
                if offset < 0 or (end > whole and fifo is not link.whole):
                    text = f"@{fifo.name}: elements {offset} to {end}"
                    yield Problem(link.op, f"{text} of an object of {whole}")


@rule(
    "link.coverage",
    "The parts of a link add up to the whole object.",
    SILENT,
    severity="warning",
)
def link_coverage(design: Design) -> Iterator[Problem]:
    for link in _complete(design):
        parts = link.inputs if len(link.inputs) > 1 else link.outputs
        total, whole = sum(nbytes(fifo.element) for fifo in parts), nbytes(link.whole.element)
        if link.parts > 1 and total != whole:
            yield Problem(link.op, f"parts of {total} bytes for objects of {whole}")


@rule("fifo.layout-ends", "A layout stands at an end of the FIFO that has a DMA.", FIFO_PASS)
def fifo_layout_ends(design: Design) -> Iterator[Problem]:
    for fifo in design.fifos.values():
        for end in (fifo.producer, *fifo.consumers):
            if fifo.layout(end).data and design.kind(end) is Kind.SHIM:
                text = f"@{fifo.name}: a layout at shim tile {end}"
                yield Problem(fifo.op, f"{text}; the transfers of the sequence say it there")


def _untouched(design: Design) -> Iterator[Fifo]:
    """FIFOs that no runtime sequence names; none when the design has no sequence."""
    used = {flat(op.metadata) for op in design.ops(MemcpyNd)}
    used |= {flat(op.alloc) for op in design.ops(ConfigureTaskFor)}
    if design.sequences:
        yield from (fifo for fifo in design.fifos.values() if fifo.name not in used)


def _complete(design: Design) -> Iterator[FifoLink]:
    """Links whose FIFOs all exist."""
    for link in design.links:
        named = len(link.op.inputs) + len(link.op.outputs)
        if link.inputs and link.outputs and len(link.inputs) + len(link.outputs) == named:
            yield link


def _sides(link: FifoLink) -> Iterator[tuple[str, tuple[Fifo, ...], list[int]]]:
    for what, fifos, offsets in (
        ("inputs", link.inputs, link.op.src_offsets),
        ("outputs", link.outputs, link.op.dst_offsets),
    ):
        yield what, fifos, [offset.value.data for offset in offsets]


RULES = rules_in(globals().values())
