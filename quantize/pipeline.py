"""From a checkpoint to a bundle, layer by layer, in work that can be broken off and continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from threading import Event

import numpy as np
from numpy.typing import NDArray

from uq.blas import blas_threads
from uq.errors import DeviceError, HubError
from uq.formats.checkpoint import Checkpoint
from uq.formats.writer import BundleWriter, Entry, QuantEntry, work_folder
from uq.progress import Progress, SilentProgress
from uq.quantize.background import Writing, in_background
from uq.quantize.calibrate import NumpyEngine
from uq.quantize.calibration_engine import CalibrationEngine
from uq.quantize.curvature import Curvature, measure_curvature
from uq.quantize.farm import Farm, Threads
from uq.quantize.independent import IndependentLayers
from uq.quantize.job import Job, prepared, worker_threads
from uq.quantize.layers import CalibratedLayers, LayerSource
from uq.quantize.options import DEFAULTS, QuantizeOptions
from uq.quantize.shards import ShardSource
from uq.quantize.towers import (
    carried,
    describe,
    int8_types,
    missing_processor,
    tower_entries,
)

__all__ = ["DEFAULTS", "QuantizeOptions", "quantize"]


SILENT = SilentProgress()


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    options: QuantizeOptions = DEFAULTS,
    progress: Progress = SILENT,
    engine: CalibrationEngine | None = None,
    farm: Farm | None = None,
) -> Path:
    """Quantize a checkpoint into the bundle `out`.

    Same checkpoint, text, options and engine, same bytes: in one run or several, on one machine or
    several, at any number of threads for which BLAS rounds alike.

    Args:
        engine: where calibration in order runs; None for main memory, and the disk where that is
            too small.
        farm: does the work that is independent; None for threads of this process.

    Returns:
        The finished folder.

    Raises:
        UsageError: the options do not fit the model or each other, or `out` exists.
        CheckpointError: a weight is not finite; a kept part of the work can be continued.
        HubError: the calibration text or a part of the checkpoint cannot be downloaded; what is
            finished is kept and can be continued.
        DeviceError: the disk is full or broken.
    """
    job = prepared(checkpoint, options, progress, engine, farm)
    with (
        blas_threads(options.threads),
        job.writer(out) as writer,
        _explained_interrupt(out, writer, progress),
        ThreadPoolExecutor(worker_threads(options)) as pool,
        Writing() as writing,
    ):
        job.watch.require_same(writer, pool)
        job.require_room(out, writer)
        job.keep_fetched(out, writer)
        assets = in_background(lambda: carried(checkpoint, towers=job.towers))
        tokens = job.tokens()
        if tokens is not None and job.plan.budget is not None:
            job = job.with_measured_grids(tokens)
            job.require_room(out, writer)
        writer.confirm("plan", {name: str(tensor) for name, tensor in job.plan.tensors.items()})
        curvature = _curvature(job, out, writer, tokens)
        progress.start(job.shards, "quantize", done=job.done(writer))
        source = _source(job, out, writer, tokens, curvature, engine, farm, pool, writing.idle)
        source.skip(writer)
        # A model without tokenizer is refused before a shard is written.
        writer.confirm("asset", {n: sha256(data).hexdigest() for n, data in assets().items()})
        for part in checkpoint.left_out:
            progress.note(f"left out: {part}")
        if job.towers and (note := missing_processor(assets())):
            progress.note(note)
        _write_shards(source, writer, writing, progress)
        if job.towers and writer.committed == job.shards:
            _write_towers(job, writer)
        return writer.finish(job.manifest(writer, tokens), assets())


def _curvature(
    job: Job, out: Path, writer: BundleWriter, tokens: NDArray[np.int32] | None
) -> Curvature | None:
    """Of the outputs of all linears, where it is asked for and there is something to round."""
    if tokens is None or not job.plan.bends or job.done(writer) == job.shards:
        return None
    sizes = job.plan.gptq.work
    return measure_curvature(job.checkpoint, tokens, sizes, work_folder(out), job.progress)


def _source(
    job: Job,
    out: Path,
    writer: BundleWriter,
    tokens: NDArray[np.int32] | None,
    curvature: Curvature | None,
    engine: CalibrationEngine | None,
    farm: Farm | None,
    pool: ThreadPoolExecutor,
    idle: Event,
) -> ShardSource:
    """Makes the shards that are not written yet."""
    checkpoint, plan, progress, contents = (
        job.checkpoint,
        job.plan,
        job.progress,
        job.watch.contents,
    )
    first = job.done(writer)
    spill = work_folder(out) if job.spill else None
    here = NumpyEngine(spill) if farm is None else None
    farm = farm or Threads(checkpoint, pool, worker_threads(job.options), progress, spill)
    calibrated: LayerSource | None = None
    if tokens is not None and first < job.shards and job.options.independent:
        layers = range(max(first - 1, 0), checkpoint.config.num_layers)
        calibrated = IndependentLayers(farm, plan, tokens, layers, here, progress, contents)
    elif tokens is not None and first < job.shards:
        engine = engine or NumpyEngine(spill)
        calibrated = CalibratedLayers(
            checkpoint, plan, tokens, engine, progress, contents, idle, curvature
        )
    todo = range(first, job.shards)
    return ShardSource(checkpoint, plan, calibrated, todo, farm, progress, contents)


def _write_shards(
    source: ShardSource, writer: BundleWriter, writing: Writing, progress: Progress
) -> None:
    """All that are not written yet; a calibrated layer while the next one is calibrated."""

    def write(index: int, entries: Sequence[Entry]) -> None:
        writer.write_shard(index, entries)
        progress.advance(_step(index), error=_mean_error(entries))

    for index in source.shards:
        made = partial(write, index, source.entries(index))
        if source.is_whole(index):
            writing.start(made)
        else:
            writing.wait()
            made()
        del made  # a layer's codes end with their writing
    writing.wait()
    progress.close()


def _write_towers(job: Job, writer: BundleWriter) -> None:
    """The last file, in the journal like the shards."""
    towers, mode = job.checkpoint.towers, job.options.towers
    job.progress.start(1, "towers")
    entries = tower_entries(job.checkpoint, mode, job.watch.contents)
    writer.write_shard(job.shards, entries, {"format": "pt"} | int8_types(towers, mode))
    job.progress.advance(describe(towers, mode))
    job.progress.close()


def _step(index: int) -> str:
    return "embedding" if index == 0 else f"layer {index - 1}"


def _mean_error(entries: Sequence[Entry]) -> float:
    """Mean relative error of a shard's quantized tensors, known once it is written."""
    errors = [entry.record("").relative_error for entry in entries if isinstance(entry, QuantEntry)]
    return fmean(error for error in errors if error is not None)


@contextmanager
def _explained_interrupt(out: Path, writer: BundleWriter, progress: Progress) -> Iterator[None]:
    """Ctrl-C, a lost network or a full disk drops the shard in work; say what is kept."""
    try:
        yield
    except (KeyboardInterrupt, HubError, DeviceError):
        progress.close()
        if writer.committed:
            progress.note(
                f"{out}.partial keeps {writer.committed} finished parts; the same command "
                "continues, --restart starts over"
            )
        raise
