"""An xclbin from kernels, memories and an AIE partition, as aiecc and xclbinutil combine them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from uq.errors import BundleError
from uq.formats.xdna.metadata import GLOBAL, SCALAR, Argument, Kernel, pack_metadata
from uq.formats.xdna.partition import AiePartition
from uq.formats.xdna.sections import (
    IP_PS_KERNEL,
    MEM_DRAM,
    NO_ADDRESS,
    Connection,
    Instance,
    Memory,
    dpu_properties,
    pack_table,
)
from uq.formats.xdna.xclbin import Kind, Section, Xclbin, content_uuid

HOST, SRAM = 0, 1  # indices into MEMORIES
MEMORIES = (
    Memory(MEM_DRAM, 1, 0x10000, 0x4000000, "HOST"),
    Memory(MEM_DRAM, 1, 0xC000, 0x4000000, "SRAM"),
)
KERNEL_ID = 0x901


def npu_kernel(
    name: str = "MLIR_AIE",
    *,
    kernel_id: int = KERNEL_ID,
    instance: str = "MLIRAIE",
    buffers: int = 5,
) -> Kernel:
    """A kernel with the arguments of mlir-aie: opcode, instructions, their count, buffers."""
    head = (
        Argument("opcode", SCALAR, 0, 8, 0x00, "uint64_t"),
        Argument("instr", GLOBAL, 1, 8, 0x08, "char *"),
        Argument("ninstr", SCALAR, 2, 4, 0x10, "uint32_t"),
    )
    data = (Argument(f"bo{i}", GLOBAL, 3 + i, 8, 0x14 + 8 * i, "void*") for i in range(buffers))
    return Kernel(name, kernel_id, (*head, *data), (instance,))


def build_xclbin(
    kernels: Sequence[Kernel],
    partition: AiePartition,
    *,
    memories: Sequence[Memory] = MEMORIES,
    memory_of: Mapping[str, int] = {"instr": SRAM},
) -> Xclbin:
    """All sections that XRT needs, the same bytes for the same input.

    Args:
        memory_of: argument name -> index of its memory; other buffers are in memory 0.

    Raises:
        BundleError: a kernel that no CDO group of the partition names, or an unknown memory.
    """
    _check_kernels(kernels, partition)
    connections = tuple(_connections(kernels, memory_of, len(memories)))
    topology, links = pack_table(Memory, memories), pack_table(Connection, connections)
    sections = (
        Section(Kind.MEM_TOPOLOGY, topology),
        Section(Kind.AIE_PARTITION, partition.to_bytes()),
        Section(Kind.EMBEDDED_METADATA, pack_metadata(kernels)),
        Section(Kind.IP_LAYOUT, pack_table(Instance, tuple(_instances(kernels)))),
        Section(Kind.CONNECTIVITY, links),
        # Every argument has one memory, so that the groups are the memories themselves.
        Section(Kind.GROUP_CONNECTIVITY, links),
        Section(Kind.GROUP_TOPOLOGY, topology),
    )
    return Xclbin(sections=sections, uuid=content_uuid(sections))


def _check_kernels(kernels: Sequence[Kernel], partition: AiePartition) -> None:
    known = {k for pdi in partition.pdis for group in pdi.groups for k in group.kernel_ids}
    for kernel in kernels:
        if not 0 <= kernel.id < 1 << 12:
            raise BundleError(f"kernel {kernel.name}: id {kernel.id:#x} has more than 12 bits")
        if kernel.id not in known:
            raise BundleError(f"kernel {kernel.name}: id {kernel.id:#x} is in no CDO group")


def _instances(kernels: Sequence[Kernel]) -> Iterable[Instance]:
    for kernel in kernels:
        for name in kernel.instances:
            properties = dpu_properties(kernel.id)
            yield Instance(IP_PS_KERNEL, properties, NO_ADDRESS, f"{kernel.name}:{name}")


def _connections(
    kernels: Sequence[Kernel], memory_of: Mapping[str, int], memories: int
) -> Iterable[Connection]:
    instances = (kernel for kernel in kernels for _ in kernel.instances)
    for index, kernel in enumerate(instances):
        for argument in kernel.arguments:
            memory = memory_of.get(argument.name, HOST)
            if not 0 <= memory < memories:
                raise BundleError(f"{kernel.name}.{argument.name}: there is no memory {memory}")
            if argument.qualifier == GLOBAL:
                yield Connection(argument.id, index, memory)
