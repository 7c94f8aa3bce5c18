"""What can go wrong around a GPU: one clear line each, and `auto` says where it goes instead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uq.cli import main
from uq.errors import DeviceError, UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import GemmaConfig
from uq.kernels import backends, vulkan
from uq.kernels.backends import Backend, open_batch, open_session
from uq.kernels.numerics import ACTIVATIONS, KV, Numerics
from uq.kernels.session import Sampling, Session
from uq.kernels.vulkan import commands, device
from uq.kernels.vulkan.api import (
    DEVICE_LOST,
    OUT_OF_DEVICE_MEMORY,
    binding,
    call,
    check,
    constant,
    create,
    new,
)
from uq.kernels.vulkan.cache import CacheSize, check_memory
from uq.kernels.vulkan.commands import Submission
from uq.kernels.vulkan.device import PhysicalGpu, choose


class WithoutLoader(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise OSError("libvulkan.so.1: cannot open shared object file")


def test_no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vulkan", WithoutLoader("vulkan"))
    with pytest.raises(DeviceError, match=r"no Vulkan loader \(libvulkan\); install the GPU's"):
        binding.__wrapped__()


def test_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vulkan", None)
    with pytest.raises(DeviceError, match="package vulkan is missing: pip install vulkan"):
        binding.__wrapped__()


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        monkeypatch.setenv(variable, str(tmp_path / "none.json"))
    with pytest.raises(DeviceError, match="no Vulkan driver: .*INCOMPATIBLE_DRIVER"):
        device.vulkan_instance.__wrapped__()


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "physical_gpus", tuple)
    with pytest.raises(DeviceError, match="no Vulkan device; install the GPU's driver"):
        choose()


def test_no_such_device() -> None:
    with pytest.raises(UsageError, match="no Vulkan device 'nonesuch'; there are 0: "):
        choose("nonesuch")
    with pytest.raises(UsageError, match="no Vulkan device '77'"):
        choose("77")


def only(monkeypatch: pytest.MonkeyPatch, gpu: PhysicalGpu) -> None:
    """The machine has no other device."""
    monkeypatch.setattr(device, "physical_gpus", lambda: (gpu,))


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, replace(choose(), version=(1, 1)))
    with pytest.raises(DeviceError, match=r"offers Vulkan 1\.1, and 1\.2 is needed; update the"):
        choose()


def test_a_missing_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(choose())
    lacking = {kind: names - {"maintenance4"} for kind, names in choose().switches.items()}
    gpu.__dict__["switches"] = lacking
    only(monkeypatch, gpu)
    with pytest.raises(DeviceError, match="its driver lacks maintenance4; update the driver"):
        choose()


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Callable[..., Path]) -> GemmaConfig:
    return open_checkpoint(tiny_checkpoint()).config


def test_too_little_memory_says_what_fits(config: GemmaConfig) -> None:
    gpu = replace(choose(), memory=2**30)
    size = CacheSize(config, 10**7, 64)
    with pytest.raises(DeviceError, match=r"needs .* GiB on .*, which has 1\.0 GiB") as caught:
        check_memory(gpu, 2**29, size)
    fits = int(str(caught.value).partition("up to ")[2].split()[0])
    check_memory(gpu, 2**29, replace(size, capacity=fits))
    with pytest.raises(DeviceError):
        check_memory(gpu, 2**29, replace(size, capacity=fits + 64))


def test_weights_that_are_too_large(config: GemmaConfig) -> None:
    with pytest.raises(DeviceError, match="no context fits: use fewer bits, or use --device cpu"):
        check_memory(replace(choose(), memory=2**30), 2**31, CacheSize(config, 4096, 64))


def lost(submission: Submission) -> None:
    check("QueueSubmit", DEVICE_LOST)


def test_a_device_that_is_lost_in_the_middle(
    tiny_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Behind what was loaded and the prompt: one line, and no traceback when all is closed."""
    bundle = open_bundle(tiny_bundle())
    session = open_session(bundle, "vulkan", max_context=32)
    session.prefill([5, 6, 7])
    monkeypatch.setattr(Submission, "start", lost)
    with pytest.raises(DeviceError, match="the GPU stopped answering"):
        list(session.decode(4, Sampling()))
    command = ["generate", str(tiny_bundle()), "-p", "a", "--device", "vulkan"]
    assert main(command) == 1
    shown = capsys.readouterr().err
    assert "the GPU stopped answering (device lost); run again, or use --device cpu" in shown
    assert "Traceback" not in shown


def test_a_full_memory_is_one_line() -> None:
    with pytest.raises(DeviceError, match=r"the GPU is out of memory \(vkQueueSubmit\)"):
        check("QueueSubmit", OUT_OF_DEVICE_MEMORY)


def test_a_step_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = device.Gpu(choose())
    recorder = commands.Recorder(gpu)
    recorder.end()
    submission = Submission(gpu, [recorder.commands])

    class Waiting:
        def vkWaitForFences(self, *_: Any) -> int:  # noqa: N802
            return commands.TIMEOUT

    monkeypatch.setattr(submission, "_lib", Waiting())
    with pytest.raises(DeviceError, match="did not finish a step in 20 s; use --device cpu"):
        submission.finish()
    for part in (submission, recorder, gpu):
        part.close()


def test_auto_says_where_it_goes(
    tiny_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: Any) -> Session:
        raise DeviceError("the GPU is out of memory")

    broken = Backend("vulkan", "a GPU", fails, fails)  # type: ignore[arg-type]
    *_, cpu = backends.backends()
    monkeypatch.setattr(backends, "backends", lambda: (broken, cpu))
    bundle = open_bundle(tiny_bundle())
    assert open_session(bundle, max_context=8).device.backend == "cpu"
    assert open_batch(bundle, slots=2, max_context=8).device.backend == "cpu"
    line = "vulkan: the GPU is out of memory; trying the next device\n"
    assert capsys.readouterr().err == 2 * line


def test_the_cpu_has_no_integers_beside_the_weights(
    tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(tiny_bundle()), "-p", "a", "--device", "cpu", "--kv", "int8"]
    assert main(command) != 0
    assert "the CPU keeps inputs of linears, keys and values in float32" in capsys.readouterr().err


def test_all_options_reach_the_gpu(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def opened(*_: Any, **options: Any) -> None:
        seen.update(options)
        raise DeviceError("enough")

    monkeypatch.setattr(vulkan, "open_vulkan", opened)
    command = ["generate", str(tiny_bundle()), "-p", "a", "--device", "vulkan", "--speculate"]
    assert main([*command, "--kv", "int8", "--activations", "int8"]) == 1
    assert seen["numerics"] == Numerics(ACTIVATIONS["int8"], KV["int8"])
    assert seen["speculate"] is True


@pytest.mark.mesa  # whose package brings the layer
def test_the_validation_layer_speaks_up(vulkan_messages: Path) -> None:
    """What the other tests rely on when they want no message: a buffer of no bytes gets one."""
    gpu = device.Gpu(choose())
    before = vulkan_messages.read_text() if vulkan_messages.exists() else ""
    null = binding().ffi.NULL
    usage = constant("BUFFER_USAGE_STORAGE_BUFFER_BIT")
    with suppress(DeviceError):
        made = create(
            "CreateBuffer", "VkBuffer", gpu.device, new("BufferCreateInfo", usage=usage), null
        )
        call("DestroyBuffer", gpu.device, made, null)
    gpu.close()
    assert "VUID-VkBufferCreateInfo-size-00912" in vulkan_messages.read_text()[len(before) :]
