"""What a validation measured, as its report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray

from uq import __version__
from uq.formats.sensitive import sensitivities
from uq.validate.environment import environment
from uq.validate.report import (
    SCHEMA,
    BundleFacts,
    Curve,
    LayerError,
    Loss,
    Memory,
    ReferenceFacts,
    Report,
    Series,
    Speed,
    TextFacts,
    Threshold,
)
from uq.validate.scoring import Scores
from uq.validate.text import EvaluationText, text_warnings
from uq.validate.weights import kind_sizes

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.formats.checkpoint import Checkpoint
    from uq.kernels.session import Device
    from uq.validate.validate import ValidateOptions

CURVE_POINTS = 240
NO_CLOCK = "the emulator has no clock, so no speed of the bundle is measured"


@dataclass(frozen=True)
class Measured:
    """What a validation found out.

    Attributes:
        losses: of integers beside the weights, each by itself.
    """

    device: Device
    reference_device: Device
    scores: Scores
    losses: tuple[Loss, ...]
    errors: tuple[LayerError, ...]
    memory: Memory
    speed: Speed | None
    reference_speed: Speed | None


def make_report(
    bundle: Bundle,
    checkpoint: Checkpoint,
    text: EvaluationText,
    tokens: NDArray[np.int32],
    options: ValidateOptions,
    measured: Measured,
    warnings: Sequence[str],
) -> Report:
    scores, speed = measured.scores, measured.speed
    return Report(
        schema=SCHEMA,
        uq=__version__,
        bundle=_bundle_facts(bundle),
        reference=_reference_facts(checkpoint),
        text=_text_facts(text, options, tokens, scores),
        device=measured.device,
        perplexity=scores.perplexity,
        reference_perplexity=scores.reference_perplexity,
        perplexity_ratio=scores.perplexity_ratio,
        kld=scores.kld_facts,
        same_top_percent=scores.same_top_percent.value,
        rms_delta_p_percent=scores.rms_delta_p_percent,
        speed=speed,
        reference_speed=measured.reference_speed,
        memory=measured.memory,
        layers=measured.errors,
        thresholds=thresholds(options, scores.kld_facts.mean, scores.perplexity_ratio.value, speed),
        losses=measured.losses,
        reference_device=measured.reference_device,
        sizes=kind_sizes(bundle.manifest, checkpoint),
        series=_series(scores, len(tokens)),
        environment=environment(options.command, numba.get_num_threads()),
        warnings=(*warnings, *_warnings(measured)),
        notes=tuple(sensitivities(bundle.manifest)),
    )


def _warnings(measured: Measured) -> tuple[str, ...]:
    return (
        *text_warnings(measured.scores.reference_perplexity.value),
        *fallbacks(measured.errors),
        *([] if measured.device.has_clock else [NO_CLOCK]),
    )


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
