"""The figures of the benchmark, as they are kept and rendered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.quality.steps import Cost


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


@dataclass(frozen=True)
class RowResult:
    """A row of the table; without draws `not_run` says why."""

    name: str
    peer: str
    arguments: tuple[str, ...]
    calibrated: bool
    draws: tuple[DrawResult, ...]
    not_run: str | None = None


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
