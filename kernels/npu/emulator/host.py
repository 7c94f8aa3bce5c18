"""C++ core kernels, compiled for this machine and called in place of a core's object file."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

from xdsl.dialects.builtin import Float32Type, IntegerType, MemRefType
from xdsl.ir import Attribute

from uq.errors import DesignError, ToolMissing
from uq.formats.checkpoint.cache import cache_folder
from uq.kernels.npu.emulator.memory import Memory

INCLUDE = Path(__file__).parent / "include"  # our host version of aie_api
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC", "-w")
# The core each device has, as the compilers of AMD define it.
ARCHITECTURES: Mapping[str, int] = {"npu1": 20, "npu2": 21}


class Library(Protocol):
    """What stands for an object file."""

    def function(self, name: str, arguments: Sequence[Attribute]) -> Callable[..., None]:
        """A function that takes a Memory for each memref and a number for each scalar."""


@dataclass(frozen=True)
class Kernels:
    """One object file of a design: a source and the macros that make it this variant.

    Attributes:
        device: npu1 or npu2; sets `__AIE_ARCH__`.
    """

    source: Path
    device: str
    defines: Mapping[str, int] = field(default_factory=dict)

    def function(self, name: str, arguments: Sequence[Attribute]) -> Callable[..., None]:
        """
        Raises:
            ToolMissing: there is no C++ compiler.
            DesignError: it does not compile, or has no such function.
        """
        path = compiled(self.source, self.device, tuple(sorted(self.defines.items())))
        try:
            entry = getattr(ctypes.CDLL(str(path)), name)
        except AttributeError:
            raise DesignError(f"{self.source}: there is no function {name} in it") from None
        entry.restype = None
        entry.argtypes = [_ctype(kind) for kind in arguments]

        def call(*values: Memory | float) -> None:
            entry(*[v.address if isinstance(v, Memory) else v for v in values])

        return call


def _ctype(kind: Attribute) -> type[ctypes.c_void_p | ctypes.c_int32 | ctypes.c_float]:
    if isinstance(kind, MemRefType):
        return ctypes.c_void_p
    if isinstance(kind, Float32Type):
        return ctypes.c_float
    if isinstance(kind, IntegerType) and kind.width.data == 32:
        return ctypes.c_int32
    raise DesignError(f"a kernel argument of {kind} is not emulated; use memrefs, i32 and f32")


@cache
def compiled(source: Path, device: str, defines: tuple[tuple[str, int], ...]) -> Path:
    """The shared library, made once for each source, variant and compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise ToolMissing("the NPU emulator compiles kernels with g++: apt-get install g++")
    macros = {"__AIE_ARCH__": ARCHITECTURES[device], **dict(defines)}
    options = [*FLAGS, *(f"-D{name}={value}" for name, value in macros.items()), f"-I{INCLUDE}"]
    key = hashlib.sha256(repr((_version(compiler), options)).encode())
    for path in (source, *sorted(INCLUDE.rglob("*.hpp")), *sorted(source.parent.glob("*.h"))):
        key.update(path.read_bytes())
    library = cache_folder() / "npu-emulator" / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if not library.exists():
        _compile([compiler, *options, str(source)], library)
    return library


def _compile(command: Sequence[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.so")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise DesignError(f"{command[-1]} does not compile for the emulator: {first.strip()[:300]}")
    partial.replace(library)


@cache
def _version(compiler: str) -> str:
    """Also names the machine: `-march=native` code runs where it was made."""
    command = [compiler, "-march=native", "-Q", "--help=target", "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout
