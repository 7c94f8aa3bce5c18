"""EMBEDDED_METADATA of an xclbin: kernels, arguments and instances as XML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from xml.etree import ElementTree as ET

from uq.errors import BundleError
from uq.formats.decode import printable

T = TypeVar("T")

SCALAR, GLOBAL = 0, 1
POINTER_BYTES = 8


@dataclass(frozen=True)
class Argument:
    """`size` and `offset` in bytes.

    Attributes:
        qualifier: SCALAR or GLOBAL (a buffer).
        type: as in C.
    """

    name: str
    qualifier: int
    id: int
    size: int
    offset: int
    type: str


@dataclass(frozen=True)
class Kernel:
    """A kernel of an NPU.

    Attributes:
        id: the dpu_kernel_id that ties it to a CDO group.
    """

    name: str
    id: int
    arguments: tuple[Argument, ...]
    instances: tuple[str, ...]
    subtype: int = 1
    functional: int = 0


def pack_metadata(kernels: Sequence[Kernel]) -> bytes:
    """One `core` with all kernels, two spaces a level, a line feed at the end."""
    project = ET.Element("project")
    core = project
    for tag in ("platform", "device", "core"):
        core = ET.SubElement(core, tag)
    for kernel in kernels:
        core.append(_element(kernel))
    ET.indent(project)
    text = ET.tostring(project, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'.encode()


def parse_metadata(data: bytes, where: str) -> tuple[Kernel, ...]:
    """All kernels of type `dpu`.

    Raises:
        BundleError: not UTF-8 XML, a document type declaration, a missing or wrong attribute.
    """
    try:
        text = data.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{where}: byte {error.start} is not UTF-8") from error
    if "<!DOCTYPE" in text:  # where entities are declared, which may grow without bound
        raise BundleError(f"{where}: a document type declaration is not allowed")
    try:
        project = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise BundleError(f"{where}: not valid XML: {error}") from error
    kernels = project.findall("./platform/device/core/kernel")
    return tuple(_kernel(kernel, where) for kernel in kernels if kernel.get("type") == "dpu")


def _element(kernel: Kernel) -> ET.Element:
    element = ET.Element("kernel", name=kernel.name, language="c", type="dpu")
    ids = {"functional": kernel.functional, "subtype": kernel.subtype, "dpu_kernel_id": kernel.id}
    ET.SubElement(element, "extended-data", {key: f"{value:#x}" for key, value in ids.items()})
    for argument in kernel.arguments:
        ET.SubElement(element, "arg", _attributes(argument))
    for instance in kernel.instances:
        ET.SubElement(element, "instance", name=instance)
    return element


def _attributes(argument: Argument) -> dict[str, str]:
    return {
        "name": argument.name,
        "addressQualifier": str(argument.qualifier),
        "id": str(argument.id),
        "size": f"{argument.size:#x}",
        "offset": f"{argument.offset:#x}",
        "hostOffset": "0x0",
        "hostSize": f"{argument.size:#x}",
        "type": argument.type,
    }


def _kernel(element: ET.Element, where: str) -> Kernel:
    name = _get(element, "name", str, where)
    where = f"{where}: kernel {printable(name)}"
    extended = element.find("extended-data")
    if extended is None:
        raise BundleError(f"{where}: extended-data is missing")
    return Kernel(
        name=name,
        id=_get(extended, "dpu_kernel_id", _number, where),
        arguments=tuple(_argument(argument, where) for argument in element.findall("arg")),
        instances=tuple(_get(i, "name", str, where) for i in element.findall("instance")),
        subtype=_get(extended, "subtype", _number, where),
        functional=_get(extended, "functional", _number, where),
    )


def _argument(element: ET.Element, where: str) -> Argument:
    return Argument(
        name=_get(element, "name", str, where),
        qualifier=_get(element, "addressQualifier", _number, where),
        id=_get(element, "id", _number, where),
        size=_get(element, "size", _number, where),
        offset=_get(element, "offset", _number, where),
        type=_get(element, "type", str, where),
    )


def _get(element: ET.Element, name: str, convert: Callable[[str], T], where: str) -> T:
    """An attribute, converted."""
    value = element.get(name)
    if value is None:
        raise BundleError(f"{where}: {printable(element.tag)}: attribute {name!r} is missing")
    try:
        return convert(value)
    except ValueError as error:
        where = f"{where}: {printable(element.tag)}.{name}"
        raise BundleError(f"{where}: {value[:40]!r} is no number") from error


def _number(text: str) -> int:
    """Decimal, or hexadecimal with `0x`."""
    if len(text) > 20:
        raise ValueError
    return int(text, 0)
