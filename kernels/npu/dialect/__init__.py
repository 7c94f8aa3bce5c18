"""The dialects `aie` and `aiex` of mlir-aie, on xDSL."""

from functools import cache

from xdsl.context import Context
from xdsl.dialects.arith import Arith
from xdsl.dialects.builtin import Builtin
from xdsl.dialects.cf import Cf
from xdsl.dialects.func import Func
from xdsl.dialects.math import Math
from xdsl.dialects.memref import MemRef
from xdsl.dialects.scf import Scf
from xdsl.dialects.vector import Vector
from xdsl.ir import Dialect

from uq.kernels.npu.dialect.attributes import ATTRIBUTES
from uq.kernels.npu.dialect.configure import CONFIGURE
from uq.kernels.npu.dialect.dma import DMA
from uq.kernels.npu.dialect.fifo import FIFO
from uq.kernels.npu.dialect.memref import MEMREF as OWN_MEMREF
from uq.kernels.npu.dialect.sequence import SEQUENCE
from uq.kernels.npu.dialect.streams import STREAMS
from uq.kernels.npu.dialect.structure import STRUCTURE
from uq.kernels.npu.dialect.tasks import TASKS

AIE = Dialect("aie", [*STRUCTURE, *STREAMS, *FIFO, *DMA], ATTRIBUTES)
AIEX = Dialect("aiex", [*SEQUENCE, *TASKS, *CONFIGURE], [])
MEMREF = Dialect(
    "memref",
    [*{op.name: op for op in (*MemRef.operations, *OWN_MEMREF)}.values()],
    list(MemRef.attributes),
)
STANDARD = (Builtin, Arith, Cf, Func, Math, MEMREF, Scf, Vector)


@cache
def npu_context() -> Context:
    """Knows the dialects of NPU designs and nothing else: other operations are refused."""
    context = Context()
    for dialect in (*STANDARD, AIE, AIEX):
        context.load_dialect(dialect)
    return context
