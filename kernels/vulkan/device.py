"""Which GPU runs the kernels, what it can do, and the logical device over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from uq.errors import DeviceError, UsageError
from uq.kernels.vulkan.api import (
    array,
    binding,
    call,
    chain,
    constant,
    create,
    listed,
    new,
    text,
)
from uq.kernels.vulkan.heaps import BUDGET, Heaps, heaps_of, largest_allocation

OLDEST, NEWEST = (1, 2), (1, 3)  # what a driver must offer, and what is used of newer ones
SMALLEST_SUBGROUP = 8
LEAST_LANES = 512  # of a workgroup
AMDS_OWN = (1, 2)  # VkDriverId: AMD_PROPRIETARY, AMD_OPEN_SOURCE
KINDS = ("other", "integrated", "discrete", "virtual", "cpu")
PREFERENCE = ("discrete", "integrated", "virtual", "other", "cpu")

# What the kernels may use, by structure; what a device lacks is left off.
WANTED = {
    "PhysicalDeviceVulkan11Features": ("storageBuffer16BitAccess",),
    "PhysicalDeviceVulkan12Features": (
        "bufferDeviceAddress",
        "shaderFloat16",
        "shaderInt8",
        "storageBuffer8BitAccess",
        "vulkanMemoryModel",
        "vulkanMemoryModelDeviceScope",
        "hostQueryReset",
    ),
    "PhysicalDeviceSubgroupSizeControlFeatures": ("computeFullSubgroups", "subgroupSizeControl"),
    "PhysicalDeviceMaintenance4Features": ("maintenance4",),
    "PhysicalDeviceShaderIntegerDotProductFeatures": ("shaderIntegerDotProduct",),
    "PhysicalDeviceCooperativeMatrixFeaturesKHR": ("cooperativeMatrix",),
}
CORE = "PhysicalDeviceFeatures"
CORE_WANTED = ("shaderInt64",)
REQUIRED = (
    "bufferDeviceAddress",
    "computeFullSubgroups",
    "maintenance4",
    "shaderInt64",
    "subgroupSizeControl",
)
EXTENSION_OF = {
    "PhysicalDeviceCooperativeMatrixFeaturesKHR": "VK_KHR_cooperative_matrix",
}
PROMOTED = {  # a part of Vulkan 1.3
    "PhysicalDeviceSubgroupSizeControlFeatures": "VK_EXT_subgroup_size_control",
    "PhysicalDeviceMaintenance4Features": "VK_KHR_maintenance4",
    "PhysicalDeviceShaderIntegerDotProductFeatures": "VK_KHR_shader_integer_dot_product",
}
# Enabled where present; `PhysicalGpu.features` reports them.
EXTENSIONS = ("VK_KHR_cooperative_matrix", "VK_EXT_external_memory_host", "VK_EXT_memory_budget")


@dataclass(frozen=True)
class Ability:
    """One rung of the ladder of features."""

    name: str
    present: bool
    detail: str = ""


@dataclass(frozen=True)
class PhysicalGpu:
    """A device as its driver describes it.

    Attributes:
        kind: one of `KINDS`.
        identity: of device and driver, 32 hexadecimal digits; the key of the pipeline cache.
        driver_id: VkDriverId.
        memory: bytes that a model may take, of all heaps where it shares the host's memory.
    """

    handle: Any
    name: str
    kind: str
    driver: str
    version: tuple[int, int]
    identity: str
    memory: int
    driver_id: int = 0

    @cached_property
    def extensions(self) -> frozenset[str]:
        null = binding().ffi.NULL
        found = listed(
            "EnumerateDeviceExtensionProperties", "VkExtensionProperties", self.handle, null
        )
        return frozenset(binding().ffi.string(item.extensionName).decode() for item in found)

    @property
    def heaps(self) -> Heaps:
        """Its memory, and what is left of it now."""
        return heaps_of(self.handle, self.kind, budget=BUDGET in self.extensions)

    @cached_property
    def largest_allocation(self) -> int:
        """Bytes that one allocation may have, by what the driver promises."""
        return largest_allocation(self.handle)

    @cached_property
    def switches(self) -> dict[str, frozenset[str]]:
        """Structure -> features of `WANTED` that the device has."""
        structures = {kind: new(kind) for kind in self._structures()}
        chain(list(structures.values()))
        first = next(iter(structures.values()))
        every = new("PhysicalDeviceFeatures2", pNext=first)
        call("GetPhysicalDeviceFeatures2", self.handle, every)
        return {
            kind: frozenset(name for name in wanted if getattr(made, name))
            for kind, made, wanted in (
                *((kind, made, WANTED[kind]) for kind, made in structures.items()),
                (CORE, every.features, CORE_WANTED),
            )
        }

    def has(self, switch: str) -> bool:
        return any(switch in names for names in self.switches.values())

    def _structures(self) -> list[str]:
        needed = EXTENSION_OF if self.version >= NEWEST else EXTENSION_OF | PROMOTED
        return [kind for kind in WANTED if kind not in needed or needed[kind] in self.extensions]

    @cached_property
    def subgroup(self) -> tuple[int, int, int]:
        """Invocations of a subgroup: the usual number, the least, the most."""
        sizes = new("PhysicalDeviceSubgroupSizeControlProperties")
        usual = new("PhysicalDeviceVulkan11Properties", pNext=sizes)
        self._properties(usual)
        return usual.subgroupSize, sizes.minSubgroupSize, sizes.maxSubgroupSize

    @property
    def has_large_blocks(self) -> bool:
        """Whether the registers of a subgroup hold 64 x 64 sums: AMD's compiler, whose devices have
        subgroups of 64, spills some."""
        return self.subgroup[2] == 32

    def lanes(self, wish: int | None) -> int:
        """Invocations of a subgroup of a kernel that wishes for so many."""
        usual, least, most = self.subgroup
        return wish if wish and least <= wish <= most else usual

    @cached_property
    def ladder(self) -> tuple[Ability, ...]:
        """What the kernels can build on, the best first."""
        dots = new("PhysicalDeviceShaderIntegerDotProductProperties")
        self._properties(dots)
        quick = bool(dots.integerDotProduct4x8BitPackedSignedAccelerated)
        usual, least, most = self.subgroup
        return (
            Ability("cooperative matrix 2", "VK_NV_cooperative_matrix2" in self.extensions),
            Ability("cooperative matrix", self.has_matrix_blocks),
            Ability(
                "integer dot product",
                self.has("shaderIntegerDotProduct"),
                "in hardware" if quick else "emulated by the driver",
            ),
            Ability("fp16", self.has("shaderFloat16") and self.has("storageBuffer16BitAccess")),
            Ability("fp32", True, f"subgroups of {usual} ({least} to {most})"),
            Ability("memory import", "VK_EXT_external_memory_host" in self.extensions),
        )

    @property
    def summary(self) -> str:
        """One sentence for `uq doctor`."""
        rungs = [f"{a.name} ({a.detail})" if a.detail else a.name for a in self.ladder if a.present]
        absent = [f"no {ability.name}" for ability in self.ladder if not ability.present]
        version = ".".join(map(str, self.version))
        return f"{self.name}, {self.driver}, Vulkan {version}; {', '.join(rungs + absent)}"

    def missing(self) -> str | None:
        """Why the kernels cannot run here."""
        if self.version < OLDEST:
            old, needed = (".".join(map(str, version)) for version in (self.version, OLDEST))
            return f"its driver offers Vulkan {old}, and {needed} is needed; update the driver"
        if absent := [name for name in REQUIRED if not self.has(name)]:
            return f"its driver lacks {', '.join(absent)}; update the driver"
        if self.subgroup[1] < SMALLEST_SUBGROUP:
            return f"its subgroups may have {self.subgroup[1]} lanes; the kernels need 8 or more"
        if self.most_lanes < LEAST_LANES:
            return f"its workgroups have {self.most_lanes} lanes; the kernels need {LEAST_LANES}"
        return None

    @cached_property
    def most_lanes(self) -> int:
        """Invocations that a workgroup may have."""
        limits = self._properties(binding().ffi.NULL)
        return int(limits.properties.limits.maxComputeWorkGroupInvocations)

    @cached_property
    def multiprocessors(self) -> int:
        """Each runs a workgroup of any size at the same time as the others; 0: the driver does not
        tell their number."""
        if "VK_NV_shader_sm_builtins" in self.extensions:
            nvidia = new("PhysicalDeviceShaderSMBuiltinsPropertiesNV")
            self._properties(nvidia)
            return int(nvidia.shaderSMCount)
        if "VK_AMD_shader_core_properties2" in self.extensions:
            amd = new("PhysicalDeviceShaderCoreProperties2AMD")
            self._properties(amd)
            return int(amd.activeComputeUnitCount)
        return 0

    @cached_property
    def shared_bytes(self) -> int:
        """Shared memory that a workgroup may have."""
        limits = self._properties(binding().ffi.NULL)
        return int(limits.properties.limits.maxComputeSharedMemorySize)

    @cached_property
    def has_matrix_blocks(self) -> bool:
        """Whether a subgroup multiplies 16 x 16 x 16 blocks of float16 into float32."""
        needed = ("cooperativeMatrix", "shaderFloat16", "vulkanMemoryModelDeviceScope")
        if not all(self.has(name) for name in needed) or self._crashes_when_asked:
            return False
        return any(
            (shape.MSize, shape.NSize, shape.KSize) == (16, 16, 16)
            and shape.AType == shape.BType == constant("COMPONENT_TYPE_FLOAT16_KHR")
            and shape.CType == shape.ResultType == constant("COMPONENT_TYPE_FLOAT32_KHR")
            and shape.scope == constant("SCOPE_SUBGROUP_KHR")
            for shape in _matrix_shapes(self.handle)
        )

    @property
    def _crashes_when_asked(self) -> bool:
        """AMD's own drivers end the process when they are to list the matrix instructions of an
        860M (GPUOpen-Drivers/AMDVLK, issue 422); RADV, which Linux comes with, does not."""
        return self.kind == "integrated" and self.driver_id in AMDS_OWN

    @cached_property
    def timestamp_period(self) -> float:
        """Nanoseconds between two values of a timestamp."""
        properties = self._properties(binding().ffi.NULL)
        return float(properties.properties.limits.timestampPeriod)

    def _properties(self, chain: Any) -> Any:
        properties = new("PhysicalDeviceProperties2", pNext=chain)
        call("GetPhysicalDeviceProperties2", self.handle, properties)
        return properties


@cache
def physical_gpus() -> tuple[PhysicalGpu, ...]:
    """All devices of this machine in the loader's order.

    Raises:
        DeviceError: there is no loader or no driver.
    """
    return described(vulkan_instance())


def described(instance: Any) -> tuple[PhysicalGpu, ...]:
    """All devices of an instance."""
    handles = listed("EnumeratePhysicalDevices", "VkPhysicalDevice", instance)
    return tuple(_describe(handle) for handle in handles)


def choose(wish: str = "") -> PhysicalGpu:
    """The device that `wish` names: a number, part of a name, or nothing for the best.

    Raises:
        DeviceError: there is no device that can run the kernels.
        UsageError: there is none of that number or name.
    """
    found = physical_gpus()
    if not found:
        raise DeviceError("no Vulkan device; install the GPU's driver")
    if wish.isdecimal():
        named = found[int(wish) : int(wish) + 1]
    else:
        named = tuple(gpu for gpu in found if wish.lower() in gpu.name.lower())
    if not named:
        names = "; ".join(f"{number}: {gpu.name}" for number, gpu in enumerate(found))
        raise UsageError(f"no Vulkan device {wish!r}; there are {names}")
    best = min(named, key=lambda gpu: (gpu.missing() is not None, PREFERENCE.index(gpu.kind)))
    if reason := best.missing():
        raise DeviceError(f"{best.name}: {reason}")
    return best


class Gpu:
    """A logical device with its one queue."""

    def __init__(self, physical: PhysicalGpu, extensions: Sequence[str] = EXTENSIONS) -> None:
        self.physical = physical
        self.family = _compute_family(physical.handle)
        self.device = create(
            "CreateDevice",
            "VkDevice",
            physical.handle,
            _device_info(physical, self.family, extensions),
            binding().ffi.NULL,
        )
        out = binding().ffi.new("VkQueue*")
        call("GetDeviceQueue", self.device, self.family, 0, out)
        self.queue = out[0]
        self.timestamp_period = physical.timestamp_period

    def wait(self) -> None:
        """Until everything that was submitted is done."""
        call("QueueWaitIdle", self.queue)

    def close(self) -> None:
        call("DestroyDevice", self.device, binding().ffi.NULL)


def _device_info(physical: PhysicalGpu, family: int, extensions: Sequence[str]) -> Any:
    structures = [
        new(kind, **{name: 1 for name in names})
        for kind, names in physical.switches.items()
        if kind != CORE
    ]
    chain(structures)
    features = new("PhysicalDeviceFeatures2", pNext=structures[0])
    for name in physical.switches[CORE]:
        setattr(features.features, name, 1)
    queue = new(
        "DeviceQueueCreateInfo",
        queueFamilyIndex=family,
        queueCount=1,
        pQueuePriorities=array("float", [1.0]),
    )
    if physical.version < NEWEST:
        extensions = [*extensions, *PROMOTED.values()]
    names = [text(name) for name in extensions if name in physical.extensions]
    return new(
        "DeviceCreateInfo",
        pNext=features,
        queueCreateInfoCount=1,
        pQueueCreateInfos=queue,
        enabledExtensionCount=len(names),
        ppEnabledExtensionNames=array("char*", names),
    )


@cache
def vulkan_instance() -> Any:
    """Raises DeviceError: no driver."""
    return make_instance(NEWEST)


def make_instance(newest: tuple[int, int]) -> Any:
    """An instance that uses nothing beyond the version `newest` of Vulkan.

    Raises:
        DeviceError: no driver.
    """
    version = newest[0] << 22 | newest[1] << 12
    application = new("ApplicationInfo", pApplicationName=text("uq"), apiVersion=version)
    info = new("InstanceCreateInfo", pApplicationInfo=application)
    try:
        return create("CreateInstance", "VkInstance", info, binding().ffi.NULL)
    except DeviceError as error:
        raise DeviceError(f"no Vulkan driver: {error}") from None


def _matrix_shapes(handle: Any) -> list[Any]:
    """VkCooperativeMatrixPropertiesKHR of all that the device multiplies."""
    name = "GetPhysicalDeviceCooperativeMatrixPropertiesKHR"
    return listed(name, "VkCooperativeMatrixPropertiesKHR", handle, function_of=vulkan_instance())


def _describe(handle: Any) -> PhysicalGpu:
    driver, identity = new("PhysicalDeviceDriverProperties"), new("PhysicalDeviceIDProperties")
    chain([driver, identity])
    properties = new("PhysicalDeviceProperties2", pNext=driver)
    call("GetPhysicalDeviceProperties2", handle, properties)
    core, ffi = properties.properties, binding().ffi
    kind = KINDS[core.deviceType] if core.deviceType < len(KINDS) else "other"
    version = core.apiVersion
    return PhysicalGpu(
        handle=handle,
        name=ffi.string(core.deviceName).decode(),
        kind=kind,
        driver=f"{ffi.string(driver.driverName).decode()} {ffi.string(driver.driverInfo).decode()}",
        version=(version >> 22 & 0x7F, version >> 12 & 0x3FF),
        identity=bytes(identity.deviceUUID).hex() + f"{core.driverVersion:08x}",
        memory=heaps_of(handle, kind).nbytes,
        driver_id=int(driver.driverID),
    )


def _compute_family(handle: Any) -> int:
    """A family that computes and does nothing else where there is one, else any that computes."""
    families = binding().ffi.new("uint32_t*")
    null = binding().ffi.NULL
    call("GetPhysicalDeviceQueueFamilyProperties", handle, families, null)
    found = binding().ffi.new("VkQueueFamilyProperties[]", families[0])
    call("GetPhysicalDeviceQueueFamilyProperties", handle, families, found)
    compute, graphics = constant("QUEUE_COMPUTE_BIT"), constant("QUEUE_GRAPHICS_BIT")
    flags = [found[i].queueFlags for i in range(families[0])]
    able = [i for i, flag in enumerate(flags) if flag & compute]
    return min(able, key=lambda i: bool(flags[i] & graphics))
