"""From a checkpoint to a bundle, layer by layer, in work that can be broken off and continued."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import numba
import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError, HubError, UsageError
from uq.formats.checkpoint import Checkpoint
from uq.formats.config import GemmaConfig
from uq.formats.disk import require_free
from uq.formats.manifest import Calibration
from uq.formats.sensitive import sensitivity_note
from uq.formats.towers import stored_bytes
from uq.formats.writer import BundleWriter, Entry, QuantEntry, work_folder
from uq.kernels.session import require_known
from uq.progress import Progress, SilentProgress
from uq.quantize.background import in_background
from uq.quantize.calibrate import FOLLOWED, NumpyEngine
from uq.quantize.calibration_engine import CalibrationEngine
from uq.quantize.farm import Farm, Threads
from uq.quantize.independent import IndependentLayers
from uq.quantize.layers import CalibratedLayers, LayerSource
from uq.quantize.memory import Fitted, Load, fit
from uq.quantize.mixing import mixed_plan
from uq.quantize.options import CALIBRATE_LAYERS, DEFAULTS, QuantizeOptions
from uq.quantize.plan import Plan, WorkSizes, make_plan
from uq.quantize.record import identity_of, manifest_of, tools_of
from uq.quantize.recover import recognise
from uq.quantize.shards import ShardSource, shard_bytes
from uq.quantize.source import SourceWatch
from uq.quantize.text import Text, read_text, text_notes, token_sequences
from uq.quantize.towers import (
    carried,
    describe,
    int8_types,
    missing_processor,
    require_towers,
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

    Same checkpoint, text, options and engine, same bytes: at any number of threads, in one run or
    several, on one machine or several.

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
    config = checkpoint.config
    require_towers(checkpoint, options.towers)
    towers = options.towers != "drop" and bool(checkpoint.towers)
    watch = SourceWatch(checkpoint, towers=towers)
    plan = recognised_plan(checkpoint, options)
    _tell_kept(plan, progress)
    if engine is not None and options.independent:
        raise UsageError("--calibrate-layers independently runs on CPUs only; add --device cpu")
    spill = 0
    if engine is None:
        fitted = fitted_plan(checkpoint, plan, options)
        plan, spill = fitted.plan, fitted.spilled
    if farm is not None and options.independent:  # workers decide by the memory that they have
        spill = 0
    _tell_sizes(plan, progress)
    text = _calibration_text(plan, options)
    tools = tools_of(None if text is None else engine)
    identity = identity_of(checkpoint, text, plan, options, tools)
    shards, threads = 1 + config.num_layers, worker_threads(options)
    with (
        BundleWriter(
            out,
            shards,
            identity,
            towers=towers,
            resume=options.resume,
            sources=watch.of_shard,
        ) as writer,
        _explained_interrupt(out, writer, progress),
        ThreadPoolExecutor(threads) as pool,
    ):
        watch.require_same(writer, pool)
        first = min(writer.committed, shards)
        beside = spill + stored_bytes(checkpoint.towers, options.towers)
        require_free(out, beside + sum(shard_bytes(config, plan)[first:]))
        waiting = work_folder(out) if spill else None  # where activations do
        assets = in_background(lambda: carried(checkpoint.assets(), towers=towers))
        tokens = None if text is None else _tokens(checkpoint, text, options, progress)
        if plan.budget is not None and tokens is not None:
            plan = mixed_plan(checkpoint, plan, plan.budget, tokens, progress)
            _tell_sensitive(plan, progress)
            require_free(out, beside + sum(shard_bytes(config, plan)[first:]))
        writer.confirm("plan", {name: str(tensor) for name, tensor in plan.tensors.items()})
        progress.start(shards, "quantize", done=first)
        todo, contents = range(first, shards), watch.contents
        here = NumpyEngine(waiting) if farm is None else None
        farm = farm or Threads(checkpoint, pool, threads, progress, waiting)
        calibrated: LayerSource | None = None
        if tokens is not None and todo and options.independent:
            layers = range(max(first - 1, 0), config.num_layers)
            calibrated = IndependentLayers(farm, plan, tokens, layers, here, progress, contents)
        elif tokens is not None and todo:
            engine = engine or NumpyEngine(waiting)
            calibrated = CalibratedLayers(checkpoint, plan, tokens, engine, progress, contents)
        source = ShardSource(checkpoint, plan, calibrated, todo, farm, progress, contents)
        source.skip(writer)
        # A model without tokenizer is refused before a shard is written.
        writer.confirm("asset", {n: sha256(data).hexdigest() for n, data in assets().items()})
        if towers and (note := missing_processor(assets())):
            progress.note(note)
        _write_shards(source, writer, progress)
        if towers and writer.committed == shards:
            _write_towers(checkpoint, options.towers, writer, watch, progress)
        calibration = None
        if text is not None and tokens is not None:
            calibration = Calibration(text.name, text.sha256, tokens.size)
        files = watch.files(writer)
        manifest = manifest_of(checkpoint, plan, options, calibration, files, tools)
        return writer.finish(manifest, assets())


def _write_shards(source: ShardSource, writer: BundleWriter, progress: Progress) -> None:
    """All that are not written yet; a calibrated layer while the next one is calibrated."""

    def write(index: int, entries: Sequence[Entry]) -> None:
        writer.write_shard(index, entries)
        progress.advance(_step(index), error=_mean_error(entries))

    with ThreadPoolExecutor(1) as pool:
        under_way: Future[None] | None = None
        for index in source.shards:
            entries = source.entries(index)
            if under_way is not None:
                under_way.result()
            under_way = None
            if source.is_whole(index):
                under_way = pool.submit(write, index, entries)
            else:
                write(index, entries)
        if under_way is not None:
            under_way.result()
    progress.close()


def _write_towers(
    checkpoint: Checkpoint,
    mode: str,
    writer: BundleWriter,
    watch: SourceWatch,
    progress: Progress,
) -> None:
    """The last file, in the journal like the shards."""
    progress.start(1, "towers")
    entries = tower_entries(checkpoint, mode, watch.contents)
    metadata = {"format": "pt"} | int8_types(checkpoint.towers, mode)
    writer.write_shard(1 + checkpoint.config.num_layers, entries, metadata)
    progress.advance(describe(checkpoint.towers, mode))
    progress.close()


def plan_of(config: GemmaConfig, options: QuantizeOptions) -> Plan:
    """The recipe applied to a model, as the options ask for it.

    Raises:
        UsageError: the options do not fit the model or each other.
        DeviceError: the model has layers that calibration cannot follow.
    """
    plan = make_plan(
        config,
        options.recipe,
        group=options.group,
        bpw=options.bpw,
        method=options.method,
        targets=options.targets,
    )
    if options.calibration_tokens < 2:
        raise UsageError(f"--calibration-tokens {options.calibration_tokens}: use 2 or more")
    if plan.uses_gptq or options.calibration is not None:
        require_known(config, "calibration", "use --method rtn without --calibration", FOLLOWED)
    if options.independent:
        require_known(config, "--calibrate-layers independently", "calibrate them in order")
    _check_layers(config, plan, options)
    if options.calibration is None or plan.uses_gptq:
        return plan
    if all(tensor.spec.bits == 8 for tensor in plan.tensors.values()):
        raise UsageError(
            "--calibration: INT8 rounding uses no text; use --method gptq or fewer bits"
        )
    return replace(plan, weighted=True)


def _check_layers(config: GemmaConfig, plan: Plan, options: QuantizeOptions) -> None:
    if options.calibrate_layers not in CALIBRATE_LAYERS:
        known = " or ".join(CALIBRATE_LAYERS)
        raise UsageError(f"calibrate_layers {options.calibrate_layers!r} is not known; use {known}")
    if not options.independent:
        return
    if options.calibration is None and not plan.uses_gptq:
        raise UsageError(
            "--calibrate-layers independently: nothing is calibrated; use --method gptq or give a "
            "--calibration text"
        )


def recognised_plan(checkpoint: Checkpoint, options: QuantizeOptions) -> Plan:
    """`plan_of`, with the codes of weights that lie on their grid kept, unless GPTQ is asked for.

    Raises:
        UsageError: the options do not fit the model or each other.
        CheckpointError: a weight is not finite.
    """
    plan = plan_of(checkpoint.config, options)
    return plan if options.method == "gptq" else recognise(checkpoint, plan)


def _tell_kept(plan: Plan, progress: Progress) -> None:
    kept = sum(tensor.method == "grid" for tensor in plan.tensors.values())
    if kept:
        progress.note(f"{kept} of {len(plan.tensors)} tensors lie on their grid: codes kept")


def _tell_sensitive(plan: Plan, progress: Progress) -> None:
    """Say which tensors break the model most at 4 bits, and what is done with them."""
    for name, nats in plan.sensitive.items():
        spec = plan.tensors[name].spec if name in plan.tensors else None
        progress.note(sensitivity_note(name, nats, spec))


def fitted_plan(checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions) -> Fitted:
    """Raises UsageError: the run does not fit into `max_memory`."""
    load = Load(
        options.calibration_tokens,
        min(options.calibration_length, options.calibration_tokens),
        worker_threads(options),
        checkpoint.makes_tokenizer,
        options.independent,
    )
    return fit(checkpoint.config, plan, load, options.max_memory)


def _tell_sizes(plan: Plan, progress: Progress) -> None:
    if plan.gptq.work != WorkSizes():
        progress.note(f"--max-memory: {plan.gptq.work}")


def _calibration_text(plan: Plan, options: QuantizeOptions) -> Text | None:
    return read_text(options.calibration) if plan.calibrated else None


def _tokens(
    checkpoint: Checkpoint, text: Text, options: QuantizeOptions, progress: Progress
) -> NDArray[np.int32]:
    length = min(options.calibration_length, options.calibration_tokens)
    sequences = options.calibration_tokens // length
    tokenizer = checkpoint.tokenizer()
    tokens = token_sequences(
        tokenizer,
        text,
        sequences=sequences,
        length=length,
        seed=options.calibration_seed,
        render=options.render,
    )
    if options.render is not None:
        progress.note("calibration: chats, by the model's own template")
    for note in text_notes(tokenizer, text, tokens, sequences):
        progress.note(f"calibration: {note}")
    return tokens


def worker_threads(options: QuantizeOptions) -> int:
    threads = options.threads or len(os.sched_getaffinity(0))
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return threads


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
