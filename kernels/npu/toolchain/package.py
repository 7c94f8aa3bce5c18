"""A PDI of CDOs and an xclbin of a PDI: by bootgen and xclbinutil, or by our own writers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import NAMESPACE_OID, UUID, uuid5

from uq.errors import BundleError
from uq.formats.xdna.build import KERNEL_ID, MEMORIES, build_xclbin, npu_kernel
from uq.formats.xdna.cdo import parse_cdo
from uq.formats.xdna.metadata import GLOBAL, Argument
from uq.formats.xdna.partition import AiePartition, Group, PdiEntry
from uq.formats.xdna.pdi import Partition, Pdi, merge
from uq.kernels.npu.toolchain.job import Job
from uq.kernels.npu.toolchain.steps import CDOS, PDI, XCLBIN, Command, Own, Step, find_one

BUFFERS = 5  # of a kernel of mlir-aie; a design may use fewer
ID_CODE, EXTENDED_ID, IMAGE_ID = 0x14CA8093, 0x01, 0x1C000000


def pdi_steps(tools: Mapping[str, Path]) -> Iterator[Step]:
    """The CDOs of the work folder become `design.pdi`."""
    if "bootgen" not in tools:
        yield Own("PDI", f"merge the CDOs and write {PDI}", write_pdi)
        return
    yield Own("PDI", "write design.bif, which names the CDOs", write_bif)
    argv = (str(tools["bootgen"]), "-arch", "versal", "-image", "design.bif", "-o", PDI, "-w")
    yield Command("PDI", argv)


def xclbin_steps(job: Job, tools: Mapping[str, Path]) -> Iterator[Step]:
    """`design.pdi` becomes `aie.xclbin`."""
    if "xclbinutil" not in tools:
        yield Own("xclbin", f"write {XCLBIN}", lambda folder: write_xclbin(folder, job))
        return
    yield Own("xclbin", "write its sections as JSON", lambda folder: write_sections(folder, job))
    yield Command(
        "xclbin",
        (
            str(tools["xclbinutil"]),
            "--add-replace-section",
            "MEM_TOPOLOGY:JSON:mem_topology.json",
            "--add-kernel",
            "kernels.json",
            "--add-replace-section",
            "AIE_PARTITION:JSON:aie_partition.json",
            "--force",
            "--output",
            XCLBIN,
        ),
    )


def write_pdi(folder: Path) -> None:
    """Raises BundleError: a CDO is broken or has a command that is not packed."""
    cdos = [parse_cdo(path.read_bytes(), path.name) for path in _cdos(folder)]
    (folder / PDI).write_bytes(Pdi(partitions=(Partition(merge(cdos)),)).to_bytes())


def write_bif(folder: Path) -> None:
    """bootgen's description of the image, with the numbers of mlir-aie."""
    files = " ".join(f"file={path.relative_to(folder)}" for path in _cdos(folder))
    ids = f"  id_code = {ID_CODE:#x}\n  extended_id_code = {EXTENDED_ID:#04x}\n"
    image = f"    name=aie_image, id={IMAGE_ID:#x}\n    {{ type=cdo {files} }}\n"
    (folder / "design.bif").write_text(f"all:\n{{\n{ids}  image\n  {{\n{image}  }}\n}}\n")


def write_xclbin(folder: Path, job: Job) -> None:
    """Raises BundleError: there is no PDI."""
    image = _pdi(folder)
    pdi = PdiEntry(image, (Group(1, (KERNEL_ID,)),), _uuid(image).bytes)
    partition = AiePartition(column_width=job.columns, start_columns=job.start_columns, pdis=(pdi,))
    xclbin = build_xclbin([npu_kernel(buffers=max(BUFFERS, len(job.buffers)))], partition)
    (folder / XCLBIN).write_bytes(xclbin.to_bytes())


def write_sections(folder: Path, job: Job) -> None:
    """The JSON that xclbinutil reads, as mlir-aie writes it."""
    sections = {
        "mem_topology.json": _topology(),
        "kernels.json": _kernels(max(BUFFERS, len(job.buffers))),
        "aie_partition.json": _partition(folder, job),
    }
    for name, content in sections.items():
        (folder / name).write_text(json.dumps(content, indent=2))


def _cdos(folder: Path) -> list[Path]:
    return [find_one(folder, f"*aie_cdo_{part}.bin") for part in CDOS]


def _pdi(folder: Path) -> bytes:
    path = folder / PDI
    if not path.is_file():
        path = find_one(folder, "*.pdi")
    if not (data := path.read_bytes()):
        raise BundleError(f"{path.name} is empty; the tool before wrote nothing into it")
    return data


def _uuid(image: bytes) -> UUID:
    """The same for the same PDI, where mlir-aie draws lots."""
    return uuid5(NAMESPACE_OID, hashlib.sha256(image).hexdigest())


def _topology() -> dict[str, object]:
    rows = [
        {
            "m_type": "MEM_DRAM",
            "m_used": str(memory.used),
            "m_sizeKB": f"{memory.size:#x}",
            "m_tag": memory.tag,
            "m_base_address": f"{memory.base_address:#x}",
        }
        for memory in MEMORIES
    ]
    return {"mem_topology": {"m_count": str(len(rows)), "m_mem_data": rows}}


def _kernels(buffers: int) -> dict[str, object]:
    kernel = npu_kernel(buffers=buffers)
    entry = {
        "name": kernel.name,
        "type": "dpu",
        "extended-data": {"subtype": "DPU", "functional": "0", "dpu_kernel_id": f"{kernel.id:#x}"},
        "arguments": [_argument(argument) for argument in kernel.arguments],
        "instances": [{"name": name} for name in kernel.instances],
    }
    return {"ps-kernels": {"kernels": [entry]}}


def _argument(argument: Argument) -> dict[str, str]:
    found = {"name": argument.name, "type": argument.type, "offset": f"{argument.offset:#04x}"}
    if argument.qualifier != GLOBAL:
        return found | {"address-qualifier": "SCALAR"}
    memory = "SRAM" if argument.name == "instr" else "HOST"
    return found | {"address-qualifier": "GLOBAL", "memory-connection": memory}


def _partition(folder: Path, job: Job) -> dict[str, object]:
    empty = AiePartition(column_width=0, start_columns=(), pdis=())  # for the defaults
    group = {
        "name": "DPU",
        "type": "PRIMARY",
        "pdi_id": "0x01",
        "dpu_kernel_ids": [f"{KERNEL_ID:#x}"],
        "pre_cdo_groups": ["0xC1"],
    }
    pdi = {
        "uuid": str(_uuid(_pdi(folder))),
        "file_name": str((folder / PDI).resolve()),
        "cdo_groups": [group],
    }
    return {
        "aie_partition": {
            "name": empty.name,
            "operations_per_cycle": str(empty.operations_per_cycle),
            "inference_fingerprint": str(empty.inference_fingerprint),
            "pre_post_fingerprint": str(empty.pre_post_fingerprint),
            "partition": {
                "column_width": job.columns,
                "start_columns": list(job.start_columns),
            },
            "PDIs": [pdi],
        }
    }
