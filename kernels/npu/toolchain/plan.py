"""The steps of a build for the tools that are there: the driver of mlir-aie, or stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from uq.errors import ToolMissing
from uq.kernels.npu.target import Place
from uq.kernels.npu.toolchain import passes
from uq.kernels.npu.toolchain.find import INSTALL, Toolchain
from uq.kernels.npu.toolchain.job import Job, Object
from uq.kernels.npu.toolchain.package import pdi_steps, xclbin_steps
from uq.kernels.npu.toolchain.steps import DESIGN, INSTS, PDI, XCLBIN, Command, Own, Step
from uq.kernels.npu.toolchain.texts import for_peano, with_elfs

PLACED, ROUTED, LINKED, LOWERED = (
    f"{name}.mlir" for name in ("placed", "routed", "linked", "sequence")
)
WARNINGS = ("parentheses", "attributes", "macro-redefined", "empty-body")


@dataclass(frozen=True)
class Dialect:
    """How the tools that were found are spoken to; `--help` tells.

    Attributes:
        get: the driver takes --get-xclbin (since mlir-aie 1.4), not --aie-generate-xclbin.
        to_binary: the translator takes --aie-npu-to-binary, not --aie-npu-instgen.
    """

    get: bool
    to_binary: bool


def plan(job: Job, toolchain: Toolchain, dialect: Dialect) -> tuple[Step, ...]:
    """Steps that end with `insts.bin` and `aie.xclbin` in the work folder.

    Raises:
        ToolMissing: nothing can be compiled; the message has the commands that install it.
    """
    if missing := toolchain.missing():
        commands = "; ".join(INSTALL[package] for package in missing)
        raise ToolMissing(f"{' and '.join(missing)} not found; run: {commands}")
    head = [compile_object(object_, job, toolchain) for object_ in job.objects]
    rest = by_driver if toolchain.has("aiecc") else by_stages
    return (*head, *rest(job, toolchain, dialect))


def compile_object(object_: Object, job: Job, toolchain: Toolchain) -> Command:
    """C++ of a kernel, compiled by Peano."""
    include = _mlir_aie(toolchain) / "include"
    defines = (f"-D{name}={value}" for name, value in sorted(object_.defines.items()))
    argv = (
        str(toolchain.tools["clang"]),
        "-O2",
        "-std=c++20",
        f"--target={job.architecture}-none-unknown-elf",
        *(f"-Wno-{warning}" for warning in WARNINGS),
        "-DNDEBUG",
        *defines,
        "-I",
        str(include),
        "-c",
        str(object_.source.resolve()),
        "-o",
        object_.name,
    )
    return Command(f"kernel {object_.name}", argv)


def by_driver(job: Job, toolchain: Toolchain, dialect: Dialect) -> Iterator[Step]:
    """One command; without xclbinutil it stops at the PDI, without bootgen at the CDOs."""
    tools = toolchain.tools
    last = "xclbin" if "xclbinutil" in tools else "pdi" if "bootgen" in tools else "cdo"
    ask = "--get-{}" if dialect.get else "--aie-generate-{}"
    old = ("--no-xchesscc", "--no-xbridge", "--no-aiesim", "--no-compile-host")
    names = {"xclbin": (f"--xclbin-name={XCLBIN}",), "pdi": (f"--pdi-name={PDI}",)}
    argv = (
        str(tools["aiecc"]),
        *(() if dialect.get else old),
        f"--peano={toolchain.peano}",
        "--tmpdir=work",
        ask.format("npu-insts"),
        f"--npu-insts-name={INSTS}",
        ask.format(last),
        *names.get(last, ()),
        DESIGN,
    )
    yield Command("driver", argv)
    if last == "cdo":
        yield from pdi_steps(tools)
    if last != "xclbin":
        yield from xclbin_steps(job, tools)


def by_stages(job: Job, toolchain: Toolchain, dialect: Dialect) -> Iterator[Step]:
    """The same without the driver, six stages."""
    opt, translate = (str(toolchain.tools[name]) for name in ("aie-opt", "aie-translate"))

    def lower(stage: str, pipeline: str, given: str, out: str) -> Command:
        return Command(stage, (opt, f"--pass-pipeline={pipeline}", given, "-o", out))

    yield lower("placement", passes.device_pipeline(job.architecture), DESIGN, PLACED)
    yield lower("routing", passes.ROUTING, PLACED, ROUTED)
    yield lower("sequence", passes.sequence_pipeline(), PLACED, LOWERED)
    binary = ("--aie-npu-to-binary",) if dialect.to_binary else ("--aie-npu-instgen",)
    yield Command("sequence", (translate, *binary, "--aie-output-binary", LOWERED, "-o", INSTS))
    for core in job.cores:
        yield from core_steps(core, job, toolchain)
    elfs = {core: f"{_stem(core)}.elf" for core in job.cores}
    what = "put the ELF files into the routed design"
    yield Own(
        "CDO", what, lambda folder: _rewrite(folder, ROUTED, LINKED, partial(with_elfs, elfs=elfs))
    )
    yield Command("CDO", (translate, "--aie-generate-cdo", "--work-dir-path=.", LINKED))
    yield from pdi_steps(toolchain.tools)
    yield from xclbin_steps(job, toolchain.tools)


def core_steps(core: Place, job: Job, toolchain: Toolchain) -> Iterator[Step]:
    """From the program of one core to its ELF file."""
    tools, stem = {name: str(path) for name, path in toolchain.tools.items()}, _stem(core)
    stage = f"core {core.column},{core.row}"
    place = (f"--tilecol={core.column}", f"--tilerow={core.row}")
    pipeline = passes.core_pipeline(job.architecture, core, job.symbol)
    lowered = (tools["aie-opt"], f"--pass-pipeline={pipeline}", PLACED, "-o", f"{stem}.mlir")
    yield Command(stage, lowered)
    to_ir = (tools["aie-translate"], "--mlir-to-llvmir", f"{stem}.mlir", "-o", f"{stem}.ll")
    yield Command(stage, to_ir)
    what = f"put {stem}.ll into the words of Peano's older LLVM"
    yield Own(
        stage, what, lambda folder: _rewrite(folder, f"{stem}.ll", f"{stem}.peano.ll", for_peano)
    )
    # Above O1 the vectorizer makes types that Peano's instruction selection does not take.
    optimize = ("--passes=default<O1>", "-inline-threshold=10", "-S", f"{stem}.peano.ll")
    yield Command(stage, (tools["opt"], *optimize, "-o", f"{stem}.opt.ll"))
    select = ("-O2", f"--march={job.architecture}", "--function-sections", "--filetype=obj")
    yield Command(stage, (tools["llc"], f"{stem}.opt.ll", *select, "-o", f"{stem}.o"))
    script = (tools["aie-translate"], "--aie-generate-ldscript", *place, PLACED)
    yield Command(stage, (*script, "-o", f"{stem}.ld"))
    link = (
        tools["clang"],
        "-O2",
        f"--target={job.architecture}-none-unknown-elf",
        f"-fuse-ld={toolchain.peano}/bin/ld.lld",
        f"{stem}.o",
        "-Wl,--gc-sections",
        "-Wl,--orphan-handling=error",
        f"-Wl,-T,{stem}.ld",
        "-o",
        f"{stem}.elf",
    )
    yield Command(stage, link)


def _stem(core: Place) -> str:
    return f"core_{core.column}_{core.row}"


def _rewrite(folder: Path, given: str, out: str, change: Callable[[str], str]) -> None:
    (folder / out).write_text(change((folder / given).read_text()))


def _mlir_aie(toolchain: Toolchain) -> Path:
    """The folder above mlir-aie's bin/."""
    tools = toolchain.tools
    return (tools.get("aiecc") or tools["aie-opt"]).resolve().parent.parent
