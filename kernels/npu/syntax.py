"""The spellings of a design in different versions of mlir-aie, and the way between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr, i32
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import Operation

from uq.errors import DesignError
from uq.kernels.npu.dialect.streams import ShimDmaAllocation
from uq.kernels.npu.dialect.structure import (
    Core,
    Device,
    LegacyRuntimeSequence,
    RuntimeSequence,
    SequenceOperation,
    Tile,
)
from uq.kernels.npu.dialect.text import flat


@dataclass(frozen=True)
class Syntax:
    """What changed between versions.

    Attributes:
        sequence: the operation that holds a runtime sequence.
        four_columns: the name of the NPU of Phoenix and Hawk Point, with 4 columns.
        allocation: a shim channel is named by its tile or by its column.
        link_with: the object file of a kernel stands on the core or on the function.
        device_names: a device may have a name; it is dropped where there is none.
    """

    sequence: type[SequenceOperation]
    four_columns: Literal["npu1", "npu1_4col"]
    allocation: Literal["tile", "column"]
    link_with: Literal["core", "function"]
    device_names: bool


SYNTAXES: Mapping[str, Syntax] = {
    "1.0": Syntax(LegacyRuntimeSequence, "npu1_4col", "column", "core", False),
    "1.1": Syntax(LegacyRuntimeSequence, "npu1", "column", "core", False),
    "2026": Syntax(RuntimeSequence, "npu1", "tile", "function", True),
}
FOUR_COLUMNS = ("npu1", "npu1_4col")


def to_syntax(module: ModuleOp, syntax: Syntax) -> ModuleOp:
    """A copy of the design in the spelling of `syntax`; the one given stays as it is.

    Raises:
        DesignError: the design has no such spelling.
    """
    copy = module.clone()
    for device in [op for op in copy.walk() if isinstance(op, Device)]:
        if device.device.data in FOUR_COLUMNS:
            device.device = StringAttr(syntax.four_columns)
        if not syntax.device_names:
            device.properties.pop("sym_name", None)
        for op in list(device.body.block.ops):
            if isinstance(op, SequenceOperation):
                _respell_sequence(op, syntax)
            elif isinstance(op, ShimDmaAllocation):
                _respell_allocation(op, syntax, device)
        _respell_links(device, syntax)
    return copy


def _respell_sequence(op: SequenceOperation, syntax: Syntax) -> None:
    if isinstance(op, syntax.sequence):
        return
    block = op.parent
    if block is None:
        return
    respelled = syntax.sequence.create(
        properties=op.properties, attributes=op.attributes, regions=[op.detach_region(0)]
    )
    block.insert_op_before(respelled, op)
    block.erase_op(op)


def _respell_allocation(op: ShimDmaAllocation, syntax: Syntax, device: Device) -> None:
    if syntax.allocation == "column" and op.tile is not None:
        tile = op.tile.owner
        if not isinstance(tile, Tile):
            raise DesignError(f"shim_dma_allocation @{op.sym_name.data}: its tile is no aie.tile")
        op.operands = []
        op.properties["col"] = IntegerAttr(tile.col.value.data, i32)
    elif syntax.allocation == "tile" and op.col is not None:
        column = op.properties.pop("col")
        op.operands = [_shim_tile(device, column, op).result]


def _shim_tile(device: Device, column: object, op: ShimDmaAllocation) -> Tile:
    for tile in device.body.block.ops:
        if tile is op:
            break
        if isinstance(tile, Tile) and tile.row.value.data == 0 and tile.col == column:
            return tile
    raise DesignError(
        f"shim_dma_allocation @{op.sym_name.data}: no aie.tile of row 0 and its column before it"
    )


def _respell_links(device: Device, syntax: Syntax) -> None:
    functions = {op.sym_name.data: op for op in device.walk() if isinstance(op, FuncOp)}
    cores = [op for op in device.walk() if isinstance(op, Core)]
    if syntax.link_with == "function":
        for core in cores:
            _link_functions(core, functions)
        for core in cores:
            core.properties.pop("link_with", None)
    else:
        for core in cores:
            _link_core(core, functions)
        for function in functions.values():
            function.attributes.pop("link_with", None)


def called(core: Operation) -> Iterator[str]:
    """Names of the functions that a core calls."""
    for op in core.walk():
        if isinstance(op, CallOp):
            yield flat(op.callee)


def _link_functions(core: Core, functions: Mapping[str, FuncOp]) -> None:
    if core.link_with is None:
        return
    for name in dict.fromkeys(called(core)):
        before = functions[name].attributes.setdefault("link_with", core.link_with)
        if before != core.link_with:
            raise DesignError(
                f"@{name} comes from {before} and from {core.link_with}; "
                "a function has one object file in this syntax"
            )


def _link_core(core: Core, functions: Mapping[str, FuncOp]) -> None:
    files = {
        functions[name].attributes["link_with"]
        for name in called(core)
        if "link_with" in functions[name].attributes
    }
    if core.link_with is not None:
        files.add(core.link_with)
    if len(files) > 1:
        names = ", ".join(sorted(str(file) for file in files))
        raise DesignError(f"a core links {names}; it takes one object file in this syntax")
    if files:
        core.properties["link_with"] = files.pop()
