"""Processes that wait for each other: locks, and the loop that runs whatever can move."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from uq.errors import DesignError
from uq.kernels.npu.target import MAX_LOCK

LISTED = 24  # processes that an explanation names


class Deadlock(DesignError):
    """Nothing can move. The message says who waits for what, from the sequence on backwards."""


@dataclass(eq=False)
class Resource:
    """What a process can wait for.

    Attributes:
        suppliers: processes that can end such a wait.
    """

    scheduler: Scheduler
    name: str
    waiters: list[Process] = field(default_factory=list)
    suppliers: list[Process] = field(default_factory=list)

    def wake(self) -> None:
        if self.waiters:
            self.scheduler.ready.extend(self.waiters)
            self.waiters.clear()

    def explain(self, process: Process, amount: int) -> str:
        """What the process waits for, as the rest of `it waits for ...`."""
        raise NotImplementedError


Wait = tuple[Resource, int]  # and how much of it
Steps = Iterator[Wait]


@dataclass(eq=False)
class Lock(Resource):
    """A counting semaphore of a tile."""

    value: int = 0

    def acquire(self, amount: int, *, exact: bool = False) -> Steps:
        """Wait until it counts `amount` or more, or exactly that, and take it."""
        while self.value < amount or (exact and self.value != amount):
            yield self, amount
        self.value -= amount

    def release(self, amount: int) -> None:
        self.value += amount
        if self.value > MAX_LOCK:
            raise DesignError(f"{self.name} would count {self.value}; a lock ends at {MAX_LOCK}")
        self.wake()

    def explain(self, process: Process, amount: int) -> str:
        return f"{amount} of {self.name}; there are {self.value}"


@dataclass(eq=False)
class Process:
    name: str
    steps: Steps
    waiting: Wait | None = None


class Scheduler:
    """Runs the sequence until it waits, then the array until that wait is over.

    So commands come as early as they can, which fills queues most, and nothing moves behind the
    last wait: an output that the sequence does not await is not there.
    """

    def __init__(self) -> None:
        self.ready: deque[Process] = deque()

    def start(self, name: str, steps: Steps) -> Process:
        process = Process(name, steps)
        self.ready.append(process)
        return process

    def run(self, name: str, steps: Steps) -> None:
        """Run `steps` to their end; raises Deadlock."""
        main = Process(name, steps)
        ready = self.ready
        ready.appendleft(main)
        while ready:
            process = ready.popleft()
            process.waiting = wait = next(process.steps, None)
            if wait is not None:
                wait[0].waiters.append(process)
            elif process is main:
                return
        raise Deadlock(_explanation(main))


def _explanation(main: Process) -> str:
    """One line for each process on the way back from the sequence."""
    lines, todo, seen = [], deque([main]), {main}
    while todo:
        process = todo.popleft()
        if process.waiting is None:
            lines.append(f"{process.name} is at its end")
            continue
        resource, amount = process.waiting
        lines.append(f"{process.name} waits for {resource.explain(process, amount)}")
        for supplier in resource.suppliers:
            if supplier not in seen and supplier is not process:
                seen.add(supplier)
                todo.append(supplier)
    more = len(lines) - LISTED
    shown = [*lines[:LISTED], *([f"and {more} more"] if more > 0 else [])]
    return "deadlock: nothing can move\n  " + "\n  ".join(shown)
