"""Writing a bundle shard by shard, so that a killed run loses at most the shard in work, and the
one before if its commit, which takes milliseconds, was still under way.

    with BundleWriter(out, shard_count, identity) as writer:
        for index in range(writer.committed, shard_count):
            writer.write_shard(index, entries(index))
        writer.finish(manifest, assets)

Everything happens in `OUT.partial`; `OUT` appears complete, in one rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from uq.errors import BundleError, UsageError
from uq.formats.disk import disk_errors, sync_folder, write_file
from uq.formats.entries import ArrayEntry, Entry, QuantEntry, TiledRows
from uq.formats.journal import JOURNAL, CommittedShard, Journal
from uq.formats.manifest import (
    CHECKSUM,
    MANIFEST,
    SHARD_SUFFIX,
    TOWERS,
    TOWERS_SCHEMA,
    UNLISTED,
    FileRecord,
    Manifest,
    check_manifest,
    check_path,
    checksum_line,
)
from uq.formats.shard import Shard, make_header, shard_file
from uq.formats.spec import QuantTensor
from uq.formats.work_lock import LOCK, WorkLock

__all__ = ["ArrayEntry", "BundleWriter", "Entry", "QuantEntry", "TiledRows"]


class BundleWriter:
    """Writes one bundle; see the head of this module.

    Attributes:
        committed: shards that are safe on the disk, hashes verified; work continues behind them.
    """

    def __init__(
        self,
        out: Path,
        shard_count: int,
        identity: Mapping[str, object],
        *,
        towers: bool = False,
        resume: str = "auto",
        sources: Callable[[int], Mapping[str, str]] = lambda _: {},
    ) -> None:
        """Lock the work folder and find out what is already there.

        Args:
            identity: JSON that fixes the bytes of the bundle: source, plan, calibration, ...
            towers: a file with towers follows the last shard.
            resume: `auto` continues where the same work was broken off, `restart` begins anew,
                `require` refuses to begin anew.
            sources: is called with a shard before it is committed, for the hashes of the tensors
                that it was made from; what it raises drops the shard.

        Raises:
            UsageError: `out` exists, another run is writing it, the work folder belongs to
                something else, or there is nothing to continue.
            DeviceError: the work folder cannot be written.
        """
        _require_new(out)
        self._out = out
        self._files = [shard_file(index, shard_count) for index in range(shard_count)]
        self._files += [TOWERS] * towers
        self._sources = sources
        self._work = work_folder(out)
        self._finished = False
        with disk_errors(self._work, 0):
            _require_ours(self._work)
            self._lock = WorkLock(self._work)
        try:
            _require_new(out)  # another run may have finished it before this one got the lock
            self._journal = self._open_journal(Journal.begin(identity, len(self._files)), resume)
        except BaseException:
            if not (self._work / JOURNAL).exists():
                shutil.rmtree(self._work)
            self._lock.let_go()
            raise
        self._written = len(self._journal.shards)
        self._committer = ThreadPoolExecutor(1)
        self._commit_under_way: Future[None] | None = None

    @property
    def committed(self) -> int:
        self._settle()
        return len(self._journal.shards)

    @property
    def facts(self) -> Mapping[str, object]:
        """What `confirm` was told, by this run or by those before it."""
        return self._journal.facts

    def confirm(self, name: str, value: Mapping[str, object]) -> None:
        """Tell what else fixes the bytes; the first run records it, those behind it compare.

        Args:
            value: JSON.

        Raises:
            UsageError: an earlier run was told something else; names the difference.
        """
        self._settle()
        journal = self._journal.confirmed(name, value, self._work)
        if journal != self._journal:
            journal.save(self._work)
            self._journal = journal

    @property
    def sources(self) -> Mapping[str, str]:
        """Hash of each tensor that the committed shards were made from."""
        self._settle()
        return self._journal.sources

    def require_sources(self, found: Mapping[str, str]) -> None:
        """Raises UsageError: one of these hashes differs from that in `sources`; names it."""
        self._journal.require_sources(found, self._work)

    def _settle(self) -> None:
        """Wait for the commit that runs beside the work on the next shard; raises what it met."""
        pending, self._commit_under_way = self._commit_under_way, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Unlock; leave a work folder only if there is something to continue."""
        try:
            self._committer.shutdown()
            if not self._finished and not self._journal.shards and self._lock.alone:
                shutil.rmtree(self._work)
        finally:  # a second Ctrl-C may come while the last commit is waited for
            self._lock.let_go()
        if kind is None:
            self._settle()

    def write_shard(
        self, index: int, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write and sync the next shard, `index`; it is committed while the one behind is made.

        The entries are consumed one after the other, by falling alignment.

        Raises:
            DeviceError: the disk is full or broken; nothing of this shard is left, or of the one
                before, whose commit failed.
            ValueError: shards out of order, or pieces that do not add up to their tensor.
        """
        with self._lock.held():
            self._write_shard(index, entries, metadata)

    def _write_shard(
        self, index: int, entries: Sequence[Entry], metadata: Mapping[str, str] | None
    ) -> None:
        if index != self._written:
            raise ValueError(f"shard {index} is not the next one, {self._written}")
        file = self._files[index]
        entries = sorted(entries, key=lambda entry: -entry.alignment)
        header = make_header({e.name: (e.dtype, e.stored_shape) for e in entries}, metadata)
        size = len(header) + sum(entry.nbytes for entry in entries)
        sha256 = write_file(self._work / file, _contents(header, entries), size)
        try:
            sources = self._sources(index)
            self._settle()
            tensors = {e.name: e.record(file) for e in entries if isinstance(e, QuantEntry)}
            arrays = {e.name: e.record(file) for e in entries if isinstance(e, ArrayEntry)}
        except BaseException:
            (self._work / file).unlink()
            raise
        shard = CommittedShard(file, FileRecord(size, sha256), tensors, arrays, sources)
        self._commit_under_way = self._committer.submit(self._commit, shard)
        self._lock.take()
        self._commit_under_way.add_done_callback(lambda _: self._lock.let_go())
        self._written += 1

    def _commit(self, shard: CommittedShard) -> None:
        journal = replace(self._journal, shards=(*self._journal.shards, shard))
        try:
            journal.save(self._work)
        except BaseException:
            (self._work / shard.file).unlink()
            raise
        self._journal = journal

    def read_layer(self, layer: int) -> dict[str, QuantTensor | NDArray[np.float32]]:
        """A committed layer, as the runs that follow will see it: role -> weight or gain."""
        self._settle()
        committed = self._journal.shards[layer + 1]
        shard = Shard(self._work / committed.file)
        values: dict[str, QuantTensor | NDArray[np.float32]] = {
            _role(name, layer): shard.quant(name, record)
            for name, record in committed.tensors.items()
        }
        return values | {_role(name, layer): shard.array(name) for name in committed.arrays}

    def finish(self, manifest: Manifest, assets: Mapping[str, bytes]) -> Path:
        """Write the assets and the manifest, and give the folder its name.

        Args:
            manifest: `tensors`, `arrays` and `files` are filled in here.
            assets: relative path -> content.

        Returns:
            The finished folder.

        Raises:
            BundleError: the manifest contradicts the shards, or an asset's name is not allowed.
            DeviceError: the disk is full or broken; the shards are kept.
        """
        if self.committed != len(self._files):
            raise ValueError(f"{self.committed} of {len(self._files)} shards are written")
        shards = self._journal.shards
        files = {shard.file: shard.record for shard in shards}
        for name in assets:
            _check_asset(name)
        files |= {name: self._write(name, data) for name, data in sorted(assets.items())}
        tensors = {name: record for s in shards for name, record in s.tensors.items()}
        oldest = TOWERS_SCHEMA if TOWERS in files else manifest.model_schema
        manifest = replace(
            manifest,
            schema=max(oldest, *(record.schema for record in tensors.values())),
            tensors=tensors,
            arrays={name: record for s in shards for name, record in s.arrays.items()},
            files=files,
        )
        check_manifest(manifest)
        digest = self._write(MANIFEST, manifest.to_bytes()).sha256
        self._write(CHECKSUM, checksum_line(digest))
        self._publish()
        return self._out

    def _write(self, name: str, data: bytes) -> FileRecord:
        path = self._work / name
        with disk_errors(path, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
        record = FileRecord(len(data), write_file(path, [data], len(data)))
        sync_folder(path.parent)
        return record

    def _publish(self) -> None:
        _require_new(self._out)
        with disk_errors(self._out, 0):
            self._work.rename(self._out)
            self._finished = True
            sync_folder(self._out.parent)
            _tidy(self._out)  # last, so that a run killed before the rename can go on

    def _open_journal(self, wanted: Journal, resume: str) -> Journal:
        begun = (self._work / JOURNAL).exists() and resume != "restart"
        if begun:
            journal = Journal.load(self._work)
            journal.require_same(wanted, self._work)
            journal = journal.verified(self._work)
        elif resume == "require":
            raise UsageError(f"{self._work}: no unfinished work to continue; leave --resume away")
        else:
            journal = wanted
        _clear(self._work, keep={LOCK, JOURNAL, *(shard.file for shard in journal.shards)})
        journal.save(self._work)
        return journal


def work_folder(out: Path) -> Path:
    """Where the bundle `out` is while it is being written.

    Raises:
        UsageError: it is the current folder.
    """
    if not out.name:
        raise UsageError(f"-o {out}: is the current folder; choose another -o")
    return out.with_name(out.name + ".partial")


def _contents(header: bytes, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    yield header
    for entry in entries:
        yield from entry.chunks()


def _role(name: str, layer: int) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `mlp.up_proj`."""
    return name.removeprefix(f"model.layers.{layer}.").rpartition(".")[0]


def _check_asset(name: str) -> None:
    check_path(name)
    if name in UNLISTED or name in (JOURNAL, LOCK) or name.endswith(SHARD_SUFFIX):
        raise BundleError(f"{name}: the bundle needs this name for itself; no asset can have it")


def _require_new(out: Path) -> None:
    if (out / JOURNAL).is_file() and (out / CHECKSUM).is_file():
        _tidy(out)
        raise UsageError(
            f"{out}: is whole: the run before was stopped behind its last step; nothing is left to "
            "do"
        )
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists; remove it or choose another -o")


def _tidy(out: Path) -> None:
    """Remove what a finished bundle does not need; the journal last: it tells what is left."""
    for name in (LOCK, JOURNAL):
        (out / name).unlink(missing_ok=True)


def _require_ours(work: Path) -> None:
    """Refuse a folder that happens to have the name of the work folder."""
    if work.is_dir() and not work.is_symlink():
        names = {path.name for path in work.iterdir()}
        if JOURNAL in names or names <= {LOCK, JOURNAL + ".new"}:
            return
    elif not os.path.lexists(work):
        return
    raise UsageError(f"{work}: is no work folder of uq; remove it or choose another -o")


def _clear(folder: Path, keep: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
