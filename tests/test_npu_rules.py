"""The rules of the hardware verifier: each is broken by one seeded violation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from uq.kernels.npu.source import parse_design
from uq.kernels.npu.verify import RULES, verify
from uq.kernels.npu.verify.rule import Rule

DESIGNS = Path(__file__).parent / "npu"
PASS, MATMUL = "accepted/passthrough_npu1", "accepted/matmul_int8_1col_npu1"
LOW, OLD, TWO = "lowlevel", "legacy", "reconfigure"


class Seed(NamedTuple):
    """An edit of a design without findings that breaks one rule."""

    rule: str
    design: str
    old: str
    new: str
    more: tuple[tuple[str, str], ...] = ()


def after(anchor: str, text: str) -> tuple[str, str]:
    return anchor, f"{anchor}\n{text}"


TILE2 = "    %far = aie.tile(2, 4)\n"
FIFO = "aie.objectfifo @src(%shim, {%core}, 2 : i32) : !aie.objectfifo<memref<256xi32>>\n"
OUT = "aiex.npu.dma_wait {symbol = @dst}"
IN = "aiex.npu.dma_memcpy_nd (%in[0, 0, 0, 0][1, 1, 1, 1024][0, 0, 0, 1]) {metadata = @src, id = 0"
FILL = "aie.dma_bd(%in : memref<64xi32>, 0, 64, [<size = 4, stride = 16>, <size = 16, stride = 1>])"
HALF = "aie.dma_bd(%stage : memref<16x16xi32>, 0, 128)"
LINK_B = "[@b_in] -> [@b2, @b3, @b4, @b5] ([] [0, 4096, 8192, 12288])"
EARLY = IN.replace("@src, id = 0", "@dst, id = 3") + " : i64} : memref<1024xi32>"
CASCADE = "aie.cascade_flow(%core, %east)"
LINK_IN = "[@in] -> [@fwd] ([] [])"
UNDER_IF = """%t = arith.constant true
  scf.if %t {
    %u = aie.objectfifo.acquire @out(Produce, 1) : !aie.objectfifosubview<memref<16xi8>>
  }
  """
AWAIT = "aiex.dma_await_task(%task)"
TASK = """%more{0} = aiex.dma_configure_task(%shim, MM2S, 0) {{
        aie.dma_bd(%a : memref<256xi32>, 0, 4)
      }}
      aiex.dma_start_task(%more{0})
      """

SEEDS = [
    Seed("tile.range", PASS, "aie.tile(0, 0)", "aie.tile(4, 0)"),
    Seed("tile.operand", LOW, CASCADE, "aie.cascade_flow(%core, %full)"),
    Seed("tile.order", PASS, "    aie.runtime_seq", TILE2 + "    aie.runtime_seq"),
    Seed("tile.kind", LOW, "aie.memtile_dma(%mem)", "aie.memtile_dma(%core)"),
    Seed("tile.shim", LOW, "@to_array(%shim, MM2S", "@to_array(%mem, MM2S"),
    Seed("tile.once", LOW, *after("%mem_east = aie.mem(%east) {", "aie.end }\naie.mem(%east) {")),
    Seed(
        "tile.channels", PASS, *after(FIFO, FIFO.replace("@src", "@x") + FIFO.replace("@src", "@y"))
    ),
    Seed(
        "tile.descriptors", PASS, "@src(%shim, {%core}, 2 : i32)", "@src(%shim, {%core}, [2, 15])"
    ),
    Seed("tile.locks", LOW, "%mem_free = ", "aie.lock(%core)\n" * 14 + "%mem_free = "),
    Seed("lock.id", LOW, "aie.lock(%mem, 1)", "aie.lock(%mem, 64)"),
    Seed("lock.once", LOW, "%full = aie.lock(%core, 1)", "%full = aie.lock(%core, 0)"),
    Seed("lock.value", LOW, "(%mem, 0) {init = 2 : i32}", "(%mem, 0) {init = 64 : i32}"),
    Seed("lock.operand", LOW, "aie.use_lock(%free, Release)", "aie.use_lock(%core, Release)"),
    Seed("lock.reach", LOW, "aie.use_lock(%free, Release)", "aie.use_lock(%mem_free, Release)"),
    Seed("buffer.address", LOW, "address = 4096", "address = 65400"),
    Seed("buffer.overlap", LOW, '{sym_name = "in"}', '{address = 4000 : i32, sym_name = "in"}'),
    Seed("buffer.reach", LOW, "memref.load %in[%i]", "memref.load %out[%i]"),
    Seed("memory.core", LOW, "stack_size = 2048", "stack_size = 65536"),
    Seed(
        "memory.memtile", LOW, "%stage = ", "%w = aie.buffer(%mem) : memref<131072xi32>\n%stage = "
    ),
    Seed("flow.port", LOW, "aie.flow(%mem, DMA : 1,", "aie.flow(%mem, DMA : 6,"),
    Seed("flow.merge", LOW, "DMA : 1, %core, DMA : 1)", "DMA : 1, %core, DMA : 0)"),
    Seed("packet.id", LOW, "aie.packet_flow(4)", "aie.packet_flow(32)"),
    Seed("packet.ends", LOW, "aie.packet_dest<%shim, South : 0>", ""),
    Seed("cascade.neighbour", LOW, CASCADE, "aie.cascade_flow(%east, %core)"),
    Seed("cascade.once", LOW, *after(CASCADE, CASCADE)),
    Seed("dma.channel", LOW, "aie.dma_start(S2MM, 1,", "aie.dma_start(S2MM, 2,"),
    Seed("dma.blocks", LOW, "aie.dma(MM2S, 1) [", "aie.dma(MM2S, 1) [" + f"{{ {HALF} }}, " * 48),
    Seed("dma.repeat", LOW, "repeat_count = 3", "repeat_count = 256"),
    Seed("dma.bank", LOW, "{bd_id = 24 : i32}", "{bd_id = 23 : i32}"),
    Seed("dma.descriptor-locks", LOW, *after(HALF, "aie.use_lock(%mem_free, Release, 1)")),
    Seed("dma.one-descriptor", LOW, HALF, ""),
    Seed("bd.empty", LOW, "aie.dma(MM2S, 1) [{", "aie.dma(MM2S, 1) []\n%x = aie.dma(MM2S, 1) [{"),
    Seed("bd.id", LOW, "bd_id = 4 : i32", "bd_id = 16 : i32"),
    Seed("bd.buffer", LOW, "aie.dma_bd(%out : memref", "aie.dma_bd(%in : memref"),
    Seed("bd.lock", LOW, "(%east_full, Acq", "(%full, Acq"),
    Seed(
        "bd.dimensions",
        LOW,
        FILL,
        FILL.replace("[", "[<size = 1, stride = 0>, <size = 1, stride = 0>, "),
    ),
    Seed("bd.wrap", PASS, IN, IN.replace("[1, 1, 1, 1024]", "[1, 1, 2, 1024]")),
    Seed("bd.size", PASS, IN, IN.replace("[1, 1, 1, 1024]", "[1, 1, 0, 1024]")),
    Seed("bd.iteration", PASS, IN, IN.replace("[1, 1, 1, 1024]", "[65, 1, 1, 1024]")),
    Seed("bd.step", LOW, FILL, FILL.replace("stride = 16", "stride = 8193")),
    Seed("bd.stride-bytes", OLD, "<size = 4, stride = 4>", "<size = 4, stride = 3>"),
    Seed(
        "bd.length-bytes",
        OLD,
        "<size = 4, stride = 4>, <size = 4,",
        "<size = 2, stride = 4>, <size = 6,",
    ),
    Seed("bd.bounds", LOW, FILL, FILL.replace("stride = 16", "stride = 20")),
    Seed("bd.length", LOW, HALF, HALF.replace("128)", "131072)")),
    Seed("bd.padding", LOW, FILL, FILL[:-1] + ", [<const_pad_before = 1, const_pad_after = 0>])"),
    Seed("fifo.consumers", PASS, "@src(%shim, {%core}", "@src(%shim, {}"),
    Seed("fifo.depth", PASS, "@src(%shim, {%core}, 2 : i32)", "@src(%shim, {%core}, [2, 2, 2])"),
    Seed("fifo.object", OLD, "!aie.objectfifo<memref<16xi8>>", "!aie.objectfifo<memref<17xi8>>"),
    Seed(
        "fifo.depth-reduced", PASS, "@src(%shim, {%core}, 2 : i32)", "@src(%shim, {%core}, 3 : i32)"
    ),
    Seed("fifo.filled", PASS, "metadata = @src", "metadata = @dst"),
    Seed("fifo.drained", PASS, "metadata = @dst", "metadata = @src"),
    Seed("fifo.acquired", OLD, "aie.objectfifo.acquire @seed", "aie.objectfifo.acquire @out"),
    Seed(
        "fifo.layout-ends",
        PASS,
        "@src(%shim,",
        "@src(%shim dimensionsToStream [<size = 4, stride = 1>],",
    ),
    Seed("link.symbol", OLD, "[@in] -> [@fwd]", "[@inn] -> [@fwd]"),
    Seed("link.tile", OLD, "[@in] -> [@fwd]", "[@in] -> [@out]"),
    Seed("link.kind", MATMUL, "[@b_in] -> [@b2", "[@b_in, @a_in] -> [@b2"),
    Seed("link.once", OLD, *after(LINK_IN, f"aie.objectfifo.link {LINK_IN}")),
    Seed("link.offsets", MATMUL, LINK_B, LINK_B.replace(", 12288", "")),
    Seed("link.parts", MATMUL, LINK_B, LINK_B.replace("12288", "12292")),
    Seed("link.coverage", MATMUL, LINK_B, "[@b_in] -> [@b2, @b3, @b4] ([] [0, 4096, 8192])"),
    Seed("fifo.symbol", PASS, "release @src(", "release @source("),
    Seed("fifo.end", PASS, "release @src(Consume, 1)", "release @src(Produce, 1)"),
    Seed(
        "fifo.element-type",
        OLD,
        "!aie.objectfifosubview<memref<4xi8>>",
        "!aie.objectfifosubview<memref<4xi16>>",
    ),
    Seed("fifo.count", OLD, "acquire @seed(Produce, 1)", "acquire @seed(Produce, 0)"),
    Seed("fifo.index", PASS, "%sv[0]", "%sv[1]"),
    Seed("fifo.release", OLD, "release @fwd(Consume, 2)", "release @fwd(Consume, 3)"),
    Seed("fifo.unreleased", OLD, "aie.objectfifo.release @seed(Produce, 1)", ""),
    Seed("fifo.conditional", OLD, "%e = aie", UNDER_IF + "%e = aie"),
    Seed(
        "fifo.loop-bound",
        OLD,
        "to %c8 step",
        "to %end step",
        (("scf.for", "%end = arith.addi %c1, %c8 : index\nscf.for"),),
    ),
    Seed("kernel.declared", OLD, "func.call @work", "func.call @wrok"),
    Seed(
        "kernel.types",
        OLD,
        "@work(memref<16xi8>, memref<16xi8>)",
        "@work(memref<16xi8>, memref<8xi8>)",
    ),
    Seed("kernel.object", OLD, ' {link_with = "work.o"}', ""),
    Seed("sequence.symbol", PASS, OUT, "aiex.npu.dma_wait {symbol = @nothing}"),
    Seed("sequence.lists", PASS, IN, IN.replace("[0, 0, 0, 1]", "[0, 0, 1]")),
    Seed("sequence.descriptor", PASS, "id = 1 : i64", "id = 16 : i64"),
    Seed("sequence.token", PASS, *after(OUT, OUT)),
    Seed("sequence.early-wait", PASS, IN, f"{EARLY}\n{OUT}\n{IN}"),
    Seed("sequence.queue", LOW, AWAIT, "".join(TASK.format(n) for n in range(4)) + AWAIT),
    Seed("sequence.reuse", PASS, "id = 1 : i64", "id = 0 : i64"),
    Seed("sequence.unawaited", PASS, OUT, ""),
    Seed("sequence.bounds", PASS, IN, IN.replace("[0, 0, 0, 0]", "[0, 0, 0, 4]")),
    Seed(
        "sequence.element-type",
        PASS,
        "%in : memref<1024xi32>",
        "%in : memref<1024xf32>",
        ((": i64} : memref<1024xi32>", ": i64} : memref<1024xf32>"),),
    ),
    Seed("sequence.objects", PASS, IN, IN.replace("1024]", "1000]")),
    Seed("task.operand", LOW, AWAIT, "aiex.dma_await_task(%shim)"),
    Seed("task.channel", LOW, "configure_task(%shim, S2MM, 1)", "configure_task(%shim, S2MM, 2)"),
    Seed("task.started", LOW, "aiex.dma_start_task(%direct)", ""),
    Seed("task.freed", LOW, *after("aiex.dma_free_task(%task)", "aiex.dma_start_task(%task)")),
    Seed("task.pool", LOW, AWAIT, "".join(TASK.format(n) for n in range(16)) + AWAIT),
    Seed("rtp.buffer", LOW, "rtp_write(@table, 3", "rtp_write(@table, 4"),
    Seed("register.address", LOW, "address = 0x1d210", "address = 0x1d211"),
    Seed("configure.device", TWO, "aiex.configure @add", "aiex.configure @sub"),
    Seed("run.sequence", TWO, "aiex.run @twice(%part)", "aiex.run @thrice(%part)"),
    Seed("register.descriptor", TWO, "bd_id = 3", "bd_id = 16"),
    Seed("register.value", LOW, "value = 5 : ui32", "value = 4294967296 : i64"),
    Seed("patch.argument", LOW, "arg_idx = 1", "arg_idx = 2"),
    Seed("sync.channel", LOW, "direction = 1", "direction = 2"),
    Seed(
        "queue.push",
        LOW,
        "repeat_count = 0 : i32, bd_id = 5",
        "repeat_count = 256 : i32, bd_id = 5",
    ),
]


def broken(seed: Seed) -> str:
    text = (DESIGNS / f"{seed.design}.mlir").read_text()
    for old, new in ((seed.old, seed.new), *seed.more):
        assert old in text
        text = text.replace(old, new, 1)
    return text


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.rule)
def test_a_seeded_violation_breaks_its_rule(seed: Seed) -> None:
    reports = verify(parse_design(broken(seed)))
    found = [f for report in reports for f in report.findings if f.rule == seed.rule]
    rule = next(rule for rule in RULES if rule.id == seed.rule)
    assert found
    assert {(f.severity, f.source) for f in found} == {(rule.severity, rule.source)}


def test_every_rule_has_a_seeded_violation() -> None:
    assert sorted({seed.rule for seed in SEEDS}) == sorted(rule.id for rule in RULES)


def test_rule_ids_are_unique_and_sentences_end() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert all(rule.sentence.endswith(".") and rule.source for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_the_readme_lists_every_rule(rule: Rule) -> None:
    readme = (Path(__file__).parents[1] / "kernels" / "npu" / "README.md").read_text()
    assert f"| `{rule.id}` | {rule.severity} | {rule.sentence} | {rule.source} |" in readme
