"""The compiler of NPU designs; it is needed for building them only, so never a problem."""

from __future__ import annotations

from collections.abc import Iterator

from uq.doctor.finding import Finding, Level
from uq.doctor.system import System
from uq.kernels.npu.toolchain.find import INSTALL, find_toolchain


def check_toolchain(system: System) -> Iterator[Finding]:
    toolchain = find_toolchain(system.environment, system.python_path)
    why = "designs for the NPU are compiled with it; everything else works without"
    for package in toolchain.missing():
        what = f"{package} is not installed"
        yield Finding("toolchain.compiler", Level.NOTE, what, why, INSTALL[package])
    if toolchain.compiles:
        shown = ", ".join(f"{name} in {path.parent}" for name, path in toolchain.tools.items())
        yield Finding("toolchain.compiler", Level.OK, f"designs can be built: {shown}")
