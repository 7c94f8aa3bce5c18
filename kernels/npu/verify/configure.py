"""Rules for what configures: other devices of the module, and descriptors field by field."""

from __future__ import annotations

from collections.abc import Iterator

from xdsl.dialects.builtin import SymbolRefAttr
from xdsl.ir import Operation

from uq.kernels.npu.dialect.configure import Configure, LoadPdi, Run, WriteBd
from uq.kernels.npu.dialect.structure import Device, SequenceOperation
from uq.kernels.npu.dialect.text import flat
from uq.kernels.npu.model import Design
from uq.kernels.npu.target import MAX_ITERATIONS, PACKET_IDS, Limits, Place
from uq.kernels.npu.verify.rule import AIEX_VERIFIER, Problem, rule, rules_in


@rule(
    "configure.device",
    "A device that is configured or loaded is one of the module, of the same type.",
    AIEX_VERIFIER,
)
def configure_device(design: Design) -> Iterator[Problem]:
    for op in design.in_sequences():
        symbol = _device_symbol(op)
        if symbol is None:
            continue
        other = _device(design, flat(symbol))
        if other is None:
            yield Problem(op, f"there is no device @{flat(symbol)}")
        elif other.device != design.device.device:
            text = f"@{flat(symbol)} is for {other.device.data}"
            yield Problem(op, f"{text}, this device for {design.device.device.data}")


@rule(
    "run.sequence",
    "A run names a sequence of the configured device and passes its types.",
    AIEX_VERIFIER,
)
def run_sequence(design: Design) -> Iterator[Problem]:
    for op in design.in_sequences():
        configure = op.parent_op()
        if not isinstance(op, Run) or not isinstance(configure, Configure):
            continue
        device, name = _device(design, flat(configure.symbol)), flat(op.sequence)
        sequence = _sequence(device, name) if device is not None else None
        if sequence is None:
            yield Problem(op, f"@{flat(configure.symbol)} has no runtime sequence @{name}")
        elif list(op.args.types) != list(sequence.body.block.arg_types):
            yield Problem(op, f"the types of the arguments are not those of @{name}")


@rule(
    "register.descriptor",
    "A descriptor that is written is one of its tile, and its fields fit their registers.",
    AIEX_VERIFIER,
)
def register_descriptor(design: Design) -> Iterator[Problem]:
    for op in design.in_sequences():
        if not isinstance(op, WriteBd):
            continue
        place = Place(op.field("column"), op.field("row"))
        limits = design.target.limits(place)
        if limits is None:
            yield Problem(op, f"tile {place} is not in the array")
            continue
        for name, most in _field_limits(op, limits).items():
            if not 0 <= op.field(name) <= most:
                yield Problem(op, f"{name} {op.field(name)}: tile {place} takes 0 to {most}")


def _field_limits(op: WriteBd, limits: Limits) -> dict[str, int]:
    """The largest value of each field; the size of a linear transfer has no register."""
    linear = op.field("d1_size") <= 1 and not op.field("iteration_size")
    steps = dict.fromkeys(("d0_stride", "d1_stride", "d2_stride"), limits.max_step - 1)
    return {
        "bd_id": limits.descriptors - 1,
        "buffer_length": limits.max_length,
        "packet_id": PACKET_IDS - 1,
        "packet_type": 7,
        "iteration_size": MAX_ITERATIONS - 1,
        "iteration_stride": limits.max_step - 1,
        "d0_size": limits.max_length if linear else limits.max_wrap,
        "d1_size": limits.max_wrap,
        **({"next_bd": limits.descriptors - 1} if op.field("use_next_bd") else {}),
        **steps,
    }


def _device_symbol(op: Operation) -> SymbolRefAttr | None:
    if isinstance(op, Configure):
        return op.symbol
    return op.device_ref if isinstance(op, LoadPdi) else None


def _device(design: Design, name: str) -> Device | None:
    """A device of the same module; one without a name is @main."""
    module = design.device.parent_op()
    for op in module.walk() if module is not None else ():
        if isinstance(op, Device) and (op.sym_name.data if op.sym_name else "main") == name:
            return op
    return None


def _sequence(device: Device, name: str) -> SequenceOperation | None:
    sequences = (op for op in device.body.block.ops if isinstance(op, SequenceOperation))
    named = {op.sym_name.data if op.sym_name else "sequence": op for op in sequences}
    return named.get(name)


RULES = rules_in(globals().values())
