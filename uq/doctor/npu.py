"""From the PCI bus to a node that may be opened: everything below XRT.

A check whose cause was found before says nothing: without a driver there is no node to look at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uq.doctor.access import memlock, node
from uq.doctor.finding import Finding, Level, Repair
from uq.doctor.install import install
from uq.doctor.kernel_log import STARTING, explain, refusals
from uq.doctor.system import System
from uq.doctor.xrt import check_xrt

AMD = "0x1022"
FIRST_KERNEL = (6, 14)  # the first with drivers/accel/amdxdna
# Processors of these names have an NPU, or mostly have one (Phoenix, Hawk Point).
WITH_NPU = re.compile(r"Ryzen AI|w/ Radeon 7[68]0M", re.IGNORECASE)
GRUB = "take it out of GRUB_CMDLINE_LINUX in /etc/default/grub, then: sudo update-grub"


@dataclass(frozen=True)
class Kind:
    """An NPU: what it is called, the device of its designs, its folder below amdnpu/."""

    name: str
    design: str
    firmware: str


# (device, revision) as in drivers/accel/amdxdna of Linux; Krackan takes Strix's firmware.
KINDS = {
    ("0x1502", "0x00"): Kind("Phoenix or Hawk Point, XDNA", "npu1", "1502_00"),
    ("0x17f0", "0x10"): Kind("Strix, XDNA 2", "npu2", "17f0_10"),
    ("0x17f0", "0x11"): Kind("Strix Halo, XDNA 2", "npu2", "17f0_11"),
    ("0x17f0", "0x20"): Kind("Krackan, XDNA 2", "npu2", "17f0_10"),
}
DEVICES = frozenset(device for device, _ in KINDS)


@dataclass(frozen=True)
class Npu:
    """One that was found.

    Attributes:
        path: its folder in sysfs, named by its address on the bus.
        kind: None for a revision that is not known here.
    """

    path: Path
    device: str
    revision: str
    kind: Kind | None

    @property
    def driver(self) -> str | None:
        link = self.path / "driver"
        return link.readlink().name if link.is_symlink() else None

    def __str__(self) -> str:
        name = self.kind.name if self.kind else f"unknown revision {self.revision}"
        return f"{name}, at {self.path.name} (1022:{self.device[2:]})"


def find_npu(system: System) -> Npu | None:
    for path in system.glob("/sys/bus/pci/devices/*"):
        vendor, device, revision = (
            system.text(path.relative_to(system.root) / name)
            for name in ("vendor", "device", "revision")
        )
        if vendor == AMD and device in DEVICES:
            return Npu(path, device, revision, KINDS.get((device, revision)))
    return None


def check_npu(system: System) -> Iterator[Finding]:
    npu = find_npu(system)
    if npu is None:
        yield absent(system)
        return
    yield Finding("npu.device", Level.OK if npu.kind else Level.WARNING, str(npu))
    trouble = (
        other_driver(npu)
        or iommu_off(system)
        or module(system, npu)
        or firmware(system, npu)
        or refused(system, npu)
    )
    if trouble:
        yield trouble
    else:
        yield bound(system, npu)
        yield from node(system, npu.path)
    yield memlock(system)
    yield from check_xrt(system, reachable=trouble is None)


def absent(system: System) -> Finding:
    cpu = re.search(r"^model name\s*:\s*(.+)$", system.text("/proc/cpuinfo"), re.MULTILINE)
    if cpu is None or not WITH_NPU.search(cpu[1]):
        return Finding("npu.device", Level.NOTE, "no NPU of AMD is on the PCI bus")
    if "microsoft" in system.text("/proc/version").lower():
        why = "Windows keeps the NPU to itself: WSL does not pass it on"
        return Finding("npu.device", Level.NOTE, "this is WSL, which has no NPU", why)
    return Finding(
        "npu.device",
        Level.WARNING,
        f"no NPU is on the PCI bus, though processors like {cpu[1]} have one",
        "it is switched off in the firmware's settings, or a virtual machine hides it",
        "sudo systemctl reboot --firmware-setup",
        "there, enable IPU or NPU (often below Advanced, CPU Configuration)",
    )


def other_driver(npu: Npu) -> Finding | None:
    if npu.driver in (None, "amdxdna", "amdxdna_legacy"):
        return None
    return Finding(
        "npu.driver",
        Level.PROBLEM,
        f"the NPU belongs to the driver {npu.driver}",
        "amdxdna cannot take it, so that there is no /dev/accel/accel0",
        f"grep -rl {npu.driver} /etc/modprobe.d /etc/default/grub",
        "take the NPU's ids out of what these files bind, then reboot",
    )


def iommu_off(system: System) -> Finding | None:
    """The NPU reads a process's memory through the IOMMU; without one amdxdna does not start."""
    line = system.text("/proc/cmdline").split()
    off = [word for word in line if word in ("amd_iommu=off", "iommu=off")]
    if not off:
        return None
    return Finding(
        "npu.iommu",
        Level.PROBLEM,
        f"the kernel was started with {off[0]}",
        "amdxdna needs the IOMMU; /dev/accel/accel0 never appears",
        f"grep -rn {off[0]} /etc/default/grub /etc/kernel/cmdline /boot/loader/entries",
        f"{GRUB}, and reboot",
    )


def firmware(system: System, npu: Npu) -> Finding | None:
    """The files that the driver asks for, plain or packed; a link to nowhere does not count."""
    if npu.kind is None or npu.driver:
        return None
    folder = f"/lib/firmware/amdnpu/{npu.kind.firmware}"
    names = [f"npu{tail}.sbin{pack}" for tail in ("", "_7", ".dev") for pack in ("", ".zst", ".xz")]
    for path in (system.at(folder) / name for name in names):
        found = system.resolve(path)
        if found and found.stat().st_size:
            return None
    there = ", ".join(path.name for path in system.glob(f"{folder}/*")) or "nothing"
    return Finding(
        "npu.firmware",
        Level.PROBLEM,
        f"{folder} has no npu.sbin that can be read; in it is {there}",
        "the kernel says 'Direct firmware load for amdnpu/... failed with error -2'",
        install("firmware", system),
        "then: sudo modprobe -r amdxdna; sudo modprobe amdxdna",
    )


def module(system: System, npu: Npu) -> Finding | None:
    """Why the kernel module is not loaded."""
    if npu.driver or system.at("/sys/module/amdxdna").exists():
        return None
    why = "without the module there is no /dev/accel/accel0, and XRT finds 0 devices"
    for path in system.glob("/etc/modprobe.d/*.conf", "/usr/lib/modprobe.d/*.conf"):
        if re.search(r"^\s*(blacklist|install)\s+amdxdna\b", path.read_text(), re.MULTILINE):
            what = f"{system.shown(path)} keeps the module amdxdna from being loaded"
            command = f"grep -n amdxdna {system.shown(path)}"
            then = "take these lines out, then: sudo modprobe amdxdna"
            return Finding("npu.module", Level.PROBLEM, what, why, command, then)
    if any(
        "/amdxdna.ko" in system.text(f"/lib/modules/{system.release}/{name}")
        for name in ("modules.dep", "modules.builtin")
    ):
        return not_loaded(system, why)
    return not_built(system, why)


def not_loaded(system: System, why: str) -> Finding:
    if explained := next(explain(system, STARTING), None):
        return explained
    what = "the kernel module amdxdna is installed and not loaded"
    repair = Repair(("modprobe", "amdxdna"), undo="sudo modprobe -r amdxdna")
    return Finding("npu.module", Level.PROBLEM, what, why, repair=repair)


def not_built(system: System, why: str) -> Finding:
    release = tuple(int(part) for part in re.findall(r"\d+", system.release)[:2])
    if release < FIRST_KERNEL:
        what = f"Linux {system.release} has no amdxdna; it came with 6.14"
        command = install("kernel", system)
        return Finding("npu.module", Level.PROBLEM, what, why, command, "then reboot")
    what = f"the module amdxdna is not installed for Linux {system.release}"
    return Finding("npu.module", Level.PROBLEM, what, why, install("module", system))


def refused(system: System, npu: Npu) -> Finding | None:
    """The module is loaded and did not take the device."""
    if npu.driver:
        return None
    if explained := next(explain(system, STARTING), None):
        return explained
    said = refusals(system)
    return Finding(
        "npu.driver",
        Level.PROBLEM,
        "the module amdxdna is loaded and did not take the NPU" + f": {said}" * bool(said),
        "there is no /dev/accel/accel0; a failed start often leaves the NPU in a state that only "
        "switching the machine off and on ends",
        "sudo dmesg | grep amdxdna",
    )


def bound(system: System, npu: Npu) -> Finding:
    where = npu.path.relative_to(system.root)
    parts = [f"driver {npu.driver}, Linux {system.release}"]
    if version := system.text(where / "fw_version"):
        parts.append(f"firmware {version}")
    return Finding("npu.driver", Level.OK, ", ".join(parts))
