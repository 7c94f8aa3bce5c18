"""Whether the user may use what the drivers offer: nodes in /dev, and how much may be locked."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from uq.doctor.finding import Finding, Level, Repair
from uq.doctor.kernel_log import SHARING, explain
from uq.doctor.system import System

HEAP = 64 << 20  # amdxdna maps so much, locked, for every context
LIMITS = "/etc/security/limits.d/99-uq-memlock.conf"


def node(system: System, device: Path) -> Iterator[Finding]:
    """The node in /dev/accel of a device in sysfs."""
    nodes = [path.name for path in device.glob("accel/accel*")] or ["accel0"]
    path = system.at(f"/dev/accel/{nodes[0]}")
    if not path.exists():
        yield no_node(system, path)
    elif system.may_open(path):
        yield Finding("npu.node", Level.OK, f"{system.shown(path)} may be opened")
        yield from explain(system, SHARING)
    else:
        yield closed(system, path, "npu.node", "XRT says 'No such device with index 0'")


def no_node(system: System, path: Path) -> Finding:
    shown = system.shown(path)
    if system.in_container:
        command = f"docker run --device {shown} --ulimit memlock=-1:-1 ..."
        what, why = f"this container was not given {shown}", "the NPU is out of its reach"
        return Finding("npu.node", Level.PROBLEM, what, why, command)
    what, why = f"{shown} is missing, though the driver runs", "nothing can open the NPU"
    command = "sudo udevadm trigger --subsystem-match=accel"
    return Finding("npu.node", Level.PROBLEM, what, why, command)


def closed(system: System, path: Path, check: str, error: str) -> Finding:
    """A node whose owner or mode keeps the user out."""
    found = path.stat()
    group, mode = system.group_name(found.st_gid), found.st_mode & 0o777
    shown, user = system.shown(path), system.user.name
    what = f"{shown} belongs to the group {group} (mode {mode:04o}), and {user} may not open it"
    member = group in _groups_of(user, system)
    if member or group == "root" or not mode & 0o060:
        then = f"{user} joined {group}: log out and in again" if member else ""
        command = "" if member else f"sudo chgrp render {shown} && sudo chmod g+rw {shown}"
        return Finding(check, Level.PROBLEM, what, error, command, then)
    repair = Repair(
        ("usermod", "--append", "--groups", group, user),
        undo=f"sudo gpasswd --delete {user} {group}",
    )
    then = "log out and in again: groups are read at login"
    return Finding(check, Level.PROBLEM, what, error, then=then, repair=repair)


def _groups_of(user: str, system: System) -> set[str]:
    lines = (line.split(":") for line in system.text("/etc/group").splitlines())
    return {name for name, *_, members in lines if user in members.split(",")}


def memlock(system: System) -> Finding:
    if system.memlock is None:
        return Finding("npu.memlock", Level.OK, "memory may be locked without a limit")
    short = system.memlock < HEAP
    line = f"{shlex.quote(system.user.name)} - memlock unlimited"
    return Finding(
        "npu.memlock",
        Level.PROBLEM if short else Level.WARNING,
        f"{system.user.name} may lock {system.memlock / 2**20:,.0f} MiB of memory",
        "buffers of the NPU are locked, the first one with 64 MiB; XRT says 'mmap(...) failed "
        "(err=-11): Resource temporarily unavailable'",
        then="log out and in again, then look at: ulimit -l. Sessions of systemd --user also need "
        "LimitMEMLOCK=infinity (sudo systemctl edit user@.service)",
        repair=Repair(
            ("sh", "-c", f"echo {line} > {LIMITS}"),
            undo=f"sudo rm {LIMITS}",
        ),
    )
