"""Compile a module with Mesa's AMD driver for a chip that is not in this machine.

RADV opens any AMD GPU that `RADV_FORCE_FAMILY` names: its limits and its compiler are the real
ones, and nothing can be executed. What comes back are the compiler's figures and the machine code;
no time is measured.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uq.errors import DeviceError, ToolMissing
from uq.formats.checkpoint.cache import cache_folder

SYSTEM_DRIVERS = Path("/usr/share/vulkan/icd.d")
PUSH_CONSTANTS = 128  # bytes; every pipeline of uq has these and no descriptor sets
CAPTURE = 0x40 | 0x80  # VK_PIPELINE_CREATE_CAPTURE_{STATISTICS,INTERNAL_REPRESENTATIONS}_BIT_KHR
COMPUTE = 0x20  # VK_SHADER_STAGE_COMPUTE_BIT
EXECUTABLE_PROPERTIES = "VK_KHR_pipeline_executable_properties"


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


class Radv:
    """RADV for one chip. Make it with `open_radv`."""

    def __init__(self, vk: Any, device: Any) -> None:
        self._vk = vk
        self._device = device
        push = vk.VkPushConstantRange(stageFlags=COMPUTE, offset=0, size=PUSH_CONSTANTS)
        info = vk.VkPipelineLayoutCreateInfo(pPushConstantRanges=[push])
        self._layout = vk.vkCreatePipelineLayout(device, info, None)

    def compile(
        self, module: bytes, constants: Mapping[int, int | float], subgroup: int | None = None
    ) -> Compiled:
        """The pipeline of `module` with specialization `constants` (constant_id -> value).

        Args:
            subgroup: required lanes, 32 or 64; None leaves it to the driver.
        """
        with self._pipeline(module, constants, subgroup) as pipeline:
            return Compiled(
                self._subgroup(pipeline), self._statistics(pipeline), self._opcodes(pipeline)
            )

    @contextmanager
    def _pipeline(
        self, module: bytes, constants: Mapping[int, int | float], subgroup: int | None
    ) -> Iterator[Any]:
        vk, device = self._vk, self._device
        info = vk.VkShaderModuleCreateInfo(codeSize=len(module), pCode=module)
        shader = vk.vkCreateShaderModule(device, info, None)
        special = _specialization(vk, constants)
        size = vk.VkPipelineShaderStageRequiredSubgroupSizeCreateInfo(
            requiredSubgroupSize=subgroup or 0
        )
        stage = vk.VkPipelineShaderStageCreateInfo(
            pNext=size if subgroup else None,
            stage=COMPUTE,
            module=shader,
            pName="main",
            pSpecializationInfo=special,
        )
        create = vk.VkComputePipelineCreateInfo(flags=CAPTURE, stage=stage, layout=self._layout)
        pipeline = vk.vkCreateComputePipelines(device, None, 1, [create], None)[0]
        try:
            yield pipeline
        finally:
            vk.vkDestroyPipeline(device, pipeline, None)
            vk.vkDestroyShaderModule(device, shader, None)

    def _subgroup(self, pipeline: Any) -> int:
        info = self._vk.ffi.new(
            "VkPipelineInfoKHR *", self._vk.VkPipelineInfoKHR(pipeline=pipeline)
        )
        executables = self._listed("PropertiesKHR", "PROPERTIES_KHR", info)
        return int(executables[0].subgroupSize)  # an item alone would not keep the list alive

    def _statistics(self, pipeline: Any) -> dict[str, int]:
        items = self._listed("StatisticsKHR", "STATISTIC_KHR", self._of(pipeline))
        return {self._string(item.name): int(item.value.u64) for item in items}

    def _opcodes(self, pipeline: Any) -> dict[str, int]:
        """Read off the text called `Assembly`: the opcode and its operands, or, where the driver's
        LLVM does not know the chip, `results = opcode operands`."""
        code = self._texts(pipeline)["Assembly"]
        return dict(
            Counter(re.findall(r"^\s+(?:[^=\n]* = )?([a-z][a-z0-9_]+)", code, re.MULTILINE))
        )

    def _texts(self, pipeline: Any) -> dict[str, str]:
        """All texts that the driver made on its way."""
        what = "InternalRepresentationsKHR", "INTERNAL_REPRESENTATION_KHR"
        records = self._listed(*what, self._of(pipeline))
        texts = [self._vk.ffi.new("char[]", record.dataSize) for record in records]
        for record, text in zip(records, texts, strict=True):
            record.pData = text
        self._listed(*what, self._of(pipeline), records)
        return {
            self._string(record.name): self._string(text)
            for record, text in zip(records, texts, strict=True)
        }

    def _listed(self, function: str, kind: str, info: Any, records: Any = None) -> Any:
        """What `vkGetPipelineExecutable<function>` lists; filled into `records` where given.

        The wrappers of the package `vulkan` lose such arrays to the garbage collector.
        """
        ffi = self._vk.ffi
        name = f"vkGetPipelineExecutable{function}"
        address = self._vk._vulkan.lib.vkGetDeviceProcAddr(self._device, name.encode())
        get = ffi.cast(f"PFN_{name}", address)
        count = ffi.new("uint32_t *", len(records or ()))
        if records is None:
            get(self._device, info, count, ffi.NULL)
            structure = f"VkPipelineExecutable{function.replace('sKHR', 'KHR')}"
            structure = structure.replace("PropertieKHR", "PropertiesKHR")
            records = ffi.new(f"{structure}[]", count[0])
            tag = getattr(self._vk, f"VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_{kind}")
            for record in records:
                record.sType = tag
        get(self._device, info, count, records)
        return records

    def _string(self, text: Any) -> str:
        return str(self._vk.ffi.string(text).decode(errors="replace"))

    def _of(self, pipeline: Any) -> Any:
        info = self._vk.VkPipelineExecutableInfoKHR(pipeline=pipeline, executableIndex=0)
        return self._vk.ffi.new("VkPipelineExecutableInfoKHR *", info)


def open_radv(driver: Path, family: str) -> Radv:
    """RADV for the chip that it calls `family`. Once a process: the driver reads its environment.

    Raises:
        DeviceError: this Mesa does not know the chip.
        ToolMissing: no Vulkan loader.
    """
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):  # new and old name of one variable
        os.environ[name] = str(driver)
    os.environ["RADV_FORCE_FAMILY"] = family
    try:
        import vulkan as vk
    except OSError:
        raise ToolMissing("no Vulkan loader: sudo apt-get install libvulkan1") from None
    info = vk.VkApplicationInfo(apiVersion=vk.VK_MAKE_VERSION(1, 3, 0))
    try:
        instance = vk.vkCreateInstance(vk.VkInstanceCreateInfo(pApplicationInfo=info), None)
        physical = vk.vkEnumeratePhysicalDevices(instance)[0]
    except (vk.VkError, vk.VkException, IndexError):
        raise DeviceError(
            f"{driver}: this Mesa does not know the chip {family}; uq checks with Mesa 25 or newer "
            "(scripts/mesa installs it beside the system's)"
        ) from None
    return Radv(vk, _create_device(vk, physical))


def _create_device(vk: Any, physical: Any) -> Any:
    """All that the chip can do, but not bounds checks, which change the code."""
    names = {item.extensionName for item in vk.vkEnumerateDeviceExtensionProperties(physical, None)}
    features: Any = None
    for make in (
        vk.VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR,
        vk.VkPhysicalDeviceCooperativeMatrixFeaturesKHR,
        vk.VkPhysicalDeviceVulkan11Features,
        vk.VkPhysicalDeviceVulkan12Features,
        vk.VkPhysicalDeviceVulkan13Features,
    ):
        features = make(pNext=features)
    supported = vk.VkPhysicalDeviceFeatures2(pNext=features)
    vk._vulkan.lib.vkGetPhysicalDeviceFeatures2(physical, vk.ffi.addressof(supported))
    supported.features.robustBufferAccess = 0
    queue = vk.VkDeviceQueueCreateInfo(queueFamilyIndex=0, queueCount=1, pQueuePriorities=[1.0])
    info = vk.VkDeviceCreateInfo(
        pNext=supported,
        pQueueCreateInfos=[queue],
        ppEnabledExtensionNames=sorted(
            names & {EXECUTABLE_PROPERTIES, "VK_KHR_cooperative_matrix"}
        ),
    )
    return vk.vkCreateDevice(physical, info, None)


def _specialization(vk: Any, constants: Mapping[int, int | float]) -> Any:
    if not constants:
        return None
    data = b"".join(
        struct.pack("<f" if isinstance(value, float) else "<I", value)
        for value in constants.values()
    )
    entries = [
        vk.VkSpecializationMapEntry(constantID=number, offset=4 * at, size=4)
        for at, number in enumerate(constants)
    ]
    return vk.VkSpecializationInfo(
        pMapEntries=entries, dataSize=len(data), pData=vk.ffi.from_buffer(data)
    )
