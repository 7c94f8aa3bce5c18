"""Rules for streams between tiles: ports, packets, cascades."""

from __future__ import annotations

from collections.abc import Iterator

from xdsl.ir import Operation, SSAValue

from uq.kernels.npu.dialect.attributes import BundleAttr
from uq.kernels.npu.dialect.streams import CascadeFlow, Flow, PacketDest, PacketFlow, PacketSource
from uq.kernels.npu.model import Design, place_of
from uq.kernels.npu.target import PACKET_IDS, Kind, Place
from uq.kernels.npu.verify.rule import (
    ARCHITECTURE,
    REGISTERS,
    TARGET_MODEL,
    Problem,
    rule,
    rules_in,
)


@rule("flow.port", "A stream begins and ends at ports that its tiles have.", TARGET_MODEL)
def flow_port(design: Design) -> Iterator[Problem]:
    for flow in design.ops(Flow):
        yield from _port(design, flow, flow.source, flow.source_bundle, _at(flow, "source"), True)
        yield from _port(design, flow, flow.dest, flow.dest_bundle, _at(flow, "dest"), False)
    for source in design.ops(PacketSource):
        number = source.channel.value.data
        yield from _port(design, source, source.tile, source.bundle, number, True)
    for dest in design.ops(PacketDest):
        yield from _port(design, dest, dest.tile, dest.bundle, dest.channel.value.data, False)


@rule("flow.merge", "Two circuit-switched streams do not end at one port.", ARCHITECTURE)
def flow_merge(design: Design) -> Iterator[Problem]:
    ends: set[tuple[Place | None, str, int]] = set()
    for flow in design.ops(Flow):
        end = (place_of(flow.dest), flow.dest_bundle.data, _at(flow, "dest"))
        if end in ends:
            yield Problem(flow, f"a second stream into {end[1]} {end[2]} of tile {end[0]}")
        ends.add(end)


@rule("packet.id", f"A packet id is 0 to {PACKET_IDS - 1}.", REGISTERS)
def packet_id(design: Design) -> Iterator[Problem]:
    for flow in design.ops(PacketFlow):
        if not 0 <= flow.id.value.data < PACKET_IDS:
            yield Problem(flow, f"packet id {flow.id.value.data}: it has 5 bits")


@rule("packet.ends", "A packet flow has a source and a destination.", "mlir-aie AIEDialect.cpp")
def packet_ends(design: Design) -> Iterator[Problem]:
    for flow in design.ops(PacketFlow):
        kinds = {type(op) for op in flow.ports.block.ops}
        for kind in (PacketSource, PacketDest):
            if kind not in kinds:
                yield Problem(flow, f"packet flow {flow.id.value.data} has no {kind.name}")


@rule("cascade.neighbour", "A cascade goes to the core east or south of its source.", ARCHITECTURE)
def cascade_neighbour(design: Design) -> Iterator[Problem]:
    for flow in design.ops(CascadeFlow):
        source, dest = place_of(flow.source_tile), place_of(flow.dest_tile)
        if source is None or dest is None:
            continue
        step = (dest.column - source.column, dest.row - source.row)
        cores = {design.kind(source), design.kind(dest)} == {Kind.CORE}
        if not cores or step not in ((1, 0), (0, -1)):
            yield Problem(flow, f"cascade from {source} to {dest}: not a core to the east or south")


@rule("cascade.once", "A core has one cascade input and one cascade output.", ARCHITECTURE)
def cascade_once(design: Design) -> Iterator[Problem]:
    seen: set[tuple[str, Place | None]] = set()
    for flow in design.ops(CascadeFlow):
        for end, tile in (("output", flow.source_tile), ("input", flow.dest_tile)):
            if (end, place_of(tile)) in seen:
                yield Problem(flow, f"a second cascade {end} of core {place_of(tile)}")
            seen.add((end, place_of(tile)))


def _at(flow: Flow, end: str) -> int:
    channel = flow.source_channel if end == "source" else flow.dest_channel
    return int(channel.value.data)


def _port(
    design: Design, op: Operation, tile: SSAValue, bundle: BundleAttr, number: int, source: bool
) -> Iterator[Problem]:
    place = place_of(tile)
    limits = design.target.limits(place)
    if limits is None:
        return
    ports = limits.ports.get(bundle.data)
    count = 0 if ports is None else ports.sources if source else ports.destinations
    if not 0 <= number < count:
        way = "from" if source else "into"
        kind = f"{design.kind(place)} tile {place}"
        yield Problem(
            op, f"stream {way} {bundle.data} {number} of {kind}: it has {count} such ports"
        )


RULES = rules_in(globals().values())
