"""Instruction words of runtime sequences: those of mlir-aie's own translator, and by hand."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from uq.cli import main
from uq.errors import DesignError
from uq.formats.xdna.txn import BlockWrite, MaskWrite, Patch, Sync, Transaction, Write, parse_txn
from uq.kernels.npu.kernels.attention.design import attention
from uq.kernels.npu.kernels.attention.plan import plan
from uq.kernels.npu.kernels.attention.variant import Variant
from uq.kernels.npu.lowering import lower
from uq.kernels.npu.source import parse_design, read_design

DESIGNS = Path(__file__).parent / "npu"
ACCEPTED = sorted((DESIGNS / "accepted").glob("*.mlir"))
PASS = DESIGNS / "accepted" / "passthrough_npu1.mlir"
# Words of aie-translate (mlir-aie, March 2026) for the two passthrough designs; `head` and `burst`
# are what differs.
WORDS = """
{head} 00000007 00000110 00000001 00000000 0001d000 00000030
00000400 00000000 00000000 00000000 {burst} 02000000 00000000 02000000
00000081 00000030 00000000 00000000 00000000 00000000 0001d004 00000000
00000000 00000000 00000000 00000000 00000000 00000000 0001d214 00000000
00000000 00000018 00000001 00000000 0001d020 00000030 00000400 00000000
00000000 00000000 {burst} 02000000 00000000 02000000 00000081 00000030
00000000 00000000 00000000 00000000 0001d024 00000000 00000001 00000000
00000000 00000000 00000000 00000000 0001d204 00000000 80000001 00000018
00000080 00000010 00000000 00010100
"""
HEADS = {1: ("06030100 00000104", "80000000"), 2: ("06040100 00000108", "c0000000")}
# Words and operations that the passes of mlir-aie make of the others.
COUNTS = {
    "passthrough": (68, 7),
    "matmul_int8": (128, 13),
    "attn_prefill_d256_1col": (612, 71),
    "attn_prefill_d256_4col": (804, 92),
    "attn_prefill_d256_8col": (1060, 120),
    "attn_decode_d256": (146, 18),
    "attn_pipeline_d256": (340, 39),
}


def words(text: str) -> list[str]:
    data = lower(parse_design(text).module).to_bytes()
    return [f"{word:08x}" for word in struct.unpack(f"<{len(data) // 4}I", data)]


def sequence(body: str, device: str = "npu1", more: str = "") -> Transaction:
    """One that takes two buffers, on a device with a tile of each kind."""
    text = f"""module {{ aie.device({device}) {{
      %shim = aie.tile(1, 0)
      %mem = aie.tile(1, 1)
      %core = aie.tile(1, 2)
      %held = aie.buffer(%mem) {{address = 1024 : i32, sym_name = "held"}} : memref<64xi32>
      %own = aie.buffer(%core) {{address = 4096 : i32, sym_name = "own"}} : memref<64xi32>
      %free = aie.lock(%mem, 2) {{init = 1 : i32}}
      %full = aie.lock(%mem, 3) {{init = 0 : i32}}
      {more}
      aie.runtime_sequence(%a : memref<64x64xi8>, %b : memref<256xi32>) {{
        {body}
      }} }} }}"""
    source = parse_design(text, "x.mlir")
    return lower(source.module, source=source)


@pytest.mark.parametrize("npu", HEADS)
def test_words_are_those_of_mlir_aie(npu: int) -> None:
    head, burst = HEADS[npu]
    text = (DESIGNS / "accepted" / f"passthrough_npu{npu}.mlir").read_text()
    assert words(text) == WORDS.format(head=head, burst=burst).split()


@pytest.mark.parametrize(
    "path", sorted((DESIGNS / "accepted").glob("*.mlir")), ids=lambda p: p.stem
)
def test_as_many_words_as_mlir_aie(path: Path) -> None:
    text = re.sub(r'\{sym_name = "args', '{address = 0 : i32, sym_name = "args', path.read_text())
    stream = lower(parse_design(text).module)
    (counts,) = (counts for stem, counts in COUNTS.items() if path.stem.startswith(stem))
    assert (len(stream.to_bytes()) // 4, len(stream.operations)) == counts
    assert parse_txn(stream.to_bytes()) == stream


def test_register_commands_are_those_of_mlir_aie() -> None:
    text = """module { aie.device(npu1) { aie.runtime_sequence(%a : memref<8xi32>) {
      aiex.npu.write32 {address = 0x1D214 : ui32, value = 5 : ui32}
      aiex.npu.sync {column = 0 : i32, row = 0 : i32, direction = 0 : i32,
        channel = 0 : i32, column_num = 1 : i32, row_num = 1 : i32}
      aiex.npu.address_patch {addr = 0x1D004 : ui32, arg_idx = 0 : i32, arg_plus = 0 : i32}
    } } }"""
    expected = """06030100 00000104 00000003 00000068 00000000 00000000 0001d214 00000000
    00000005 00000018 00000080 00000010 00000000 00010100 00000081 00000030 00000000 00000000
    00000000 00000000 0001d004 00000000 00000000 00000000 00000000 00000000"""
    assert words(text) == expected.split()


TILE = 1 << 25  # column 1, row 0
ALLOCATION = "aie.shim_dma_allocation @in(%shim, MM2S, 1)"
WORDS_OF_B, BYTES_OF_A = "memref<256xi32>", "memref<64x64xi8>"


def copy(view: str, attributes: str, kind: str = WORDS_OF_B) -> str:
    return f"aiex.npu.dma_memcpy_nd({view}) {{metadata = @in, {attributes}}} : {kind}"


def test_strides_and_repeats_have_their_registers() -> None:
    """Rows of 16 bytes, 4 rows, 8 times over the rows, all twice with a step."""
    body = copy("%a[0, 1, 0, 4][2, 8, 4, 16][1024, 128, 64, 1]", "id = 3", BYTES_OF_A)
    write, patch, push = sequence(body, more=ALLOCATION).operations
    assert write == BlockWrite(
        TILE | 0x1D060,
        (
            16 // 4 * 4 * 8,
            0,
            0,
            4 << 20,
            2 << 30 | 4 << 20 | (64 // 4 - 1),
            2 << 24 | (128 // 4 - 1),
            1 << 20 | (1024 // 4 - 1),
            1 << 25,
        ),
    )
    assert patch == Patch(TILE | 0x1D064, argument=0, offset=128 + 4)
    assert push == Write(TILE | 0x1D21C, 1 << 16 | 3)


def test_a_repeat_without_a_step_is_left_to_the_queue() -> None:
    copy = (
        "aiex.npu.dma_memcpy_nd(%b[0, 0, 0, 0][5, 1, 1, 256][0, 0, 0, 1]) {metadata = @in, id = 0}"
    )
    write, _, push = sequence(f"{copy} : memref<256xi32>", more=ALLOCATION).operations
    assert isinstance(write, BlockWrite) and write.data[6] == 0
    assert push == Write(TILE | 0x1D21C, 4 << 16)


def test_the_task_form_has_the_words_of_the_transfer() -> None:
    walk = ((1, 0), (2, 64), (2, 32), (16, 1))
    layout = ", ".join(f"<size = {size}, stride = {stride}>" for size, stride in walk)
    task = sequence(
        f"""%t = aiex.dma_configure_task_for @in {{
          aie.dma_bd(%b : memref<256xi32>, 0, 64, [{layout}]) {{bd_id = 5 : i32}}
        }} {{issue_token = true}}
        aiex.dma_start_task(%t)
        aiex.dma_await_task(%t)""",
        more=ALLOCATION,
    )
    transfer = copy("%b[0, 0, 0, 0][1, 2, 2, 16][0, 64, 32, 1]", "id = 5, issue_token = true")
    assert task == sequence(f"{transfer}\naiex.npu.dma_wait {{symbol = @in}}", more=ALLOCATION)


def test_tasks_take_the_lowest_descriptors_and_give_them_back() -> None:
    task = """%{0} = aiex.dma_configure_task(%shim, S2MM, 0) {{
        aie.dma_bd(%b : memref<256xi32>, 0, 4)
      }} {{issue_token = true}}
      aiex.dma_start_task(%{0})
      """
    body = task.format("x") + task.format("y") + "aiex.dma_await_task(%x)\n" + task.format("z")
    pushes = [op for op in sequence(body).operations if isinstance(op, Write)]
    assert [push.value & 0xF for push in pushes] == [0, 1, 0]
    with pytest.raises(DesignError, match="no free descriptor"):
        sequence("".join(task.format(f"t{n}") for n in range(17)))


@pytest.mark.parametrize(("device", "base"), [("npu1", 0), ("npu2", 512 * 1024)])
def test_a_chain_on_a_mem_tile(device: str, base: int) -> None:
    """Locks of its own begin at 64, and so does its memory on npu2, behind the western one."""
    body = """%t = aiex.dma_configure_task(%mem, MM2S, 0) {
        aie.use_lock(%full, AcquireGreaterEqual, 1)
        aie.dma_bd(%held : memref<64xi32>, 16, 32) {bd_id = 7 : i32}
        aie.use_lock(%free, Release, 1)
        aie.next_bd ^more
      ^more:
        aie.dma_bd(%held : memref<64xi32>, 0, 16)
        aie.end
      } {repeat_count = 3 : i32}
      aiex.dma_start_task(%t)"""
    first, point, second, _, push = sequence(body, device).operations
    tile = TILE | 1 << 20
    assert isinstance(first, BlockWrite) and isinstance(second, BlockWrite)
    assert first.address == tile | 0xA00E0
    assert first.data[:2] == (32, 0 << 20 | 1 << 19 | 64)
    assert first.data[7] == 1 << 31 | 1 << 24 | (64 + 2) << 16 | 1 << 15 | 0x7F << 8 | (64 + 3)
    assert point == MaskWrite(tile | 0xA00E4, (base + 1024 + 64) // 4, 0x7FFFF)
    assert second.address == tile | 0xA0000
    assert push == Write(tile | 0xA0634, 3 << 16 | 7)


def test_a_descriptor_on_a_core() -> None:
    body = """%t = aiex.dma_configure_task(%core, S2MM, 1) {
        aie.dma_bd(%own : memref<64xi32>, 8, 16)
          {packet = #aie.packet_info<pkt_type = 1, pkt_id = 5>}
      }
      aiex.dma_start_task(%t)"""
    write, point, push = sequence(body).operations
    tile = TILE | 2 << 20
    assert write == BlockWrite(
        tile | 0x1D000, (32 // 4 << 14 | 16, 1 << 30 | 5 << 19 | 1 << 16, 0, 0, 0, 1 << 25)
    )
    assert point == MaskWrite(tile | 0x1D000, (4096 + 32) // 4 << 14, 0xFFFC000)
    assert push == Write(tile | 0x1DE0C, 0)


def test_writes_to_buffers_locks_and_registers() -> None:
    body = """aiex.npu.rtp_write(@own, 3, -7)
      aiex.npu.write32 {buffer = @held, address = 2 : ui32, value = 9 : ui32}
      aiex.npu.maskwrite32 {address = 0x1D210 : ui32, column = 1 : i32, row = 0 : i32,
        value = 1 : ui32, mask = 3 : ui32}
      aiex.set_lock(%full, 4)"""
    assert sequence(body).operations == (
        Write(TILE | 2 << 20 | 4096 + 12, 0xFFFFFFF9),
        Write(TILE | 1 << 20 | 1024 + 8, 9),
        MaskWrite(TILE | 0x1D210, 1, 3),
        Write(TILE | 1 << 20 | 0xC0030, 4),
    )


def test_views_of_an_argument_begin_where_they_are_cut() -> None:
    body = """%cut = memref.subview %b[4] [32] [1]
        : memref<256xi32> to memref<32xi32, strided<[1], offset: 4>>
      %part = memref.reinterpret_cast %cut to offset: [0], sizes: [32], strides: [1]
        : memref<32xi32, strided<[1], offset: 4>> to memref<32xi32>
      """
    transfer = copy("%part[0, 0, 0, 8][1, 1, 1, 16][0, 0, 0, 1]", "id = 0", "memref<32xi32>")
    patch = sequence(body + transfer, more=ALLOCATION).operations[1]
    assert patch == Patch(TILE | 0x1D004, argument=1, offset=16 + 32)


def test_tokens_go_to_the_controller_of_the_tile() -> None:
    text = PASS.read_text().replace(
        "aie.tile(0, 0)",
        "aie.tile(0, 0) {controller_id = #aie.packet_info<pkt_type = 0, pkt_id = 15>}",
    )
    masks = [op for op in lower(parse_design(text).module).operations if isinstance(op, MaskWrite)]
    assert masks == [MaskWrite(0x1D200, 0xF00, 0x1F00)]


def test_fifos_take_channels_in_their_order() -> None:
    """An allocation by hand does not count, as in mlir-aie; a program of the tile does."""
    stream = lower(read_design(DESIGNS / "accepted" / "matmul_int8_1col_npu1.mlir").module)
    syncs = {(op.direction, op.channel) for op in stream.operations if isinstance(op, Sync)}
    pushes = {op.address for op in stream.operations if isinstance(op, Write)}
    assert syncs == {(0, 0)}
    assert pushes == {0x1D204, 0x1D214, 0x1D21C}


REFUSED = {
    "loop": (
        "%c = arith.constant 1 : index\n scf.for %i = %c to %c step %c { }",
        "x.mlir:12: scf.for in a runtime sequence is not lowered",
    ),
    "unknown name": ("aiex.npu.dma_wait {symbol = @no}", "@no is not a FIFO or allocation"),
    "no address": ("aiex.npu.rtp_write(@nowhere, 0, 1)", "buffer @nowhere has no address"),
    "no buffer": ("aiex.npu.rtp_write(@no, 0, 1)", "there is no buffer @no"),
    "device by name": ("aiex.npu.load_pdi {device_ref = @main}", "gets its number from aiecc"),
    "burst": (
        copy("%b[0,0,0,0][1,1,1,4][0,0,0,1]", "id = 0, burst_length = 512 : i64"),
        "burst_length 512: npu1 has bursts of 64 to 256 bytes",
    ),
    "repeats": (
        copy("%b[0,0,0,0][257,1,1,4][0,0,0,1]", "id = 0"),
        "repeated 0 to 255 times, not 256",
    ),
    "steps": (
        copy("%b[0,0,0,0][65,1,1,4][4,0,0,1]", "id = 0"),
        "iteration_size: 64 does not fit into 6 bits",
    ),
    "half words": (
        copy("%a[0,0,0,0][1,1,1,6][0,0,0,1]", "id = 0", BYTES_OF_A),
        "6 elements of 8 bits are no whole number of 4-byte words",
    ),
    "no token": (
        "%t = aiex.dma_configure_task_for @in { aie.dma_bd(%b : memref<256xi32>, 0, 4) }\n"
        "aiex.dma_await_task(%t)",
        "sends no token",
    ),
}


def test_controllers_of_a_compiled_sequence_are_taken_over() -> None:
    made = attention(plan(Variant("npu1", 256, 8), 4, 1, 32))
    control = MaskWrite(0x1D200, 0xF00, 0x1F00)
    like = Transaction(operations=(control,), generation=3, columns=4)
    instructions = lower(made, like).operations
    assert tuple(op for op in instructions if op != control) == lower(made).operations
    tokens = [i for i, op in enumerate(instructions) if getattr(op, "address", 0) == 0x1D204]
    assert tokens and all(instructions[i - 1] == control for i in tokens)


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_words_is_refused_with_its_line(case: str) -> None:
    body, message = REFUSED[case]
    more = f'{ALLOCATION} %n = aie.buffer(%core) {{sym_name = "nowhere"}} : memref<4xi32>'
    with pytest.raises(DesignError, match=re.escape(message)) as caught:
        sequence(body, more=more)
    assert re.match(r"x\.mlir:\d+: ", str(caught.value))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "insts.bin"
    assert main(["npu", "lower", str(PASS), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 7 operations, 68 words\n"
    assert len(out.read_bytes()) == 68 * 4
    assert [path.name for path in tmp_path.iterdir()] == ["insts.bin"]


def test_command_line_refuses_what_would_hang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = DESIGNS / "wrong" / "queue_overflow.mlir", tmp_path / "insts.bin"
    assert main(["npu", "lower", str(bad), "-o", str(out)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"uq: {bad}:") and "sequence.queue" in message
    assert main(["npu", "lower", str(PASS), "-o", str(tmp_path / "no" / "x")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["npu", "lower", str(PASS), "-o", str(out), "--sequence", "other"]) == 1
    assert "no runtime sequence @other; the design has sequence" in capsys.readouterr().err
    assert not out.exists()
