"""Runtime sequences as instruction words, beside those of mlir-aie's own translation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_xdna_txn import GOLDEN
from uq.cli import main
from uq.errors import DesignError
from uq.formats.xdna.txn import MaskWrite, Transaction, parse_txn
from uq.kernels.npu.kernels.attention.design import attention
from uq.kernels.npu.kernels.attention.plan import plan
from uq.kernels.npu.kernels.attention.variant import Variant
from uq.kernels.npu.lowering import lower
from uq.kernels.npu.source import parse_design, read_design

ACCEPTED = Path(__file__).parent / "npu/accepted"
# Words and operations that aie-translate of March 2026 wrote for these designs.
SIZES = {
    "attn_pipeline_d256_1col_npu1": (340, 39),
    "attn_pipeline_d256_1col_npu2": (340, 39),
    "attn_prefill_d256_1col_npu1": (612, 71),
    "attn_prefill_d256_1col_npu2": (612, 71),
    "attn_prefill_d256_4col_npu1": (804, 92),
    "attn_prefill_d256_8col_npu2": (1060, 120),
    "matmul_int8_1col_npu1": (128, 13),
    "matmul_int8_1col_npu2": (128, 13),
}


@pytest.mark.parametrize("device", ["npu1", "npu2"])
def test_passthrough_has_the_golden_words(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "insts.bin"
    design = ACCEPTED / f"passthrough_{device}.mlir"
    assert main(["npu", "lower", str(design), "-o", str(out)]) == 0
    assert "7 operations, 68 words" in capsys.readouterr().out
    assert parse_txn(out.read_bytes()) == GOLDEN[f"passthrough-{device}"][1]


@pytest.mark.parametrize("name", SIZES)
def test_as_many_words_as_mlir_aie_writes(name: str) -> None:
    stream = lower(read_design(ACCEPTED / f"{name}.mlir").module)
    assert (len(stream.to_bytes()) // 4, len(stream.operations)) == SIZES[name]


SEQUENCE = """
module {{ aie.device(npu2) {{
  %t0 = aie.tile(3, 0)
  %t1 = aie.tile(3, 2)
  aie.objectfifo @other(%t0, {{%t1}}, 2 : i32) : !aie.objectfifo<memref<64xi8>>
  aie.objectfifo @in(%t0, {{%t1}}, 2 : i32) : !aie.objectfifo<memref<64xi8>>
  aie.runtime_sequence(%a : memref<4096xi8>, %b : memref<4096xi8>) {{
    {}
  }}
}} }}
"""
COPY = (
    "aiex.npu.dma_memcpy_nd (%b[{}][{}][{}]) {{id = 5 : i64, metadata = @in{}}} : memref<4096xi8>"
)


def lowered(*lists: str, more: str = "") -> tuple[int, ...]:
    """All words of one transfer behind the header."""
    text = SEQUENCE.format(COPY.format(*lists, more))
    data = lower(parse_design(text).module).to_bytes()
    return tuple(int.from_bytes(data[i : i + 4], "little") for i in range(16, len(data), 4))


def test_fields_of_a_strided_transfer() -> None:
    """By hand from the table of registers: 3 times 4 x 2 runs of 16 bytes."""
    words = lowered("0, 1, 0, 8", "3, 4, 2, 16", "1024, 256, 64, 1", more=", issue_token = true")
    column, bd = 3 << 25, 0x1D000 + 5 * 0x20
    assert words[:4] == (1, 0, column + bd, 48)
    length, steps = 4 * 2 * 16 // 4, (64 // 4 - 1, 256 // 4 - 1, 1024 // 4 - 1)
    assert words[4:8] == (length, 0, 0, 4 << 20)
    assert words[8:10] == (3 << 30 | 2 << 20 | steps[0], 2 << 24 | steps[1])
    assert words[10:12] == (2 << 20 | steps[2], 1 << 25)
    assert words[12:24] == (0x81, 48, 0, 0, 0, 0, column + bd + 4, 0, 1, 0, 256 + 8, 0)
    # @in is the second FIFO of its tile that leaves it: channel 1
    assert words[24:] == (0, 0, column + 0x1D21C, 0, 1 << 31 | 2 << 16 | 5, 24)


def test_a_stride_of_zero_repeats_the_task_alone() -> None:
    words = lowered("0, 0, 0, 0", "7, 1, 1, 64", "0, 0, 0, 1")
    assert words[4:12] == (16, 0, 0, 0, 3 << 30, 2 << 24, 0, 1 << 25)
    assert words[-2] == 6 << 16 | 5


def test_controllers_of_a_compiled_sequence_are_taken_over() -> None:
    made = attention(plan(Variant("npu1", 256, 8), 4, 1, 32))
    plain = lower(made)
    control = MaskWrite(0x1D200, 0xF00, 0x1F00)
    like = Transaction(operations=(control,), generation=3, columns=4)
    words = lower(made, like).operations
    assert tuple(op for op in words if op != control) == plain.operations
    tokens = [i for i, op in enumerate(words) if getattr(op, "address", 0) == 0x1D204]
    assert tokens and all(words[i - 1] == control for i in tokens)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("aiex.npu.dma_wait {symbol = @nothing}", "@nothing is neither a FIFO nor an allocation"),
        ("aiex.npu.write32 {address = 4 : ui32, value = 1 : ui32}", "write32 is not lowered"),
        (COPY.format("0, 0, 0, 0", "1, 1, 1, 6", "0, 0, 0, 1", ""), "a transfer of 6 bytes"),
        (COPY.format("0, 0, 0, 0", "65, 1, 1, 4", "4, 0, 0, 1", ""), "repeated 1 to 64 times"),
    ],
)
def test_what_is_not_lowered_is_refused(sequence: str, message: str) -> None:
    with pytest.raises(DesignError, match=message):
        lower(parse_design(SEQUENCE.format(sequence)).module)
