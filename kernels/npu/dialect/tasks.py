"""`aiex` operations for tasks: chains of descriptors that a sequence configures and starts."""

from __future__ import annotations

from xdsl.dialects.builtin import BoolAttr, IndexType, IntegerAttr, SymbolRefAttr, i32
from xdsl.ir import Operation
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
)

from uq.kernels.npu.dialect.attributes import DirectionAttr
from uq.kernels.npu.dialect.structure import close_region

NUMBER = IntegerAttr.constr(type=i32)


class TaskOperation(IRDLOperation):
    """A chain of BDs, configured now and started later."""

    issue_token = opt_prop_def(BoolAttr)
    repeat_count = opt_prop_def(IntegerAttr)
    body = region_def()
    result = result_def(IndexType())
    irdl_options = (ParsePropInAttrDict(),)

    def __post_init__(self) -> None:
        close_region(self, self.body)


@irdl_op_definition
class ConfigureTask(TaskOperation):
    name = "aiex.dma_configure_task"
    tile = operand_def(IndexType())
    direction = prop_def(DirectionAttr)
    channel = prop_def(NUMBER)
    assembly_format = "`(` $tile `,` $direction `,` $channel `)` $body attr-dict"


@irdl_op_definition
class ConfigureTaskFor(TaskOperation):
    name = "aiex.dma_configure_task_for"
    alloc = prop_def(SymbolRefAttr)
    assembly_format = "$alloc $body attr-dict"


@irdl_op_definition
class StartTask(IRDLOperation):
    name = "aiex.dma_start_task"
    task = operand_def(IndexType())
    assembly_format = "`(` $task `)` attr-dict"


@irdl_op_definition
class AwaitTask(IRDLOperation):
    name = "aiex.dma_await_task"
    task = operand_def(IndexType())
    assembly_format = "`(` $task `)` attr-dict"


@irdl_op_definition
class FreeTask(IRDLOperation):
    name = "aiex.dma_free_task"
    task = operand_def(IndexType())
    assembly_format = "`(` $task `)` attr-dict"


TASKS: list[type[Operation]] = [
    ConfigureTask,
    ConfigureTaskFor,
    StartTask,
    AwaitTask,
    FreeTask,
]
