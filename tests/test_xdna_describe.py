import json
import struct
from pathlib import Path

import pytest

from uq.cli import main
from uq.formats.xdna.build import build_xclbin, npu_kernel
from uq.formats.xdna.cdo import Cdo, Command, Opcode
from uq.formats.xdna.describe import describe
from uq.formats.xdna.partition import AiePartition, Group, PdiEntry
from uq.formats.xdna.pdi import Partition, Pdi, merge
from uq.formats.xdna.txn import NPU2, BlockWrite, Preempt, Transaction, Write
from uq.formats.xdna.xclbin import Section, Xclbin

CDO = Cdo.of([Command.of(Opcode.WRITE, 1, 2), Command.of(Opcode.WRITE, 3, 4)])
PDI = Pdi(partitions=(Partition(merge([CDO]), id=7),)).to_bytes()
IMAGE = {
    "image": "aie_image",
    "id": "0x1c000000",
    "id code": "0x14ca8093",
    "partitions": [{"id": 7, "size": 24, "commands": {"WRITE": 2}}],
}


def saved(folder: Path, data: bytes) -> Path:
    path = folder / "file"
    path.write_bytes(data)
    return path


def test_pdi(tmp_path: Path) -> None:
    assert describe(saved(tmp_path, PDI)) == {"format": "PDI", "size": len(PDI)} | IMAGE


def test_cdo(tmp_path: Path) -> None:
    data = CDO.to_bytes()
    assert describe(saved(tmp_path, data)) == {
        "format": "CDO",
        "size": 44,
        "commands": {"WRITE": 2},
    }


def test_instruction_stream(tmp_path: Path) -> None:
    operations = (Write(1, 2), BlockWrite(1, (2, 3)), Write(1, 3), Preempt(0))
    data = Transaction(operations=operations, generation=NPU2, columns=8).to_bytes()
    assert describe(saved(tmp_path, data)) == {
        "format": "TXN",
        "size": len(data),
        "device": "NPU2",
        "columns": 8,
        "rows": 6,
        "operations": {"Write": 2, "BlockWrite": 1, "Preempt": 1},
    }


def test_xclbin(tmp_path: Path) -> None:
    entries = (PdiEntry(PDI, (Group(1, (0x901,)),)), PdiEntry(b"other", ()))
    partition = AiePartition(column_width=4, start_columns=(0,), pdis=entries)
    found = describe(saved(tmp_path, build_xclbin([npu_kernel(buffers=1)], partition).to_bytes()))
    memory, parts, metadata, layout, links, *_ = found["sections"]
    assert memory["memories"] == ["HOST: 65536 KiB at 0x4000000", "SRAM: 49152 KiB at 0x4000000"]
    assert (parts["kind"], parts["columns"], parts["start columns"]) == ("AIE_PARTITION", 4, [0])
    read, unread = parts["PDIs"]
    assert read["groups"] == [{"name": "DPU", "PDI id": "0x1", "kernels": ["0x901"]}]
    assert {key: read[key] for key in IMAGE} == IMAGE
    assert "PDI 1: magic at 0x0: needs 16 bytes, but 5 are left" in unread["not read"]
    arguments = ["uint64_t opcode", "char * instr", "uint32_t ninstr", "void* bo0"]
    kernel = {"name": "MLIR_AIE", "id": "0x901", "arguments": arguments, "instances": ["MLIRAIE"]}
    assert metadata["kernels"] == [kernel]
    assert layout["instances"] == ["MLIR_AIE:MLIRAIE: kernel 0x901"]
    assert links["connections"] == [
        "argument 1 of instance 0: memory 1",
        "argument 3 of instance 0: memory 0",
    ]


def test_sections_of_other_kinds_are_named(tmp_path: Path) -> None:
    file = Xclbin(sections=(Section(0, b"1"), Section(99, b"")), uuid=bytes(16))
    assert describe(saved(tmp_path, file.to_bytes()))["sections"] == [
        {"kind": "BITSTREAM", "size": 1},
        {"kind": "section kind 99", "size": 0},
    ]


def test_raw_kernel_in_both_byte_orders(tmp_path: Path) -> None:
    for order, name in (("<", "little"), (">", "big")):
        data = struct.pack(f"{order}3I", 0x4E505541, 1, 0xABCDEF) + b"\xff"
        assert describe(saved(tmp_path, data)) == {
            "format": "raw kernel",
            "size": 13,
            "byte order": name,
            "words after the magic": ["0x00000001", "0x00abcdef"],
        }


def test_inspect_prints_an_outline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved(tmp_path, PDI))]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "format: PDI",
        "size: 384",
        "image: aie_image",
        "id: 0x1c000000",
        "id code: 0x14ca8093",
        "partitions:",
        "  - id: 7",
        "    size: 24",
        "    commands:",
        "      WRITE: 2",
    ]


def test_inspect_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, CDO.to_bytes())
    assert main(["inspect", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == describe(path)


def test_inspect_reports_a_broken_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved(tmp_path, PDI[:100]))]) == 1
    assert capsys.readouterr().err == (
        "uq: file: table at 0x10: needs 124 bytes, but 84 are left\n"
    )
