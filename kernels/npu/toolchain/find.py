"""Where the tools are: named by the environment, installed as wheels, or on the PATH."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

WHEELS = "https://github.com/Xilinx/{}/releases/expanded_assets/{}"
INSTALL = {
    "mlir-aie": f"pip install mlir_aie -f {WHEELS.format('mlir-aie', 'latest-wheels-4')}",
    "Peano": f"pip install llvm-aie -f {WHEELS.format('llvm-aie', 'nightly')}",
    "bootgen": "sudo apt-get install xilinx-bootgen",
}
# Tool -> the package that brings it.
TOOLS = {
    "aiecc": "mlir-aie",
    "aie-opt": "mlir-aie",
    "aie-translate": "mlir-aie",
    "clang": "Peano",
    "opt": "Peano",
    "llc": "Peano",
    "bootgen": "bootgen",
    "xclbinutil": "XRT",
}
PATIENCE = 20  # seconds
NAMES = {"aiecc": ("aiecc", "aiecc.py")}
FOLDERS = {"XRT": ("/opt/xilinx/xrt/bin",)}


@dataclass(frozen=True)
class Toolchain:
    """Tools that were found, by the names of `TOOLS`.

    Attributes:
        broken: found, and of no use: an xclbinutil that does not run, as Debian's.
    """

    tools: Mapping[str, Path]
    broken: tuple[Path, ...] = ()

    def has(self, *names: str) -> bool:
        return all(name in self.tools for name in names)

    @property
    def peano(self) -> Path | None:
        """The folder above Peano's bin/."""
        clang = self.tools.get("clang")
        return clang.parent.parent if clang else None

    @property
    def compiles(self) -> bool:
        """Whether a design becomes machine code: by the driver, or stage by stage."""
        return self.has("clang", "opt", "llc") and (
            self.has("aiecc") or self.has("aie-opt", "aie-translate")
        )

    def missing(self) -> tuple[str, ...]:
        """Packages without which nothing is compiled; bootgen and xclbinutil have a substitute."""
        lacking = ["Peano"] * (not self.has("clang", "opt", "llc"))
        if not self.has("aiecc") and not self.has("aie-opt", "aie-translate"):
            lacking.insert(0, "mlir-aie")
        return tuple(lacking)

    def assumed(self) -> Toolchain:
        """With what is missing where its wheels would put it, to show what would be run."""
        wheel = {"Peano": "llvm-aie/bin", "mlir-aie": "mlir_aie/bin"}
        there = {
            name: Path(wheel[package]) / name
            for name, package in TOOLS.items()
            if package in self.missing() and name not in ("aie-opt", "aie-translate")
        }
        return Toolchain({**there, **self.tools})


def find_toolchain(environment: Mapping[str, str], python_path: Iterable[Path]) -> Toolchain:
    """Look for every tool.

    Args:
        environment: `PATH`, `MLIR_AIE_INSTALL_DIR`, `PEANO_INSTALL_DIR` and `XILINX_XRT` count.
        python_path: folders of installed packages; wheels keep their tools inside them.
    """
    packages = tuple(python_path)
    found = {name: path for name in TOOLS if (path := _find(name, environment, packages))}
    broken = [path for name, path in found.items() if name == "xclbinutil" and not _runs(path)]
    tools = {name: path for name, path in found.items() if path not in broken}
    return Toolchain(tools, tuple(broken))


def _runs(tool: Path) -> bool:
    """Whether it says its version: Debian's wrapper ends with 0 even where it finds no program."""
    try:
        done = subprocess.run((str(tool), "--version"), capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return False
    return re.search(rb"\d+\.\d+", done.stdout) is not None


def _find(name: str, environment: Mapping[str, str], packages: Iterable[Path]) -> Path | None:
    package = TOOLS[name]
    folders = [*map(str, _folders(package, environment, packages))]
    if package != "Peano":  # a clang of the PATH compiles for the host
        folders.append(environment.get("PATH", ""))
    for spelling in NAMES.get(name, (name,)):
        if path := shutil.which(spelling, path=":".join(folders)):
            return Path(path)
    return None


def _folders(
    package: str, environment: Mapping[str, str], packages: Iterable[Path]
) -> Iterator[Path]:
    variable, wheel = {
        "Peano": ("PEANO_INSTALL_DIR", "llvm-aie"),
        "XRT": ("XILINX_XRT", ""),
    }.get(package, ("MLIR_AIE_INSTALL_DIR", "mlir_aie"))
    if named := environment.get(variable):
        yield Path(named) / "bin"
    if wheel:
        yield from (folder / wheel / "bin" for folder in packages)
    yield from map(Path, FOLDERS.get(package, ()))
