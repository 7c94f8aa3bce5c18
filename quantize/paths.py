"""Models on their way through a layer together, each with its own hidden states and at most one
rounded tensor. The layer's weights are read once for all, those of an expert one expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.experts import DOWN, GATE_UP, expert_hidden
from uq.kernels.per_layer import Beside
from uq.kernels.reference import (
    add_attention,
    add_mlp,
    attention_context,
    attention_input,
    enter,
    leave,
    mlp_hidden,
    mlp_input,
)
from uq.quantize.expert_calibration import Routed

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
Round = Callable[[str, Array], Array]  # role, weight -> what stands for it


class Experts(Protocol):
    """Reads one expert's weight: a `Checkpoint` does."""

    def expert(self, index: int, role: str, number: int) -> Array: ...


@dataclass
class Path:
    """Some texts in front of a layer, in one of the models.

    Attributes:
        hidden: (texts, length, hidden).
        beside: what goes with them; arrays are shared between paths and never written to.
        rounded: role of the tensor of the layer in work that is rounded in this model.
    """

    hidden: Array
    beside: Beside
    rounded: str | None = None

    def fork(self, rounded: str | None = None) -> Path:
        """The same texts in a model that goes its own way from here on."""
        return Path(self.hidden, replace(self.beside, shared=dict(self.beside.shared)), rounded)

    @property
    def stream(self) -> Array:
        """All that layers have made of the texts, (texts, length, ...)."""
        return self.hidden if self.beside.streams is None else self.beside.streams


def exactly(role: str, weight: Array) -> Array:
    """A `Round` that leaves a weight as it is."""
    return weight


def pass_layer(
    config: GemmaConfig,
    layer: int,
    weights: Weights,
    experts: Experts,
    paths: Sequence[Path],
    round_weight: Round = exactly,
) -> None:
    """Take all paths behind a layer."""
    for path in paths:
        _to_mlp(config, layer, RoundedOne(weights, path.rounded, round_weight), path)
    if config.experts:
        _mix_experts(config, layer, weights, experts, paths, round_weight)
    for path in paths:
        _to_end(config, layer, RoundedOne(weights, path.rounded, round_weight), path)


class RoundedOne(Mapping[str, Array]):
    """Weights of a layer, one of them rounded when it is asked for."""

    def __init__(self, weights: Weights, role: str | None, round_weight: Round) -> None:
        self._weights, self._role, self._round = weights, role, round_weight

    def __getitem__(self, role: str) -> Array:
        weight = self._weights[role]
        return self._round(role, weight) if role == self._role else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _to_mlp(config: GemmaConfig, layer: int, weights: Weights, path: Path) -> None:
    hidden = enter(config, weights, path.hidden, path.beside)
    x = attention_input(config, weights, hidden)
    context = attention_context(config, layer, weights, x, beside=path.beside)
    path.hidden = add_attention(config, weights, hidden, context)


def _to_end(config: GemmaConfig, layer: int, weights: Weights, path: Path) -> None:
    y = mlp_hidden(config, layer, weights, mlp_input(config, weights, path.hidden))
    hidden = add_mlp(config, weights, path.hidden, y, experts=path.beside.experts)
    path.beside.experts = None
    path.hidden = leave(config, layer, weights, hidden, path.beside)


def _mix_experts(
    config: GemmaConfig,
    layer: int,
    weights: Weights,
    experts: Experts,
    paths: Sequence[Path],
    round_weight: Round,
) -> None:
    """What the experts give joins each path; a rounded stack is rounded expert by expert."""
    assert config.experts is not None
    routed = [
        Routed(config, RoundedOne(weights, path.rounded, round_weight), path.hidden)
        for path in paths
    ]
    for number in range(config.experts.count):
        exact = {role: experts.expert(layer, role, number) for role in (GATE_UP, DOWN)}
        for path, one in zip(paths, routed, strict=True):
            here = RoundedOne(exact, path.rounded, round_weight)
            one.add(number, expert_hidden(here[GATE_UP], one.inputs(number)[0]), here[DOWN])
    for path, one in zip(paths, routed, strict=True):
        path.beside.experts = one.finish()
