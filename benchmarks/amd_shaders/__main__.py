"""Every kernel compiled for AMD's iGPUs by their own driver's compiler, on any machine.

    python -m benchmarks.amd_shaders [--write docs/amd.md]

Prints what the compiler says of each pipeline and exits with 1 if one spills registers or lacks the
matrix or dot instructions that it was written for. Nothing runs on a GPU here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.amd_shaders.cases import Case, cases
from benchmarks.amd_shaders.radv import Compiled, find_driver, open_radv
from uq.errors import DeviceError, UqError
from uq.kernels.vulkan.variants import VARIANTS

# A feature that a module is written for -> what must be in its machine code.
EXPECTED = {"int8dot": "v_dot4", "coopmat": "v_wmma"}
BEGIN, END = "<!-- begin: python -m benchmarks.amd_shaders --write -->", "<!-- end -->"
MODULE = "benchmarks.amd_shaders"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Chip:
    """`family` is RADV's name of the GPU in `product`."""

    product: str
    family: str


CHIPS = (
    Chip("Radeon 780M", "PHOENIX"),
    Chip("Radeon 890M", "GFX1150"),
    Chip("Radeon 8060S", "GFX1151"),
)


@dataclass(frozen=True)
class Compilation:
    """`cases()` for a chip, in their order; `driver` is the driver's name for itself."""

    driver: str
    pipelines: list[Compiled]


def compile_cases(chip: Chip, driver: Path) -> Compilation:
    """All `cases()` for `chip`, in a process of its own: the driver aborts on an unknown chip.

    Raises:
        DeviceError: the driver does not know the chip, or failed; with its last line.
    """
    command = [sys.executable, "-m", MODULE, "--family", chip.family]
    command += ["--driver", str(driver.resolve())]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "compiled.json"  # a file, because the driver prints to stdout
        command += ["--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        record = json.loads(out.read_text()) if done.returncode == 0 else {}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceError(
            f"{driver} cannot compile for {chip.product} ({chip.family}): {last}; Mesa 25 or newer "
            "can, and scripts/mesa fetches it"
        )
    return Compilation(record["driver"], [Compiled(**one) for one in record["pipelines"]])


def problems(case: Case, compiled: Compiled) -> list[str]:
    """What is wrong with a pipeline, a sentence each."""
    statistics = compiled.statistics
    found = [
        f"{case.module}: {statistics[name]} {name.lower()}"
        for name in ("Spilled SGPRs", "Spilled VGPRs", "Scratch size")
        if statistics[name]
    ]
    for feature, prefix in EXPECTED.items():
        if feature in VARIANTS[case.module].features and not compiled.count(prefix):
            found.append(f"{case.module}: no {prefix} instruction")
    return found


def table(chip: Chip, driver: str, made: Sequence[tuple[Case, Compiled]]) -> str:
    """Markdown: a row for each module with the worst of its pipelines."""
    head = "module | pipelines | wave | VGPRs | waves per SIMD | LDS bytes | instructions"
    lines = [
        f"### {chip.product} ({chip.family})",
        "",
        f"Compiler: {driver}.",
        "",
        f"| {head} | dot4 | wmma |",
    ]
    lines.append("|---" * 9 + "|")
    by_module = groupby(sorted(made, key=_module), key=_module)
    for module, pairs in by_module:
        group = [compiled for _, compiled in pairs]
        cells = [
            module,
            len(group),
            "/".join(map(str, sorted({compiled.subgroup for compiled in group}))),
            max(compiled.statistics["VGPRs"] for compiled in group),
            min(compiled.statistics["Subgroups per SIMD"] for compiled in group),
            max(compiled.statistics["LDS size"] for compiled in group),
            max(compiled.statistics["Instructions"] for compiled in group),
            min(compiled.count("v_dot4") for compiled in group),
            min(compiled.count("v_wmma") for compiled in group),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _module(pair: tuple[Case, Compiled]) -> str:
    return pair[0].module


def write_page(path: Path, tables: Sequence[str]) -> None:
    """Replace the part of the page between the marks."""
    text = path.read_text()
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    path.write_text("\n\n".join([before + BEGIN, *tables, END]) + after)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__)
    parser.add_argument("--driver", type=Path, help="RADV's manifest (radeon_icd*.json)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    for option in ("--family", "--out"):  # of the process of one chip
        parser.add_argument(option, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        driver = args.driver or find_driver()
        if args.family:
            return _child(driver, args.family, Path(args.out))
        return _report(driver, args.write)
    except UqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _child(driver: Path, family: str, out: Path) -> int:
    compiler = open_radv(driver, family, out.parent)
    made = [compiler.compile(case.module, dict(case.constants)) for case in cases()]
    out.write_text(json.dumps(asdict(Compilation(compiler.driver, made))))
    return 0


def _report(driver: Path, page: Path | None) -> int:
    tables, wrong = [], []
    for chip in CHIPS:
        compilation = compile_cases(chip, driver)
        made = list(zip(cases(), compilation.pipelines, strict=True))
        tables.append(table(chip, compilation.driver, made))
        wrong += [f"{chip.product}: {line}" for pair in made for line in problems(*pair)]
    if page is None:
        print("\n\n".join(tables))
    else:
        write_page(page, tables)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
