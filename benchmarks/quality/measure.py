"""From a row to its figures; what was found before is not made again."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.quality.calibration import Draw
from benchmarks.quality.engine import Engine
from benchmarks.quality.models import Model
from benchmarks.quality.peers.peer import Peer
from benchmarks.quality.results import DrawResult, RowResult, Sizes
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
    """Everything that rows are measured with.

    Attributes:
        draws: of the calibrated rows; the others are measured once.
        chosen_draw: the only one to make now; None for all.
        keep: the quantized models stay on the disk.
        engine: of llama.cpp.
    """

    peers: Mapping[str, Peer]
    scorer: Scorer
    texts: Sequence[EvaluationText]
    draws: Sequence[Draw]
    work: Path
    machine: str
    keep: bool
    chosen_draw: int | None = None
    engine: Engine | None = None

    def measure(self, row: Row, *, chosen: bool = True) -> RowResult:
        """Figures of a row; with `chosen` false those alone that an earlier run has left."""
        if reason := self.peers[row.peer].missing(row):
            return _result(row, (), reason)
        draws = self.draws if row.calibrated else self.draws[:1]
        try:
            found = [self._draw(row, draw, chosen and self._chosen(draw)) for draw in draws]
        except UqError as error:
            return _result(row, (), str(error))
        kept = tuple(result for result in found if result is not None)
        return _result(row, kept, None if kept else "not chosen (--only)")

    def _chosen(self, draw: Draw) -> bool:
        return self.chosen_draw in (None, draw.number)

    def _draw(self, row: Row, draw: Draw, chosen: bool) -> DrawResult | None:
        peer = self.peers[row.peer]
        model = Lazy(peer, peer.steps(row, draw), self.work, self.machine)
        facts = model.facts() if chosen else model.kept_facts()
        if facts is None:
            return None
        runner = self.engine if row.engine and self.engine else row.numerics
        texts = {}
        for text in self.texts:
            scores = self.scorer.kept(facts.content, runner, text)
            if scores is None and chosen:
                say(f"{row.name}, draw {draw.number}: scoring {text.name}")
                scores = self.scorer.score(model.opened, runner, text)
            if scores is not None:
                texts[text.name] = scores
        if chosen and not (self.keep or row.shared):
            remove(model.output)
        return DrawResult(draw.number, facts.sizes, model.cost(), texts) if texts else None


@dataclass(frozen=True)
class Lazy:
    """A quantized model that is made and opened when it is first needed."""

    peer: Peer
    steps: tuple[Step, ...]
    work: Path
    machine: str

    @cached_property
    def opened(self) -> Model:
        """Raises NotRun: a process failed."""
        for step in self.steps:
            if not (step.output(self.work).exists() and kept_cost(step, self.work)):
                say(step.label)
            run(step, self.work, self.machine)
        model = self.peer.open(self.output)
        write_json(self._file, asdict(Facts(model.content, model.sizes)))
        return model

    @property
    def output(self) -> Path:
        return self.steps[-1].output(self.work)

    def kept_facts(self) -> Facts | None:
        """What an earlier run found of the model; None if it was never made."""
        if not self._file.is_file() or None in [kept_cost(step, self.work) for step in self.steps]:
            return None
        data = json.loads(self._file.read_text())
        return Facts(data["content"], Sizes(**data["sizes"]))

    def facts(self) -> Facts:
        """Raises NotRun: the model has to be made, and a process failed."""
        return self.kept_facts() or Facts(self.opened.content, self.opened.sizes)

    def cost(self) -> Cost:
        return total([kept_cost(step, self.work) for step in self.steps if step.counted])

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
