"""From a row to its figures; what was found before is not made again."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.quality.calibration import Draw
from benchmarks.quality.errors import NotRun
from benchmarks.quality.models import Model
from benchmarks.quality.peers.peer import Peer
from benchmarks.quality.results import DrawResult, RowResult, Sizes, TextScores
from benchmarks.quality.rows import Row
from benchmarks.quality.scoring import Scorer
from benchmarks.quality.steps import Cost, Step, kept_cost, remove, run, write_json
from benchmarks.quality.texts import EvaluationText
from uq.errors import UqError

MODEL = "model.json"


@dataclass(frozen=True)
class Facts:
    """What is kept of a quantized model when its files are gone."""

    content: str
    sizes: Sizes


@dataclass(frozen=True)
class Bench:
    """Attributes:
    draws: of the calibrated rows; the others are measured once.
    keep: the quantized models stay on the disk.
    """

    peers: Mapping[str, Peer]
    scorer: Scorer
    texts: Sequence[EvaluationText]
    draws: Sequence[Draw]
    work: Path
    machine: str
    keep: bool

    def measure(self, row: Row, *, chosen: bool = True) -> RowResult:
        """Figures of a row; with `chosen` false only if an earlier run has left all of them."""
        if reason := self.peers[row.peer].missing(row):
            return _result(row, (), reason)
        draws = self.draws if row.calibrated else self.draws[:1]
        try:
            found = [self._draw(row, draw, chosen) for draw in draws]
        except UqError as error:
            return _result(row, (), str(error))
        return _result(row, tuple(found), None)

    def _draw(self, row: Row, draw: Draw, chosen: bool) -> DrawResult:
        peer = self.peers[row.peer]
        steps = peer.steps(row, draw)
        model = Lazy(peer, steps, self.work, self.machine, chosen)
        facts = model.facts()
        texts = {text.name: self._text(row, draw, model, facts, text) for text in self.texts}
        cost = total([kept_cost(step, self.work) for step in steps if step.counted])
        if not self.keep:
            remove(steps[-1].output(self.work))
        return DrawResult(draw.number, facts.sizes, cost, texts)

    def _text(
        self, row: Row, draw: Draw, model: Lazy, facts: Facts, text: EvaluationText
    ) -> TextScores:
        kept = self.scorer.kept(facts.content, text)
        if kept is None:
            say(f"{row.name}, draw {draw.number}: scoring {text.name}")
            kept = self.scorer.score(model.open(), text)
        return kept


@dataclass(frozen=True)
class Lazy:
    """A quantized model that is made and opened when it is first needed."""

    peer: Peer
    steps: tuple[Step, ...]
    work: Path
    machine: str
    chosen: bool

    def open(self) -> Model:
        """Raises NotRun: a process failed, or none may be started."""
        if not self.chosen:
            raise NotRun("not chosen (--only)")
        for step in self.steps:
            if not (step.output(self.work).exists() and kept_cost(step, self.work)):
                say(step.label)
            run(step, self.work, self.machine)
        model = self.peer.open(self.steps[-1].output(self.work))
        write_json(self._file, asdict(Facts(model.content, model.sizes)))
        return model

    def facts(self) -> Facts:
        if not self._file.is_file() or None in [kept_cost(step, self.work) for step in self.steps]:
            self.open()
        data = json.loads(self._file.read_text())
        return Facts(data["content"], Sizes(**data["sizes"]))

    @property
    def _file(self) -> Path:
        return self.steps[-1].folder(self.work) / MODEL


def total(costs: Sequence[Cost | None]) -> Cost:
    """One process after the other: times add up, the largest peak counts."""
    known = [cost for cost in costs if cost is not None]
    machines = dict.fromkeys(cost.machine for cost in known)
    return Cost(
        sum(cost.seconds for cost in known),
        max(cost.peak_bytes for cost in known),
        ", ".join(machines),
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _result(row: Row, draws: tuple[DrawResult, ...], not_run: str | None) -> RowResult:
    return RowResult(row.name, row.peer, row.arguments, row.calibrated, draws, not_run)
