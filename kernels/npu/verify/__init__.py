"""The hardware verifier: rules over a design, and what it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from xdsl.dialects.func import CallOp
from xdsl.ir import Block, Operation
from xdsl.utils.exceptions import VerifyException

from uq.errors import DesignError
from uq.kernels.npu.dialect.structure import Device
from uq.kernels.npu.model import gather
from uq.kernels.npu.resources import Usage, usage
from uq.kernels.npu.source import Source
from uq.kernels.npu.target import COLUMNS, Place, Target
from uq.kernels.npu.verify import (
    commands,
    configure,
    cores,
    descriptors,
    fifos,
    sequences,
    streams,
    tiles,
)
from uq.kernels.npu.verify.rule import AIE_VERIFIER, TARGET_MODEL, Finding, Rule, Severity

RULES: tuple[Rule, ...] = tuple(
    rule
    for module in (tiles, streams, descriptors, fifos, cores, sequences, commands, configure)
    for rule in module.RULES
)
# Two rules come before the others: without them there is nothing to gather.
IR_RULE = ("ir.operation", "An operation has the operands, attributes and parents it needs.")
DEVICE_RULE = ("device.name", "The device is an NPU, or a part of one.")


@dataclass(frozen=True)
class Report:
    """What `verify` found in one device, errors and warnings in the order of the lines."""

    device: str
    findings: tuple[Finding, ...]
    usage: Mapping[Place, Usage]

    @property
    def accepted(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)


def verify(source: Source, *, device: str | None = None, reserved: int = 0) -> list[Report]:
    """Check every device of a design.

    Args:
        device: checks for this device in place of the one that the design names.
        reserved: bytes of every core that tables and constants of its kernels take.

    Raises:
        DesignError: there is no aie.device, or no device of that name.
    """
    if device is not None and device not in COLUMNS:
        raise DesignError(f"unknown device {device}; use {', '.join(COLUMNS)}")
    devices = [op for op in source.module.walk() if isinstance(op, Device)]
    if not devices:
        raise DesignError(f"{source.name}: there is no aie.device in it")
    return [_verify(source, op, device or op.device.data, reserved) for op in devices]


def accepted(source: Source) -> list[Report]:
    """The reports of a design that has no error; what follows would hang or damage otherwise.

    Raises:
        DesignError: the first error, and the command that shows all.
    """
    reports = verify(source)
    for report in reports:
        for finding in report.findings:
            if finding.severity == "error":
                place = f"{source.name}:{finding.line}: {finding.rule}: {finding.message}"
                raise DesignError(f"{place}; see all with: uq npu verify {source.name}")
    return reports


def _verify(source: Source, op: Device, name: str, reserved: int) -> Report:
    if broken := list(_broken(source, op)):
        return Report(name, tuple(broken), {})
    if name not in COLUMNS:
        message = f"{name} is not an NPU; use {', '.join(COLUMNS)}"
        return Report(
            name, (Finding(source.lines[op], *_id(DEVICE_RULE), message, TARGET_MODEL),), {}
        )
    design = gather(op, Target(name, COLUMNS[name]), reserved=reserved)
    findings = [
        Finding(source.lines[problem.op], rule.id, rule.severity, problem.message, rule.source)
        for rule in RULES
        for problem in rule.check(design)
    ]
    return Report(name, tuple(sorted(findings, key=lambda f: f.line)), usage(design))


def _broken(source: Source, device: Device) -> Iterator[Finding]:
    """Operations that are not what their definition says. Calls have rules of their own.

    Beside the device, in no other one, only the order of values is looked at.
    """
    seen: set[Operation | Block] = set()
    mine, others = set(device.walk()), _in_devices(source)
    for op in source.module.walk():
        seen.update((op, *(block for region in op.regions for block in region.blocks)))
        if op in others and op not in mine:
            continue
        if any(_undefined(operand.owner, op, seen) for operand in op.operands):
            message = f"{op.name} uses a value before its definition"
            yield Finding(_line(source, op), *_id(IR_RULE), message, AIE_VERIFIER)
        if isinstance(op, CallOp) or op not in mine:
            continue
        try:
            op.verify(verify_nested_ops=False)
        except VerifyException as error:
            message = f"{op.name}: {' '.join(str(error).split())}"[:300]
            yield Finding(_line(source, op), *_id(IR_RULE), message, AIE_VERIFIER)


def _in_devices(source: Source) -> set[Operation]:
    devices = (op for op in source.module.walk() if isinstance(op, Device))
    return {op for device in devices for op in device.walk()}


def _undefined(owner: Operation | Block, op: Operation, seen: set[Operation | Block]) -> bool:
    """Whether a value of `owner` is used where it is not there yet: a region has no result of its
    own operation."""
    return owner not in seen or (isinstance(owner, Operation) and owner.is_ancestor(op))


def _line(source: Source, op: Operation) -> int:
    """Its line; that of its parent for a terminator that the text leaves out."""
    parent: Operation | None = op
    while parent is not None and parent not in source.lines:
        parent = parent.parent_op()
    return source.lines[parent] if parent is not None else 1


def _id(rule: tuple[str, str]) -> tuple[str, Severity]:
    return rule[0], "error"
