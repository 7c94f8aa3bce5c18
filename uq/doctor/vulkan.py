"""The GPU: kernel driver, node, Vulkan loader, Vulkan driver, features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from uq.doctor.access import closed
from uq.doctor.finding import Finding, Level
from uq.doctor.install import install
from uq.doctor.system import System, VulkanDevice
from uq.errors import DeviceError

LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
MANIFESTS = ("/etc/vulkan/icd.d/*.json", "/usr/share/vulkan/icd.d/*.json")
CHOSEN = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
AMD_GPUS, DISPLAY = "0x1002", "0x03"  # vendor and class of PCI devices


def check_vulkan(system: System) -> Iterator[Finding]:
    gpus = amd_gpus(system)
    causes = [*kernel_driver(gpus), *nodes(system, gpus), *chosen_drivers(system)]
    yield from causes
    yield from broken_manifests(system)
    try:
        devices = system.vulkan()
    except DeviceError as error:
        if not causes:
            yield no_vulkan(system, gpus, str(error))
        return
    yield from features(devices)
    if gpus and not causes and all(device.kind == "cpu" for device in devices):
        yield software_only(system, devices)


def amd_gpus(system: System) -> list[Path]:
    """Folders in sysfs of AMD's display devices."""
    return [
        path
        for path in system.glob("/sys/bus/pci/devices/*")
        if system.text(path.relative_to(system.root) / "vendor") == AMD_GPUS
        and system.text(path.relative_to(system.root) / "class").startswith(DISPLAY)
    ]


def kernel_driver(gpus: list[Path]) -> Iterator[Finding]:
    for gpu in gpus:
        link = gpu / "driver"
        driver = link.readlink().name if link.is_symlink() else "no driver"
        if driver == "amdgpu":
            continue
        yield Finding(
            "vulkan.kernel",
            Level.PROBLEM,
            f"the GPU at {gpu.name} has {driver} instead of amdgpu",
            "Mesa's Vulkan driver needs amdgpu",
            "sudo modprobe amdgpu; sudo dmesg | grep amdgpu",
            "if the kernel was started with nomodeset, take that out",
        )


def nodes(system: System, gpus: list[Path]) -> Iterator[Finding]:
    for path in system.glob("/dev/dri/renderD*") if gpus else ():
        if not system.may_open(path):
            why = "Vulkan then offers llvmpipe alone, which computes on the processor"
            yield closed(system, path, "vulkan.node", why)


def chosen_drivers(system: System) -> Iterator[Finding]:
    """Drivers that the environment names are the only ones that the loader takes."""
    for name in CHOSEN:
        for entry in filter(None, system.environment.get(name, "").split(":")):
            if not system.at(entry).exists():
                what = f"{name} names {entry}, which is not there"
                why = "the loader takes no other driver as long as this is set"
                yield Finding("vulkan.loader", Level.PROBLEM, what, why, f"unset {name}")


def broken_manifests(system: System) -> Iterator[Finding]:
    for path in system.glob(*MANIFESTS):
        try:
            library = json.loads(path.read_text())["ICD"]["library_path"]
        except (OSError, ValueError, KeyError, TypeError):
            library = None
        if library is None or not _library(system, path, library):
            to = f"names {library}, which is not there" if library else "is no manifest"
            what, why = f"{system.shown(path)} {to}", "the loader drops this driver"
            yield Finding("vulkan.driver", Level.WARNING, what, why, install("vulkan", system))


def no_vulkan(system: System, gpus: list[Path], error: str) -> Finding:
    level = Level.PROBLEM if gpus else Level.NOTE
    why = "--device vulkan is not available; --device cpu is" * bool(gpus)
    return Finding("vulkan.loader", level, error, why, install("vulkan", system) if gpus else "")


def features(devices: tuple[VulkanDevice, ...]) -> Iterator[Finding]:
    """What runs the kernels, and what newer drivers would add."""
    for device in devices:
        if device.reason:
            what, why = f"{device.name}: {device.reason}", "the kernels do not run on it"
            yield Finding("vulkan.device", Level.WARNING, what, why)
        elif device.kind == "cpu":
            what = f"{device.name} runs the kernels in software, for tests"
            yield Finding("vulkan.device", Level.NOTE, what)
        else:
            yield Finding("vulkan.device", Level.OK, f"{device.name} runs the kernels")
            if not device.matrices:
                what = f"{device.name} has no cooperative matrices of 16 x 16 in this driver"
                why = "prompts run without them, slower; on RDNA 3 and newer Mesa 25 has them"
                yield Finding("vulkan.matrices", Level.NOTE, what, why)


def software_only(system: System, devices: tuple[VulkanDevice, ...]) -> Finding:
    names = ", ".join(device.name for device in devices) or "no device"
    return Finding(
        "vulkan.driver",
        Level.PROBLEM,
        f"there is a GPU of AMD, and Vulkan offers {names}",
        "its driver is missing, or may not open /dev/dri/renderD128",
        install("vulkan", system),
    )


def _library(system: System, manifest: Path, library: str) -> bool:
    """A bare name is looked up like any shared library, others beside the manifest."""
    if "/" in library:
        path = system.at(library) if library.startswith("/") else manifest.parent / library
        return system.resolve(path) is not None
    return any(system.resolve(system.at(folder) / library) for folder in LIBRARIES)
