"""Write a design in Python: each method adds one operation of the dialect where the design stands.

design = Builder("npu1")
shim, core = design.tile(0, 0), design.tile(0, 2)
design.fifo("src", shim, [core], 2, memref(256, i32))
with design.core(core):
    with design.forever():
        source = design.acquire("src", Port.Consume)
        ...
design.module, or print_design(design.module)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from xdsl.dialects import arith, scf
from xdsl.dialects import memref as memrefs
from xdsl.dialects.builtin import (
    ArrayAttr,
    BoolAttr,
    DenseArrayBase,
    FunctionType,
    IndexType,
    IntegerAttr,
    MemRefType,
    ModuleOp,
    StringAttr,
    SymbolRefAttr,
    i1,
    i32,
    i64,
)
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue

from uq.kernels.npu.dialect.attributes import (
    Dimension,
    DimensionsAttr,
    ObjectFifoType,
    Port,
    PortAttr,
    SubviewType,
)
from uq.kernels.npu.dialect.fifo import Access, Acquire, Link, ObjectFifo, Release
from uq.kernels.npu.dialect.sequence import DmaWait, MemcpyNd, RtpWrite
from uq.kernels.npu.dialect.structure import Buffer, Core, Device, End, RuntimeSequence, Tile

FOREVER = 2**63 - 2  # even, so that a FIFO of two objects unrolls it without a remainder
Op = TypeVar("Op", bound=Operation)
Layout = Sequence[tuple[int, int]]  # (size, stride), slowest first


def memref(*shape_and_type: int | Attribute) -> MemRefType[Attribute]:
    """memref(16, 256, i8) is memref<16x256xi8>."""
    *shape, element = shape_and_type
    assert isinstance(element, Attribute)
    return MemRefType(element, [size for size in shape if isinstance(size, int)])


class Builder:
    """One device. Tiles come before cores, and FIFOs before what uses them."""

    def __init__(self, device: str) -> None:
        self._blocks = [Block()]
        body = Region(self._blocks[0])
        self.device = Device.create(properties={"device": StringAttr(device)}, regions=[body])
        self.module = ModuleOp([self.device])
        self._fifos: dict[str, MemRefType[Attribute]] = {}
        self._functions: dict[str, tuple[Attribute, ...]] = {}

    def emit(self, op: Op) -> Op:
        self._blocks[-1].add_op(op)
        return op

    @contextmanager
    def inside(self, block: Block, last: Operation | None = None) -> Iterator[None]:
        """What follows goes into `block`, and `last` behind it."""
        self._blocks.append(block)
        yield
        if last is not None:
            self.emit(last)
        self._blocks.pop()

    # ---- what stands on the array

    def tile(self, column: int, row: int) -> SSAValue:
        place = {"col": IntegerAttr(column, i32), "row": IntegerAttr(row, i32)}
        return self.emit(Tile.create(result_types=[IndexType()], properties=place)).result

    def fifo(
        self,
        name: str,
        producer: SSAValue,
        consumers: Sequence[SSAValue],
        depth: int,
        element: MemRefType[Attribute],
        to_stream: Layout = (),
    ) -> str:
        """Objects of `element` from one tile to others; `to_stream` is the order they are sent."""
        layout = DimensionsAttr(tuple(Dimension(*pair) for pair in to_stream))
        self._fifos[name] = element
        properties = {
            "sym_name": StringAttr(name),
            "elemNumber": IntegerAttr(depth, i32),
            "elemType": ObjectFifoType(element),
            "dimensionsToStream": layout,
            "dimensionsFromStreamPerConsumer": ArrayAttr([DimensionsAttr(())] * len(consumers)),
        }
        self.emit(ObjectFifo.create(operands=[producer, *consumers], properties=properties))
        return name

    def link(
        self, inputs: Sequence[str], outputs: Sequence[str], offsets: Sequence[int] = ()
    ) -> None:
        """`offsets`: of the parts in the whole object, in its elements; none to forward."""
        empty: Sequence[int] = ()
        source, dest = (offsets, empty) if len(inputs) > 1 else (empty, offsets)
        properties: dict[str, Attribute] = {
            "fifoIns": ArrayAttr([SymbolRefAttr(name) for name in inputs]),
            "fifoOuts": ArrayAttr([SymbolRefAttr(name) for name in outputs]),
            "src_offsets": ArrayAttr([IntegerAttr(value, i64) for value in source]),
            "dst_offsets": ArrayAttr([IntegerAttr(value, i64) for value in dest]),
        }
        self.emit(Link.create(properties=properties))

    def function(self, name: str, *arguments: Attribute) -> None:
        """Declare a kernel of C linkage."""
        self._functions[name] = arguments
        kind = FunctionType.from_lists(arguments, [])
        self.emit(FuncOp(name, kind, Region(), "private"))

    def buffer(self, tile: SSAValue, name: str, kind: MemRefType[Attribute]) -> SSAValue:
        named = {"sym_name": StringAttr(name)}
        buffer = Buffer.create(operands=[tile], result_types=[kind], properties=named)
        return self.emit(buffer).buffer

    # ---- programs

    @contextmanager
    def core(self, tile: SSAValue, link_with: str | None = None) -> Iterator[None]:
        """A core's program. Objects are chosen at run time, so that loops may have any bound."""
        block = Block()
        properties: dict[str, Attribute] = {"dynamic_objfifo_lowering": BoolAttr(-1, i1)}
        if link_with is not None:
            properties["link_with"] = StringAttr(link_with)
        with self.inside(block, End.create()):
            yield
        self.emit(
            Core.create(
                operands=[tile],
                result_types=[IndexType()],
                properties=properties,
                regions=[Region(block)],
            )
        )

    def constant(self, value: int, kind: Attribute | None = None) -> SSAValue:
        attribute = IntegerAttr(value, i32 if kind is i32 else IndexType())
        return self.emit(arith.ConstantOp(attribute)).result

    @contextmanager
    def loop(self, count: SSAValue) -> Iterator[SSAValue]:
        """From 0 to `count`; yields the index."""
        zero, one = self.constant(0), self.constant(1)
        block = Block(arg_types=[IndexType()])
        with self.inside(block, scf.YieldOp()):
            yield block.args[0]
        self.emit(scf.ForOp(zero, count, one, [], Region(block)))

    @contextmanager
    def forever(self) -> Iterator[SSAValue]:
        with self.loop(self.constant(FOREVER)) as turn:
            yield turn

    def acquire(self, fifo: str, port: Port) -> SSAValue:
        """The next object of a FIFO, as a memref."""
        element = self._fifos[fifo]
        view = self.emit(
            Acquire.create(result_types=[SubviewType(element)], properties=_one(fifo, port))
        )
        return self.emit(
            Access.create(
                operands=[view.subview],
                result_types=[element],
                properties={"index": IntegerAttr(0, i32)},
            )
        ).output

    def release(self, fifo: str, port: Port) -> None:
        self.emit(Release.create(properties=_one(fifo, port)))

    def call(self, name: str, *arguments: SSAValue) -> None:
        self.emit(CallOp(name, list(arguments), []))

    def load(self, buffer: SSAValue, *indices: SSAValue) -> SSAValue:
        return self.emit(memrefs.LoadOp.get(buffer, list(indices))).res

    def store(self, value: SSAValue, buffer: SSAValue, *indices: SSAValue) -> None:
        self.emit(memrefs.StoreOp.get(value, buffer, list(indices)))

    def cast(self, value: SSAValue, kind: Attribute) -> SSAValue:
        """Between index and i32."""
        return self.emit(arith.IndexCastOp(value, kind)).result

    # ---- the runtime sequence

    @contextmanager
    def sequence(self, *arguments: MemRefType[Attribute]) -> Iterator[Sequence[SSAValue]]:
        """What the command processor does; yields the buffers of the host."""
        block = Block(arg_types=arguments)
        with self.inside(block):
            yield block.args
        self.emit(RuntimeSequence.create(regions=[Region(block)]))

    def transfer(
        self,
        fifo: str,
        buffer: SSAValue,
        length: int,
        *,
        offset: int = 0,
        descriptor: int,
        token: bool = False,
    ) -> None:
        """Start a linear transfer of `length` elements from `offset` on."""
        layout = ([0, 0, 0, offset], [1, 1, 1, length], [0, 0, 0, 1])
        self.strided(fifo, buffer, layout, descriptor=descriptor, token=token)

    def strided(
        self,
        fifo: str,
        buffer: SSAValue,
        layout: tuple[Sequence[int], Sequence[int], Sequence[int]],
        *,
        descriptor: int,
        token: bool = False,
    ) -> None:
        """Start a transfer; `layout` is offsets, sizes and strides, four each, slowest first."""
        names = ("static_offsets", "static_sizes", "static_strides")
        properties: dict[str, Attribute] = {
            name: DenseArrayBase.from_list(i64, list(values))
            for name, values in zip(names, layout, strict=True)
        }
        properties["metadata"] = SymbolRefAttr(fifo)
        properties["id"] = IntegerAttr(descriptor, i64)
        if token:
            properties["issue_token"] = BoolAttr(-1, i1)
        self.emit(MemcpyNd.create(operands=[buffer], properties=properties))

    def wait(self, fifo: str) -> None:
        self.emit(DmaWait.create(properties={"symbol": SymbolRefAttr(fifo)}))

    def parameter(self, buffer: str, index: int, value: int) -> None:
        """Write one word of a buffer of run-time parameters."""
        properties: dict[str, Attribute] = {
            "buffer": SymbolRefAttr(buffer),
            "index": IntegerAttr(index, i32),
            "value": IntegerAttr(value, i32),
        }
        self.emit(RtpWrite.create(properties=properties))


def _one(fifo: str, port: Port) -> dict[str, Attribute]:
    return {
        "objFifo_name": SymbolRefAttr(fifo),
        "port": PortAttr(port),
        "size": IntegerAttr(1, i32),
    }
