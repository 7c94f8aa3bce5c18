"""What is to be compiled: a checked design, its cores, and the sources of the objects it links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from xdsl.dialects.builtin import StringAttr
from xdsl.dialects.func import FuncOp

from uq.errors import DesignError, UsageError
from uq.kernels.npu.dialect.structure import Core, Device, SequenceOperation
from uq.kernels.npu.dialect.text import memref_type
from uq.kernels.npu.model import nbytes, place_of
from uq.kernels.npu.source import Source, print_design
from uq.kernels.npu.syntax import SYNTAXES, Syntax, to_syntax
from uq.kernels.npu.target import COLUMNS, Place
from uq.kernels.npu.verify import accepted

SUFFIXES = (".cc", ".cpp")
HEADERS = (*SUFFIXES, ".h", ".hpp")
ARCHITECTURES = {"npu1": "aie2", "npu2": "aie2p"}


@dataclass(frozen=True)
class Object:
    """An object file that cores link, compiled from C++."""

    name: str
    source: Path
    defines: Mapping[str, int] = field(default_factory=dict)

    def content(self) -> Iterator[bytes]:
        """All that its compiler may read: C++ beside the source, and the macros."""
        yield repr((self.name, self.source.name, sorted(self.defines.items()))).encode()
        for path in sorted(self.source.parent.iterdir()):
            if path.suffix in HEADERS:
                yield path.name.encode() + b"\0" + path.read_bytes()


@dataclass(frozen=True)
class Job:
    """One design for one device.

    Attributes:
        text: the MLIR that the tools get.
        device: such as `npu2` or `npu1_1col`.
        symbol: the name of the aie.device, if it has one.
        buffers: bytes of the host's buffers, the arguments of the runtime sequence.
    """

    name: str
    text: str
    device: str
    symbol: str | None
    cores: tuple[Place, ...]
    objects: tuple[Object, ...]
    buffers: tuple[int, ...]

    @property
    def architecture(self) -> str:
        """What Peano and mlir-aie call the cores."""
        return ARCHITECTURES[self.device.partition("_")[0]]

    @property
    def columns(self) -> int:
        return COLUMNS[self.device]

    @property
    def start_columns(self) -> tuple[int, ...]:
        """Where a partition may begin: a part of an array anywhere, as mlir-aie writes it."""
        whole = self.device in ARCHITECTURES
        return (0,) if whole else tuple(range(1, max(6 - self.columns, 2)))


def prepare(
    source: Source,
    *,
    name: str,
    sources: Path,
    defines: Mapping[str, int] | None = None,
    objects: tuple[Object, ...] | None = None,
    syntax: str | None = None,
) -> Job:
    """Check a design and find the C++ of its objects.

    Args:
        sources: folder with `NAME.cc` for each `NAME.o` that a core links.
        defines: macros for all of them.
        objects: what the cores link, in place of `sources` and `defines`.
        syntax: the spelling that the tools understand; None leaves the design as it is.

    Raises:
        DesignError: the verifier refuses the design, or it is not one device with a sequence.
        UsageError: there is no source for an object.
    """
    device = _device(source)
    (report,) = accepted(source)
    if objects is None:
        objects = tuple(_objects(device, sources, defines or {}))
    module = to_syntax(source.module, _syntax(syntax)) if syntax else source.module
    return Job(
        name=name,
        text=print_design(module),
        device=report.device,
        symbol=device.sym_name.data if device.sym_name else None,
        cores=tuple(_cores(device)),
        objects=objects,
        buffers=_buffers(source, device),
    )


def _device(source: Source) -> Device:
    devices = [op for op in source.module.walk() if isinstance(op, Device)]
    if len(devices) != 1:
        raise DesignError(f"{source.name}: {len(devices)} devices; an xclbin is built of one")
    return devices[0]


def _syntax(name: str) -> Syntax:
    if name not in SYNTAXES:
        raise UsageError(f"unknown syntax {name}; use {', '.join(SYNTAXES)}")
    return SYNTAXES[name]


def _cores(device: Device) -> Iterator[Place]:
    for op in device.walk():
        if isinstance(op, Core) and (place := place_of(op.tile)):
            yield place


def _objects(device: Device, folder: Path, defines: Mapping[str, int]) -> Iterator[Object]:
    for name in sorted(set(_linked(device))):
        stem = Path(name).stem
        for source in (folder / f"{stem}{suffix}" for suffix in SUFFIXES):
            if source.is_file():
                yield Object(name, source, defines)
                break
        else:
            raise UsageError(
                f"the design links {name}, and {folder} has no {stem}.cc; name the folder of its "
                "C++ with --sources"
            )


def _linked(device: Device) -> Iterator[str]:
    """Object files stand on cores until March 2026, then on functions."""
    for op in device.walk():
        found = op.link_with if isinstance(op, Core) else op.attributes.get("link_with")
        if isinstance(op, Core | FuncOp) and isinstance(found, StringAttr):
            yield found.data


def _buffers(source: Source, device: Device) -> tuple[int, ...]:
    sequences = [op for op in device.walk() if isinstance(op, SequenceOperation)]
    if len(sequences) != 1:
        raise DesignError(f"{source.name}: {len(sequences)} runtime sequences; one is needed")
    return tuple(nbytes(memref_type(argument)) for argument in sequences[0].body.block.args)
