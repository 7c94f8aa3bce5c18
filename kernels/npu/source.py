"""Read and write designs as text; every fault of the text is one line with its place."""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from xdsl.context import Context
from xdsl.dialects.builtin import (
    AnyFloat,
    ComplexType,
    IndexType,
    IntegerType,
    ModuleOp,
    RankedStructure,
)
from xdsl.ir import Block, Operation, SSAValue
from xdsl.parser import Parser
from xdsl.parser.core import ForwardDeclaredValue
from xdsl.printer import Printer
from xdsl.utils.exceptions import DiagnosticException, ParseError

from uq.errors import DesignError
from uq.kernels.npu.dialect import npu_context
from uq.kernels.npu.dialect.text import check_dense

DenseType = RankedStructure[IntegerType | IndexType | AnyFloat | ComplexType]
# Comments and well-formed strings; a quote outside of them never ends.
CLOSED = re.compile(r'//.*|"(?:[^"\\\v\f]|\\(?:["nt\\]|[0-9A-Fa-f]{2}))*"')
WIDTHS = re.compile(r"^[su]?i(\d{1,3})$")  # xDSL counts with numbers as wide as the type
MAX_BYTES = 64 << 20  # designs are generated; the largest known has 0.1 MB


@dataclass(frozen=True)
class Source:
    """A parsed design and the line on which each of its operations begins."""

    name: str
    module: ModuleOp
    lines: Mapping[Operation, int]


class _LocatingParser(Parser):
    _builtin_integer_type_regex = WIDTHS

    def __init__(self, context: Context, text: str, name: str) -> None:
        super().__init__(context, text, name)
        self.starts: dict[Operation, int] = {}
        self.start = self._current_token.span
        self.within = ""  # the operation that is being read

    def _parse_dense_literal_type(self) -> DenseType:
        kind = super()._parse_dense_literal_type()
        check_dense(self, kind)
        return kind

    def parse_optional_str_literal(self) -> str | None:
        """Letters beyond ASCII are escaped byte by byte, which xDSL takes for no string."""
        if (text := super().parse_optional_str_literal()) is not None:
            return text
        if (raw := self.parse_optional_bytes_literal()) is None:
            return None
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.raise_error("a string is not UTF-8 text", at_position=self.start)

    def _parse_block(self) -> Block:
        """xDSL looks in vain for the references of a label that it has met before."""
        label = self._current_token.text[1:]
        if label in self.blocks and label not in self.forward_block_references:
            self.raise_error(f"block ^{label} is defined twice")
        return super()._parse_block()

    def parse_operation(self) -> Operation:
        self.start = self._current_token.span
        start, around = self.start.start, self.within
        op = super().parse_operation()
        self.starts[op], self.within = start, around
        return op

    def _get_op_by_name(self, name: str) -> type[Operation]:
        stack = self._parser_state.dialect_stack
        if (known := self.ctx.get_optional_op(name, dialect_stack=stack)) is None:
            self.within = ""
            self.raise_error(f"unknown operation {name}", at_position=self.start)
        self.within = name
        return known


class _Printer(Printer):
    """Gives each value of a scope a name of its own; `%a_1` may be a name or the second `%a`."""

    def print_ssa_value(self, value: SSAValue) -> str:
        hint = value.name_hint
        if value not in self._ssa_values and hint in self.ssa_names:
            while f"{hint}_{self.ssa_names[hint]}" in self.ssa_names:
                self.ssa_names[hint] += 1
            self.ssa_names[f"{hint}_{self.ssa_names[hint]}"] = 1
        return super().print_ssa_value(value)


def parse_design(text: str, name: str = "design") -> Source:
    """Parse MLIR text.

    Raises:
        DesignError: with `name:line:column` and what was found there.
    """
    if len(text) > MAX_BYTES:
        raise DesignError(f"{name}: {len(text)} characters; a design has at most {MAX_BYTES}")
    _refuse_open_strings(text, name)
    parser = None
    try:
        parser = _LocatingParser(npu_context(), text, name)
        module = parser.parse_module()
    except ParseError as error:
        line, column = _position(text, error.span.start)
        within = f"{parser.within}: " if parser and parser.within else ""
        raise DesignError(f"{name}:{line}:{column}: {within}{_one_line(error.msg)}") from None
    except RecursionError:
        raise DesignError(f"{name}: nested too deeply to be a design") from None
    except (DiagnosticException, ValueError, OverflowError) as error:
        line, column = _position(text, parser.pos if parser else 0)
        raise DesignError(f"{name}:{line}:{column}: {_one_line(str(error))}") from None
    starts = _line_starts(text)
    for op, start in parser.starts.items():
        if not all(_in_scope(operand, op) for operand in op.operands):
            raise DesignError(f"{name}:{starts(start)}: {op.name} uses a value that is not defined")
    return Source(name, module, {op: starts(start) for op, start in parser.starts.items()})


def read_design(path: Path) -> Source:
    """Parse a file.

    Raises:
        DesignError: the file is not UTF-8 text or not a design.
        OSError: the file cannot be read.
    """
    try:
        return parse_design(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DesignError(f"{path}: byte {error.start} is not UTF-8 text") from None


def print_design(module: Operation) -> str:
    stream = io.StringIO()
    _Printer(stream).print_op(module)
    return stream.getvalue() + "\n"


def _in_scope(value: SSAValue, op: Operation) -> bool:
    """Whether a value is defined, in a region around `op`."""
    if isinstance(value, ForwardDeclaredValue):
        return False
    block = value.owner if isinstance(value.owner, Block) else value.owner.parent
    home, region = block.parent if block else None, op.parent_region()
    while region is not None and region is not home:
        region = region.parent_region()
    return region is home


def _refuse_open_strings(text: str, name: str) -> None:
    """The lexer of xDSL takes exponential time over a string that does not end."""
    for number, line in enumerate(text.split("\n"), start=1):
        if '"' in CLOSED.sub("", line):
            raise DesignError(f"{name}:{number}: a string that does not end, or a wrong escape")


def _position(text: str, offset: int) -> tuple[int, int]:
    """Line and column, from 1."""
    before = text[:offset]
    return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1


def _line_starts(text: str) -> Callable[[int], int]:
    breaks = [place for place, character in enumerate(text) if character == "\n"]
    return lambda offset: bisect_right(breaks, offset) + 1


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]
