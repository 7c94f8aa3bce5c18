"""Where the checks look: files below a root, the user, the environment, and tools that answer."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MAX_LINKS = 16
PATIENCE = 20  # seconds that a tool may take


@dataclass(frozen=True)
class VulkanDevice:
    """What the Vulkan loader says of a device.

    Attributes:
        kind: `cpu` is a driver in software.
        reason: why the kernels cannot run on it.
        matrices: it multiplies blocks of matrices by one instruction.
    """

    name: str
    kind: str
    reason: str | None = None
    matrices: bool = True


@dataclass(frozen=True)
class User:
    name: str
    uid: int
    groups: frozenset[int]


@dataclass(frozen=True)
class System:
    """A machine.

    Attributes:
        root: what stands for `/`.
        release: of the kernel, as `uname -r` prints it.
        memlock: bytes that the user may lock in memory; None for no limit.
        python: the tag of extension modules, such as `cpython-312`.
        python_path: folders that Python imports from.
        may_open: whether the user may read and write a device node.
        run: standard output of a command; None when it is missing, fails or takes too long.
        vulkan: the devices of the Vulkan loader; raises DeviceError.
    """

    root: Path
    environment: Mapping[str, str]
    user: User
    release: str
    memlock: int | None
    python: str
    python_path: tuple[Path, ...]
    may_open: Callable[[Path], bool]
    run: Callable[[Sequence[str]], str | None]
    vulkan: Callable[[], tuple[VulkanDevice, ...]]

    def at(self, path: str | Path) -> Path:
        return self.root / str(path).lstrip("/")

    def shown(self, path: Path) -> str:
        """A path as the machine's own user names it."""
        return f"/{path.relative_to(self.root)}" if path.is_relative_to(self.root) else str(path)

    def text(self, path: str | Path) -> str:
        """Contents of a small file; empty when it is missing or may not be read."""
        try:
            return self.at(path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def glob(self, *patterns: str) -> Iterator[Path]:
        for pattern in patterns:
            yield from sorted(self.root.glob(pattern.lstrip("/")))

    def resolve(self, path: Path) -> Path | None:
        """What links lead to, absolute ones below the root; None when they lead nowhere."""
        for _ in range(MAX_LINKS):
            if not path.is_symlink():
                return path if path.exists() else None
            path = self.target(path)
        return None

    def target(self, link: Path) -> Path:
        to = Path(os.readlink(link))
        return self.at(to) if to.is_absolute() else link.parent / to

    def which(self, tool: str) -> str | None:
        return shutil.which(tool, path=self.environment.get("PATH", ""))

    @cached_property
    def os_release(self) -> dict[str, str]:
        pairs = (line.partition("=") for line in self.text("/etc/os-release").splitlines())
        return {key: value.strip('"') for key, _, value in pairs}

    @cached_property
    def distribution(self) -> str:
        """One of `DISTRIBUTIONS` that this one is or is like; empty when it is none."""
        names = (self.os_release.get("ID", ""), *self.os_release.get("ID_LIKE", "").split())
        return next((name for name in names if name in DISTRIBUTIONS), "")

    @cached_property
    def kernel_log(self) -> str | None:
        """None when the user may not read it."""
        return self.run(("dmesg",)) or self.run(("journalctl", "--dmesg", "--quiet", "--no-pager"))

    @cached_property
    def in_container(self) -> bool:
        marks = ("/.dockerenv", "/run/.containerenv")
        return any(self.at(mark).exists() for mark in marks) or "container" in self.environment

    def group_name(self, gid: int) -> str:
        for line in self.text("/etc/group").splitlines():
            name, _, number, *_ = (*line.split(":"), "", "", "")
            if number == str(gid):
                return name
        return str(gid)


DISTRIBUTIONS = ("ubuntu", "debian", "fedora", "arch")


def this_system() -> System:
    return System(
        root=Path("/"),
        environment=os.environ,
        user=_user(),
        release=platform.release(),
        memlock=_memlock(),
        python=sys.implementation.cache_tag or "",
        python_path=tuple(Path(entry) for entry in sys.path if entry),
        may_open=lambda path: os.access(path, os.R_OK | os.W_OK),
        run=run_tool,
        vulkan=vulkan_devices,
    )


def run_tool(argv: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(argv, capture_output=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def vulkan_devices() -> tuple[VulkanDevice, ...]:
    """Raises DeviceError: there is no loader or no driver."""
    from uq.kernels.vulkan.device import physical_gpus

    return tuple(
        VulkanDevice(gpu.name, gpu.kind, gpu.missing(), gpu.has_matrix_blocks)
        for gpu in physical_gpus()
    )


def _user() -> User:
    if sys.platform == "win32":
        return User(os.environ.get("USERNAME", ""), -1, frozenset())
    import pwd

    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # as in a container that was given a bare number
        name = str(uid)
    return User(name, uid, frozenset((*os.getgroups(), os.getgid())))


def _memlock() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft
