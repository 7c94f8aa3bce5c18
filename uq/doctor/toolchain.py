"""The compiler of NPU designs; it is needed for building them only, so never a problem."""

from __future__ import annotations

from collections.abc import Iterator

from uq.doctor.finding import Finding, Level
from uq.doctor.system import System
from uq.kernels.npu.toolchain.find import INSTALL, find_toolchain


def check_toolchain(system: System) -> Iterator[Finding]:
    toolchain = find_toolchain(system.environment, system.python_path)
    why = "`uq npu build` compiles designs with it; everything else works without"
    for package in toolchain.missing():
        what = f"{package} is not installed"
        yield Finding("toolchain.compiler", Level.NOTE, what, why, INSTALL[package])
    for tool in toolchain.broken:
        what = f"{tool} does not run; Debian's package is incomplete"
        yield Finding("toolchain.packager", Level.NOTE, what, "uq writes xclbins without it")
    if toolchain.compiles:
        shown = ", ".join(f"{name} in {path.parent}" for name, path in toolchain.tools.items())
        yield Finding("toolchain.compiler", Level.OK, f"designs can be built: {shown}")
