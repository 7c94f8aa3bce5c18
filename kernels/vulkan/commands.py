"""Command buffers: recorded once, submitted as often as needed, with nothing built in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from uq.errors import DeviceError
from uq.kernels.vulkan.api import array, binding, call, check, constant, create, new
from uq.kernels.vulkan.device import Gpu

# Seconds that a submit may take before the device counts as lost; a CPU may be busy with others.
PATIENCE = {"cpu": 600}
USUAL_PATIENCE = 20


TIMEOUT = 2  # a VkResult


class Region(Protocol):
    """Bytes of a buffer."""

    @property
    def buffer(self) -> Any: ...

    @property
    def offset(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Recorder:
    """One command buffer while it is recorded, and after.

    Attributes:
        label: what the next dispatches are for; whoever measures them reads it.
    """

    label = ""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._lib = gpu, binding().lib
        info = new("CommandPoolCreateInfo", queueFamilyIndex=gpu.family)
        null = binding().ffi.NULL
        self._pool = create("CreateCommandPool", "VkCommandPool", gpu.device, info, null)
        buffers = new("CommandBufferAllocateInfo", commandPool=self._pool, commandBufferCount=1)
        self.commands = create("AllocateCommandBuffers", "VkCommandBuffer", gpu.device, buffers)
        usage = constant("COMMAND_BUFFER_USAGE_SIMULTANEOUS_USE_BIT")
        call("BeginCommandBuffer", self.commands, new("CommandBufferBeginInfo", flags=usage))
        self._bound: Any = None

    def dispatch(
        self, pipeline: Any, layout: Any, push: bytes, groups: tuple[int, int, int]
    ) -> None:
        """Run a kernel with `push` as its push constants."""
        if pipeline != self._bound:
            point = constant("PIPELINE_BIND_POINT_COMPUTE")
            self._lib.vkCmdBindPipeline(self.commands, point, pipeline)
            self._bound = pipeline
        stage = constant("SHADER_STAGE_COMPUTE_BIT")
        data = binding().ffi.from_buffer(push)
        self._lib.vkCmdPushConstants(self.commands, layout, stage, 0, len(push), data)
        self._lib.vkCmdDispatch(self.commands, *groups)

    def barrier(self) -> None:
        """What follows sees what was written before."""
        compute = constant("PIPELINE_STAGE_COMPUTE_SHADER_BIT")
        write, read = constant("ACCESS_SHADER_WRITE_BIT"), constant("ACCESS_SHADER_READ_BIT")
        self._barrier(compute, compute, write, read | write)

    def transfer_barrier(self) -> None:
        """The same between kernels, copies and the host."""
        compute = constant("PIPELINE_STAGE_COMPUTE_SHADER_BIT")
        stages = compute | constant("PIPELINE_STAGE_TRANSFER_BIT")
        stages |= constant("PIPELINE_STAGE_HOST_BIT")
        write = constant("ACCESS_MEMORY_WRITE_BIT")
        read = constant("ACCESS_MEMORY_READ_BIT")
        self._barrier(stages, stages, write, read | write)

    def copy(self, source: Region, target: Region) -> None:
        region = new(
            "BufferCopy", srcOffset=source.offset, dstOffset=target.offset, size=source.nbytes
        )
        self.transfer_barrier()
        self._lib.vkCmdCopyBuffer(self.commands, source.buffer, target.buffer, 1, region)
        self.transfer_barrier()

    def fill(self, buffer: Any, offset: int, nbytes: int) -> None:
        self.transfer_barrier()
        self._lib.vkCmdFillBuffer(self.commands, buffer, offset, nbytes, 0)
        self.transfer_barrier()

    def end(self) -> None:
        call("EndCommandBuffer", self.commands)

    def close(self) -> None:
        call("DestroyCommandPool", self._gpu.device, self._pool, binding().ffi.NULL)

    def _barrier(self, before: int, after: int, written: int, read: int) -> None:
        memory = new("MemoryBarrier", srcAccessMask=written, dstAccessMask=read)
        null = binding().ffi.NULL
        self._lib.vkCmdPipelineBarrier(self.commands, before, after, 0, 1, memory, 0, null, 0, null)


class Submission:
    """Command buffers that run one after the other, built once."""

    def __init__(self, gpu: Gpu, commands: Sequence[Any]) -> None:
        self._gpu, self._lib = gpu, binding().lib
        buffers = array("VkCommandBuffer", list(commands))
        self._info = new("SubmitInfo", commandBufferCount=len(commands), pCommandBuffers=buffers)
        null = binding().ffi.NULL
        fence = create("CreateFence", "VkFence", gpu.device, new("FenceCreateInfo"), null)
        self._fences = array("VkFence", [fence])
        self._patience = PATIENCE.get(gpu.physical.kind, USUAL_PATIENCE) * 10**9

    def start(self) -> None:
        check(
            "QueueSubmit",
            self._lib.vkQueueSubmit(self._gpu.queue, 1, self._info, self._fences[0]),
        )

    def finish(self) -> None:
        """Wait for what `start` began.

        Raises:
            DeviceError: the device is lost, or does not come to an end.
        """
        result = self._lib.vkWaitForFences(self._gpu.device, 1, self._fences, 1, self._patience)
        if result == TIMEOUT:
            raise DeviceError("the GPU did not finish a step in 20 s; use --device cpu")
        check("WaitForFences", result)
        check("ResetFences", self._lib.vkResetFences(self._gpu.device, 1, self._fences))

    def run(self) -> None:
        self.start()
        self.finish()

    def close(self) -> None:
        call("DestroyFence", self._gpu.device, self._fences[0], binding().ffi.NULL)
