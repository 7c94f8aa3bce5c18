"""One protocol for every row: dequantized weights, float32, the reference beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.engine import Engine
from benchmarks.quality.models import Model
from benchmarks.quality.results import Figure, TextScores
from benchmarks.quality.steps import write_json
from benchmarks.quality.texts import CONTEXT, EvaluationText
from benchmarks.quality.torch_scoring import TorchModel
from uq.formats.checkpoint import Checkpoint
from uq.kernels.numerics import FLOAT, Numerics
from uq.kernels.reference import ReferenceSession
from uq.progress import Progress
from uq.validate.scores import Scores, estimate
from uq.validate.scoring import ReferenceStates, compare, final_states, states_key
from uq.validate.text import targets

PROTOCOL = 1  # raise it when the same weights would score otherwise

Runner = Numerics | Engine  # uq's reference with these numerics, or llama.cpp


@dataclass(frozen=True)
class Scorer:
    """Scores models on texts and keeps what it found in `work`.

    Attributes:
        torch: runs the models on a device; None for uq's reference on the CPU.
    """

    reference: Checkpoint
    work: Path
    progress: Progress
    torch: TorchModel | None = None

    def kept(self, content: str, runner: Runner, text: EvaluationText) -> TextScores | None:
        """What an earlier run found for a model, by the hash of its content."""
        path = self._path(content, runner, text)
        return TextScores.from_json(json.loads(path.read_text())) if path.is_file() else None

    def score(self, model: Model, runner: Runner, text: EvaluationText) -> TextScores:
        """Score a model now; integers are emulated on the CPU.

        Raises:
            DeviceError: a hidden state is not finite.
            NotRun: llama.cpp failed.
        """
        scores = self._scores(model, runner, text)
        write_json(self._path(model.content, runner, text), asdict(scores))
        return scores

    def _scores(self, model: Model, runner: Runner, text: EvaluationText) -> TextScores:
        if isinstance(runner, Engine):
            assert model.gguf is not None
            draft = self._folder("truth") / f"{os.getpid()}.logits"
            return runner.scores(model.gguf, text.windows, self._logits(text), draft)
        if self.torch is None or runner != FLOAT:
            found = self._on_cpu(model.session(runner), text)
        else:
            found = self.torch.scores(model.weights, text.windows)
        return summary(found, len(text.windows))

    def _logits(self, text: EvaluationText) -> Iterator[NDArray[np.float32]]:
        """Of the reference, (scored, vocab) for each window."""
        vocab = self._truth.config.vocab_size
        for states in np.array_split(self._reference_states(text), len(text.windows)):
            yield self._truth.logits(states, 0, vocab)

    def _on_cpu(self, session: ReferenceSession, text: EvaluationText) -> Scores:
        truth = self._truth
        truth_states = self._reference_states(text)
        states = final_states(session, text.windows, self.progress, "model")
        return compare(session, states, truth, truth_states, targets(text.windows), self.progress)

    @cached_property
    def _truth(self) -> ReferenceSession:
        return ReferenceSession(self.reference, max_context=CONTEXT)

    def _reference_states(self, text: EvaluationText) -> NDArray[np.float32]:
        key = states_key(self.reference.fingerprint(), self.reference.config, text.windows)
        path = self._folder("states") / f"{key[:16]}.npz"
        kept = ReferenceStates.load(path, key)
        if kept is None:
            hidden = final_states(self._truth, text.windows, self.progress, "reference")
            kept = ReferenceStates(key, hidden)
            kept.save(path)
        return kept.hidden

    def _path(self, content: str, runner: Runner, text: EvaluationText) -> Path:
        key = states_key(self.reference.fingerprint(), self.reference.config, text.windows)
        what = content if runner == FLOAT else f"{content} {runner}"
        digest = hashlib.sha256(f"{PROTOCOL} {what} {key}".encode()).hexdigest()
        return self._folder("scores") / f"{digest[:32]}.json"

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def summary(scores: Scores, windows: int) -> TextScores:
    """Figures of a text; errors are those of means over windows, whose tokens are not independent.

    The perplexity ratio's error is that of the paired differences, to first order.
    """

    def figure(values: NDArray[np.float64]) -> Figure:
        mean = estimate(values.reshape(windows, -1).mean(1))
        return Figure(mean.value, mean.stderr)

    difference = figure(scores.nll - scores.nll_reference)
    ratio = float(np.exp(difference.value))
    return TextScores(
        kld=figure(scores.kld),
        kld_p99_9=float(np.percentile(scores.kld, 99.9)),
        same_top_percent=figure(100 * scores.same_top.astype(np.float64)),
        perplexity_ratio=Figure(ratio, ratio * difference.stderr),
        kld_windows=tuple(scores.kld.reshape(windows, -1).mean(1).tolist()),
    )
