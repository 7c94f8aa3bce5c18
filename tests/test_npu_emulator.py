"""The emulator: bytes through FIFOs, links, layouts, tasks and locks; deadlocks explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute

from uq.errors import DesignError, UsageError
from uq.kernels.npu.emulator import Deadlock, run
from uq.kernels.npu.emulator.memory import Memory
from uq.kernels.npu.kernels.passthrough.design import SIZES, passthrough
from uq.kernels.npu.source import parse_design, print_design, read_design
from uq.kernels.npu.syntax import SYNTAXES, to_syntax
from uq.kernels.npu.verify import verify

DESIGNS = Path(__file__).parent / "npu"
RNG = np.random.default_rng(7)


class Functions:
    """Kernels in numpy, for designs whose object files are not ours."""

    def __init__(self, **functions: Callable[..., None]) -> None:
        self.functions = functions

    def function(self, name: str, arguments: Sequence[Attribute]) -> Callable[..., None]:
        return self.functions[name]


def _work(source: Memory, dest: Memory) -> None:
    dest.values[...] = source.values


WORK = {"work.o": Functions(work=_work)}


def words(count: int) -> np.ndarray:
    return RNG.integers(-(2**31), 2**31, count, dtype=np.int32)


def design(body: str, tiles: str = "") -> ModuleOp:
    text = f"""module {{ aie.device(npu1) {{
      %shim = aie.tile(0, 0)
      %mem = aie.tile(0, 1)
      %core = aie.tile(0, 2)
      %north = aie.tile(0, 3)
      {body} }} }}"""
    return parse_design(text, "design").module


def move(fifo: str, buffer: str, count: int, id: int = 0, *, token: bool = False) -> str:
    return f"""aiex.npu.dma_memcpy_nd(%{buffer}[0, 0, 0, 0][1, 1, 1, {count}][0, 0, 0, 1])
      {{metadata = @{fifo}, id = {id} : i64{", issue_token = true" if token else ""}}}
      : memref<{count}xi32>"""


def sequence(count: int, *commands: str, out: int | None = None) -> str:
    return f"""aie.runtime_sequence(%in : memref<{count}xi32>, %out : memref<{out or count}xi32>) {{
      {" ".join(commands)} }}"""


OUT = "aiex.npu.dma_wait {symbol = @out}"


@pytest.mark.parametrize("device", ["npu1", "npu2"])
@pytest.mark.parametrize("nbytes", SIZES)
def test_passthrough_is_accepted_and_copies(device: str, nbytes: int) -> None:
    module = passthrough(device, nbytes)
    (report,) = verify(parse_design(print_design(module), "passthrough"))
    assert [finding.message for finding in report.findings] == []
    given = words(nbytes // 4)
    taken = np.zeros_like(given)
    run(module, [given, taken])
    np.testing.assert_array_equal(taken, given)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_syntax_runs(syntax: str) -> None:
    module = to_syntax(passthrough("npu1", 1024), SYNTAXES[syntax])
    given = words(256)
    taken = np.zeros_like(given)
    run(module, [given, taken])
    np.testing.assert_array_equal(taken, given)


def test_passthrough_has_three_sizes() -> None:
    with pytest.raises(UsageError, match="passthrough of 100 bytes; use one of 1024, 4096, 16384"):
        passthrough("npu1", 100)


def test_a_design_of_others_multiplies() -> None:
    """Broadcast, distribute, join, layouts of a mem tile and strided transfers, in one design.

    The mem tile makes 8x8 blocks of A and B; numpy unblocks them, so a wrong order shows.
    """

    def blocked(memory: Memory) -> np.ndarray:
        return memory.values.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)

    def matmul(a: Memory, b: Memory, c: Memory) -> None:
        product = blocked(a).astype(np.int32) @ blocked(b).astype(np.int32)
        c.values[...] = c.values + product

    def zero(c: Memory) -> None:
        c.values[...] = 0

    library = Functions(zero_i32=zero, matmul_i8_i32=matmul)
    a, b = (RNG.integers(-128, 128, shape, dtype=np.int8) for shape in ((128, 256), (256, 256)))
    c = np.zeros((128, 256), np.int32)
    module = read_design(DESIGNS / "accepted" / "matmul_int8_1col_npu2.mlir").module
    run(module, [a, b, c], {"matmul.o": library})
    np.testing.assert_array_equal(c, a.astype(np.int32) @ b.astype(np.int32))


def test_neighbours_pass_objects_through_shared_memory() -> None:
    module = design(
        """
      aie.objectfifo @in(%shim, {%core}, 2 : i32) : !aie.objectfifo<memref<4xi32>>
      aie.objectfifo @up(%core, {%north}, 2 : i32) : !aie.objectfifo<memref<4xi32>>
      aie.objectfifo @out(%north, {%shim}, 2 : i32) : !aie.objectfifo<memref<4xi32>>"""
        + _add_core("core", "in", "up", 1)
        + _add_core("north", "up", "out", 10)
        + sequence(32, move("in", "in", 32), move("out", "out", 32, 1, token=True), OUT)
    )
    given = RNG.integers(-99, 99, 32, dtype=np.int32)
    taken = np.zeros_like(given)
    run(module, [given, taken])
    np.testing.assert_array_equal(taken, given + 11)


def _add_core(tile: str, source: str, dest: str, amount: int) -> str:
    kind = "!aie.objectfifosubview<memref<4xi32>>"
    return f"""
      aie.core(%{tile}) {{
        %c0 = arith.constant 0 : index
        %c1 = arith.constant 1 : index
        %c4 = arith.constant 4 : index
        %forever = arith.constant 9223372036854775806 : index
        %amount = arith.constant {amount} : i32
        scf.for %turn = %c0 to %forever step %c1 {{
          %a = aie.objectfifo.acquire @{source}(Consume, 1) : {kind}
          %x = aie.objectfifo.subview.access %a[0] : {kind} -> memref<4xi32>
          %b = aie.objectfifo.acquire @{dest}(Produce, 1) : {kind}
          %y = aie.objectfifo.subview.access %b[0] : {kind} -> memref<4xi32>
          scf.for %i = %c0 to %c4 step %c1 {{
            %v = memref.load %x[%i] : memref<4xi32>
            %s = arith.addi %v, %amount : i32
            memref.store %s, %y[%i] : memref<4xi32>
          }}
          aie.objectfifo.release @{source}(Consume, 1)
          aie.objectfifo.release @{dest}(Produce, 1)
        }}
        aie.end
      }}"""


def test_a_core_may_hold_several_objects() -> None:
    """A window of three: every object but the first two is the sum of itself and two before it."""
    kind = "!aie.objectfifosubview<memref<1xi32>>"
    access = "\n".join(
        f"""%x{n} = aie.objectfifo.subview.access %a[{n}] : {kind} -> memref<1xi32>
          %v{n} = memref.load %x{n}[%c0] : memref<1xi32>"""
        for n in range(3)
    )
    module = design(f"""
      aie.objectfifo @in(%shim, {{%core}}, 4 : i32) : !aie.objectfifo<memref<1xi32>>
      aie.objectfifo @out(%core, {{%shim}}, 2 : i32) : !aie.objectfifo<memref<1xi32>>
      aie.core(%core) {{
        %c0 = arith.constant 0 : index
        %c1 = arith.constant 1 : index
        %n = arith.constant 8 : index
        scf.for %turn = %c0 to %n step %c1 {{
          %a = aie.objectfifo.acquire @in(Consume, 3) : {kind}
          {access}
          %s = arith.addi %v0, %v1 : i32
          %t = arith.addi %s, %v2 : i32
          %b = aie.objectfifo.acquire @out(Produce, 1) : {kind}
          %y = aie.objectfifo.subview.access %b[0] : {kind} -> memref<1xi32>
          memref.store %t, %y[%c0] : memref<1xi32>
          aie.objectfifo.release @in(Consume, 1)
          aie.objectfifo.release @out(Produce, 1)
        }}
        aie.end
      }}
      {sequence(10, move("in", "in", 10), move("out", "out", 8, 1, token=True), OUT, out=8)}""")
    given = np.arange(10, dtype=np.int32) ** 2
    taken = np.zeros(8, np.int32)
    run(module, [given, taken])
    np.testing.assert_array_equal(taken, given[:-2] + given[1:-1] + given[2:])


LOW_LEVEL = """
      %free = aie.lock(%mem, 0) {{init = 1 : i32}}
      %full = aie.lock(%mem, 1) {{init = 0 : i32}}
      %stage = aie.buffer(%mem) : memref<4x8xi32>
      aie.flow(%shim, DMA : 0, %mem, DMA : 0)
      aie.flow(%mem, DMA : 0, %shim, DMA : 0)
      aie.shim_dma_allocation @in(%shim, MM2S, 0)
      aie.shim_dma_allocation @out(%shim, S2MM, 0)
      %dma = aie.memtile_dma(%mem) {{
        %a = aie.dma_start(S2MM, 0, ^fill, ^next)
      ^fill:
        aie.use_lock(%free, AcquireGreaterEqual, 1)
        aie.dma_bd(%stage : memref<4x8xi32>)
        aie.use_lock(%full, Release, 1)
        aie.next_bd ^fill
      ^next:
        %b = aie.dma_start(MM2S, 0, ^send, ^end)
      ^send:
        aie.use_lock(%full, AcquireGreaterEqual, 1)
        aie.dma_bd(%stage : memref<4x8xi32>, 0, 32, {layout})
        aie.use_lock(%free, Release, 1)
        aie.next_bd ^send
      ^end:
        aie.end
      }}"""


def test_programs_of_channels_transpose() -> None:
    body = LOW_LEVEL.format(layout="[<size = 8, stride = 1>, <size = 4, stride = 8>]")
    module = design(
        body + sequence(64, move("in", "in", 64), move("out", "out", 64, 1, token=True), OUT)
    )
    given = words(64).reshape(2, 4, 8)
    taken = np.zeros((2, 8, 4), np.int32)
    run(module, [given, taken])
    np.testing.assert_array_equal(taken, given.transpose(0, 2, 1))


def test_a_mem_tile_pads_what_it_sends() -> None:
    none, after = (
        "<const_pad_before = 0, const_pad_after = 0>",
        ("<const_pad_before = 1, const_pad_after = 2>"),
    )
    layout = f"[<size = 4, stride = 8>, <size = 8, stride = 1>], [{none}, {after}]"
    commands = move("in", "in", 32), move("out", "out", 44, 1, token=True), OUT
    module = design(LOW_LEVEL.format(layout=layout) + sequence(32, *commands, out=44))
    given = words(32).reshape(4, 8)
    taken = np.zeros((4, 11), np.int32)
    run(module, [given, taken])
    np.testing.assert_array_equal(taken, np.pad(given, ((0, 0), (1, 2))))


def test_tasks_repeat_and_are_awaited() -> None:
    """A task of one descriptor, run three times, and the same rows awaited as one task."""
    task = """
      %t = aiex.dma_configure_task_for @in {{
        aie.dma_bd(%in : memref<32xi32>, 0, 32, [<size = 4, stride = 8>, <size = 8, stride = 1>])
        aie.end
      }} {{issue_token = true, repeat_count = 2 : i32}}
      %o = aiex.dma_configure_task_for @out {{
        aie.dma_bd(%out : memref<96xi32>, 0, 96)
        aie.end
      }} {{issue_token = true}}
      aiex.dma_start_task(%o)
      aiex.dma_start_task(%t)
      aiex.dma_await_task(%t)
      aiex.dma_await_task(%o)
      aiex.dma_free_task(%t)""".format()
    linear = "[<size = 4, stride = 8>, <size = 8, stride = 1>]"
    module = design(LOW_LEVEL.format(layout=linear) + sequence(32, task, out=96))
    given, taken = words(32), np.zeros(96, np.int32)
    run(module, [given, taken])
    np.testing.assert_array_equal(taken, np.tile(given, 3))


def test_a_fifo_that_nobody_fills_is_a_deadlock() -> None:
    module = read_design(DESIGNS / "wrong" / "fifo_never_filled.mlir").module
    with pytest.raises(Deadlock) as caught:
        run(module, _buffers(module), WORK)
    text = str(caught.value)
    assert "the runtime sequence waits for a token of @dst at (0, 0) (S2MM)" in text
    assert "the core of (0, 2) waits for 1 of full objects of @src at (0, 2); there are 0" in text
    assert "the channel of @src at (0, 0) (MM2S) waits for a task of the runtime sequence" in text


def test_half_a_transfer_is_a_deadlock_with_its_bytes() -> None:
    body = """
      aie.objectfifo @in(%shim, {%core}, 2 : i32) : !aie.objectfifo<memref<4xi32>>
      aie.objectfifo @out(%core, {%shim}, 2 : i32) : !aie.objectfifo<memref<4xi32>>"""
    commands = move("in", "in", 12), move("out", "out", 16, 1, token=True), OUT
    module = design(body + _add_core("core", "in", "out", 1) + sequence(12, *commands, out=16))
    with pytest.raises(Deadlock, match="the stream of @out; 48 of 64 bytes received"):
        run(module, [words(12), np.zeros(16, np.int32)])


@pytest.mark.parametrize("stem", ["wait_before_input", "wait_without_token"])
def test_waits_that_never_end_are_deadlocks(stem: str) -> None:
    module = read_design(DESIGNS / "wrong" / f"{stem}.mlir").module
    with pytest.raises(Deadlock, match="the runtime sequence waits for a token of @"):
        run(module, _buffers(module), WORK)


def _buffers(module: ModuleOp) -> list[np.ndarray]:
    (text,) = (op for op in module.walk() if op.name.endswith("runtime_sequence"))
    shapes = [argument.type.get_shape() for argument in text.regions[0].block.args]  # type: ignore[attr-defined]
    return [np.zeros(shape, np.int32) for shape in shapes]


def test_a_full_queue_is_an_error() -> None:
    module = read_design(DESIGNS / "wrong" / "queue_overflow.mlir").module
    with pytest.raises(DesignError, match="whose queue holds 4 already"):
        run(module, _buffers(module), WORK)


def test_a_slow_reader_holds_up_a_broadcast() -> None:
    """The second core takes nothing: the first gets no more than the two may hold together."""
    body = """
      aie.objectfifo @in(%shim, {%core, %north}, 2 : i32) : !aie.objectfifo<memref<4xi32>>
      aie.objectfifo @out(%core, {%shim}, 2 : i32) : !aie.objectfifo<memref<4xi32>>"""
    idle = "aie.core(%north) { aie.end }"
    commands = move("in", "in", 16), move("out", "out", 16, 1, token=True), OUT
    module = design(body + _add_core("core", "in", "out", 1) + idle + sequence(16, *commands))
    taken = np.zeros(16, np.int32)
    with pytest.raises(Deadlock, match="the stream of @in; 32 of 64 bytes sent"):
        run(module, [words(16), taken])


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ([], "takes 2 buffers; 0 given"),
        (
            [np.zeros(255, np.int32)] * 2,
            "buffer 0 has 1020 bytes; the sequence takes memref<256xi32",
        ),
    ],
)
def test_wrong_buffers_are_refused(buffers: list[np.ndarray], message: str) -> None:
    with pytest.raises(DesignError, match=message):
        run(passthrough("npu1", 1024), buffers)


def test_what_is_not_emulated_is_named() -> None:
    module = read_design(DESIGNS / "lowlevel.mlir").module
    with pytest.raises(DesignError, match="is not emulated"):
        run(module, [np.zeros(256, np.int32), np.zeros(128, np.int32)])
    with pytest.raises(DesignError, match="calls @zero_i32 of .*matmul.o.*, which was not given"):
        run(
            read_design(DESIGNS / "accepted" / "matmul_int8_1col_npu1.mlir").module,
            [np.zeros(n, d) for n, d in ((32768, np.int8), (65536, np.int8), (32768, np.int32))],
        )
