"""Mesa's AMD driver for a chip that is not in this machine.

RADV opens any AMD GPU that `RADV_FORCE_FAMILY` names: its limits and its compiler are the real
ones, and nothing can be executed. What comes back are the compiler's figures and the machine code;
no time is measured.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from uq.errors import ToolMissing
from uq.formats.checkpoint.cache import cache_folder
from uq.kernels.vulkan.api import binding, new
from uq.kernels.vulkan.device import EXTENSIONS, Gpu, choose
from uq.kernels.vulkan.pipelines import Pipelines

SYSTEM_DRIVERS = Path("/usr/share/vulkan/icd.d")
CAPTURE = 0x40 | 0x80  # VK_PIPELINE_CREATE_CAPTURE_{STATISTICS,INTERNAL_REPRESENTATIONS}_BIT_KHR
EXECUTABLES = "VK_KHR_pipeline_executable_properties"


@dataclass(frozen=True)
class Compiled:
    """A pipeline as the driver's compiler made it.

    Attributes:
        subgroup: lanes of a subgroup (a wave).
        statistics: RADV's own names (`VGPRs`, `Spilled VGPRs`, `Subgroups per SIMD`, ...) -> value.
        opcodes: machine instruction -> how often it occurs in the code.
    """

    subgroup: int
    statistics: Mapping[str, int]
    opcodes: Mapping[str, int]

    def count(self, prefix: str) -> int:
        """Machine instructions whose name begins with `prefix`."""
        return sum(number for name, number in self.opcodes.items() if name.startswith(prefix))


def find_driver() -> Path:
    """RADV's manifest: the one that `scripts/mesa` put into uq's cache, else the system's.

    Raises:
        ToolMissing: neither is there.
    """
    candidates = [cache_folder() / "mesa" / "radeon_icd.json"]
    candidates += sorted(SYSTEM_DRIVERS.glob("radeon_icd*.json"))
    for path in candidates:
        if path.is_file():
            return path
    raise ToolMissing(
        "Mesa's AMD driver is not installed: scripts/mesa, or apt-get install mesa-vulkan-drivers"
    )


def open_radv(driver: Path, family: str, folder: Path) -> Compiler:
    """RADV for the chip that it calls `family`. Once a process: the driver reads its environment.

    An unknown chip ends the process.

    Args:
        folder: for the driver's cache.

    Raises:
        DeviceError: the driver cannot be loaded.
    """
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):  # new and old name of one variable
        os.environ[name] = str(driver)
    os.environ["RADV_FORCE_FAMILY"] = family
    return Compiler(Gpu(choose(), (*EXTENSIONS, EXECUTABLES)), folder)


class Compiler(Pipelines):
    """Makes pipelines just as a session does, and says what became of them."""

    flags = CAPTURE

    @property
    def driver(self) -> str:
        return self._gpu.physical.driver

    def compile(self, name: str, constants: Mapping[str, int | float]) -> Compiled:
        pipeline = self.get(name, **constants)
        executable = partial(new, "PipelineExecutableInfoKHR", pipeline=pipeline)
        properties = self._list("PropertiesKHR", new("PipelineInfoKHR", pipeline=pipeline))
        statistics = self._list("StatisticKHR", executable())
        return Compiled(
            subgroup=int(properties[0].subgroupSize),
            statistics={_string(item.name): int(item.value.u64) for item in statistics},
            opcodes=_opcodes(self._texts(executable())["Assembly"]),
        )

    def _texts(self, executable: Any) -> dict[str, str]:
        """All texts that the driver made on its way."""
        records = self._list("InternalRepresentationKHR", executable)
        texts = [binding().ffi.new("char[]", record.dataSize) for record in records]
        for record, text in zip(records, texts, strict=True):
            record.pData = text
        self._fill("InternalRepresentationKHR", executable, records)
        return {
            _string(record.name): _string(text) for record, text in zip(records, texts, strict=True)
        }

    def _list(self, what: str, executable: Any) -> Any:
        """An array of `VkPipelineExecutable<what>`."""
        ffi, kind = binding().ffi, f"PipelineExecutable{what}"
        count = self._fill(what, executable, ffi.NULL)
        records = ffi.new(f"Vk{kind}[]", [new(kind)[0]] * count)
        self._fill(what, executable, records)
        return records

    def _fill(self, what: str, executable: Any, records: Any) -> int:
        """Fill an array, or count what there is."""
        name = f"vkGetPipelineExecutable{what.removesuffix('KHR').rstrip('s')}sKHR"
        ffi, lib = binding().ffi, binding().lib
        get = ffi.cast(f"PFN_{name}", lib.vkGetDeviceProcAddr(self._gpu.device, name.encode()))
        count = ffi.new("uint32_t *", len(records) if records else 0)
        get(self._gpu.device, executable, count, records)
        return int(count[0])


def _string(text: Any) -> str:
    return str(binding().ffi.string(text).decode(errors="replace"))


def _opcodes(code: str) -> dict[str, int]:
    """Of lines `opcode operands`, or, where the driver's LLVM does not know the chip,
    `results = opcode operands`."""
    return dict(Counter(re.findall(r"^\s+(?:[^=\n]* = )?([a-z][a-z0-9_]+)", code, re.MULTILINE)))
