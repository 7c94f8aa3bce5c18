"""Repairs, one after the other, each after a yes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Sequence

from uq.doctor.finding import Finding, Repair
from uq.doctor.system import System
from uq.errors import DeviceError, ToolMissing, UsageError

Ask = Callable[[str], bool]
Execute = Callable[[Sequence[str]], int]


def mend(findings: Iterable[Finding], system: System, ask: Ask, execute: Execute) -> int:
    """Offer every repair; a cause that several findings share is offered once.

    Returns:
        How many were made.
    """
    repairs = {finding.repair: finding for finding in findings if finding.repair}
    return sum(_make(repair, finding, system, ask, execute) for repair, finding in repairs.items())


def set_power_mode(mode: str, system: System, execute: Execute) -> None:
    """`xrt-smi configure --pmode MODE`, as root.

    Raises:
        ToolMissing: there is no xrt-smi.
        DeviceError: it refuses.
    """
    tool = system.which("xrt-smi")
    if tool is None:
        raise ToolMissing("xrt-smi is not on the PATH; it comes with XRT: uq doctor says how")
    argv = _as_root((tool, "configure", "--pmode", mode), system)
    if execute(argv) != 0:
        raise DeviceError(f"xrt-smi did not set the power mode {mode}; see above")


def execute(argv: Sequence[str]) -> int:
    """Run a command in this terminal; its exit code."""
    try:
        return subprocess.run(argv).returncode
    except OSError as error:
        raise DeviceError(f"{argv[0]}: {error.strerror}") from error


def _make(repair: Repair, finding: Finding, system: System, ask: Ask, run: Execute) -> bool:
    question = f"{finding.what}\n  {repair}\n  undone by: {repair.undo}\nrun it?"
    if not ask(question):
        return False
    argv = _as_root(repair.argv, system) if repair.root else repair.argv
    if run(argv) != 0:
        raise DeviceError(f"{finding.check}: {repair} failed; nothing after it was tried")
    return True


def _as_root(argv: Sequence[str], system: System) -> Sequence[str]:
    if system.user.uid == 0:
        return argv
    if system.which("sudo") is None:
        raise UsageError("this needs root, and there is no sudo; run uq doctor --fix as root")
    return ("sudo", *argv)
