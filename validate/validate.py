"""Compare a bundle with the float32 model that it was made from."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uq.blas import blas_threads
from uq.errors import DeviceError, UsageError
from uq.formats.chat import Render
from uq.kernels.backends import device_numerics, open_reference, open_session
from uq.kernels.numerics import ACTIVATIONS, KV, Numerics
from uq.kernels.session import require_context
from uq.progress import Progress, SilentProgress
from uq.text import size
from uq.validate.assembly import NO_CLOCK, Measured, make_report
from uq.validate.bandwidth import Ceiling
from uq.validate.environment import peak_memory
from uq.validate.losses import losses
from uq.validate.origin import find_reference
from uq.validate.report import (
    LayerError,
    Memory,
    Report,
    Speed,
)
from uq.validate.scoring import (
    ReferenceStates,
    final_states,
    is_streamed,
    score,
    states_key,
)
from uq.validate.speed import Rates, measure_speed
from uq.validate.text import read_text, windows
from uq.validate.weights import weight_errors

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.formats.checkpoint import Checkpoint
    from uq.kernels.session import Device, Session

SLACK = 1 << 30  # bytes of the disk that fetched weights leave free
REFERENCE_REPEATS = 2  # float32 decodes slowly and evenly


@dataclass(frozen=True)
class ValidateOptions:
    """How to validate; every field is an option of `uq validate`.

    Attributes:
        keep: download the weights of the bundle's own checkpoint; else its layers are fetched from
            the Hub as they are read, twice.
        text: as in `read_text`.
        render: the model's chat template, for a model that was trained on chats.
        context: tokens of a chunk, the BOS in front of each included; its second half is scored.
        max_chunks: None scores all of the text.
        states: .npz file that keeps the reference's hidden states for the next bundle of the same
            model and text; read if it is of these, else written.
        speed: whether tokens per second are measured, of `generate` tokens behind `prompt`.
        activations, kv: names in `uq.kernels.numerics.ACTIVATIONS` and `KV`; with another than
            `float` their losses are told apart from the weights', emulated on the reference; a GPU
            that `device` names runs with those that its kernels have.
        max_kld, max_ppl_ratio, min_tps: limits; None is no limit. They judge the device's run.
        command: the arguments that the user gave, for the report.
    """

    device: str = "auto"
    reference_device: str = "auto"
    threads: int | None = None
    keep: bool = False
    text: Path | None = None
    render: Render | None = None
    context: int = 512
    max_chunks: int | None = 40
    states: Path | None = None
    activations: str = "float"
    kv: str = "float"
    speed: bool = True
    prompt: int = 512
    generate: int = 64
    repeats: int = 5
    max_kld: float | None = None
    max_ppl_ratio: float | None = None
    min_tps: float | None = None
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_tps is not None and not self.speed:
            raise UsageError("--min-tps needs a speed; leave --no-speed out")
        if self.text is not None:
            object.__setattr__(self, "text", Path(self.text))
        if self.activations not in ACTIVATIONS or self.kv not in KV:
            raise UsageError(
                f"activations {self.activations!r}, kv {self.kv!r}; use one of "
                f"{', '.join(ACTIVATIONS)} and one of {', '.join(KV)}"
            )
        for name in ("max_kld", "max_ppl_ratio", "min_tps"):
            if not isfinite(getattr(self, name) or 0.0):
                raise UsageError(f"{name} is no number")
        if self.states is not None:
            ReferenceStates.require_place(self.states)

    @property
    def cache_length(self) -> int:
        """Tokens that the KV cache of a session must hold."""
        return max(self.context, self.prompt + self.generate)


def validate(
    bundle: Bundle,
    reference: Checkpoint | None = None,
    options: ValidateOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """Score a text with the bundle and the reference, measure speeds, compare the weights.

    The bundle runs first and alone, so that its peak memory is told apart; the bandwidth comes
    last, because its buffer would count as memory of the model.

    Args:
        reference: None opens the checkpoint that the bundle was made from.

    Raises:
        CheckpointError: the reference cannot be opened or is another model.
        DeviceError: the device is not available.
        UsageError: the text cannot be read or is too short, or the shapes of the model do not fit
            the numerics.
    """
    options = options or ValidateOptions()
    progress = progress or SilentProgress()
    numerics = Numerics(ACTIVATIONS[options.activations], KV[options.kv])
    numerics.check(bundle.config)
    require_context("--context", options.context, bundle.config)
    if options.speed:
        require_context("--prompt and --generate", options.prompt + options.generate, bundle.config)
    checkpoint, warnings = find_reference(bundle.manifest, reference, keep=options.keep)
    _keep_fetched(checkpoint, bundle, progress)
    text = read_text(options.text)
    tokens = windows(bundle.tokenizer(), text, options.context, options.max_chunks, options.render)
    with blas_threads(options.threads):
        measured = _measure(bundle, checkpoint, tokens, numerics, options, progress)
    return make_report(bundle, checkpoint, text, tokens, options, measured, warnings)


def _keep_fetched(checkpoint: Checkpoint, bundle: Bundle, progress: Progress) -> None:
    """Weights that are fetched to run the reference are read again to compare the bundle's."""
    with suppress(DeviceError):  # a bundle in a folder that cannot be written
        if kept := checkpoint.keep_fetched(bundle.path, beside=SLACK):
            progress.note(f"reference: {size(kept)} of it wait on the disk, to be read again")


def _measure(
    bundle: Bundle,
    checkpoint: Checkpoint,
    tokens: NDArray[np.int32],
    numerics: Numerics,
    options: ValidateOptions,
    progress: Progress,
) -> Measured:
    """The bundle first and alone, the bandwidth last."""
    session = open_session(
        bundle,
        options.device,
        max_context=options.cache_length,
        threads=options.threads,
        numerics=device_numerics(options.device, numerics),
    )
    _check_clock(session, options)
    rates = _rates(session, options, options.repeats, "bundle", progress)
    alone = peak_memory()
    truth = open_reference(checkpoint, options.reference_device, max_context=options.cache_length)
    states = _reference_states(truth, checkpoint, tokens, options.states, progress)
    scores = score(session, truth, tokens, progress, reference_states=states)
    parts = losses(bundle, truth, states, tokens, options.activations, options.kv, progress)
    truth_rates = _rates(truth, options, REFERENCE_REPEATS, "reference", progress)
    errors = _errors(bundle, checkpoint, progress)
    memory = Memory(peak_memory(), alone)
    speed, reference_speed = _beside_ceilings((session, rates), (truth, truth_rates))
    return Measured(
        session.device, truth.device, scores, parts, errors, memory, speed, reference_speed
    )


def _check_clock(session: Session, options: ValidateOptions) -> None:
    if options.min_tps is not None and not session.device.has_clock:
        raise UsageError(f"--min-tps: {NO_CLOCK}; use another device")


def _reference_states(
    truth: Session,
    checkpoint: Checkpoint,
    tokens: NDArray[np.int32],
    path: Path | None,
    progress: Progress,
) -> NDArray[np.float32]:
    """Final hidden states of the reference, from `path` where an earlier run left them."""
    if path is None:
        return final_states(truth, tokens, progress, "reference")
    key = states_key(checkpoint.fingerprint(), checkpoint.config, tokens, truth.device.backend)
    stored = ReferenceStates.load(path, key)
    if stored is None:
        stored = ReferenceStates(key, final_states(truth, tokens, progress, "reference"))
        stored.save(path)
    return stored.hidden


def _rates(
    session: Session, options: ValidateOptions, repeats: int, label: str, progress: Progress
) -> Rates | None:
    """Speeds of a session whose weights are in memory; from a disk they would be the disk's."""
    if not options.speed or is_streamed(session) or not session.device.has_clock:
        return None
    return measure_speed(
        session,
        prompt=options.prompt,
        generate=options.generate,
        repeats=repeats,
        progress=progress,
        label=f"speed of the {label}",
    )


def _errors(bundle: Bundle, checkpoint: Checkpoint, progress: Progress) -> tuple[LayerError, ...]:
    progress.start(checkpoint.config.num_layers, "weight errors")
    errors = weight_errors(bundle, checkpoint, lambda layer: progress.advance(f"layer {layer}"))
    progress.close()
    return errors


def _beside_ceilings(*measured: tuple[Session, Rates | None]) -> list[Speed | None]:
    """The rates of sessions beside the bandwidth of the memory that each reads, measured now."""
    ceilings: dict[Device | None, Ceiling] = {}
    speeds: list[Speed | None] = []
    for session, rates in measured:
        if rates is None:
            speeds.append(None)
            continue
        memory = session.device if session.probe else None  # None: this machine's
        if memory not in ceilings:
            ceilings[memory] = Ceiling.of(session)
        speeds.append(rates.beside(ceilings[memory]))
    return speeds
