"""Passthrough: shim -> core -> shim. The core copies word by word; nothing is linked to it."""

from __future__ import annotations

from xdsl.dialects.builtin import ModuleOp, i32

from uq.errors import UsageError
from uq.kernels.npu.build import Builder, memref
from uq.kernels.npu.dialect.attributes import Port

SIZES = (1024, 4096, 16384)  # bytes
CHUNK = 256  # words of one object


def passthrough(device: str, nbytes: int) -> ModuleOp:
    """The design for `nbytes` bytes. Host buffers: input and output, `nbytes / 4` words each.

    Raises:
        UsageError: a size that has no design.
    """
    if nbytes not in SIZES:
        raise UsageError(f"passthrough of {nbytes} bytes; use one of {', '.join(map(str, SIZES))}")
    words = nbytes // 4
    design = Builder(device)
    shim, core = design.tile(0, 0), design.tile(0, 2)
    source = design.fifo("src", shim, [core], 2, memref(CHUNK, i32))
    dest = design.fifo("dst", core, [shim], 2, memref(CHUNK, i32))
    with design.core(core), design.forever():
        read = design.acquire(source, Port.Consume)
        write = design.acquire(dest, Port.Produce)
        with design.loop(design.constant(CHUNK)) as word:
            design.store(design.load(read, word), write, word)
        design.release(source, Port.Consume)
        design.release(dest, Port.Produce)
    with design.sequence(memref(words, i32), memref(words, i32)) as (incoming, outgoing):
        design.transfer(source, incoming, words, descriptor=0)
        design.transfer(dest, outgoing, words, descriptor=1, token=True)
        design.wait(dest)
    return design.module
