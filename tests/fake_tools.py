"""Strict doubles of mlir-aie, Peano, bootgen and xclbinutil: `python fake_tools.py NAME ARGUMENTS`.

They compile nothing. Each takes the options of the real tool and no others, reads what the real one
reads, refuses what the real one refuses, and writes files of the real formats. `--help` and
`--version` are answered by the shell (`SCRIPT`), which is faster; every other call adds a line to
$FAKE_LOG.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from uq.formats.xdna.build import build_xclbin, npu_kernel
from uq.formats.xdna.cdo import Cdo, Command, Opcode, parse_cdo
from uq.formats.xdna.partition import AiePartition, Group, PdiEntry
from uq.formats.xdna.pdi import Partition, Pdi, merge, parse_pdi
from uq.formats.xdna.txn import NPU1, NPU2, Transaction, Write

SCRIPT = f"""#!/bin/sh
name=$(basename "$0")
[ "$*" = --version ] && exec echo "$name version 1.0 of nothing"
if [ "$*" = --help ]; then
  [ "$FAKE_AIECC" = old ] && exec echo "--aie-generate-xclbin - Generate xclbin"
  exec echo "--get=<name> - named artifacts also have --get-<name> shorthands (e.g. --get-xclbin)"
fi
echo "$name" >> "$FAKE_LOG"
exec {sys.executable} -S {__file__} "$name" "$@"
"""


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def read(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        fail(f"could not open input file '{name}'")
    return path.read_text()


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    parser.exit_on_error = False
    return parser.parse_args(arguments)


def device_of(design: str) -> str:
    found = re.search(r"aie\.device\((\w+)\)", design)
    return found[1] if found else fail("no aie.device")


def write_insts(design: str, name: str) -> None:
    generation, columns = (NPU1, 4) if device_of(design).startswith("npu1") else (NPU2, 8)
    operations = (Write(0x1D214, 5),)
    stream = Transaction(operations=operations, generation=generation, columns=columns)
    Path(name).write_bytes(stream.to_bytes())


def write_cdos(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(("elfs", "init", "enable"), start=1):
        write = Command.of(Opcode.WRITE, 0x20000 + 4 * number, number)
        cdo = Cdo.of([write, Command.of(Opcode.END)])
        (folder / f"main_aie_cdo_{part}.bin").write_bytes(cdo.to_bytes())


def image(folder: Path) -> bytes:
    names = (f"main_aie_cdo_{part}.bin" for part in ("elfs", "init", "enable"))
    cdos = [parse_cdo((folder / name).read_bytes(), name) for name in names]
    return Pdi(partitions=(Partition(merge(cdos)),)).to_bytes()


def xclbin(pdi: bytes) -> bytes:
    parse_pdi(pdi)
    entry = PdiEntry(pdi, (Group(1, (0x901,)),))
    partition = AiePartition(column_width=4, start_columns=(0,), pdis=(entry,))
    return build_xclbin([npu_kernel()], partition).to_bytes()


def check_objects(design: str) -> None:
    """The linker finds objects in the folder that it runs in."""
    for name in re.findall(r'link_with = "([^"]+)"', design):
        if read(name) != "object\n":
            fail(f"{name}: file not recognized")


def aiecc(arguments: list[str]) -> None:
    new = os.environ.get("FAKE_AIECC", "new") == "new"
    parser = argparse.ArgumentParser()
    parser.add_argument("--peano", required=True)
    parser.add_argument("--tmpdir", required=True)
    ask = "--get-{}" if new else "--aie-generate-{}"
    for output in ("npu-insts", "xclbin", "pdi", "cdo"):
        parser.add_argument(ask.format(output), action="store_true", dest=output.replace("-", "_"))
    for name in ("npu-insts", "xclbin", "pdi"):
        parser.add_argument(f"--{name}-name")
    for option in (
        () if new else ("--no-xchesscc", "--no-xbridge", "--no-aiesim", "--no-compile-host")
    ):
        parser.add_argument(option, action="store_true", required=True)
    parser.add_argument("design")
    args = parse(parser, arguments)
    design = read(args.design)
    check_objects(design)
    if not (Path(args.peano) / "bin/clang").is_file():
        fail(f"no Peano in {args.peano}")
    if os.environ.get("FAKE_SILENT"):
        return
    write_insts(design, args.npu_insts_name)
    work = Path(args.tmpdir)
    write_cdos(work)
    if args.pdi:
        Path(args.pdi_name).write_bytes(image(work))
    if args.xclbin:
        Path(args.xclbin_name).write_bytes(xclbin(image(work)))


def aie_opt(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pass-pipeline", required=True)
    parser.add_argument("given")
    parser.add_argument("-o", required=True)
    args = parse(parser, arguments)
    pipeline: str = args.pass_pipeline
    if not pipeline.startswith("builtin.module(") or pipeline.count("(") != pipeline.count(")"):
        fail(f"expected a pass pipeline, not {pipeline}")
    Path(args.o).write_text(f"{read(args.given)}// {pipeline}\n")


def aie_translate(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    modes = ("mlir-to-llvmir", "aie-generate-ldscript", "aie-npu-to-binary", "aie-generate-cdo")
    chosen = parser.add_mutually_exclusive_group(required=True)
    for mode in modes:
        chosen.add_argument(f"--{mode}", action="store_true")
    parser.add_argument("--aie-output-binary", action="store_true")
    parser.add_argument("--tilecol", type=int)
    parser.add_argument("--tilerow", type=int)
    parser.add_argument("--work-dir-path")
    parser.add_argument("given")
    parser.add_argument("-o")
    args = parse(parser, arguments)
    design = read(args.given)
    if args.aie_generate_cdo:
        elfs = re.findall(r'aie\.core\(%[\w]+\) \{aie\.end \} \{elf_file = "([^"]+)"\}', design)
        if len(elfs) != design.count("aie.core("):
            fail("a core has no elf_file, or a body beside it")
        for elf in elfs:
            if read(str(Path(args.work_dir_path) / elf)) != "elf\n":
                fail(f"{elf} is no ELF file")
        write_cdos(Path(args.work_dir_path))
    elif args.aie_npu_to_binary:
        if "aie-dma-to-npu" not in design or not args.aie_output_binary:
            fail("the sequence was not lowered")
        write_insts(design, args.o)
    elif args.mlir_to_llvmir:
        if "aie-standard-lowering" not in design:
            fail("not a core in the LLVM dialect")
        Path(args.o).write_text("%1 = getelementptr inbounds nuw i8, ptr %0\nload i32, align 4\n")
    else:
        Path(args.o).write_text(f"core {args.tilecol} {args.tilerow}\n")


def opt(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", required=True)
    parser.add_argument("-inline-threshold", required=True)
    parser.add_argument("-S", action="store_true", required=True)
    parser.add_argument("given")
    parser.add_argument("-o", required=True)
    args = parse(parser, arguments)
    ir = read(args.given)
    if "nuw" in ir or "align" in ir:
        fail(f"{args.given}:1: expected type")
    Path(args.o).write_text(ir)


def llc(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("given")
    parser.add_argument("-O2", action="store_true")
    parser.add_argument("--march", choices=("aie2", "aie2p"), required=True)
    parser.add_argument("--function-sections", action="store_true")
    parser.add_argument("--filetype", choices=("obj",), required=True)
    parser.add_argument("-o", required=True)
    args = parse(parser, arguments)
    read(args.given)
    Path(args.o).write_text("object\n")


def clang(arguments: list[str]) -> None:
    """Compile one C++ file, or link one object by a script."""
    out = arguments[arguments.index("-o") + 1]
    targets = ("--target=aie2-none-unknown-elf", "--target=aie2p-none-unknown-elf")
    if not any(target in arguments for target in targets):
        fail("unknown target triple")
    if "-c" in arguments:
        source = read(arguments[arguments.index("-c") + 1])
        if "#error" in source:
            fail("#error in the source")
        Path(out).write_text("object\n")
        return
    (script,) = (word for word in arguments if word.startswith("-Wl,-T,"))
    read(script.removeprefix("-Wl,-T,"))
    (linker,) = (word for word in arguments if word.startswith("-fuse-ld="))
    if not Path(linker.removeprefix("-fuse-ld=")).is_file():
        fail(f"invalid linker name in argument '{linker}'")
    (given,) = (word for word in arguments if word.endswith(".o"))
    read(given)
    Path(out).write_text("elf\n")


def bootgen(arguments: list[str]) -> None:
    if arguments != ["-arch", "versal", "-image", "design.bif", "-o", "design.pdi", "-w"]:
        fail(f"syntax error near {arguments}")
    bif = read("design.bif")
    files = re.findall(r"file=(\S+)", bif)
    if "id_code = 0x14ca8093" not in bif or len(files) != 3:
        fail("syntax error in design.bif")
    cdos = [parse_cdo(Path(name).read_bytes(), name) for name in files]
    Path("design.pdi").write_bytes(Pdi(partitions=(Partition(merge(cdos)),)).to_bytes())


def xclbinutil(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--add-replace-section", action="append", required=True)
    parser.add_argument("--add-kernel", required=True)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--output", required=True)
    args = parse(parser, arguments)
    sections = dict(section.split(":JSON:") for section in args.add_replace_section)
    if sections.keys() != {"MEM_TOPOLOGY", "AIE_PARTITION"}:
        fail(f"sections {sorted(sections)}")
    memory = json.loads(read(sections["MEM_TOPOLOGY"]))["mem_topology"]
    (kernel,) = json.loads(read(args.add_kernel))["ps-kernels"]["kernels"]
    partition = json.loads(read(sections["AIE_PARTITION"]))["aie_partition"]
    if memory["m_count"] != "2" or kernel["arguments"][3]["offset"] != "0x14":
        fail("another memory or kernel than mlir-aie's")
    Path(args.output).write_bytes(xclbin(Path(partition["PDIs"][0]["file_name"]).read_bytes()))


TOOLS = {
    "aiecc": aiecc,
    "aie-opt": aie_opt,
    "aie-translate": aie_translate,
    "opt": opt,
    "llc": llc,
    "clang": clang,
    "bootgen": bootgen,
    "xclbinutil": xclbinutil,
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == os.environ.get("FAKE_FAILS"):
        fail("LLVM ERROR: cannot select G_BUILD_VECTOR")
    TOOLS[name](arguments)


if __name__ == "__main__":
    main()
