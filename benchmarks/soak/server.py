"""Quantizes in forks of a process that has imported uq once: `python -m benchmarks.soak.server`.

Takes a `Job` a line, as JSON, and answers with an `Outcome` a line. `Server` is the other side.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.soak.faults import Calls, Fault, Layer

# One thread, so that the process can fork after it has compiled and run everything itself.
LIMITS = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "NUMBA_THREADING_LAYER": "workqueue",
}


@dataclass(frozen=True)
class Job:
    """One run of the quantizer.

    Attributes:
        text: calibrates; None: data-free.
        fork: False: within the process that forks, so that its forks find all compiled.
    """

    model: str
    out: str
    text: str | None
    fault: Fault = Fault()
    fork: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        killed: it did not end by itself.
        first: shards that it found finished; None when it did not come so far.
        finished: shards that it wrote.
        error: the line for the user; None when it went well.
    """

    killed: bool
    seconds: float
    first: int | None
    finished: int
    error: str | None
    calls: Calls | None


class Server:
    """The process that forks; use it in a `with`."""

    def __init__(self, library: Path, cache: Path) -> None:
        environment = os.environ | LIMITS | {"LD_PRELOAD": str(library), "UQ_CACHE": str(cache)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak.server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def run(self, job: Job) -> Outcome:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asdict(job)), file=self._process.stdin, flush=True)
        found = json.loads(self._process.stdout.readline())
        calls = found.pop("calls")
        return Outcome(**found, calls=None if calls is None else Calls(**calls))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def main() -> None:
    import uq.quantize.pipeline  # noqa: F401, so that the forks have it

    layer = Layer()
    for line in sys.stdin:
        fields = json.loads(line)
        job = Job(**fields | {"fault": Fault(**fields["fault"])})
        print(json.dumps(asdict(run(job, layer))), flush=True)


def run(job: Job, layer: Layer) -> Outcome:
    ours, theirs = os.pipe()
    begin = time.perf_counter()
    killed = False
    if job.fork:
        killed = run_in_fork(job, layer, theirs)
    else:
        quantize_job(job, layer, theirs)
    os.close(theirs)
    seconds = time.perf_counter() - begin
    with os.fdopen(ours) as events:
        return outcome(killed, seconds, events)


def run_in_fork(job: Job, layer: Layer, events: int) -> bool:
    """Whether it was killed."""
    child = os.fork()
    if child == 0:
        renew_lock()
        quantize_job(job, layer, events)
        os._exit(0)
    wait(child, job.fault.seconds)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def renew_lock() -> None:
    """Numba's lock is common to all forks: one killed within it would stop the later ones."""
    from numba.np.ufunc import parallel

    parallel._set_init_process_lock()


def wait(child: int, seconds: float | None) -> None:
    """Until it ends, or is killed after so many seconds."""
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], seconds)
    if not ended:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)


def outcome(killed: bool, seconds: float, events: Iterator[str]) -> Outcome:
    first, finished, error, calls = None, 0, None, None
    for event in events:
        kind, value = json.loads(event)
        if kind == "first":
            first = value
        elif kind == "finished":
            finished += 1
        elif kind == "error":
            error = value
        else:
            calls = Calls(**value)
    return Outcome(killed, seconds, first, finished, error, calls)


def quantize_job(job: Job, layer: Layer, events: int) -> None:
    """What the fork does; every event is in the pipe before the next thing happens."""
    from uq.cli import explain
    from uq.formats.checkpoint import open_checkpoint
    from uq.progress import SilentProgress
    from uq.quantize.pipeline import QuantizeOptions, quantize

    def say(kind: str, value: object) -> None:
        os.write(events, json.dumps([kind, value]).encode() + b"\n")

    class Events(SilentProgress):
        def start(self, total: int, label: str, *, done: int = 0) -> None:
            if label == "quantize":
                say("first", done)

        def advance(self, step: str, **figures: float) -> None:
            if "error" in figures:  # a shard, not a step of a measurement
                say("finished", step)

    options = QuantizeOptions(method="rtn", threads=2)
    if job.text is not None:
        options = QuantizeOptions(calibration=job.text, calibration_tokens=256, threads=2)
    layer.begin(Path(job.out).parent, Path(job.model), job.fault)
    try:
        quantize(open_checkpoint(job.model), Path(job.out), options, Events())
    except BaseException as error:
        say("error", explain(error)[0])
    say("calls", asdict(layer.calls()))


if __name__ == "__main__":
    main()
