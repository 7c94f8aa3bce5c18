"""Streams and DMA channels: bytes from descriptors of one tile to descriptors of others.

A stream holds nothing: a word leaves its source when every destination takes it. Switches of the
array hold a few words each, so a design that runs here needs none of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Dimension, Padding
from uq.kernels.npu.emulator.scheduler import Lock, Process, Resource, Scheduler, Steps
from uq.kernels.npu.target import QUEUE_DEPTH

Bytes = NDArray[np.uint8]


class Walk:
    """The bytes of one descriptor, in the order of its address generator."""

    def __init__(
        self,
        buffer: Bytes,
        width: int,
        offset: int,
        dimensions: Sequence[Dimension],
        pads: Sequence[Padding] = (),
        fill: int = 0,
    ) -> None:
        """
        Args:
            buffer: the whole buffer, flat.
            width: bytes of an element; offset, sizes and strides count elements.
            dimensions: slowest first.
            pads, fill: elements of `fill` around what is sent, for each dimension.

        Raises:
            DesignError: the walk leaves the buffer.
        """
        last = offset + sum((d.size - 1) * d.stride for d in dimensions)
        if (last + 1) * width > buffer.size:
            raise DesignError(f"a descriptor walks to byte {(last + 1) * width} of {buffer.size}")
        self._view: NDArray[np.generic] = np.ndarray(
            [d.size for d in dimensions],
            f"V{width}",
            buffer.data,
            offset * width,
            [d.stride * width for d in dimensions],
        )
        self._pads = [tuple(pad) for pad in pads]
        self._fill = np.frombuffer(fill.to_bytes(8, "little")[:width], f"V{width}")
        self.flat: Bytes | None = None  # in place, when the walk is one contiguous run
        if self._view.flags.c_contiguous and not self._pads:
            start = offset * width
            self.flat = buffer[start : start + self._view.nbytes]

    def read(self) -> Bytes:
        """In place or as a copy."""
        if self.flat is not None:
            return self.flat
        view = self._view
        if self._pads:
            ends = list(zip(view.shape, self._pads, strict=True))
            padded = np.full([n + before + after for n, (before, after) in ends], self._fill)
            padded[tuple(slice(before, before + n) for n, (before, _) in ends)] = view
            view = padded
        return np.frombuffer(view.tobytes(), np.uint8)

    def target(self) -> Bytes:
        """Where incoming bytes go: the buffer itself, or room of the same size for `scatter`."""
        return self.flat if self.flat is not None else np.empty(self._view.nbytes, np.uint8)

    def scatter(self, data: Bytes) -> None:
        """Put into the buffer what `target` has received."""
        if self.flat is None:
            self._view[...] = data.view(self._view.dtype).reshape(self._view.shape)


@dataclass(frozen=True, eq=False)
class Descriptor:
    """`times`: how often the walk is sent between the acquire and the release."""

    walk: Walk
    acquire: tuple[Lock, int] | None = None
    release: tuple[Lock, int] | None = None
    times: int = 1


@dataclass(eq=False)
class _Transfer:
    data: Bytes
    done: int = 0


@dataclass(eq=False)
class Stream(Resource):
    """From one channel to one or more (broadcast)."""

    sinks: int = 1
    sending: _Transfer | None = None
    receiving: list[_Transfer | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.receiving = [None] * self.sinks

    def send(self, data: Bytes) -> Steps:
        mine = self.sending = _Transfer(data)
        self._advance()
        while self.sending is mine:
            yield self, -1

    def receive(self, data: Bytes, sink: int) -> Steps:
        mine = self.receiving[sink] = _Transfer(data)
        self._advance()
        while self.receiving[sink] is mine:
            yield self, sink

    def _advance(self) -> None:
        """Move what both sides have ready."""
        source, sinks = self.sending, self.receiving
        if source is None or None in sinks:
            return
        ends = [source, *(sink for sink in sinks if sink is not None)]
        count = min(end.data.size - end.done for end in ends)
        data = source.data[source.done : source.done + count]
        for end in ends[1:]:
            end.data[end.done : end.done + count] = data
        for end in ends:
            end.done += count
        if source.done == source.data.size:
            self.sending = None
        self.receiving = [
            None if sink is None or sink.done == sink.data.size else sink for sink in sinks
        ]
        self.wake()

    def explain(self, process: Process, amount: int) -> str:
        transfer = self.sending if amount < 0 else self.receiving[amount]
        if transfer is None:
            return self.name
        done, size = transfer.done, transfer.data.size
        what = "sent" if amount < 0 else "received"
        return f"the other side of {self.name}; {done} of {size} bytes {what}"


@dataclass(frozen=True, eq=False)
class Port:
    """One end of a stream: the source, or a destination."""

    stream: Stream
    sink: int | None = None

    def pass_one(self, descriptor: Descriptor) -> Steps:
        if descriptor.acquire is not None:
            lock, amount = descriptor.acquire
            while lock.value < amount:
                yield lock, amount
            lock.value -= amount
        for _ in range(descriptor.times):
            if self.sink is None:
                yield from self.stream.send(descriptor.walk.read())
            else:
                data = descriptor.walk.target()
                yield from self.stream.receive(data, self.sink)
                descriptor.walk.scatter(data)
        if descriptor.release is not None:
            lock, amount = descriptor.release
            lock.release(amount)

    def pass_all(self, descriptors: Iterable[Descriptor]) -> Steps:
        for descriptor in descriptors:
            yield from self.pass_one(descriptor)


@dataclass(eq=False)
class Tokens(Resource):
    """What finished tasks send to the sequence."""

    count: int = 0

    def explain(self, process: Process, amount: int) -> str:
        return f"a token of {self.name}"


class TaskQueue(Resource):
    """The tasks of one channel that the sequence controls, and the channel that runs them."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        super().__init__(scheduler, name)
        self.tokens = Tokens(scheduler, name)
        self.tasks: deque[tuple[Sequence[Descriptor], bool]] = deque()

    def push(self, descriptors: Sequence[Descriptor], token: bool) -> None:
        if len(self.tasks) == QUEUE_DEPTH:
            raise DesignError(
                f"a task for {self.name}, whose queue holds {QUEUE_DEPTH} already: the array may "
                "lose it; wait for a token first"
            )
        self.tasks.append((descriptors, token))
        self.wake()

    def work(self, port: Port) -> Steps:
        while True:
            while not self.tasks:
                yield self, 1
            descriptors, token = self.tasks.popleft()
            yield from port.pass_all(descriptors)
            if token:
                self.tokens.count += 1
                self.tokens.wake()

    def explain(self, process: Process, amount: int) -> str:
        return f"a task of the runtime sequence on {self.name}"
