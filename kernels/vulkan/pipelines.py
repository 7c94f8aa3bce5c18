"""Compute pipelines: modules of the package with their sizes fixed, and the driver's cache."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from uq.kernels.vulkan.api import array, binding, call, constant, create, new, text
from uq.kernels.vulkan.device import NEWEST, Gpu
from uq.kernels.vulkan.spirv import in_vulkan_12, load
from uq.kernels.vulkan.variants import VARIANTS

PUSH_BYTES = 128  # of push constants: what every device offers

Constants = Mapping[str, int | float]


class Pipelines:
    """Every pipeline of a device, made when it is first asked for."""

    flags = 0  # VkPipelineCreateFlags

    def __init__(self, gpu: Gpu, folder: Path, common: Constants = MappingProxyType({})) -> None:
        """
        Args:
            folder: where the drivers' caches lie, a file for each device and driver.
            common: constants of every module that knows them.
        """
        self._gpu, self._common = gpu, common
        self._is_new = gpu.physical.version >= NEWEST
        self._file = folder / f"{gpu.physical.identity}.bin"
        self._cache = self._read()
        stage = constant("SHADER_STAGE_COMPUTE_BIT")
        push = new("PushConstantRange", stageFlags=stage, size=PUSH_BYTES)
        info = new("PipelineLayoutCreateInfo", pushConstantRangeCount=1, pPushConstantRanges=push)
        null = binding().ffi.NULL
        self.layout = create("CreatePipelineLayout", "VkPipelineLayout", gpu.device, info, null)
        self._modules: dict[str, Any] = {}
        self._made: dict[tuple[Any, ...], Any] = {}

    def get(self, name: str, **constants: int | float) -> Any:
        """The module `name` of the table of variants with its specialization constants.

        A float constant is given as a float, any other as an integer or a truth value.
        """
        constants = {**constants, **self.common(name)}
        key = (name, *sorted(constants.items()))
        if key not in self._made:
            self._made[key] = self._make(name, constants)
        return self._made[key]

    def common(self, name: str) -> Constants:
        """Of the constants that all modules share, those that the module `name` has."""
        known = VARIANTS[name].spec_constants
        return {key: value for key, value in self._common.items() if key in known}

    def save(self) -> None:
        """Keep the driver's work for the next process; without a folder to write to, do not."""
        size = binding().ffi.new("size_t*")
        null = binding().ffi.NULL
        call("GetPipelineCacheData", self._gpu.device, self._cache, size, null)
        if self._file.is_file() and self._file.stat().st_size == size[0]:
            return
        data = binding().ffi.new("char[]", size[0])
        call("GetPipelineCacheData", self._gpu.device, self._cache, size, data)
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(bytes(binding().ffi.buffer(data, size[0])))
            fresh.replace(self._file)
        except OSError:
            fresh.unlink(missing_ok=True)

    def close(self) -> None:
        self.save()
        null = binding().ffi.NULL
        for pipeline in self._made.values():
            call("DestroyPipeline", self._gpu.device, pipeline, null)
        for module in self._modules.values():
            call("DestroyShaderModule", self._gpu.device, module, null)
        call("DestroyPipelineLayout", self._gpu.device, self.layout, null)
        call("DestroyPipelineCache", self._gpu.device, self._cache, null)

    def _make(self, name: str, constants: Constants) -> Any:
        flags = constant("PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT")
        size = self._subgroup_size(VARIANTS[name].subgroup)
        if not size and not self._is_new:  # what SPIR-V 1.6 says by itself
            flags |= constant("PIPELINE_SHADER_STAGE_CREATE_ALLOW_VARYING_SUBGROUP_SIZE_BIT")
        stage = new(
            "PipelineShaderStageCreateInfo",
            pNext=size,
            flags=flags,
            stage=constant("SHADER_STAGE_COMPUTE_BIT"),
            module=self._module(name),
            pName=text("main"),
            pSpecializationInfo=specialization(VARIANTS[name].spec_constants, constants),
        )
        info = new(
            "ComputePipelineCreateInfo", flags=self.flags, stage=stage[0], layout=self.layout
        )
        out = binding().ffi.new("VkPipeline*")
        null = binding().ffi.NULL
        device = self._gpu.device
        call("CreateComputePipelines", device, self._cache, 1, info, null, out)
        return out[0]

    def _subgroup_size(self, wish: int | None) -> Any:
        if wish is None or wish != self._gpu.physical.lanes(wish):
            return binding().ffi.NULL
        kind = "PipelineShaderStageRequiredSubgroupSizeCreateInfo"
        return new(kind, requiredSubgroupSize=wish)

    def _module(self, name: str) -> Any:
        if name not in self._modules:
            code = load(name) if self._is_new else in_vulkan_12(load(name))
            words = binding().ffi.cast("uint32_t*", binding().ffi.from_buffer(code))
            info = new("ShaderModuleCreateInfo", codeSize=len(code), pCode=words)
            self._modules[name] = create(
                "CreateShaderModule", "VkShaderModule", self._gpu.device, info, binding().ffi.NULL
            )
        return self._modules[name]

    def _read(self) -> Any:
        """The driver refuses what another driver wrote, and begins anew."""
        data = self._file.read_bytes() if self._file.is_file() else b""
        source = binding().ffi.new("char[]", data) if data else binding().ffi.NULL
        info = new("PipelineCacheCreateInfo", initialDataSize=len(data), pInitialData=source)
        null = binding().ffi.NULL
        return create("CreatePipelineCache", "VkPipelineCache", self._gpu.device, info, null)


def specialization(names: tuple[str, ...], constants: Constants) -> Any:
    """VkSpecializationInfo of constants whose `constant_id` is their place among `names`.

    Raises:
        ValueError: the module has no such constant.
    """
    if unknown := set(constants) - set(names):
        raise ValueError(f"no specialization constant {sorted(unknown)}")
    entries, data = [], b""
    for name, value in constants.items():
        entry = new(
            "SpecializationMapEntry", constantID=names.index(name), offset=len(data), size=4
        )
        entries.append(entry[0])
        data += struct.pack("<f" if isinstance(value, float) else "<I", value)
    return new(
        "SpecializationInfo",
        mapEntryCount=len(entries),
        pMapEntries=array("VkSpecializationMapEntry", entries),
        dataSize=len(data),
        pData=binding().ffi.new("char[]", data),
    )
