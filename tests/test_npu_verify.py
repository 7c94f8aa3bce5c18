"""The hardware verifier: reference designs, resources, command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from uq.cli import main
from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.source import parse_design, read_design
from uq.kernels.npu.target import Place
from uq.kernels.npu.verify import Report, verify

DESIGNS = Path(__file__).parent / "npu"
ACCEPTED = sorted((DESIGNS / "accepted").glob("*.mlir"))
OWN = [DESIGNS / f"{stem}.mlir" for stem in ("lowlevel", "legacy", "reconfigure")]
PASS = DESIGNS / "accepted" / "passthrough_npu1.mlir"

# What the tools of mlir-aie (March 2026) say to each wrong design is in its first line; those
# marked `silent` they accept.
WRONG = {
    "acquire_in_if": "fifo.conditional",  # silent
    "core_17_bd_blocks": "dma.blocks",
    "core_four_dims": "bd.dimensions",
    "core_over_64k": "memory.core",
    "core_three_inputs": "tile.channels",
    "depth_9_reduced": "fifo.depth-reduced",  # silent
    "dynamic_bound_static_lowering": "fifo.loop-bound",
    "far_buffer": "buffer.reach",
    "fifo_never_filled": "fifo.filled",  # silent
    "fifo_no_consumer": "fifo.consumers",
    "flow_to_channel_2": "flow.port",
    "kernel_type_mismatch": "kernel.types",
    "link_without_shared_tile": "link.tile",
    "lock_id_16": "lock.id",
    "mem_over_512k": "memory.memtile",  # silent
    "queue_overflow": "sequence.queue",  # silent
    "release_unacquired": "fifo.release",
    "shim_bd_id_16": "sequence.descriptor",  # silent
    "stride_not_4_bytes": "bd.stride-bytes",
    "tile_after_core": "tile.order",
    "tile_out_of_range": "tile.range",
    "wait_before_input": "sequence.early-wait",  # silent
    "wait_without_token": "sequence.token",  # silent
    "wrap_too_large": "bd.wrap",
    "wrong_element_type": "fifo.element-type",
    "wrong_sequence_type": "sequence.element-type",  # silent, and it works
}
WARNED = {"depth_9_reduced", "mem_over_512k", "wrong_sequence_type"}


def report(text: str, **options: str | int | None) -> Report:
    (only,) = verify(parse_design(text, "x"), **options)  # type: ignore[arg-type]
    return only


@pytest.mark.parametrize("path", [*ACCEPTED, *OWN], ids=lambda path: path.stem)
def test_good_designs_have_no_findings(path: Path) -> None:
    for result in verify(read_design(path)):
        assert [f"{f.line}: {f.rule}: {f.message}" for f in result.findings] == []
        assert result.accepted


@pytest.mark.parametrize("stem", WRONG)
def test_wrong_designs_break_their_rule(stem: str) -> None:
    (result,) = verify(read_design(DESIGNS / "wrong" / f"{stem}.mlir"))
    assert WRONG[stem] in {finding.rule for finding in result.findings}
    assert result.accepted == (stem in WARNED)


def test_every_wrong_design_has_its_rule() -> None:
    assert {path.stem for path in (DESIGNS / "wrong").glob("*.mlir")} == set(WRONG)


def test_the_line_of_a_finding_is_that_of_its_operation() -> None:
    text = (DESIGNS / "wrong" / "lock_id_16.mlir").read_text()
    (finding,) = report(text).findings
    assert "aie.lock(%core, 16)" in text.split("\n")[finding.line - 1]


# Buffers, bytes, descriptors, locks, S2MM and MM2S channels of each row, as the passes of
# mlir-aie (March 2026) allocate them; every column of a design takes the same.
RESOURCES = {
    "passthrough": {0: (0, 0, 2, 4, 1, 1), 2: (4, 4096, 4, 4, 1, 1)},
    "matmul_int8": {
        0: (0, 0, 4, 6, 1, 2),
        1: (6, 172_032, 36, 18, 6, 6),
        **dict.fromkeys((2, 3, 4, 5), (5, 32_768, 5, 6, 2, 1)),
    },
    "attn_prefill_d256": {
        0: (0, 0, 6, 6, 1, 2),
        1: (6, 114_688, 36, 18, 6, 6),
        **dict.fromkeys((2, 3, 4, 5), (9, 46_540, 4, 6, 2, 1)),
    },
    "attn_prefill_d256_8col": {  # fewer query blocks in each column, so fewer transfers
        0: (0, 0, 4, 6, 1, 2),
        1: (6, 114_688, 36, 18, 6, 6),
        **dict.fromkeys((2, 3, 4, 5), (9, 46_540, 4, 6, 2, 1)),
    },
    "attn_decode_d256": {
        0: (0, 0, 3, 6, 1, 2),
        1: (2, 65_536, 16, 8, 1, 4),
        2: (7, 21_716, 3, 6, 2, 0),
        3: (7, 21_720, 3, 6, 2, 0),
        4: (7, 21_720, 3, 6, 2, 0),
        5: (8, 23_768, 4, 6, 2, 1),
    },
    "attn_pipeline_d256": {
        0: (0, 0, 6, 6, 1, 2),
        1: (2, 32_768, 8, 4, 1, 2),
        2: (6, 32_780, 3, 6, 2, 0),
        3: (4, 2824, 0, 2, 0, 0),
        4: (6, 57_356, 4, 4, 1, 1),
    },
}


@pytest.mark.parametrize("path", ACCEPTED, ids=lambda path: path.stem)
def test_resources_are_those_of_the_real_passes(path: Path) -> None:
    rows = RESOURCES[re.sub(r"(_[14]col)?_npu\d$", "", path.stem)]
    (result,) = verify(read_design(path))
    counted = re.search(r"(\d)col", path.stem)
    columns = int(counted[1]) if counted else 1
    expected = {Place(column, row): rows[row] for column in range(columns) for row in rows}
    assert {
        place: (
            used.buffers,
            used.nbytes,
            used.descriptors,
            used.locks,
            used.channels(Direction.S2MM),
            used.channels(Direction.MM2S),
        )
        for place, used in result.usage.items()
    } == expected


def test_neighbours_share_buffers_where_both_reach_them() -> None:
    """A core reaches memory to its west, not to its east: the western tile has the buffers."""
    for producer, consumer, holder in (((1, 2), (2, 2), (1, 2)), ((2, 2), (1, 2), (1, 2))):
        text = f"""module {{ aie.device(npu1) {{
          %a = aie.tile{producer}
          %b = aie.tile{consumer}
          aie.objectfifo @f(%a, {{%b}}, 3 : i32) : !aie.objectfifo<memref<8xi32>> }} }}"""
        used = report(text).usage
        assert {tuple(place): u.buffers for place, u in used.items() if u.buffers} == {holder: 3}
        assert all(u.channels(d) == 0 for u in used.values() for d in Direction)


def test_reserved_memory_counts() -> None:
    path = DESIGNS / "accepted" / "attn_pipeline_d256_1col_npu1.mlir"
    assert verify(read_design(path), reserved=65536 - 1024 - 57356)[0].accepted
    (result,) = verify(read_design(path), reserved=65536 - 1024 - 57356 + 1)
    assert [finding.rule for finding in result.findings] == ["memory.core"]


def test_another_device_has_other_columns() -> None:
    path = DESIGNS / "accepted" / "attn_prefill_d256_8col_npu2.mlir"
    (result,) = verify(read_design(path), device="npu1")
    assert {finding.rule for finding in result.findings} >= {"tile.range"}
    assert not result.accepted


def test_unknown_devices_are_refused() -> None:
    text = "module { aie.device(xcvc1902) { } }"
    assert [finding.rule for finding in report(text).findings] == ["device.name"]
    with pytest.raises(DesignError, match="unknown device npu9; use npu1, "):
        report(text, device="npu9")
    with pytest.raises(DesignError, match="no aie.device"):
        verify(parse_design("module { }", "x"))


def test_broken_operations_are_findings() -> None:
    text = (
        "module { aie.device(npu1) { aiex.npu.sync {column = 0 : i32}\n aie.packet_flow(3) { } } }"
    )
    assert [(f.line, f.rule) for f in report(text).findings] == [
        (1, "ir.operation"),
        (2, "ir.operation"),
    ]


def test_use_before_definition_is_a_finding() -> None:
    text = "module { aie.device(npu1) {\naie.cascade_flow(%a, %a)\n%a = aie.tile(0, 2) } }"
    assert [(f.line, f.rule) for f in report(text).findings] == [(2, "ir.operation")]


def test_use_before_definition_beside_a_device_is_a_finding() -> None:
    text = "module { aie.device(npu1) { }\naie.cascade_flow(%a, %a)\n%a = aie.tile(0, 2) }"
    assert [(f.line, f.rule) for f in report(text).findings] == [(2, "ir.operation")]


def test_use_inside_of_its_own_definition_is_a_finding() -> None:
    text = """module { aie.device(npu2) {
      aie.runtime_sequence() {
        %t = aiex.dma_configure_task_for @out {
          aiex.dma_start_task(%t)
          aie.end
        }
      }
    } }"""
    assert (4, "ir.operation") in {(f.line, f.rule) for f in report(text).findings}


def test_deep_loops_do_not_take_exponential_time() -> None:
    loops = "".join(f"scf.for %i{n} = %c to %c step %c {{\n" for n in range(60))
    text = f"""module {{ aie.device(npu1) {{
      %s = aie.tile(0, 0)
      %t = aie.tile(0, 2)
      aie.objectfifo @f(%s, {{%t}}, 2 : i32) : !aie.objectfifo<memref<4xi32>>
      aie.core(%t) {{
        %c = arith.constant 1 : index
        {loops} aie.objectfifo.release @f(Consume, 1) {"}" * 60}
        aie.end
      }} }} }}"""
    assert "fifo.release" in {finding.rule for finding in report(text).findings}


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = PASS, DESIGNS / "wrong" / "lock_id_16.mlir"
    assert main(["npu", "verify", str(good)]) == 0
    assert capsys.readouterr().out.endswith("accepted for npu1: 0 errors, 0 warnings\n")
    assert main(["npu", "verify", str(bad)]) == 1
    first = capsys.readouterr().out.split("\n")[0]
    assert first.startswith(f"{bad}:26: error: lock.id: lock 16: this tile has locks 0 to 15 [")
    assert main(["npu", "verify", str(bad), "--device", "npu2", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["devices"][0]["device"] == "npu2"
    assert printed["devices"][0]["findings"][0]["rule"] == "lock.id"
    assert printed["devices"][0]["tiles"][2]["bytes"] == 4096


def test_command_line_refuses_what_is_no_design(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.mlir"
    path.write_text("module {")
    assert main(["npu", "verify", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"uq: {path}:1:")


def test_command_line_without_xdsl_says_what_to_install() -> None:
    run = "import sys; sys.modules['xdsl'] = None; from uq.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "npu", "verify", str(PASS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "uq: uq npu needs the package xdsl; run: pip install 'unicorn-quant[npu]'\n"
    )
