"""Recipes tried one after the other, or on several machines: what each takes, and what it loses.

A recipe is tried as a user would: the checkpoint is quantized and the bundle compared with it. The
bundle is thrown away; its costs of grids stay in the cache for the one that is chosen.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any

from uq import __version__
from uq.commands.validate import described
from uq.errors import BundleError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import Checkpoint
from uq.formats.decode import decode, parse_json
from uq.formats.disk import replace_file
from uq.instruct import chat_render
from uq.progress import Progress, SilentProgress
from uq.quantize.farm import Farm
from uq.quantize.job import plan_of
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.text import duration, size, table
from uq.validate.validate import ValidateOptions, validate

HEAD = ("recipe", "bits/weight", "size", "KL divergence", "same top", "PPL ratio", "quantizing", "")
BEST = "<- nothing smaller is as close"


@dataclass(frozen=True)
class Trial:
    """One recipe to try, and how it is judged.

    Attributes:
        name: as the user wrote it.
        options: without `render`.
        calibration_format, text_format: as in `chat_render`.
        text, context, chunks: as in `ValidateOptions`.
    """

    name: str
    options: QuantizeOptions
    calibration_format: str = "auto"
    text_format: str = "auto"
    text: Path | None = None
    context: int = 512
    chunks: int | None = 40

    def __str__(self) -> str:
        return self.name

    def key(self, checkpoint: Checkpoint) -> str:
        """sha256 of what the figures follow from."""
        files = {name: [f.size, f.version] for name, f in checkpoint.files().items()}
        found = checkpoint.assets().items()
        assets = {name: hashlib.sha256(data).hexdigest() for name, data in found}
        texts = [_content(text) for text in (self.options.calibration, self.text)]
        model = [checkpoint.source.revision, files, checkpoint.config.to_json(), assets]
        facts = [__version__, model, texts, asdict(self)]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        kld, kld_stderr: mean KL divergence from the reference, nats per token.
        same_top_percent: tokens for which both models find the same most likely.
        seconds: of quantizing, on the machine that did it.
    """

    name: str
    bits_per_weight: float
    bytes: int
    kld: float
    kld_stderr: float
    same_top_percent: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    seconds: float


def sweep(
    checkpoint: Checkpoint,
    trials: Sequence[Trial],
    progress: Progress,
    *,
    farm: Farm | None = None,
    kept: Path | None = None,
) -> list[Outcome]:
    """Outcomes in the order of the trials.

    Args:
        farm: tries them; None for this process, one by one.
        kept: JSON file of outcomes; those of the same trial are taken from it, and every new one is
            added at once.

    Raises:
        UsageError: a trial does not fit the model.
        BundleError: `kept` is something else.
    """
    for trial in trials:
        plan_of(checkpoint.config, trial.options)
    keys = [trial.key(checkpoint) for trial in trials]
    known = _load(kept)
    missing = [trial for trial, key in zip(trials, keys, strict=True) if key not in known]
    progress.start(len(trials), "sweep", done=len(trials) - len(missing))
    for trial, outcome in zip(missing, _outcomes(checkpoint, missing, progress, farm), strict=True):
        known[trial.key(checkpoint)] = outcome
        if kept is not None:
            _save(kept, known)
        progress.advance(trial.name, bits=outcome.bits_per_weight, kld=outcome.kld)
    progress.close()
    return [known[key] for key in keys]


def _outcomes(
    checkpoint: Checkpoint, trials: Sequence[Trial], progress: Progress, farm: Farm | None
) -> Iterator[Outcome]:
    if farm is not None:
        return farm.map(evaluate, trials, ahead=len(trials), together=1)
    return (evaluate(checkpoint, trial, progress) for trial in trials)


def evaluate(checkpoint: Checkpoint, trial: Trial, progress: Progress) -> Outcome:
    """Quantize and compare, in a temporary folder (`TMPDIR` says where)."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="uq-sweep-") as folder:
        progress = Within(trial.name, progress, folder)
        assets, name = checkpoint.assets(), checkpoint.source.id
        calibrated = plan_of(checkpoint.config, trial.options).calibrated
        form = trial.calibration_format if calibrated else "plain"
        with chat_render(form, name, assets, checkpoint.tokenizer) as render:
            options = replace(trial.options, render=render)
            bundle = open_bundle(quantize(checkpoint, Path(folder) / "b", options, progress))
        seconds = time.perf_counter() - began
        judged = ValidateOptions(
            device="cpu",
            threads=options.threads,
            text=trial.text,
            context=trial.context,
            max_chunks=trial.chunks,
            states=_states(),
            speed=False,
        )
        with chat_render(trial.text_format, *described(bundle)) as render:
            report = validate(bundle, checkpoint, replace(judged, render=render), progress)
    return Outcome(
        name=trial.name,
        bits_per_weight=report.bundle.bits_per_weight,
        bytes=report.bundle.bytes,
        kld=report.kld.mean,
        kld_stderr=report.kld.stderr,
        same_top_percent=report.same_top_percent,
        ppl_ratio=report.perplexity_ratio.value,
        ppl_ratio_stderr=report.perplexity_ratio.stderr,
        seconds=seconds,
    )


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """By size; marked are those that no smaller one comes closer than."""
    ordered = sorted(outcomes, key=lambda outcome: (outcome.bytes, outcome.kld))
    return table([_row(outcome, ordered) for outcome in ordered], head=HEAD)


def is_best(outcome: Outcome, outcomes: Sequence[Outcome]) -> bool:
    """Whether no other one is as small and as close, and better in one of the two."""
    here = (outcome.bytes, outcome.kld)
    return not any(
        other.bytes <= outcome.bytes
        and other.kld <= outcome.kld
        and (other.bytes, other.kld) != here
        for other in outcomes
    )


class Within(SilentProgress):
    """Of the steps inside a trial the bar shows the name alone; notes come through, but for what is
    kept in its folder: that goes with the trial.
    """

    def __init__(self, trial: str, outer: Progress, folder: str) -> None:
        self._trial, self._outer, self._folder = trial, outer, folder

    def advance(self, step: str, **figures: float) -> None:
        self._outer.work(f"{self._trial}: {step}")

    def note(self, text: str) -> None:
        if self._folder not in text:
            self._outer.note(f"{self._trial}: {text}")


def _content(text: str | Path | None) -> str | None:
    """sha256 of a text of the user's; a dataset of the Hub is known by its name."""
    if text is None or not Path(text).is_file():
        return None
    return hashlib.sha256(Path(text).read_bytes()).hexdigest()


def _row(outcome: Outcome, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    return (
        outcome.name,
        f"{outcome.bits_per_weight:.3f}",
        size(outcome.bytes),
        f"{outcome.kld:.5f} ± {outcome.kld_stderr:.5f}",
        f"{outcome.same_top_percent:.2f} %",
        f"{outcome.ppl_ratio:.4f} ± {outcome.ppl_ratio_stderr:.4f}",
        duration(outcome.seconds),
        BEST if is_best(outcome, outcomes) else "",
    )


def _states() -> Path:
    """Where this thread keeps the reference's hidden states from one trial to the next."""
    return Path(_folder().name) / f"{get_ident()}.npz"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="uq-reference-")


def _load(path: Path | None) -> dict[str, Outcome]:
    if path is None or not path.exists():
        return {}
    found: Any = parse_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise BundleError(f"{path}: is no file of uq sweep; choose another -o")
    return {key: decode(Outcome, value, str(path)) for key, value in found.items()}


def _save(path: Path, known: dict[str, Outcome]) -> None:
    data = {key: asdict(outcome) for key, outcome in known.items()}
    replace_file(path, json.dumps(data, indent=1).encode())
