"""The figures of the benchmark, as they are kept and rendered."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.quality.steps import Cost
from uq.errors import UsageError


@dataclass(frozen=True)
class Figure:
    """A mean over windows and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class TextScores:
    """How far a model's distributions are from the reference's on one text.

    Attributes:
        kld: KL(reference || model) in nats.
        kld_p99_9: its 99.9th percentile over the tokens.
        same_top_percent: tokens for which both models find the same continuation most likely.
        perplexity_ratio: model over reference.
        kld_windows: mean KL of each window, for paired comparisons.
    """

    kld: Figure
    kld_p99_9: float
    same_top_percent: Figure
    perplexity_ratio: Figure
    kld_windows: tuple[float, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextScores:
        figures = {name: Figure(**data[name]) for name in data if isinstance(data[name], dict)}
        windows = tuple(data["kld_windows"])
        return cls(**{**data, **figures, "kld_windows": windows})


@dataclass(frozen=True)
class Sizes:
    """What a quantized model takes, scales and padding included.

    Attributes:
        bits: per weight over all tensors; `body_bits` over the layers' linears.
        nbytes: of its files, or of its tensors where `computed`.
        embedding, body: the grids that were used, for people.
        computed: no packed file was written, the size follows from the grids.
    """

    bits: float
    body_bits: float
    nbytes: int
    embedding: str
    body: str
    computed: bool = False


@dataclass(frozen=True)
class DrawResult:
    """One calibration draw of a row; `cost` is of the quantizer alone."""

    draw: int
    sizes: Sizes
    cost: Cost
    texts: Mapping[str, TextScores]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DrawResult:
        texts = {name: TextScores.from_json(text) for name, text in data["texts"].items()}
        return cls(data["draw"], Sizes(**data["sizes"]), Cost(**data["cost"]), texts)


@dataclass(frozen=True)
class RowResult:
    """A row of the table; without draws `not_run` says why."""

    name: str
    peer: str
    arguments: tuple[str, ...]
    calibrated: bool
    draws: tuple[DrawResult, ...]
    not_run: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowResult:
        draws = tuple(map(DrawResult.from_json, data["draws"]))
        return cls(**{**data, "arguments": tuple(data["arguments"]), "draws": draws})


@dataclass(frozen=True)
class TextFacts:
    """A text that was scored: its windows, the tokens scored in them, the hash of the windows."""

    name: str
    windows: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Results:
    """Everything one run gives; `against` names the row that the others are compared with."""

    schema: int
    uq: str
    date: str
    machine: str
    reference: str
    reference_sha256: str
    context: int
    calibration_tokens: int
    draws: int
    against: str
    texts: tuple[TextFacts, ...]
    rows: tuple[RowResult, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        rows = tuple(map(RowResult.from_json, data["rows"]))
        return cls(**{**data, "texts": tuple(TextFacts(**t) for t in data["texts"]), "rows": rows})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def completed(here: Results, other: Results) -> Results:
    """`here`, and the draws of `other` that it has not: of the same model, texts and calibration.

    Raises:
        UsageError: `other` is of something else.
    """
    for what in ("schema", "reference_sha256", "context", "calibration_tokens"):
        ours, theirs = getattr(here, what), getattr(other, what)
        if ours != theirs:
            raise UsageError(f"--with: its {what} is {theirs}, here it is {ours}")
    windows = {text.sha256 for text in here.texts}
    texts = {text.name for text in other.texts if text.sha256 in windows}
    known = {(row.name, row.arguments): row for row in other.rows}
    rows = (_completed(row, known.get((row.name, row.arguments)), texts) for row in here.rows)
    return replace(here, rows=tuple(rows))


def _completed(row: RowResult, other: RowResult | None, texts: Set[str]) -> RowResult:
    have = {draw.draw for draw in row.draws}
    found = list(row.draws)
    for draw in other.draws if other else ():
        scores = {name: draw.texts[name] for name in draw.texts if name in texts}
        if draw.draw not in have and scores:
            found.append(replace(draw, texts=scores))
    found.sort(key=lambda draw: draw.draw)
    return replace(row, draws=tuple(found), not_run=None if found else row.not_run)
