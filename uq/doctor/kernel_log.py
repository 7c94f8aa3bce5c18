"""What amdxdna says in the kernel's log when it fails, and what helps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from uq.doctor.finding import Finding, Level
from uq.doctor.install import install
from uq.doctor.system import System


@dataclass(frozen=True)
class Saying:
    """A line of the log, its meaning, and the remedy for a system."""

    pattern: re.Pattern[str]
    check: str
    what: str
    why: str
    command: Callable[[System], str]
    then: str = ""


# Why the driver does not start, and why processes cannot open the device that it made.
STARTING = (
    Saying(
        re.compile(r"amdxdna.*(?:Invalid|Incompatible) firmware protocol.*"),
        "npu.firmware",
        "the module amdxdna is older than the NPU's firmware",
        "their protocols differ, so that the NPU does not start; no other firmware helps as long "
        "as the module stays",
        lambda system: install("module", system),
        "then switch the machine off and on: a failed start leaves the NPU in a bad state",
    ),
    Saying(
        re.compile(r"unsigned module loading is restricted|Loading of .*module .*is rejected"),
        "npu.module",
        "amdxdna is not loaded, and Secure Boot refused a module that nobody signed",
        "a module that DKMS has built is signed with a key of this machine, which its firmware "
        "has to know",
        lambda system: "sudo mokutil --import /var/lib/dkms/mok.pub",
        "reboot and confirm the key",
    ),
    Saying(
        re.compile(
            r"amdxdna.*(?:disagrees about version|Invalid relocation target|Unknown symbol)"
        ),
        "npu.module",
        "the module amdxdna was built for another kernel",
        "the kernel does not load it",
        lambda system: "sudo dkms autoinstall && sudo modprobe amdxdna",
    ),
    Saying(
        re.compile(r"amdxdna.*(?:firmware is not alive|smu cmd \d+ failed|Access power failed).*"),
        "npu.driver",
        "the NPU did not answer when the driver started it",
        "it hangs, which outlives a reboot, or module and firmware do not fit each other",
        lambda system: "systemctl poweroff",
        "switch it on again; if it stays, install the newest module, NPU firmware and BIOS",
    ),
)
SHARING = (
    Saying(
        re.compile(r"amdxdna.*SVA bind device failed.*"),
        "npu.iommu",
        "the NPU may not see the memory of processes (SVA)",
        "every program that opens the NPU gets 'No such device'; amdxdna needs PASIDs of the IOMMU",
        lambda system: "cat /proc/cmdline",
        "take out iommu=pt, iommu.passthrough=1 and amd_iommu=..., enable IOMMU and SVM in the "
        "firmware's settings, and reboot; modules since June 2026 also run with iommu=pt",
    ),
)
REFUSED = re.compile(r"amdxdna.*?((?:\*ERROR\*|probe with driver|failed).*)")


def explain(system: System, sayings: Sequence[Saying]) -> Iterator[Finding]:
    """A finding for each of the sayings since the start of the machine."""
    log = system.kernel_log or ""
    for saying in sayings:
        if found := saying.pattern.search(log):
            what = f"{saying.what}; the kernel says: {found[0].strip()}"
            command = saying.command(system)
            yield Finding(saying.check, Level.PROBLEM, what, saying.why, command, then=saying.then)


def refusals(system: System) -> str:
    """The last words of the driver; empty when the log cannot be read."""
    lines = REFUSED.findall(system.kernel_log or "")
    return lines[-1].strip() if lines else ""
