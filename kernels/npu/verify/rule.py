"""A rule: an id, a sentence, where it comes from, and one function that finds violations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from xdsl.ir import Operation

from uq.kernels.npu.model import Design

Severity = Literal["error", "warning"]

TARGET_MODEL = "mlir-aie AIETargetModel.h"
AIE_VERIFIER = "mlir-aie AIEDialect.cpp"
AIEX_VERIFIER = "mlir-aie AIEXDialect.cpp"
FIFO_PASS = "mlir-aie AIEObjectFifoStatefulTransform.cpp"
BUFFER_PASS = "mlir-aie AIEAssignBuffers.cpp"
REGISTERS = "AM025 register reference"
ARCHITECTURE = "AM020 architecture manual"
SILENT = "accepted by mlir-aie without a message"


class Problem(NamedTuple):
    op: Operation
    message: str


Check = Callable[[Design], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    id: str
    sentence: str
    source: str
    severity: Severity
    check: Check


@dataclass(frozen=True)
class Finding:
    line: int
    rule: str
    severity: Severity
    message: str
    source: str


def rule(
    id: str, sentence: str, source: str, *, severity: Severity = "error"
) -> Callable[[Check], Rule]:
    """Turn a function that yields problems into a rule."""
    return lambda check: Rule(id, sentence, source, severity, check)


def rules_in(namespace: Iterable[object]) -> tuple[Rule, ...]:
    """The rules among the values of a module, in the order of their definition."""
    return tuple(value for value in namespace if isinstance(value, Rule))
