"""The Vulkan API as the package `vulkan` offers it, called directly through cffi.

The package's own wrappers convert every argument on every call (6 to 18 microseconds) and lose
nested structures to the garbage collector; here a structure is built once and keeps what it
points to.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from uq.errors import DeviceError

OUT_OF_HOST_MEMORY, OUT_OF_DEVICE_MEMORY, DEVICE_LOST, INCOMPATIBLE_DRIVER = -1, -2, -4, -9

_kept: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # structure -> what it points to


@cache
def binding() -> Any:
    """The module of the package `vulkan` that holds `ffi`, `lib` and the constants.

    Raises:
        DeviceError: no package, or no Vulkan loader on this machine.
    """
    try:
        from vulkan import _vulkan
    except ImportError:
        raise DeviceError("the Python package vulkan is missing: pip install vulkan") from None
    except OSError:
        raise DeviceError(
            "this machine has no Vulkan loader (libvulkan); install the GPU's Vulkan driver"
        ) from None
    return _vulkan


# Of Vulkan 1.2 and 1.3, with the values of the specification; the package has no name for them.
LATER = {
    "BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT": 0x20000,
    "MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT": 0x2,
    "PIPELINE_SHADER_STAGE_CREATE_ALLOW_VARYING_SUBGROUP_SIZE_BIT": 0x1,
    "PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT": 0x2,
}


def constant(name: str) -> int:
    """Value of `VK_<name>`."""
    return LATER[name] if name in LATER else int(getattr(binding(), f"VK_{name}"))


def new(kind: str, **fields: Any) -> Any:
    """A pointer to a zeroed `Vk<kind>` with its `sType` set; it keeps alive what `fields` hold."""
    made = binding().ffi.new(f"Vk{kind}*", {**_type_tag(kind), **fields})
    _kept[made] = list(fields.values())
    return made


def chain(structures: list[Any]) -> None:
    """Let each structure's `pNext` be the following one."""
    for made, following in zip(structures, structures[1:], strict=False):
        made.pNext = following
        _kept[made].append(following)


def array(kind: str, items: list[Any]) -> Any:
    """A C array of `kind`, such as `VkFence` or `uint32_t`; keeps its items alive."""
    made = binding().ffi.new(f"{kind}[]", items)
    _kept[made] = list(items)
    return made


def text(value: str) -> Any:
    return binding().ffi.new("char[]", value.encode())


def call(function: str, *arguments: Any) -> None:
    """Call `vk<function>`, which returns a VkResult or nothing.

    Raises:
        DeviceError: the device is lost, out of memory, or refuses.
    """
    check(function, getattr(binding().lib, f"vk{function}")(*arguments))


def check(function: str, result: int | None) -> None:
    """Turn a negative VkResult into an error."""
    if result is None or result >= 0:
        return
    if result == DEVICE_LOST:
        raise DeviceError("the GPU stopped answering (device lost); run again, or use --device cpu")
    if result in (OUT_OF_HOST_MEMORY, OUT_OF_DEVICE_MEMORY):
        raise DeviceError(f"the GPU is out of memory (vk{function}); use a smaller model or cpu")
    raise DeviceError(f"vk{function} failed with {_result_name(result)}; use --device cpu")


def create(function: str, kind: str, *arguments: Any) -> Any:
    """Call `vk<function>(*arguments, out)` and return the `kind` that it writes."""
    out = binding().ffi.new(f"{kind}*")
    call(function, *arguments, out)
    return out[0]


def extension(instance: Any, function: str) -> Any:
    """`vk<function>` of an extension, which the loader does not export by name."""
    name = f"vk{function}"
    found = binding().lib.vkGetInstanceProcAddr(instance, text(name))
    return binding().ffi.cast(f"PFN_{name}", found)


def listed(function: str, kind: str, *arguments: Any, function_of: Any = None) -> list[Any]:
    """All that an enumerating function offers; `function_of`: the instance of an extension's."""
    library = binding().lib
    run = extension(function_of, function) if function_of else getattr(library, f"vk{function}")
    count = binding().ffi.new("uint32_t*")
    check(function, run(*arguments, count, binding().ffi.NULL))
    items = binding().ffi.new(f"{kind}[]", max(count[0], 1))
    _tag_all(kind, items)
    check(function, run(*arguments, count, items))
    found = [items[i] for i in range(count[0])]
    for item in found:
        if isinstance(item, binding().ffi.CData) and kind not in HANDLES:
            _kept[item] = items  # it points into the array
    return found


HANDLES = frozenset({"VkPhysicalDevice"})


@cache
def _type_tag(kind: str) -> dict[str, int]:
    maker = getattr(binding(), f"Vk{kind}")
    default = inspect.signature(maker).parameters.get("sType")
    return {} if default is None else {"sType": default.default}


def _tag_all(kind: str, items: Any) -> None:
    if kind.startswith("Vk") and kind not in HANDLES:
        for name, value in _type_tag(kind[2:]).items():
            for item in items:
                setattr(item, name, value)


def _result_name(result: int) -> str:
    names = [
        name
        for name, value in vars(binding()).items()
        if name.startswith("VK_ERROR_") and value == result
    ]
    return names[0] if names else str(result)
