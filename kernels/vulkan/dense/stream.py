"""Dispatches one after the other, recorded while the device works on those before them."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.memory import Span, Transfers
from uq.kernels.vulkan.pipelines import Pipelines

MOST_WORK = 1.5e12  # operations of a submit: a fifth of a second of a small GPU
MOST_DISPATCHES = 256  # of a submit
DEPTH = 3  # submits that wait for the device


class Stream:
    """What is dispatched runs in order, each dispatch behind all before it.

    Attributes:
        seconds: label of a phase -> its time, where phases are timed.
    """

    def __init__(
        self, gpu: Gpu, pipelines: Pipelines, transfers: Transfers, *, timed: bool = False
    ) -> None:
        """`timed`: the host waits for the device at both ends of a phase."""
        self.gpu, self._pipelines, self._transfers = gpu, pipelines, transfers
        self._timed = timed
        self._recorder: Recorder | None = None
        self._work, self._dispatches = 0.0, 0
        self._running: deque[tuple[Submission, Recorder]] = deque()
        self.seconds: dict[str, float] = defaultdict(float)

    def dispatch(
        self,
        name: str,
        push: bytes,
        groups: tuple[int, int, int],
        constants: dict[str, int | float],
        work: float = 0.0,
    ) -> None:
        """Run a module; `work`: operations, about."""
        if self._recorder is None:
            self._recorder = Recorder(self.gpu)
        pipeline = self._pipelines.get(name, **constants)
        self._recorder.dispatch(pipeline, self._pipelines.layout, push, groups)
        self._recorder.barrier()
        self._work += work
        self._dispatches += 1
        if self._work >= MOST_WORK or self._dispatches >= MOST_DISPATCHES:
            self.flush()

    def flush(self) -> None:
        """Submit what is recorded."""
        if self._recorder is None:
            return
        self._recorder.end()
        submission = Submission(self.gpu, [self._recorder.commands])
        submission.start()
        self._running.append((submission, self._recorder))
        self._recorder, self._work, self._dispatches = None, 0.0, 0
        while len(self._running) > DEPTH:
            self._finish()

    def wait(self) -> None:
        self.flush()
        while self._running:
            self._finish()

    def write(self, span: Span, values: NDArray[Any]) -> None:
        self.wait()
        self._transfers.write(span, values)

    def read(self, span: Span) -> NDArray[Any]:
        """Bytes."""
        self.wait()
        return self._transfers.read(span)

    def clear(self, span: Span) -> None:
        self.wait()
        self._transfers.fill(span)

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        """What the block dispatches is a part of `label`. Phases lie side by side, not nested."""
        if not self._timed:
            yield
            return
        self.wait()
        began = time.perf_counter()
        yield
        self.wait()
        self.seconds[label] += time.perf_counter() - began

    def _finish(self) -> None:
        submission, recorder = self._running.popleft()
        submission.finish()
        submission.close()
        recorder.close()
