"""Builds with strict doubles of the tools; neither mlir-aie nor Peano took part."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import fake_tools
from uq.cli import main
from uq.errors import BundleError, DesignError, ToolMissing, UsageError
from uq.formats.xdna.metadata import parse_metadata
from uq.formats.xdna.partition import parse_partition
from uq.formats.xdna.pdi import parse_pdi
from uq.formats.xdna.records import Window
from uq.formats.xdna.txn import parse_txn
from uq.formats.xdna.xclbin import Kind, parse_xclbin
from uq.kernels.npu.source import parse_design, read_design
from uq.kernels.npu.target import Place
from uq.kernels.npu.toolchain.find import Toolchain, find_toolchain
from uq.kernels.npu.toolchain.job import Job, prepare
from uq.kernels.npu.toolchain.package import write_pdi, write_xclbin
from uq.kernels.npu.toolchain.run import Built, ToolFailed, build
from uq.kernels.npu.toolchain.texts import for_peano, with_elfs

DESIGNS = Path(__file__).parent / "npu"
PASSTHROUGH = DESIGNS / "accepted/passthrough_npu2.mlir"
MATMUL = DESIGNS / "accepted/matmul_int8_1col_npu2.mlir"  # links kernels
PEANO = ("clang", "opt", "llc")
DRIVER = ("aiecc", "xclbinutil", "bootgen", *PEANO)
STAGES = ("aie-opt", "aie-translate", "xclbinutil", "bootgen", *PEANO)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Toolchain]:
    """Put doubles of these tools into folders as wheels have them."""
    monkeypatch.setenv("UQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls.log"))
    monkeypatch.setenv("XILINX_XRT", str(tmp_path / "site/mlir_aie"))

    def install(*names: str) -> Toolchain:
        shutil.rmtree(tmp_path / "site", ignore_errors=True)
        for name in names:
            wheel = "llvm-aie" if name in PEANO else "mlir_aie"
            tool = tmp_path / "site" / wheel / "bin" / name
            tool.parent.mkdir(parents=True, exist_ok=True)
            tool.write_text(fake_tools.SCRIPT)
            tool.chmod(0o755)
            (tool.parent / "ld.lld").write_text("")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        environment = {"PATH": "/nowhere", "XILINX_XRT": str(tmp_path / "site/mlir_aie")}
        return find_toolchain(environment, [tmp_path / "site"])

    return install


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    """The tools that ran since the last time."""

    def calls() -> list[str]:
        log = tmp_path / "calls.log"
        lines = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return calls


Install = Callable[..., Toolchain]
Calls = Callable[[], list[str]]


def job(design: Path = PASSTHROUGH, sources: Path = DESIGNS) -> Job:
    return prepare(read_design(design), name=design.stem, sources=sources)


def check(built: Built) -> None:
    """The files are of the formats, and hold together."""
    xclbin = parse_xclbin((built.folder / "aie.xclbin").read_bytes())
    partition_section = xclbin.find(Kind.AIE_PARTITION)
    metadata = xclbin.find(Kind.EMBEDDED_METADATA)
    assert partition_section and metadata
    (kernel,) = parse_metadata(metadata.data, "xclbin")
    assert (kernel.name, len(kernel.arguments)) == ("MLIR_AIE", 8)
    (entry,) = parse_partition(Window.of(partition_section.data, "xclbin")).pdis
    (partition,) = parse_pdi(entry.image).partitions
    assert len(list(partition.cdo.commands())) == 3
    assert parse_txn((built.folder / "insts.bin").read_bytes()).columns == 8


@pytest.mark.parametrize("flavour", ["old", "new"])
@pytest.mark.parametrize("missing", [(), ("xclbinutil",), ("xclbinutil", "bootgen")])
def test_the_driver_builds_with_and_without_packagers(
    flavour: str,
    missing: tuple[str, ...],
    install: Install,
    calls: Calls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_AIECC", flavour)
    toolchain = install(*(set(DRIVER) - set(missing)))
    check(build(job(), toolchain, tmp_path / "out"))
    assert calls() == ["aiecc"]


@pytest.mark.parametrize("missing", [(), ("xclbinutil", "bootgen")])
def test_without_the_driver_the_stages_run_one_by_one(
    missing: tuple[str, ...], install: Install, calls: Calls, tmp_path: Path
) -> None:
    toolchain = install(*(set(STAGES) - set(missing)))
    check(build(job(), toolchain, tmp_path / "out"))
    core = ["aie-opt", "aie-translate", "opt", "llc", "aie-translate", "clang"]
    packagers = [tool for tool in ("bootgen", "xclbinutil") if tool not in missing]
    assert calls() == [*["aie-opt"] * 3, "aie-translate", *core, "aie-translate", *packagers]


def test_kernels_are_compiled_by_peano_for_the_device(
    install: Install, calls: Calls, tmp_path: Path
) -> None:
    (tmp_path / "kernel.cc").write_text("int x;")
    found = job(MATMUL, kernel_sources(tmp_path))
    built = build(found, install(*DRIVER), tmp_path / "out")
    assert calls() == [*["clang"] * len(found.objects), "aiecc"]
    command = built.record["commands"][0]
    assert "--target=aie2p-none-unknown-elf" in command and "-std=c++20" in command


def kernel_sources(folder: Path) -> Path:
    """A C++ file for every object that the matmul links."""
    sources = folder / "sources"
    sources.mkdir(exist_ok=True)
    for name in ("kernel", "mm", "matmul", "matmul_i8", "zero", "mm_i8"):
        (sources / f"{name}.cc").write_text("int x;")
    return sources


def test_the_same_is_not_built_twice(install: Install, calls: Calls, tmp_path: Path) -> None:
    toolchain = install(*DRIVER)
    sources = kernel_sources(tmp_path)
    first = build(job(MATMUL, sources), toolchain, tmp_path / "one")
    assert not first.cached and calls()
    again = build(job(MATMUL, sources), toolchain, tmp_path / "two")
    assert again.cached and calls() == []
    assert (tmp_path / "one/aie.xclbin").read_bytes() == (tmp_path / "two/aie.xclbin").read_bytes()
    moved = shutil.copytree(sources, tmp_path / "elsewhere")
    assert build(job(MATMUL, moved), toolchain, tmp_path / "three").cached
    (sources / "common.h").write_text("#define N 1")
    assert not build(job(MATMUL, sources), toolchain, tmp_path / "four").cached


def test_another_compiler_builds_anew(install: Install, calls: Calls, tmp_path: Path) -> None:
    build(job(), install(*DRIVER), tmp_path / "out")
    toolchain = install(*DRIVER)
    with (tmp_path / "site/mlir_aie/bin/aiecc").open("a") as tool:
        tool.write("# a newer version\n")
    assert not build(job(), toolchain, tmp_path / "out").cached


def test_the_record_says_how_it_was_made(install: Install, tmp_path: Path) -> None:
    built = build(job(), install(*STAGES), tmp_path / "out")
    record = json.loads((tmp_path / "out/build.json").read_text())
    assert record == built.record
    assert record["tools"]["aie-opt"]["version"] == "aie-opt version 1.0 of nothing"
    assert len(record["tools"]["clang"]["sha256"]) == 64
    assert record["device"] == "npu2" and record["files"]["aie.xclbin"]["size"] > 1000
    assert any(line.startswith("# uq: put the ELF files") for line in record["commands"])


def test_missing_tools_are_named_with_what_installs_them(install: Install, tmp_path: Path) -> None:
    with pytest.raises(
        ToolMissing, match="mlir-aie and Peano not found; run: pip install mlir_aie"
    ):
        build(job(), install(), tmp_path / "out")
    with pytest.raises(ToolMissing, match="^Peano not found; run: pip install llvm-aie"):
        build(job(), install("aiecc"), tmp_path / "out")


def test_a_host_compiler_is_not_taken_for_peano(tmp_path: Path) -> None:
    clang = tmp_path / "clang"
    clang.write_text("#!/bin/sh\n")
    clang.chmod(0o755)
    assert find_toolchain({"PATH": str(tmp_path)}, []).tools == {}


def test_an_xclbinutil_that_does_not_run_is_done_without(
    install: Install, calls: Calls, tmp_path: Path
) -> None:
    install(*DRIVER)
    (tmp_path / "site/mlir_aie/bin/xclbinutil").write_text("#!/bin/sh\nexit 0\n")
    toolchain = find_toolchain({"XILINX_XRT": str(tmp_path / "site/mlir_aie")}, [tmp_path / "site"])
    assert [path.name for path in toolchain.broken] == ["xclbinutil"]
    check(build(job(), toolchain, tmp_path / "out"))
    assert calls() == ["aiecc"]


@pytest.mark.parametrize("tool", ["aie-opt", "llc"])
def test_a_tool_that_fails_is_one_line(
    tool: str, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolchain = install(*STAGES)
    monkeypatch.setenv("FAKE_FAILS", tool)
    with pytest.raises(ToolFailed, match=f"{tool} ended with 1: error: LLVM ERROR: cannot") as info:
        build(job(), toolchain, tmp_path / "out")
    assert " run: " in str(info.value) and not (tmp_path / "out").exists()


def test_tools_that_write_nothing_are_found_out(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolchain = install(*DRIVER)
    monkeypatch.setenv("FAKE_SILENT", "1")
    with pytest.raises(ToolFailed, match="ended well and wrote no aie.xclbin"):
        build(job(), toolchain, tmp_path / "out")


def test_a_broken_cdo_is_not_packed(tmp_path: Path) -> None:
    for part in ("elfs", "init", "enable"):
        (tmp_path / f"aie_cdo_{part}.bin").write_bytes(b"no CDO")
    with pytest.raises(BundleError, match="aie_cdo_elfs.bin"):
        write_pdi(tmp_path)
    (tmp_path / "design.pdi").write_bytes(b"")
    with pytest.raises(BundleError, match="design.pdi is empty"):
        write_xclbin(tmp_path, job())


def test_a_refused_design_reaches_no_tool() -> None:
    with pytest.raises(DesignError, match="sequence.queue: .*; see all with: uq npu verify"):
        job(DESIGNS / "wrong/queue_overflow.mlir")


def test_sources_of_objects_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the design links .*\.o, and .* name the folder of its"):
        job(MATMUL, tmp_path)


def test_a_part_of_an_array_may_stand_at_several_columns() -> None:
    text = PASSTHROUGH.read_text().replace("aie.device(npu2)", "aie.device(npu1_1col)")
    found = prepare(parse_design(text), name="part", sources=DESIGNS)
    assert (found.columns, found.start_columns, found.architecture) == (1, (1, 2, 3, 4), "aie2")
    assert job().start_columns == (0,)


def test_designs_are_respelled_for_older_tools() -> None:
    found = prepare(read_design(PASSTHROUGH), name="old", sources=DESIGNS, syntax="1.1")
    assert "aiex.runtime_sequence" in found.text
    with pytest.raises(UsageError, match="unknown syntax 3; use 1.0, 1.1, 2026"):
        prepare(read_design(PASSTHROUGH), name="old", sources=DESIGNS, syntax="3")


def test_peano_gets_the_words_it_knows() -> None:
    given = "%p = getelementptr inbounds nuw i8, ptr %q\nstore i32 0, ptr %p, align 4\n"
    assert for_peano(given) == "%p = getelementptr inbounds i8, ptr %q\nstore i32 0, ptr %p\n"


def test_cores_become_their_elf_files() -> None:
    routed = """%tile_0_2 = aie.tile(0, 2)
%core_0_2 = aie.core(%tile_0_2) {
  func.call @f() {name = "}"} : () -> ()
  aie.end
} {link_with = "f.o", stack_size = 1024 : i32}
aie.flow(%a, DMA : 0, %b, DMA : 0)
"""
    assert (
        with_elfs(routed, {Place(0, 2): "core_0_2.elf"})
        == """%tile_0_2 = aie.tile(0, 2)
%core_0_2 = aie.core(%tile_0_2) {aie.end } {elf_file = "core_0_2.elf"}
aie.flow(%a, DMA : 0, %b, DMA : 0)
"""
    )
    with pytest.raises(DesignError, match=r"core \(0, 2\) of the routed design was not compiled"):
        with_elfs(routed, {})
    with pytest.raises(DesignError, match="ends inside of a core"):
        with_elfs(routed[:90], {Place(0, 2): "core_0_2.elf"})


def test_the_command_builds_and_says_where(
    install: Install,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(*DRIVER)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    monkeypatch.chdir(tmp_path)
    assert main(["npu", "build", str(PASSTHROUGH)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("passthrough_npu2-npu2: aie.xclbin ") and "in 1 steps" in out
    assert err.startswith("driver: ")
    assert main(["npu", "build", str(PASSTHROUGH), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cached"] is True


def test_a_dry_run_shows_commands_and_runs_none(
    install: Install,
    calls: Calls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(*STAGES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    assert main(["npu", "build", str(PASSTHROUGH), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17 and "aie-create-pathfinder-flows" in lines[1]
    assert calls() == []
    shutil.rmtree(tmp_path / "site")
    assert main(["npu", "build", str(PASSTHROUGH), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "not installed: mlir-aie, Peano" in err
    assert json.loads(out)["commands"][0]["command"].startswith(
        "mlir_aie/bin/aiecc --peano=llvm-aie"
    )


def test_wrong_macros_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["npu", "build", str(PASSTHROUGH), "--define", "HEAD=wide"]) == 2
    assert "expected NAME or NAME=NUMBER, not 'HEAD=wide'" in capsys.readouterr().err
