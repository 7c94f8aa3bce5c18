"""What installs a missing part, by distribution.

Sources: AMD's Ubuntu archive `ppa:amd-team/xrt`, whose packages Ubuntu itself has since 26.04,
Fedora's and Arch's package lists, and the README of amd/xdna-driver for all others.
"""

from __future__ import annotations

from uq.doctor.system import System

APT, DNF, PACMAN = "sudo apt-get install", "sudo dnf install", "sudo pacman -S"
PPA = "sudo add-apt-repository ppa:amd-team/xrt"
XDNA_DRIVER = "build and install it from https://github.com/amd/xdna-driver"

COMMANDS = {
    "xrt": {
        "ubuntu": f"{PPA} && {APT} libxrt2 libxrt-npu2 libxrt-utils-npu python3-xrt",
        "fedora": f"{DNF} xrt python3-xrt",
        "arch": f"{PACMAN} xrt xrt-plugin-amdxdna",
    },
    "module": {
        "ubuntu": f"{PPA} && {APT} amdxdna-dkms",
        "fedora": f"{DNF} kernel kernel-modules-extra",
        "arch": f"{PACMAN} linux",
    },
    "kernel": {
        "ubuntu": f"{APT} --install-recommends linux-generic-hwe-24.04",
        "debian": f"{APT} -t stable-backports linux-image-amd64",
        "fedora": "sudo dnf upgrade kernel",
        "arch": "sudo pacman -Syu",
    },
    "firmware": {
        "ubuntu": f"{APT} --reinstall linux-firmware",
        "fedora": "sudo dnf reinstall linux-firmware",
        "arch": f"{PACMAN} linux-firmware",
    },
    "vulkan": {
        "ubuntu": f"{APT} mesa-vulkan-drivers vulkan-tools",
        "debian": f"{APT} mesa-vulkan-drivers vulkan-tools",
        "fedora": f"{DNF} mesa-vulkan-drivers vulkan-tools",
        "arch": f"{PACMAN} vulkan-radeon vulkan-tools",
    },
}
OTHERWISE = {
    "kernel": "install Linux 6.14 or newer",
    "firmware": (
        "copy the folder amdnpu of https://gitlab.com/kernel-firmware/linux-firmware "
        "to /lib/firmware"
    ),
    "vulkan": "install the Vulkan loader and Mesa's driver RADV",
}


def install(part: str, system: System) -> str:
    """The line that installs `part`, one of `COMMANDS`, on this distribution."""
    known = COMMANDS[part].get(system.distribution) or OTHERWISE.get(part, XDNA_DRIVER)
    return known.removeprefix(f"{PPA} && ") if _has_xrt(system) else known


def _has_xrt(system: System) -> bool:
    """Ubuntu's own archive has XRT."""
    version = system.os_release.get("VERSION_ID", "")
    return system.os_release.get("ID") == "ubuntu" and version >= "26.04"
