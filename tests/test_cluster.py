"""Work on several machines: the bytes of one, through deaths; and who is refused.

Two workers are processes of their own, which can be killed. What needs no kill runs on a worker in
a thread, which starts at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import dask.config
import pytest
from distributed import Client, LocalCluster

from uq.cluster import link, members
from uq.cluster.admission import difference
from uq.cluster.cluster import connect
from uq.cluster.worker import Dropped, Facts, facts_of
from uq.errors import CheckpointError, DeviceError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.progress import Progress, SilentProgress
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.sweep import Trial, sweep

RTN = QuantizeOptions(method="rtn")


INDEPENDENT = QuantizeOptions(
    group=32, calibration_tokens=160, calibration_length=80, calibrate_layers="independently"
)


LET_GO, STOPPED = Event(), Event()


HERE = Facts({"uq": "1.0", "numpy": "2.5"}, "znver5", {"a.safetensors": (100, "noon")})


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def processes() -> Iterator[LocalCluster]:
    patient = dask.config.set({"distributed.deploy.lost-worker-timeout": "5m"})
    with (
        patient,
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=100
        ) as started,
    ):
        yield started


@pytest.fixture
def threads() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=1,
        processes=False,
        protocol="tcp",
        dashboard_address="127.0.0.1:0",
        silence_logs=100,
    ) as started:
        yield started


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(layers=4, vocab=3000)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one machine writes."""
    return contents(quantize(open_checkpoint(model), tmp_path_factory.mktemp("alone") / "b", RTN))


def scheduler(started: LocalCluster) -> Any:
    return started.scheduler


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def on_cluster(
    started: LocalCluster,
    model: Path,
    out: Path,
    progress: Any = None,
    options: QuantizeOptions = RTN,
) -> Path:
    progress = progress or SilentProgress()
    checkpoint = open_checkpoint(model)
    with connect(started.scheduler_address, checkpoint, progress) as farm:
        return quantize(checkpoint, out, options, progress, farm=farm)


def run_on_first(started: LocalCluster, function: Callable[[], None]) -> str:
    """Run a function on one worker process; its address."""
    with Client(started) as client:
        address = sorted(answering(client))[0]
        client.run(function, workers=[address])
    return address


def answering(client: Client) -> set[str]:
    """Both workers, when one that was killed is there again."""
    while len(found := client.run(os.getpid, on_error="ignore")) < 2:
        time.sleep(0.1)
    return set(found)


def die_at_work() -> None:
    import os
    import signal

    from uq.cluster import worker

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    worker.perform = die  # type: ignore[assignment]


def die_once(function: str, task: str, marker: str) -> None:
    """The first worker that is given the task dies at it."""
    import os
    import signal

    from uq.cluster import worker

    alive = getattr(worker, function)

    def die(*args: object) -> object:
        if task in str(args[2]):
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return alive(*args)

    setattr(worker, function, die)


def run_on_all(started: LocalCluster, function: Callable[..., None], *args: str) -> set[str]:
    """Run a function on both worker processes; their addresses."""
    with Client(started) as client:
        found = answering(client)
        client.run(by_value(function), *args)
    return found


def by_value(function: Callable[..., None]) -> Callable[..., None]:
    """The same function, sent as code: workers do not have the tests."""

    def sent() -> None:
        return None

    sent.__code__ = function.__code__
    return sent


def test_bytes_are_those_of_one_machine_though_a_worker_is_killed(
    processes: LocalCluster, model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    killed = run_on_first(processes, by_value(die_at_work))
    assert contents(on_cluster(processes, model, tmp_path / "b")) == alone
    assert killed not in scheduler(processes).workers


def test_calibrated_bytes_are_those_of_one_machine_though_a_worker_is_killed(
    processes: LocalCluster, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The dead one had a layer in work, and a part of what was passed on to the next layers."""
    model = tiny_checkpoint(layers=4, hidden=64, ffn=128, head_dim=16)
    alone = quantize(open_checkpoint(model), tmp_path / "alone", INDEPENDENT)
    before = run_on_all(processes, die_once, "use", "layer 1", str(tmp_path / "killed"))
    found = on_cluster(processes, model, tmp_path / "b", options=INDEPENDENT)
    assert contents(found) == contents(alone)
    assert len(before & scheduler(processes).workers.keys()) == 1


def test_a_sweep_finds_what_one_machine_finds_though_a_worker_is_killed(
    processes: LocalCluster, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the time of the world and the city in which they were not one " * 20)
    trials = [
        Trial(name, QuantizeOptions(name, method="rtn"), "plain", "plain", text, 32, 2)
        for name in ("int4", "int8")
    ]
    checkpoint = open_checkpoint(model)
    alone = sweep(checkpoint, trials, SilentProgress())
    before = run_on_all(processes, die_once, "perform", "int8", str(tmp_path / "killed"))
    with connect(processes.scheduler_address, checkpoint, SilentProgress()) as farm:
        found = sweep(checkpoint, trials, SilentProgress(), farm=farm)
    assert [replace(o, seconds=0) for o in found] == [replace(o, seconds=0) for o in alone]
    assert len(before & scheduler(processes).workers.keys()) == 1


def test_work_that_kills_its_workers_ends_in_one_line(
    processes: LocalCluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler(processes), "allowed_failures", 0)
    run_on_first(processes, by_value(die_at_work))
    with pytest.raises(DeviceError, match=r"weight: 1 workers died at it, the last one tcp://"):
        on_cluster(processes, model, tmp_path / "b")


def pretend_another_version() -> None:
    import uq

    uq.__version__ = "9.9"


def test_a_worker_of_another_version_is_refused_and_the_rest_works(
    processes: LocalCluster, model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    refused = run_on_first(processes, by_value(pretend_another_version))
    progress = Notes()
    assert contents(on_cluster(processes, model, tmp_path / "b", progress)) == alone
    (line,) = progress.notes
    assert refused in line and line.endswith("has uq 9.9, here is 0.1.0; install the same there")


def test_refused_alone_means_no_work(
    threads: LocalCluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = facts_of(open_checkpoint(model))
    another = replace(here, software=here.software | {"numpy": "1.0"})
    monkeypatch.setattr(members, "facts_of", lambda checkpoint: another)
    with pytest.raises(DeviceError, match=r"^worker 0 \(tcp://.*\) has numpy .*, here is 1.0;"):
        on_cluster(threads, model, tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (HERE, None),
        (replace(HERE, software={"uq": "1.0"}), "has numpy nothing, here is 2.5; install"),
        (replace(HERE, cpu="znver4"), "has a znver4 processor, here is a znver5;"),
        (replace(HERE, files={}), "has a.safetensors of no such file, here of 100 bytes;"),
        (replace(HERE, files={"a.safetensors": (9, "noon")}), "has a.safetensors of 9 bytes"),
        (replace(HERE, files={"a.safetensors": (100, "one")}), "with content beef, here cafe;"),
    ],
)
def test_what_would_change_the_bytes_is_named(there: Facts, reason: str | None) -> None:
    found = difference(
        HERE, there, True, lambda: {"a.safetensors": "cafe"}, lambda: {"a.safetensors": "beef"}
    )
    assert found == reason if reason is None else reason in str(found)


def test_the_same_files_of_another_time_and_processor_do_for_rounding() -> None:
    there = replace(HERE, cpu="znver4", files={"a.safetensors": (100, "one")})
    hashes = {"a.safetensors": "cafe"}
    assert difference(HERE, there, False, lambda: hashes, lambda: hashes) is None


def test_a_run_that_was_interrupted_continues_on_a_cluster(
    threads: LocalCluster, model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    class Interrupted(Notes):
        def advance(self, step: str, **figures: float) -> None:
            if step == "layer 1":
                raise KeyboardInterrupt

    progress = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        on_cluster(threads, model, tmp_path / "b", progress)
    assert "keeps 3 finished parts; the same command continues" in progress.notes[0]
    assert contents(on_cluster(threads, model, tmp_path / "b")) == alone


def hold(checkpoint: Checkpoint, task: str, progress: Progress) -> str:
    """Work that lasts until it is let go."""
    if task == "held":
        LET_GO.wait(20)
    return task


def test_the_bar_says_who_does_what(threads: LocalCluster, model: Path) -> None:
    class Watching(SilentProgress):
        def work(self, what: str) -> None:
            seen.append(what)
            LET_GO.set()

    seen: list[str] = []
    LET_GO.clear()
    with connect(threads.scheduler_address, open_checkpoint(model), Watching()) as farm:
        assert list(farm.map(hold, ["first", "held"], ahead=1, together=1)) == ["first", "held"]
    assert seen[0] == "held on 0"


def say(checkpoint: Checkpoint, task: str, progress: Progress) -> str:
    progress.note("this stays on the screen")
    progress.work("half done")
    LET_GO.wait(20)
    return task


def test_what_a_worker_says_reaches_the_bar(threads: LocalCluster, model: Path) -> None:
    class Watching(Notes):
        def work(self, what: str) -> None:
            if what == "half done on 0":
                LET_GO.set()

    LET_GO.clear()
    progress = Watching()
    with connect(threads.scheduler_address, open_checkpoint(model), progress) as farm:
        assert list(farm.map(say, ["first"], ahead=1, together=1)) == ["first"]
        assert LET_GO.is_set()
    assert progress.notes == ["this stays on the screen"]


def go_on(checkpoint: Checkpoint, task: str, progress: Progress) -> None:
    LET_GO.set()
    try:
        while True:
            progress.work("on and on")
            time.sleep(0.02)
    except Dropped:
        STOPPED.set()
        raise


def test_workers_drop_what_nobody_waits_for(threads: LocalCluster, model: Path) -> None:
    LET_GO.clear()
    STOPPED.clear()
    with connect(threads.scheduler_address, open_checkpoint(model), SilentProgress()) as farm:
        farm.map(go_on, ["first"], ahead=1, together=1)
        assert LET_GO.wait(20)
    assert STOPPED.wait(20)


def test_an_error_of_the_checkpoint_arrives_as_itself(
    threads: LocalCluster, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\xff\xff\xff")  # NaN, in the last tensor
    with pytest.raises(CheckpointError, match="nan"):
        on_cluster(threads, folder, tmp_path / "b")


def test_workers_that_go_away_end_in_one_line(
    threads: LocalCluster, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "RESTART", 0.2)
    LET_GO.clear()
    with connect(threads.scheduler_address, open_checkpoint(model), SilentProgress()) as farm:
        results = farm.map(hold, ["first", "held"], ahead=1, together=1)
        assert next(results) == "first"
        (worker,) = scheduler(threads).workers
        threads.sync(scheduler(threads).remove_worker, worker, stimulus_id="test")
        with pytest.raises(DeviceError, match="all workers are gone; the same command continues"):
            next(results)
        LET_GO.set()


def test_a_lost_scheduler_is_one_line(
    threads: LocalCluster, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PATIENCE", 0.5)
    LET_GO.clear()
    with connect(threads.scheduler_address, open_checkpoint(model), SilentProgress()) as farm:
        results = farm.map(hold, ["first", "held"], ahead=1, together=1)
        assert next(results) == "first"
        LET_GO.set()
        threads.close()
        with pytest.raises(DeviceError, match="the scheduler is gone; the same command continues"):
            list(farm.map(hold, ["first"], ahead=1, together=1))
