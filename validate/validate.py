"""Compare a bundle with the float32 model that it was made from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray

from uq import __version__
from uq.errors import UsageError
from uq.formats.chat import Render
from uq.formats.sensitive import sensitivities
from uq.kernels.backends import device_numerics, open_reference, open_session
from uq.kernels.numerics import ACTIVATIONS, KV, Numerics
from uq.progress import Progress, SilentProgress
from uq.validate.bandwidth import Ceiling
from uq.validate.environment import environment, peak_memory
from uq.validate.losses import losses
from uq.validate.origin import find_reference
from uq.validate.report import (
    SCHEMA,
    BundleFacts,
    Curve,
    LayerError,
    Memory,
    ReferenceFacts,
    Report,
    Series,
    Speed,
    TextFacts,
    Threshold,
)
from uq.validate.scoring import (
    ReferenceStates,
    Scores,
    final_states,
    is_streamed,
    score,
    states_key,
)
from uq.validate.speed import Rates, measure_speed
from uq.validate.text import EvaluationText, read_text, text_warnings, windows
from uq.validate.weights import kind_sizes, weight_errors

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.formats.checkpoint import Checkpoint
    from uq.kernels.session import Device, Session

CURVE_POINTS = 240
NO_CLOCK = "the emulator has no clock, so no speed of the bundle is measured"
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
        if self.states is not None and not self.states.parent.is_dir():
            raise UsageError(f"--reference-states {self.states}: there is no such folder; make it")

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
    checkpoint, warnings = find_reference(bundle.manifest, reference, keep=options.keep)
    text = read_text(options.text)
    tokens = windows(bundle.tokenizer(), text, options.context, options.max_chunks, options.render)

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
    return Report(
        schema=SCHEMA,
        uq=__version__,
        bundle=_bundle_facts(bundle),
        reference=_reference_facts(checkpoint),
        text=_text_facts(text, options, tokens, scores),
        device=session.device,
        perplexity=scores.perplexity,
        reference_perplexity=scores.reference_perplexity,
        perplexity_ratio=scores.perplexity_ratio,
        kld=scores.kld_facts,
        same_top_percent=scores.same_top_percent.value,
        rms_delta_p_percent=scores.rms_delta_p_percent,
        speed=speed,
        reference_speed=reference_speed,
        memory=memory,
        layers=errors,
        thresholds=thresholds(options, scores.kld_facts.mean, scores.perplexity_ratio.value, speed),
        losses=parts,
        reference_device=truth.device,
        sizes=kind_sizes(bundle.manifest, checkpoint),
        series=_series(scores, len(tokens)),
        environment=environment(options.command, numba.get_num_threads()),
        warnings=(
            *warnings,
            *text_warnings(scores.reference_perplexity.value),
            *fallbacks(errors),
            *([] if session.device.has_clock else [NO_CLOCK]),
        ),
        notes=tuple(sensitivities(bundle.manifest)),
    )


def _check_clock(session: Session, options: ValidateOptions) -> None:
    if options.min_tps is not None and not session.device.has_clock:
        raise UsageError(f"--min-tps: {NO_CLOCK}; use another device")


def fallbacks(errors: tuple[LayerError, ...]) -> list[str]:
    """One line for each reason why tensors were not quantized as planned."""
    names: dict[str, list[str]] = {}
    for error in errors:
        if error.fallback is not None:
            names.setdefault(error.fallback, []).append(error.name)
    return [
        f"{tensors[0]}{f' and {len(tensors) - 1} more' if len(tensors) > 1 else ''}: {reason}"
        for reason, tensors in names.items()
    ]


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
    key = states_key(checkpoint.fingerprint(), tokens, truth.device.backend)
    stored = ReferenceStates.load(path, key)
    if stored is None:
        stored = ReferenceStates(key, final_states(truth, tokens, progress, "reference"))
        stored.save(path)
    return stored.hidden


def _bundle_facts(bundle: Bundle) -> BundleFacts:
    return BundleFacts(
        name=bundle.name,
        sha256=bundle.sha256,
        bits_per_weight=bundle.bits_per_weight,
        bytes=bundle.nbytes,
        recipe=bundle.manifest.recipe,
    )


def _reference_facts(checkpoint: Checkpoint) -> ReferenceFacts:
    source = checkpoint.source
    return ReferenceFacts(source.id, source.revision, checkpoint.dtype)


def _text_facts(
    text: EvaluationText, options: ValidateOptions, tokens: NDArray[np.int32], scores: Scores
) -> TextFacts:
    return TextFacts(
        name=text.name,
        sha256=hashlib.sha256(text.content.encode()).hexdigest(),
        chunks=len(tokens),
        tokens_scored=scores.kld.size,
        context=options.context,
        format="plain" if options.render is None else "chat",
    )


def _rates(
    session: Session, options: ValidateOptions, repeats: int, label: str, progress: Progress
) -> Rates | None:
    """Speeds of a session whose weights are in memory; from a disk they would be the disk's."""
    if not options.speed or is_streamed(session) or not session.device.has_clock:
        return None
    progress.start(1, f"speed of the {label}")
    progress.work(f"{options.prompt} tokens of prefill, {options.generate} of decoding")
    rates = measure_speed(
        session, prompt=options.prompt, generate=options.generate, repeats=repeats
    )
    progress.advance(label, prefill=rates.prefill_tps.median, decode=rates.decode_tps.median)
    progress.close()
    return rates


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


def thresholds(
    options: ValidateOptions, kld: float, ratio: float, speed: Speed | None
) -> tuple[Threshold, ...]:
    """One entry for each limit that was given. A value equal to its limit passes."""
    limits = []
    if options.max_kld is not None:
        limits.append(Threshold("max_kld", options.max_kld, kld, kld <= options.max_kld))
    if options.max_ppl_ratio is not None:
        limit = options.max_ppl_ratio
        limits.append(Threshold("max_ppl_ratio", limit, ratio, ratio <= limit))
    if options.min_tps is not None and speed is not None:
        tps = speed.decode_tps.median
        limits.append(Threshold("min_tps", options.min_tps, tps, tps >= options.min_tps))
    return tuple(limits)


def _series(scores: Scores, count: int) -> Series:
    return Series(
        perplexity=tuple(np.exp(scores.nll.reshape(count, -1).mean(1)).tolist()),
        reference_perplexity=tuple(
            np.exp(scores.nll_reference.reshape(count, -1).mean(1)).tolist()
        ),
        kld_survival=survival(scores.kld),
    )


def survival(values: NDArray[np.floating]) -> Curve:
    """Share of values that are at least x, at ranks spread evenly on a logarithmic axis.

    The largest values stand for one token each, so the tail is drawn token by token.
    """
    ascending = np.sort(values, axis=None)
    count = ascending.size
    ranks = np.unique(np.geomspace(1, count, CURVE_POINTS).round().astype(int))[::-1]
    return Curve(tuple(ascending[count - ranks].tolist()), tuple((ranks / count).tolist()))
