"""A run as it was asked for: plan, memory and text, decided before anything is written."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.checkpoint import Checkpoint
from uq.formats.config import GemmaConfig
from uq.formats.disk import require_free
from uq.formats.manifest import Calibration, Manifest
from uq.formats.sensitive import sensitivity_note
from uq.formats.towers import stored_bytes
from uq.formats.writer import BundleWriter, work_folder
from uq.kernels.session import require_known
from uq.progress import Progress
from uq.quantize.backward import FOLLOWED as GRADIENTS
from uq.quantize.calibrate import FOLLOWED
from uq.quantize.calibration_engine import CalibrationEngine
from uq.quantize.curvature import curvature_bytes
from uq.quantize.farm import Farm
from uq.quantize.memory import Fitted, Load, fit
from uq.quantize.mixing import mixed_plan
from uq.quantize.options import CALIBRATE_LAYERS, QuantizeOptions
from uq.quantize.plan import CURVATURE_DAMPING, RECIPES, Plan, WorkSizes, make_plan
from uq.quantize.record import identity_of, manifest_of, tools_of
from uq.quantize.recover import recognise
from uq.quantize.shards import shard_bytes
from uq.quantize.source import SourceWatch
from uq.quantize.text import Text, read_text, text_notes, token_sequences
from uq.quantize.towers import require_towers
from uq.text import size


@dataclass(frozen=True)
class Job:
    """What a run makes, and of what.

    Attributes:
        plan: a grid for each tensor; those of mixed recipes change once they are measured.
        text: what calibrates; None where nothing does.
        spill: bytes of activations that wait on the disk.
        tools: what the bytes depend on besides.
    """

    checkpoint: Checkpoint
    options: QuantizeOptions
    progress: Progress
    watch: SourceWatch
    plan: Plan
    text: Text | None
    spill: int
    tools: dict[str, str]

    @property
    def shards(self) -> int:
        """Without that of the towers."""
        return 1 + self.checkpoint.config.num_layers

    @property
    def towers(self) -> bool:
        """Whether the bundle carries any."""
        return _carries_towers(self.checkpoint, self.options)

    def done(self, writer: BundleWriter) -> int:
        """Shards that earlier runs have finished."""
        return min(writer.committed, self.shards)

    def writer(self, out: Path) -> BundleWriter:
        """Raises UsageError, DeviceError: as `BundleWriter`."""
        identity = identity_of(self.checkpoint, self.text, self.plan, self.options, self.tools)
        return BundleWriter(
            out,
            self.shards,
            identity,
            towers=self.towers,
            resume=self.options.resume,
            sources=self.watch.of_shard,
        )

    def require_room(self, out: Path, writer: BundleWriter) -> None:
        """Raises DeviceError: the disk is too full for what is left to do."""
        bent = curvature_on_disk(self.checkpoint.config, self.plan, self.options)
        remedy = f"use --no-curvature, which needs {bent:,} less" if bent else ""
        require_free(out, self._room(writer), remedy)

    def _room(self, writer: BundleWriter) -> int:
        """Bytes of the disk that what is left to do takes."""
        left = shard_bytes(self.checkpoint.config, self.plan)[self.done(writer) :]
        towers = stored_bytes(self.checkpoint.towers, self.options.towers)
        bent = curvature_on_disk(self.checkpoint.config, self.plan, self.options)
        return self.spill + bent + towers + sum(left)

    def keep_fetched(self, out: Path, writer: BundleWriter) -> None:
        """Let weights that are fetched for one pass over the layers wait for the next."""
        wanted = fetched_on_disk(self.checkpoint, self.plan, self.options)
        if not wanted or self.done(writer) == self.shards:
            return
        kept = self.checkpoint.keep_fetched(work_folder(out), self._room(writer))
        how = "once" if kept == wanted else "for each pass over the layers but for what is kept"
        note = f"weights: fetched {how}; {size(kept)} wait on the disk meanwhile"
        if kept < wanted:
            note += (
                f"; with {size(wanted - kept)} more room there, or --keep, they are fetched once"
            )
        self.progress.note(note)

    def tokens(self) -> NDArray[np.int32] | None:
        """(sequences, length) of the calibration; None without a text.

        Raises:
            UsageError: the text is too short.
            CheckpointError: there is no tokenizer.
        """
        if self.text is None:
            return None
        options, progress = self.options, self.progress
        length = min(options.calibration_length, options.calibration_tokens)
        sequences = options.calibration_tokens // length
        tokenizer = self.checkpoint.tokenizer()
        tokens = token_sequences(
            tokenizer,
            self.text,
            sequences=sequences,
            length=length,
            seed=options.calibration_seed,
            render=options.render,
        )
        if options.render is not None:
            progress.note("calibration: chats, by the model's own template")
        for note in text_notes(tokenizer, self.text, tokens, sequences):
            progress.note(f"calibration: {note}")
        return tokens

    def with_measured_grids(self, tokens: NDArray[np.int32]) -> Job:
        """With a grid for each tensor by what it costs, within the plan's budget."""
        plan, progress, in_order = self.plan, self.progress, not self.options.independent
        assert plan.budget is not None
        plan = mixed_plan(self.checkpoint, plan, plan.budget, tokens, progress, in_order=in_order)
        _tell_sensitive(plan, progress)
        return replace(self, plan=plan)

    def manifest(self, writer: BundleWriter, tokens: NDArray[np.int32] | None) -> Manifest:
        """Of the bundle, once all its shards are committed."""
        calibration = None
        if self.text is not None and tokens is not None:
            calibration = Calibration(self.text.name, self.text.sha256, tokens.size)
        files = self.watch.files(writer)
        return manifest_of(self.checkpoint, self.plan, self.options, calibration, files, self.tools)


def prepared(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    progress: Progress,
    engine: CalibrationEngine | None,
    farm: Farm | None,
) -> Job:
    """Decide how it is done and say what a user would not expect.

    Args:
        engine, farm: as of `quantize`.

    Raises:
        UsageError: the options do not fit the model or each other, or the machine's memory.
        CheckpointError: a weight is not finite.
        HubError: the calibration text cannot be downloaded.
    """
    require_towers(checkpoint, options.towers)
    watch = SourceWatch(checkpoint, towers=_carries_towers(checkpoint, options))
    plan = recognised_plan(checkpoint, options)
    _tell_kept(plan, progress)
    if engine is not None and options.independent:
        raise UsageError("--calibrate-layers independently runs on CPUs only; add --device cpu")
    if engine is not None and options.curvature:
        raise UsageError("--curvature is measured on the CPU only; add --device cpu")
    spill = 0
    if engine is not None:
        plan = without_curvature(plan)
    else:
        fitted = fitted_plan(checkpoint, plan, options)
        plan, spill = fitted.plan, fitted.spilled
    if missed := _missed(checkpoint.config, plan, options, engine):
        progress.note(f"without --curvature, which {missed}")
    if farm is not None and options.independent:  # workers decide by the memory that they have
        spill = 0
    _tell_sizes(plan, progress)
    text = read_text(options.calibration) if plan.calibrated else None
    tools = tools_of(None if text is None else engine)
    return Job(checkpoint, options, progress, watch, plan, text, spill, tools)


def _carries_towers(checkpoint: Checkpoint, options: QuantizeOptions) -> bool:
    return options.towers != "drop" and bool(checkpoint.towers)


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
    _check_layers(plan, options)
    plan = _with_curvature(config, plan, options)
    if options.calibration is None or plan.uses_gptq:
        return plan
    if all(tensor.spec.bits == 8 for tensor in plan.tensors.values()):
        raise UsageError(
            "--calibration: INT8 rounding uses no text; use --method gptq or fewer bits"
        )
    return replace(plan, weighted=True)


def _check_layers(plan: Plan, options: QuantizeOptions) -> None:
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


def _with_curvature(config: GemmaConfig, plan: Plan, options: QuantizeOptions) -> Plan:
    """Rows are rounded together where the user wants it, else where recipe and model allow it."""
    obstacle = _obstacle(config, plan, options)
    if options.curvature and obstacle:
        raise UsageError(f"--curvature {obstacle}; leave it out")
    if options.curvature:
        return replace(plan, gptq=replace(plan.gptq, outputs=CURVATURE_DAMPING))
    return plan if options.curvature is None and not obstacle else without_curvature(plan)


def _obstacle(config: GemmaConfig, plan: Plan, options: QuantizeOptions) -> str | None:
    """Why rows cannot be rounded together."""
    if not plan.uses_gptq:
        return "is for --method gptq"
    if options.independent:
        return "needs layers calibrated in order"
    if unknown := [part for part in config.extensions() if part not in GRADIENTS]:
        return f"does not compute {unknown[0]} ({config.family})"
    return None


def _missed(
    config: GemmaConfig, plan: Plan, options: QuantizeOptions, engine: CalibrationEngine | None
) -> str | None:
    """Why a recipe that rounds rows together where it can does not do so."""
    wanted = options.curvature is None and RECIPES[options.recipe].gptq.outputs is not None
    if plan.bends or not plan.uses_gptq or not wanted:
        return None
    elsewhere = None if engine is None else "is measured on the CPU only"
    return _obstacle(config, plan, options) or elsewhere or "does not fit into --max-memory"


def without_curvature(plan: Plan) -> Plan:
    """Each row is rounded for itself."""
    return replace(plan, gptq=replace(plan.gptq, outputs=None))


def recognised_plan(checkpoint: Checkpoint, options: QuantizeOptions) -> Plan:
    """`plan_of`, with the codes of weights that lie on their grid kept, unless GPTQ is asked for.

    Raises:
        UsageError: the options do not fit the model or each other.
        CheckpointError: a weight is not finite.
    """
    plan = plan_of(checkpoint.config, options)
    return plan if options.method == "gptq" else recognise(checkpoint, plan)


def fitted_plan(checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions) -> Fitted:
    """Without the curvature, unless it is asked for, where `max_memory` is too small for it.

    Raises:
        UsageError: the run does not fit into `max_memory`.
    """
    load = Load(
        options.calibration_tokens,
        min(options.calibration_length, options.calibration_tokens),
        worker_threads(options),
        checkpoint.makes_tokenizer,
        options.independent,
    )
    if plan.bends and not options.curvature:
        with suppress(UsageError):
            return fit(checkpoint.config, plan, load, options.max_memory)
        plan = without_curvature(plan)
    return fit(checkpoint.config, plan, load, options.max_memory)


def curvature_on_disk(config: GemmaConfig, plan: Plan, options: QuantizeOptions) -> int:
    """Bytes that wait while the run lasts."""
    numbers = plan.gptq.work.row_numbers
    return curvature_bytes(config, options.calibration_tokens, numbers) if plan.bends else 0


def fetched_on_disk(checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions) -> int:
    """Bytes of fetched weights that wait while the run lasts: where layers are read repeatedly."""
    again = plan.budget is not None or plan.bends or options.independent
    return checkpoint.stored_bytes if checkpoint.streamed and again else 0


def worker_threads(options: QuantizeOptions) -> int:
    threads = options.threads or len(os.sched_getaffinity(0))
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return threads


def _tell_kept(plan: Plan, progress: Progress) -> None:
    kept = sum(tensor.method == "grid" for tensor in plan.tensors.values())
    if kept:
        progress.note(f"{kept} of {len(plan.tensors)} tensors lie on their grid: codes kept")


def _tell_sensitive(plan: Plan, progress: Progress) -> None:
    """Say which tensors break the model most at 4 bits, and what is done with them."""
    for name, nats in plan.sensitive.items():
        spec = plan.tensors[name].spec if name in plan.tensors else None
        progress.note(sensitivity_note(name, nats, spec))


def _tell_sizes(plan: Plan, progress: Progress) -> None:
    if plan.gptq.work != WorkSizes():
        progress.note(f"--max-memory: {plan.gptq.work}")
