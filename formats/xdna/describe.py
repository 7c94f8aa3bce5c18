"""What is in a binary file of an NPU, as plain data for `uq inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from uq.errors import BundleError, UsageError
from uq.formats.decode import printable
from uq.formats.xdna import pdi, txn, xclbin
from uq.formats.xdna.cdo import Cdo, parse_cdo
from uq.formats.xdna.metadata import parse_metadata
from uq.formats.xdna.partition import Group, PdiEntry, parse_partition
from uq.formats.xdna.raw_kernel import is_raw_kernel, parse_raw_kernel
from uq.formats.xdna.records import Window
from uq.formats.xdna.sections import Connection, Instance, Memory, parse_table
from uq.formats.xdna.xclbin import Kind, Section

Description = dict[str, Any]  # JSON: str, int, list, dict

CDO_MAGIC = bytes.fromhex("04000000 43444f00")
START = 16  # bytes that tell the formats apart
DEVICES = {txn.NPU1: "NPU1", txn.NPU2: "NPU2"}


def describe(path: str | Path) -> Description:
    """Format, size and contents of an xclbin, PDI, CDO, instruction stream or raw kernel.

    Raises:
        UsageError: the file cannot be read.
        BundleError: the file is broken, or of none of these formats.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return describe_bytes(data, path.name)


def describe_bytes(data: bytes, name: str) -> Description:
    """The same of a file in memory.

    Raises:
        BundleError: the file is broken, or of none of these formats.
    """
    found = _find(data)
    if found is None:
        start = data[:8].hex(" ")
        raise BundleError(
            f"{printable(name)}: no xclbin, PDI, CDO or instruction stream; it starts with {start}"
        )
    kind, read = found
    return {"format": kind, "size": len(data)} | read(data, name)


def is_npu_file(path: str | Path) -> bool:
    """Whether there is a file that starts like one of the formats."""
    try:
        with Path(path).open("rb") as file:
            return _find(file.read(START)) is not None
    except OSError:
        return False


def _find(data: bytes) -> tuple[str, Callable[[bytes, str], Description]] | None:
    if data.startswith(xclbin.MAGIC):
        return "xclbin", _xclbin
    if data.startswith(pdi.SMAP):
        return "PDI", _pdi
    if data.startswith(CDO_MAGIC):
        return "CDO", lambda data, name: _cdo(parse_cdo(data, name))
    if is_raw_kernel(data):
        return "raw kernel", _raw_kernel
    if data.startswith(bytes(txn.VERSION)) and len(data) >= txn.Header.nbytes():
        return "TXN", _txn
    return None


def _xclbin(data: bytes, name: str) -> Description:
    file = xclbin.parse_xclbin(data, name)
    return {
        "uuid": str(UUID(bytes=file.uuid)),
        "platform": printable(file.platform),
        "sections": [_section(section, name) for section in file.sections],
    }


def _section(section: Section, name: str) -> Description:
    where = f"{printable(name)}: {section.title}"
    read = SECTIONS.get(section.kind)
    content = read(Window(memoryview(section.data), where)) if read else {}
    return {"kind": section.title, "size": len(section.data)} | content


def _memories(window: Window) -> Description:
    rows = parse_table(Memory, window)
    return {"memories": [f"{printable(m.tag)}: {m.size} KiB at {m.base_address:#x}" for m in rows]}


def _connections(window: Window) -> Description:
    rows = parse_table(Connection, window)
    return {
        "connections": [
            f"argument {row.argument} of instance {row.instance}: memory {row.memory}"
            for row in rows
        ]
    }


def _instances(window: Window) -> Description:
    rows = parse_table(Instance, window)
    return {"instances": [f"{printable(row.name)}: kernel {row.kernel_id:#x}" for row in rows]}


def _metadata(window: Window) -> Description:
    kernels = parse_metadata(bytes(window.data), window.where)
    return {
        "kernels": [
            {
                "name": printable(kernel.name),
                "id": f"{kernel.id:#x}",
                "arguments": [f"{printable(a.type)} {printable(a.name)}" for a in kernel.arguments],
                "instances": [printable(instance) for instance in kernel.instances],
            }
            for kernel in kernels
        ]
    }


def _partition(window: Window) -> Description:
    partition = parse_partition(window)
    return {
        "name": printable(partition.name),
        "columns": partition.column_width,
        "start columns": list(partition.start_columns),
        "PDIs": [
            _entry(entry, f"{window.where}: PDI {i}") for i, entry in enumerate(partition.pdis)
        ],
    }


def _entry(entry: PdiEntry, where: str) -> Description:
    """An image that cannot be read is no reason to hide the rest."""
    try:
        content = _pdi(entry.image, where)
    except BundleError as error:
        content = {"not read": str(error)}
    head = {"uuid": str(UUID(bytes=entry.uuid)), "size": len(entry.image)}
    return head | {"groups": [_group(group) for group in entry.groups]} | content


def _group(group: Group) -> Description:
    kernels = [f"{kernel:#x}" for kernel in group.kernel_ids]
    return {"name": printable(group.name), "PDI id": f"{group.pdi_id:#x}", "kernels": kernels}


def _pdi(data: bytes, name: str) -> Description:
    image = pdi.parse_pdi(data, name)
    return {
        "image": printable(image.name),
        "id": f"{image.id:#x}",
        "id code": f"{image.id_code:#x}",
        "partitions": [
            {"id": part.id, "size": len(part.cdo.body)} | _cdo(part.cdo)
            for part in image.partitions
        ],
    }


def _cdo(cdo: Cdo) -> Description:
    return {"commands": dict(Counter(command.name for command in cdo.commands()))}


def _txn(data: bytes, name: str) -> Description:
    stream = txn.parse_txn(data, name)
    return {
        "device": DEVICES.get(stream.generation, f"generation {stream.generation}"),
        "columns": stream.columns,
        "rows": stream.rows,
        "operations": dict(Counter(type(operation).__name__ for operation in stream.operations)),
    }


def _raw_kernel(data: bytes, name: str) -> Description:
    kernel = parse_raw_kernel(data, name)
    words = [f"{word:#010x}" for word in kernel.words]
    return {"byte order": kernel.byte_order, "words after the magic": words}


SECTIONS: dict[int, Callable[[Window], Description]] = {
    Kind.MEM_TOPOLOGY: _memories,
    Kind.GROUP_TOPOLOGY: _memories,
    Kind.CONNECTIVITY: _connections,
    Kind.GROUP_CONNECTIVITY: _connections,
    Kind.IP_LAYOUT: _instances,
    Kind.EMBEDDED_METADATA: _metadata,
    Kind.AIE_PARTITION: _partition,
}
