"""XRT: its libraries, the plug-in for the NPU, the Python module, and the power mode."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from uq.doctor.finding import Finding, Level, Repair
from uq.doctor.install import install
from uq.doctor.system import System

OLDEST = (2, 17)  # the first that amd/xdna-driver was published with, in 2024
FOLDERS = (
    "/opt/xilinx/xrt/lib",
    "/opt/amd/xrt/lib",
    "/usr/local/lib",
    "/usr/local/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
)
PYTHON_FOLDERS = (
    "/opt/xilinx/xrt/python",
    "/opt/amd/xrt/python",
    "/usr/lib/python3/dist-packages",
    "/usr/local/lib/python3*/*-packages",
    "/usr/lib/python3*/*-packages",
    "/usr/lib64/python3*/site-packages",
)
WHY_PYXRT = "uq reaches the NPU through `import pyxrt`"
CORE, PLUGIN = "libxrt_core.so", "libxrt_driver_xdna.so"


def check_xrt(system: System, *, reachable: bool) -> Iterator[Finding]:
    """`reachable`: the driver runs, so that tools of XRT can ask it."""
    folders = _folders(system)
    broken = [finding for folder in folders for finding in broken_links(system, folder)]
    yield from broken
    homes = [folder for folder in folders if _versions(system, folder, CORE)]
    if homes:
        core = libraries(system, homes[0])
        yield core
        yield from second_copy(system, homes)
        if core.level is Level.OK:
            yield from plugin(system, homes[0])
    elif not broken:
        why = "nothing else talks to the NPU; `import pyxrt` fails"
        what = "XRT is not installed"
        if _xray(system):
            what += "; python3-xrt of Debian is X-ray tracing, not this"
        yield Finding("xrt.libraries", Level.PROBLEM, what, why, install("xrt", system))
        return
    yield pyxrt(system)
    if reachable and system.which("xrt-smi"):
        yield power_mode(system)


def broken_links(system: System, folder: Path) -> Iterator[Finding]:
    """Links to libraries of XRT that lead nowhere, as half an upgrade leaves them."""
    for link in sorted(folder.glob("libxrt*.so*")):
        if system.resolve(link) is not None:
            continue
        shown, to = system.shown(link), link.readlink()
        whole = [path for path in folder.glob(f"{link.name}.*") if system.resolve(path)]
        real = sorted(path.name for path in whole if not path.is_symlink())
        repair = None
        if len(real) == 1:
            argv = ("ln", "--symbolic", "--force", "--no-dereference", real[0], shown)
            repair = Repair(argv, undo=f"sudo ln -sfn {to} {shown}")
        yield Finding(
            "xrt.links",
            Level.PROBLEM,
            f"{shown} leads to {to}, which is not there",
            "XRT loads its libraries by these names; it says 'No such library' or finds 0 devices",
            "" if repair else install("xrt", system),
            repair=repair,
        )


def libraries(system: System, folder: Path) -> Finding:
    version = max(_versions(system, folder, CORE))
    shown = f"XRT {'.'.join(map(str, version)) or 'of unknown version'} in {system.shown(folder)}"
    if version and version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        why = f"it knows nothing of NPUs: {oldest} is the first that does"
        then = "remove the old one before that; Debian's is: sudo apt-get remove libxrt1"
        command = install("xrt", system)
        return Finding("xrt.libraries", Level.PROBLEM, f"{shown} is too old", why, command, then)
    return Finding("xrt.libraries", Level.OK, shown)


def second_copy(system: System, homes: list[Path]) -> Iterator[Finding]:
    if len(homes) == 1:
        return
    shown = " and ".join(system.shown(home) for home in homes)
    yield Finding(
        "xrt.libraries",
        Level.WARNING,
        f"XRT is installed twice: {shown}",
        "a program loads the core of one and the plug-in of the other, and finds 0 devices",
        "ldconfig -p | grep libxrt",
        "remove the copy that you do not need",
    )


def plugin(system: System, folder: Path) -> Iterator[Finding]:
    """XRT loads `libxrt_driver_*.so.MAJOR` from the folder of its core, and from nowhere else."""
    core, found = (_versions(system, folder, name) for name in (CORE, PLUGIN))
    why = "without it XRT finds 0 devices and says 'No such device with index 0'"
    if not found:
        if any((folder / f"{PLUGIN}{end}").is_symlink() for end in ("", ".2")):
            return  # a broken link, which has its own finding
        what = f"{system.shown(folder)} has no plug-in for the NPU ({PLUGIN})"
        yield Finding("xrt.plugin", Level.PROBLEM, what, why, install("xrt", system))
    elif max(found)[:2] != max(core)[:2]:
        versions = " and ".join(".".join(map(str, max(v))) for v in (core, found))
        what = f"XRT and its plug-in for the NPU are of different versions: {versions}"
        why = "they call each other's inner functions; calls to the driver fail or crash"
        yield Finding("xrt.plugin", Level.WARNING, what, why, install("xrt", system))
    else:
        yield Finding("xrt.plugin", Level.OK, f"plug-in for the NPU beside it ({PLUGIN})")


def pyxrt(system: System) -> Finding:
    """Python imports an extension module only if its name has the tag of this very Python."""
    ours = (f"pyxrt.{system.python}-", "pyxrt.so")
    seen = [path for folder in system.python_path for path in _modules(system, folder)]
    for path in seen:
        if path.name.startswith(ours):
            return Finding("xrt.python", Level.OK, f"pyxrt in {system.shown(path.parent)}")
    elsewhere = [path for folder in _python_folders(system) for path in _modules(system, folder)]
    for path in elsewhere:
        if path.name.startswith(ours):
            return out_of_sight(system, path)
    if others := [*elsewhere, *seen]:
        return wrong_python(system, others[0])
    what = "pyxrt, XRT's Python module, is not installed"
    return Finding("xrt.python", Level.PROBLEM, what, WHY_PYXRT, install("xrt", system))


def out_of_sight(system: System, path: Path) -> Finding:
    """One link into the environment of uq: PYTHONPATH would bring all of the system's packages."""
    shown = system.shown(path)
    what = f"{shown} is where this Python does not look"
    homes = [folder for folder in system.python_path if folder.name == "site-packages"]
    if not homes:
        command = f'export PYTHONPATH="{system.shown(path.parent)}:$PYTHONPATH"'
        return Finding("xrt.python", Level.PROBLEM, what, WHY_PYXRT, command)
    home = system.shown(homes[0])
    argv = ("ln", "--symbolic", shown, f"{home}/")
    repair = Repair(argv, undo=f"rm {home}/{path.name}", root=False)
    return Finding("xrt.python", Level.PROBLEM, what, WHY_PYXRT, repair=repair)


def wrong_python(system: System, path: Path) -> Finding:
    tag = re.search(r"cpython-(\d)(\d+)", path.name)
    built = f"{tag[1]}.{tag[2]}" if tag else "another version"
    here = re.sub(r"cpython-(\d)(\d+)", r"\1.\2", system.python)
    return Finding(
        "xrt.python",
        Level.PROBLEM,
        f"{system.shown(path)} is built for Python {built}, and uq runs on {here}",
        "an extension module works with one version of Python; `import pyxrt` says 'No module "
        "named pyxrt'",
        f"python{built} -m venv ~/uq && ~/uq/bin/pip install unicorn-quant" if tag else "",
        "then run uq doctor of that environment",
    )


def power_mode(system: System) -> Finding:
    report = system.run(("xrt-smi", "examine", "--report", "platform")) or ""
    found = re.search(r"^\s*(?:Power Mode|Performance Mode)\s*:\s*(\w+)", report, re.MULTILINE)
    if not found:
        return Finding("xrt.power", Level.NOTE, "xrt-smi does not say the NPU's power mode")
    mode = found[1].lower()
    what = f"the NPU's power mode is {mode}"
    if mode in ("performance", "turbo"):
        return Finding("xrt.power", Level.OK, what)
    why = "turbo lets it clock higher, and draw more power"
    level = Level.WARNING if mode == "powersaver" else Level.NOTE
    return Finding("xrt.power", level, what, why, "uq doctor --power-mode turbo")


def _folders(system: System) -> list[Path]:
    """Folders of libraries, each once; that of `setup.sh` comes first."""
    named = system.environment.get("XILINX_XRT")
    wanted = [f"{named}/lib"] if named else []
    paths = (system.at(folder) for folder in (*wanted, *FOLDERS))
    unique = {path.resolve(): path for path in paths if path.is_dir()}
    return list(unique.values())


def _versions(system: System, folder: Path, name: str) -> list[tuple[int, ...]]:
    """Versions of a library that is whole, from names such as `libxrt_core.so.2.21.75`."""
    found = [path for path in folder.glob(f"{name}*") if system.resolve(path)]
    numbers = (re.findall(r"\d+", path.name.removeprefix(name)) for path in found)
    return [tuple(map(int, parts)) for parts in numbers]


def _modules(system: System, folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("pyxrt*.so")) if system.resolve(path)]


def _python_folders(system: System) -> list[Path]:
    named = system.environment.get("XILINX_XRT")
    wanted = [f"{named}/python"] if named else []
    return list(system.glob(*wanted, *PYTHON_FOLDERS))


def _xray(system: System) -> bool:
    return system.at("/usr/lib/python3/dist-packages/xrt/backends/raycing").is_dir()
