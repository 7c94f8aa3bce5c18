"""Break uq's work in every way, and demand that nothing is lost or mistaken.

    python -m benchmarks.soak [--kills N] [--failures N] [--flips N] [--seconds S] [--seed S]

A small random checkpoint is quantized, data-free and calibrated in turn. Each run is killed at a
random moment, by the clock or within a random call that changes a file, or its disk fills up or
fails; then it is run again and every file compared with an unbroken run's. At the end random bytes
of every file of a bundle are flipped, one at a time: opening it must refuse and name the file.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.soak.faults import Fault, compile_layer
from benchmarks.soak.model import write_model
from benchmarks.soak.server import Job, Outcome, Server
from uq.errors import BundleError, UqError
from uq.formats.bundle import open_bundle

KILLS, FAILURES = ("seconds", "change"), ("room", "sync", "read")
SAYS = {"room": "No space left on device", "sync": "Input/output error", "read": "cannot read"}
DONE = ("is whole", "exists; remove it")  # says a run behind one that was killed at its last step
Files = dict[str, bytes]


class Lost(Exception):
    """Something was lost or mistaken."""


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing disturbed."""

    text: str | None
    outcome: Outcome
    files: Files

    @property
    def shards(self) -> int:
        return self.outcome.finished


@dataclass
class Tally:
    """What happened, by the kind of fault.

    Attributes:
        missed: runs that ended before their fault.
        again: finished layers that a run made again -> number of runs.
    """

    resumed: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    again: Counter[int] = field(default_factory=Counter)
    flips: int = 0
    files: int = 0


@dataclass(frozen=True)
class Soak:
    """The workplace: `folder` has the model, what is written and the cache."""

    folder: Path
    server: Server
    rng: random.Random

    def job(self, text: str | None, fault: Fault = Fault()) -> Job:  # noqa: B008, it is frozen
        out = self.folder / "work" / "bundle"
        return Job(str(self.folder / "model"), str(out), text, fault)

    def unbroken(self, text: str | None) -> Unbroken:
        """The second run is taken: the first one fills caches and compiles."""
        for fork in (False, True):
            outcome = self.server.run(replace(self.job(text), fork=fork))
            if outcome.error is not None:
                raise Lost(f"an undisturbed run failed: {outcome.error}")
            files = self.take()
        return Unbroken(text, outcome, files)

    def take(self) -> Files:
        """The files of the bundle, which is removed; nothing else may lie beside it."""
        work = self.folder / "work"
        if [path.name for path in work.iterdir()] != ["bundle"]:
            raise Lost(f"beside the bundle: {sorted(path.name for path in work.iterdir())}")
        files = read_files(work / "bundle")
        shutil.rmtree(work / "bundle")
        return files

    def fault(self, kind: str, unbroken: Unbroken) -> Fault:
        """A random place within an unbroken run."""
        calls = unbroken.outcome.calls
        assert calls is not None
        written = sum(map(len, unbroken.files.values()))
        match kind:
            case "seconds":
                return Fault(seconds=self.rng.uniform(0, unbroken.outcome.seconds))
            case "change":
                return Fault(change=self.rng.randrange(calls.changes))
            case "room":
                return Fault(room=self.rng.randrange(written))
            case "sync":
                return Fault(sync=self.rng.randrange(calls.syncs))
        return Fault(read=self.rng.randrange(calls.reads))

    def disturb(self, kind: str, unbroken: Unbroken, tally: Tally) -> bool:
        """One run that is broken and one that goes on; whether the first was broken in time.

        Raises:
            Lost: the second fails or its files differ, or too much was done again.
        """
        fault = self.fault(kind, unbroken)
        broken = self.server.run(self.job(unbroken.text, fault))
        if broken.error is None and not broken.killed:
            tally.missed += 1  # it was faster this time
            self.take()
            return False
        if not broken.killed and SAYS[kind] not in str(broken.error):
            raise Lost(f"{fault}: said {broken.error!r}")
        resumed = self.server.run(self.job(unbroken.text))
        if resumed.error is not None and not any(said in resumed.error for said in DONE):
            raise Lost(f"{fault}: cannot be continued: {resumed.error}")
        if self.take() != unbroken.files:
            raise Lost(f"{fault}: the files differ from those of an unbroken run")
        # A kill may come between a commit and the word of it.
        again = 0 if resumed.first is None else max(broken_at(broken) - resumed.first, 0)
        if again > 1:
            raise Lost(f"{fault}: {again} finished layers were made again")
        tally.resumed[kind] += 1
        tally.again[again] += 1
        return True


def broken_at(outcome: Outcome) -> int:
    """Shards that were finished when the run broke off."""
    return (outcome.first or 0) + outcome.finished


def read_files(folder: Path) -> Files:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def disturbances(kills: int, failures: int) -> Iterator[str]:
    """Kinds of faults, each as often as the others of its sort."""
    for index in range(max(kills, failures)):
        if index < kills:
            yield KILLS[index % len(KILLS)]
        if index < failures:
            yield FAILURES[index % len(FAILURES)]


def flip(folder: Path, files: Files, rng: random.Random, count: int, deadline: float) -> int:
    """Flip a bit, `count` times, in one file after the other.

    Raises:
        Lost: the bundle was opened all the same, or the message does not name the file.
    """
    write_files(folder, files)
    open_bundle(folder)
    names = sorted(files)
    for index in range(count):
        if time.monotonic() > deadline:
            return index
        name = names[index % len(names)]
        place, bit = rng.randrange(len(files[name])), 1 << rng.randrange(8)
        flip_bit(folder / name, place, bit)
        require_refusal(folder, name, f"bit {bit} of byte {place}")
        flip_bit(folder / name, place, bit)
    open_bundle(folder)
    return count


def flip_bit(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ bit]))


def require_refusal(folder: Path, name: str, what: str) -> None:
    try:
        open_bundle(folder)
    except BundleError as error:
        if name not in str(error):
            raise Lost(f"{name}: {what}: refused without its name: {error}") from error
        return
    raise Lost(f"{name}: {what}: opened all the same")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def soak(folder: Path, args: argparse.Namespace) -> Tally:
    rng, tally = random.Random(args.seed), Tally()
    deadline = time.monotonic() + args.seconds
    write_model(folder / "model", args.layers)
    (folder / "work").mkdir()
    text = folder / "text.txt"
    text.write_text("the time of the world and the city in which they were not " * 100)
    with Server(compile_layer(folder), folder / "cache") as server:
        work = Soak(folder, server, rng)
        kinds = [work.unbroken(None), work.unbroken(str(text))]
        for index, kind in enumerate(disturbances(args.kills, args.failures)):
            if time.monotonic() > deadline:
                break
            while not work.disturb(kind, kinds[index // 2 % 2], tally):
                pass
    tally.files = len(kinds[1].files)
    tally.flips = flip(folder / "flipped", kinds[1].files, rng, args.flips, deadline)
    return tally


def describe(tally: Tally) -> str:
    def count(kind: str) -> int:
        return tally.resumed[kind]

    again = ", ".join(f"{n} in {runs} runs" for n, runs in sorted(tally.again.items()))
    return "\n".join(
        [
            f"killed: {count('seconds')} by the clock, {count('change')} within a call that "
            f"changes a file; {tally.missed} more ended before their fault",
            f"failed disk: {count('room')} full, {count('sync')} at a sync, {count('read')} at a "
            "read of the source (a library in front of libc, LD_PRELOAD)",
            f"continued: {sum(tally.resumed.values())}, each to the bytes of an unbroken run",
            f"finished layers made again: {again or 'none'}",
            f"flipped: {tally.flips} bits over {tally.files} files, each refused by name",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=200, help="default: %(default)s")
    add("--failures", type=int, default=60, help="of the disk; default: %(default)s")
    add("--flips", type=int, default=2000, help="default: %(default)s")
    add("--seconds", type=float, default=float("inf"), help="stop then; default: when all is done")
    add("--layers", type=int, default=6, help="of the checkpoint; default: %(default)s")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="uq-soak-") as folder:
            print(describe(soak(Path(folder), args)))
    except (Lost, UqError) as error:
        print(f"soak: seed {args.seed}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
