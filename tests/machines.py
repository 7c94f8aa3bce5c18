"""Machines as trees of files: one on which all works, and broken ones.

Made from what users and manuals say of them: no machine with an NPU was at hand.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uq.doctor.system import System, User, VulkanDevice
from uq.errors import DeviceError

NPU = "sys/devices/pci0000:00/0000:c5:00.1"
GPU = "sys/devices/pci0000:00/0000:c4:00.0"
PYTHON, PYXRT = "usr/lib/python3/dist-packages", "pyxrt.cpython-312-x86_64-linux-gnu.so"
VENV = "home/ann/uq/lib/python3.12/site-packages"
LIB = "usr/lib/x86_64-linux-gnu"
FIRMWARE = "lib/firmware/amdnpu/17f0_10"
RELEASE = "6.17.0-14-generic"
MODULE = f"lib/modules/{RELEASE}/modules.dep"
ICD = '{"ICD": {"library_path": "libvulkan_radeon.so", "api_version": "1.4.318"}}'
FILES = {
    "etc/os-release": 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n',
    "etc/group": f"render:x:{os.getgid()}:ann\n",
    "proc/cpuinfo": "model name\t: AMD Ryzen AI 9 HX 370 w/ Radeon 890M\n",
    "proc/cmdline": "BOOT_IMAGE=/vmlinuz root=/dev/nvme0n1p2 ro quiet",
    f"{NPU}/vendor": "0x1022\n",
    f"{NPU}/device": "0x17f0\n",
    f"{NPU}/revision": "0x10\n",
    f"{NPU}/class": "0x118000\n",
    f"{NPU}/fw_version": "1.1.2.64\n",
    f"{NPU}/accel/accel0/dev": "261:0\n",
    f"{GPU}/vendor": "0x1002\n",
    f"{GPU}/class": "0x038000\n",
    "sys/module/amdxdna/version": "0.6\n",
    MODULE: "kernel/drivers/accel/amdxdna/amdxdna.ko.zst: kernel/drivers/gpu/drm/gpu-sched.ko\n",
    "dev/accel/accel0": "",
    "dev/dri/renderD128": "",
    f"{FIRMWARE}/npu.sbin.1.1.2.64.zst": "firmware",
    f"{LIB}/libxrt_core.so.2.21.75": "library",
    f"{LIB}/libxrt_driver_xdna.so.2.21.75": "library",
    f"{LIB}/libvulkan_radeon.so": "library",
    "usr/share/vulkan/icd.d/radeon_icd.json": ICD,
    f"{PYTHON}/{PYXRT}": "module",
    "usr/bin/xrt-smi": "#!/bin/sh\n",
    "usr/bin/sudo": "#!/bin/sh\n",
}
LINKS = {
    "sys/bus/pci/devices/0000:c5:00.1": "../../../devices/pci0000:00/0000:c5:00.1",
    "sys/bus/pci/devices/0000:c4:00.0": "../../../devices/pci0000:00/0000:c4:00.0",
    f"{NPU}/driver": "../../../bus/pci/drivers/amdxdna",
    f"{GPU}/driver": "../../../bus/pci/drivers/amdgpu",
    f"{FIRMWARE}/npu.sbin.zst": "npu.sbin.1.1.2.64.zst",
    f"{LIB}/libxrt_core.so.2": "libxrt_core.so.2.21.75",
    f"{LIB}/libxrt_driver_xdna.so.2": "libxrt_driver_xdna.so.2.21.75",
    f"{VENV}/{PYXRT}": f"/{PYTHON}/{PYXRT}",
}
RADEON = VulkanDevice("AMD Radeon 890M Graphics (RADV STRIX1)", "integrated")
LLVMPIPE = VulkanDevice("llvmpipe", "cpu", matrices=False)
PLATFORM = "Platform\n  Name                   : NPU Strix \n  Power Mode             : Turbo \n"


@dataclass
class Tree:
    """A machine that is being put together."""

    root: Path
    memlock: int | None = None
    python: str = "cpython-312"
    release: str = RELEASE
    closed: set[str] = field(default_factory=set)
    says: dict[str, str] = field(default_factory=lambda: {"dmesg": "", "xrt-smi": PLATFORM})
    gpus: tuple[VulkanDevice, ...] = (RADEON,)
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755 if "bin/" in path else 0o660)

    def link(self, path: str, to: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).unlink(missing_ok=True)
        (self.root / path).symlink_to(to)

    def remove(self, *paths: str) -> None:
        for path in paths:
            found = self.root / path
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink()

    def run(self, argv: Sequence[str]) -> str | None:
        return self.says.get(argv[0])

    def vulkan(self) -> tuple[VulkanDevice, ...]:
        if not self.gpus:
            raise DeviceError("no Vulkan driver: the loader found none")
        return self.gpus

    def system(self) -> System:
        return System(
            root=self.root,
            environment={"PATH": str(self.root / "usr/bin")} | self.environment,
            user=User("ann", 1000, frozenset({1000})),
            release=self.release,
            memlock=self.memlock,
            python=self.python,
            python_path=(self.root / VENV,),
            may_open=lambda path: f"{path.relative_to(self.root)}" not in self.closed,
            run=self.run,
            vulkan=self.vulkan,
        )


def healthy(root: Path) -> Tree:
    """A Ryzen AI 300 with Ubuntu's hardware enablement kernel and AMD's archive of XRT."""
    tree = Tree(root)
    for path, text in FILES.items():
        tree.write(path, text)
    for path, to in LINKS.items():
        tree.link(path, to)
    return tree


def no_node(tree: Tree) -> None:
    tree.remove("dev/accel/accel0", f"{NPU}/driver", f"{NPU}/fw_version", f"{NPU}/accel")


def unloaded(tree: Tree) -> None:
    no_node(tree)
    tree.remove("sys/module/amdxdna")


def not_in_group(tree: Tree) -> None:
    tree.write("etc/group", f"render:x:{os.getgid()}:\n")
    tree.closed.add("dev/accel/accel0")


def joined_but_not_logged_in_again(tree: Tree) -> None:
    tree.closed.add("dev/accel/accel0")


def memlock_of_8_mib(tree: Tree) -> None:
    tree.memlock = 8 << 20


def old_kernel(tree: Tree) -> None:
    unloaded(tree)
    tree.release = "6.8.0-38-generic"
    tree.write("lib/modules/6.8.0-38-generic/modules.dep", "kernel/drivers/gpu/drm/drm.ko:\n")


def kernel_without_module(tree: Tree) -> None:
    unloaded(tree)
    tree.write(MODULE, "kernel/drivers/gpu/drm/drm.ko:\n")


def blacklisted(tree: Tree) -> None:
    unloaded(tree)
    tree.write("etc/modprobe.d/npu.conf", "# power\nblacklist amdxdna\n")


def not_loaded(tree: Tree) -> None:
    unloaded(tree)


def unsigned(tree: Tree) -> None:
    unloaded(tree)
    tree.says["dmesg"] = (
        "[ 9.1] Lockdown: modprobe: unsigned module loading is restricted; see man ..."
    )


def other_kernels_module(tree: Tree) -> None:
    unloaded(tree)
    tree.says["dmesg"] = "[ 9.2] amdxdna: Invalid relocation target, existing value is nonzero"


def twice_packed_firmware(tree: Tree) -> None:
    no_node(tree)
    tree.remove(FIRMWARE)
    tree.write(f"{FIRMWARE}/npu.sbin.1.0.0.63.zst.zst", "firmware")
    tree.link(f"{FIRMWARE}/npu.sbin.zst", "npu.sbin.1.0.0.63.zst")
    tree.says["dmesg"] = (
        "[ 4.0] amdxdna 0000:c5:00.1: Direct firmware load for amdnpu/17f0_10/npu.sbin failed "
        "with error -2"
    )


def newer_firmware_than_module(tree: Tree) -> None:
    no_node(tree)
    tree.says["dmesg"] = (
        "[ 4.1] amdxdna 0000:c5:00.1: [drm] *ERROR* aie2_check_protocol: Incompatible firmware "
        "protocol major 7 minor 3\n"
        "[ 4.2] amdxdna 0000:c5:00.1: [drm] *ERROR* aie2_hw_start: firmware is not alive\n"
    )


def hanging_npu(tree: Tree) -> None:
    no_node(tree)
    tree.says["dmesg"] = (
        "[ 4.1] amdxdna 0000:c5:00.1: [drm] *ERROR* aie2_smu_exec: smu cmd 4 failed, 0xff"
    )


def silent_refusal(tree: Tree) -> None:
    no_node(tree)
    del tree.says["dmesg"]


def iommu_off(tree: Tree) -> None:
    no_node(tree)
    tree.write("proc/cmdline", "root=/dev/nvme0n1p2 amd_iommu=off quiet")


def no_shared_memory(tree: Tree) -> None:
    tree.says["dmesg"] = (
        "[ 33.6] amdxdna 0000:c5:00.1: [drm] *ERROR* amdxdna_drm_open: SVA bind device failed, "
        "ret -19"
    )


def given_to_a_virtual_machine(tree: Tree) -> None:
    no_node(tree)
    tree.link(f"{NPU}/driver", "../../../bus/pci/drivers/vfio-pci")


def off_in_firmware_setup(tree: Tree) -> None:
    tree.remove("sys/bus/pci/devices/0000:c5:00.1")


def container_without_node(tree: Tree) -> None:
    tree.write(".dockerenv", "")
    tree.remove("dev/accel/accel0")


def no_xrt(tree: Tree) -> None:
    tree.remove(*(f"{LIB}/libxrt_{name}.so.2" for name in ("core", "driver_xdna")))
    tree.remove(*(f"{LIB}/libxrt_{name}.so.2.21.75" for name in ("core", "driver_xdna")))
    tree.remove(f"{PYTHON}/{PYXRT}")
    (tree.root / PYTHON / "xrt/backends/raycing").mkdir(parents=True)


def no_plugin(tree: Tree) -> None:
    tree.remove(*(f"{LIB}/libxrt_driver_xdna.so.2{end}" for end in ("", ".21.75")))


def broken_link(tree: Tree) -> None:
    tree.link(f"{LIB}/libxrt_driver_xdna.so.2", "libxrt_driver_xdna.so.2.20.0")


def plugin_of_another_version(tree: Tree) -> None:
    no_plugin(tree)
    tree.write(f"{LIB}/libxrt_driver_xdna.so.2.19.0", "library")
    tree.link(f"{LIB}/libxrt_driver_xdna.so.2", "libxrt_driver_xdna.so.2.19.0")


def debians_xrt(tree: Tree) -> None:
    no_plugin(tree)
    tree.remove(*(f"{LIB}/libxrt_core.so.2{end}" for end in ("", ".21.75")))
    tree.write(f"{LIB}/libxrt_core.so.2.13.0", "library")
    tree.link(f"{LIB}/libxrt_core.so.2", "libxrt_core.so.2.13.0")


def two_xrts(tree: Tree) -> None:
    tree.write("opt/xilinx/xrt/lib/libxrt_core.so.2.23.0", "library")
    tree.write("opt/xilinx/xrt/lib/libxrt_driver_xdna.so.2.23.0", "library")


def pyxrt_of_another_python(tree: Tree) -> None:
    tree.python = "cpython-313"


def pyxrt_out_of_sight(tree: Tree) -> None:
    tree.remove(f"{VENV}/{PYXRT}")


def no_pyxrt(tree: Tree) -> None:
    tree.remove(f"{PYTHON}/{PYXRT}")


def no_vulkan_driver(tree: Tree) -> None:
    tree.remove("usr/share/vulkan/icd.d/radeon_icd.json", f"{LIB}/libvulkan_radeon.so")
    tree.gpus = (LLVMPIPE,)


def closed_render_node(tree: Tree) -> None:
    tree.write("etc/group", f"render:x:{os.getgid()}:\n")
    tree.closed.add("dev/dri/renderD128")
    tree.gpus = (LLVMPIPE,)


def stale_driver_choice(tree: Tree) -> None:
    tree.environment["VK_ICD_FILENAMES"] = "/usr/share/vulkan/icd.d/amd_icd64.json"
    tree.gpus = ()


def powersaver(tree: Tree) -> None:
    tree.says["xrt-smi"] = PLATFORM.replace("Turbo", "Powersaver")


@dataclass(frozen=True)
class Broken:
    """Damage, and what must be found.

    Attributes:
        checks: all findings that are not in order, first things first.
        command: part of the line that mends the first.
        source: where users report it, or where they are warned of it; empty when nobody was found.
    """

    damage: Callable[[Tree], None]
    checks: tuple[str, ...]
    command: str
    source: str = ""
    level: str = "problem"


XDNA, FLM = "github.com/amd/xdna-driver", "github.com/ROCm/FastFlowLM"
AIE, AIR = "github.com/Xilinx/mlir-aie", "xilinx.github.io/mlir-air"
RENDER = "sudo usermod --append --groups render ann"
REPORTED = [
    Broken(not_in_group, ("npu.node",), RENDER, f"{FLM}/issues/400"),
    Broken(joined_but_not_logged_in_again, ("npu.node",), "", f"{FLM}/issues/400"),
    Broken(memlock_of_8_mib, ("npu.memlock",), "memlock unlimited", f"{XDNA}/issues/903"),
    Broken(old_kernel, ("npu.module",), "linux-generic-hwe-24.04", f"{XDNA}, README.md"),
    Broken(unsigned, ("npu.module",), "mokutil --import", f"{AIE}, docs/buildHostLin.md"),
    Broken(other_kernels_module, ("npu.module",), "dkms autoinstall", f"{XDNA}/issues/1469"),
    Broken(twice_packed_firmware, ("npu.firmware",), "linux-firmware", f"{XDNA}/issues/421"),
    Broken(newer_firmware_than_module, ("npu.firmware",), "amdxdna-dkms", f"{XDNA}/issues/1074"),
    Broken(hanging_npu, ("npu.driver",), "systemctl poweroff", f"{XDNA}/issues/389"),
    Broken(
        iommu_off,
        ("npu.iommu",),
        "grep -rn amd_iommu=off",
        "sleepingrobots.com/dreams/lemonade-server-npu-strix-halo",
    ),
    Broken(no_shared_memory, ("npu.iommu",), "cat /proc/cmdline", f"{XDNA}/issues/704"),
    Broken(
        off_in_firmware_setup, ("npu.device",), "--firmware-setup", f"{AIE}, README.md", "warning"
    ),
    Broken(no_plugin, ("xrt.plugin",), "libxrt-npu2", "github.com/Xilinx/XRT/issues/9141"),
    Broken(
        plugin_of_another_version,
        ("xrt.plugin",),
        "libxrt-npu2",
        "github.com/hpenedones/fastflowlm-docker/issues/1",
        "warning",
    ),
    Broken(
        pyxrt_of_another_python,
        ("xrt.python",),
        "python3.12 -m venv",
        f"{AIR}/dev/buildingRyzenWin",
    ),
    Broken(
        pyxrt_out_of_sight,
        ("xrt.python",),
        f"ln --symbolic /{PYTHON}/{PYXRT} /{VENV}/",
        f"{AIE}/pull/2685",
    ),
    Broken(
        closed_render_node,
        ("vulkan.node",),
        RENDER,
        "github.com/fastfetch-cli/fastfetch/issues/1513",
    ),
]
UNREPORTED = [
    Broken(kernel_without_module, ("npu.module",), "amdxdna-dkms"),
    Broken(blacklisted, ("npu.module",), "grep -n amdxdna /etc/modprobe.d/npu.conf"),
    Broken(not_loaded, ("npu.module",), "sudo modprobe amdxdna"),
    Broken(silent_refusal, ("npu.driver",), "sudo dmesg | grep amdxdna"),
    Broken(given_to_a_virtual_machine, ("npu.driver",), "grep -rl vfio-pci"),
    Broken(container_without_node, ("npu.node",), "docker run --device /dev/accel/accel0"),
    Broken(no_xrt, ("xrt.libraries",), "libxrt2 libxrt-npu2"),
    Broken(broken_link, ("xrt.links",), "sudo ln --symbolic --force --no-dereference"),
    Broken(debians_xrt, ("xrt.libraries",), "libxrt2 libxrt-npu2"),
    Broken(no_pyxrt, ("xrt.python",), "python3-xrt"),
    Broken(two_xrts, ("xrt.libraries",), "ldconfig -p", level="warning"),
    Broken(no_vulkan_driver, ("vulkan.driver",), "mesa-vulkan-drivers"),
    Broken(stale_driver_choice, ("vulkan.loader",), "unset VK_ICD_FILENAMES"),
    Broken(powersaver, ("xrt.power",), "uq doctor --power-mode turbo", level="warning"),
]


def broken(machine: Broken, root: Path) -> System:
    tree = healthy(root)
    machine.damage(tree)
    return tree.system()


BROKEN = [*REPORTED, *UNREPORTED]
