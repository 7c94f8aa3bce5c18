"""Every kernel compiled for AMD's iGPUs by their own driver's compiler, on any machine.

    python -m uq.kernels.vulkan.amd [--write docs/amd.md]

Prints what the compiler says of each pipeline and exits with 1 if one spills registers or lacks the
matrix or dot instructions that it was written for. Nothing runs on a GPU here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from uq.errors import DeviceError, UqError
from uq.kernels.vulkan.radv import Compiled, find_driver, open_radv
from uq.kernels.vulkan.spirv import load
from uq.kernels.vulkan.variants import VARIANTS

# A feature that a module is written for -> what must be in its machine code.
EXPECTED = {"int8dot": "v_dot4", "coopmat": "v_wmma"}
BEGIN, END = "<!-- begin: python -m uq.kernels.vulkan.amd --write -->", "<!-- end -->"
MODULE = "uq.kernels.vulkan.amd"


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
class Case:
    """A pipeline that a session would make: a module and its specialization constants by name."""

    module: str
    constants: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The module, and what of the constants tells this pipeline from its siblings."""
        return " ".join([self.module, *(f"{k}={v}" for k, v in self.constants.items())])

    @property
    def numbered(self) -> dict[int, int | float]:
        names = VARIANTS[self.module].spec_constants
        return {names.index(name): value for name, value in self.constants.items()}


def cases() -> Iterator[Case]:
    """What is compiled."""
    for name in VARIANTS:
        yield Case(name)


def compile_cases(chip: Chip, driver: Path) -> list[Compiled]:
    """All `cases()` for `chip`, in a process of its own: the driver aborts on an unknown chip.

    Raises:
        DeviceError: the driver does not know the chip, or failed; with its last line.
    """
    command = [sys.executable, "-m", MODULE, "--family", chip.family, "--driver", str(driver)]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "compiled.json"  # a file, because the driver prints to stdout
        done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
        records = json.loads(out.read_text()) if done.returncode == 0 else []
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceError(
            f"{driver} cannot compile for {chip.product} ({chip.family}): {last}; Mesa 25 or newer "
            "can, and scripts/mesa fetches it"
        )
    return [Compiled(**record) for record in records]


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


def table(chip: Chip, made: Sequence[tuple[Case, Compiled]]) -> str:
    """Markdown: a row for each pipeline."""
    head = "wave | VGPRs | subgroups per SIMD | spilled | LDS bytes | instructions | dot4 | wmma"
    lines = [f"### {chip.product} ({chip.family})", "", f"| pipeline | {head} |"]
    lines.append("|---" * 9 + "|")
    for case, compiled in made:
        of = compiled.statistics
        cells = [
            case.label,
            compiled.subgroup,
            of["VGPRs"],
            of["Subgroups per SIMD"],
            of["Spilled SGPRs"] + of["Spilled VGPRs"],
            of["LDS size"],
            of["Instructions"],
            compiled.count("v_dot4"),
            compiled.count("v_wmma"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


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
    radv = open_radv(driver, family)
    made = [radv.compile(load(case.module), case.numbered) for case in cases()]
    out.write_text(json.dumps([asdict(compiled) for compiled in made]))
    return 0


def _report(driver: Path, page: Path | None) -> int:
    tables, wrong = [], []
    for chip in CHIPS:
        made = list(zip(cases(), compile_cases(chip, driver), strict=True))
        tables.append(table(chip, made))
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
