"""The SPIR-V modules of the package, by name."""

from __future__ import annotations

import hashlib
import json
import struct
from functools import cache
from pathlib import Path

from uq.errors import DeviceError
from uq.kernels.vulkan.variants import VARIANTS

SPIRV_15 = 0x10500


@cache
def load(name: str) -> bytes:
    """The module called `name` in the table of variants.

    A source checkout whose shaders changed since the package was built compiles the module anew;
    the installed package has no sources and needs no compiler.

    Raises:
        KeyError: no such variant.
        DeviceError: the file is missing, or not the one that the index of the package lists.
        ToolMissing: a checkout with changed shaders and no compiler.
        ShaderError: a changed shader is wrong.
    """
    from uq.kernels.vulkan import compile as compiler

    variant, sources = VARIANTS[name], compiler.SOURCES
    entry = _index(compiler.MODULES).get(name, {})
    if sources.is_dir() and entry.get("sources") != compiler.sources_hash(variant, sources):
        return compiler.compile_variant(variant, sources)
    return _packaged(compiler.MODULES / f"{name}.spv", entry)


def in_vulkan_12(module: bytes) -> bytes:
    """A module as SPIR-V 1.5. Ours use nothing newer; with VK_KHR_maintenance4 their workgroups may
    have sizes that are specialization constants there, too."""
    return module[:4] + struct.pack("<I", SPIRV_15) + module[8:]


def _packaged(path: Path, entry: dict[str, str]) -> bytes:
    try:
        module = path.read_bytes()
    except OSError:
        module = b""
    if hashlib.sha256(module).hexdigest() != entry.get("spv"):
        raise DeviceError(f"{path} is missing or not the file that uq installed; reinstall uq")
    return module


@cache
def _index(folder: Path) -> dict[str, dict[str, str]]:
    """Module -> its hashes; nothing when the package was never built."""
    try:
        modules: dict[str, dict[str, str]] = json.loads((folder / "index.json").read_text())[
            "modules"
        ]
    except (OSError, ValueError, KeyError):
        return {}
    return modules
