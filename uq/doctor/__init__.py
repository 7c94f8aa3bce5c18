"""What keeps this machine from running uq on all of its devices, and the command that mends it.

Every check is a generator of findings over a `System`, which reads below a root folder: `/`, or a
tree that a test has written. Nothing is changed here; `uq.doctor.mend` does that, after asking.
"""

from __future__ import annotations

from uq.doctor.finding import Finding, Level
from uq.doctor.npu import check_npu
from uq.doctor.resources import check_resources
from uq.doctor.system import System, this_system
from uq.doctor.toolchain import check_toolchain
from uq.doctor.vulkan import check_vulkan
from uq.machine import Machine

__all__ = ["Finding", "Level", "System", "diagnose", "this_system"]


def diagnose(system: System, machine: Machine) -> tuple[Finding, ...]:
    """All findings, in the order in which one thing depends on another."""
    return (
        *check_resources(system, machine),
        *check_vulkan(system),
        *check_npu(system),
        *check_toolchain(system),
    )
