"""What stays of a tensor's cost, and when the choice of grids looks at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import EMBEDDING, layer_tensor
from uq.formats.spec import Spec
from uq.progress import SilentProgress
from uq.quantize.lasting import DOWN_PROFILE, TAIL_PROFILE, lasting, share
from uq.quantize.mixing import mixed_plan
from uq.quantize.plan import make_plan
from uq.quantize.sensitivity import Costs, Measured

LAYERS = 5
SPEC = Spec(4, 32, scale_bits=8)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(family="gemma3", layers=LAYERS)


def test_what_later_linears_make_good_counts_less() -> None:
    roles = ("mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    shares = [share(role, 0.5) for role in roles]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.7 * shares[0]


def test_the_first_layers_count_most() -> None:
    for role in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        assert share(role, 0.0) >= 1.4 * max(share(role, depth) for depth in (0.2, 0.5, 0.95))


@pytest.mark.parametrize("profile", [DOWN_PROFILE, TAIL_PROFILE])
def test_a_profile_reaches_the_last_layer(profile: tuple[tuple[float, float], ...]) -> None:
    ends = [end for end, _ in profile]
    assert ends == sorted(ends) and ends[-1] == 1.0


def test_tensors_of_no_layer_and_other_linears_keep_their_costs(folder: Path) -> None:
    config = open_checkpoint(folder).config
    values = layer_tensor(3, "self_attn.v_proj")
    costs = lasting(config, {name: {SPEC: 2.0} for name in (EMBEDDING, values)})
    assert costs == {EMBEDDING: {SPEC: 2.0}, values: {SPEC: 2 * share("self_attn.v_proj", 0.6)}}
    assert share("per_layer_input_gate", 0.5) == 1.0


@pytest.mark.parametrize(
    ("in_order", "correction", "counted"),
    [(True, 0.5, True), (False, 0.5, False), (True, 0.0, False)],
)
def test_it_counts_where_errors_are_made_good(
    folder: Path, monkeypatch: pytest.MonkeyPatch, in_order: bool, correction: float, counted: bool
) -> None:
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint.config)
    plan = replace(plan, gptq=replace(plan.gptq, correction=correction, residual=correction))
    alone = {n: {SPEC: 1.0} for n in plan.tensors if n != EMBEDDING}
    monkeypatch.setattr("uq.quantize.mixing._kept_costs", lambda *_: Measured(alone, {}))
    weighed: list[Costs] = []

    def chosen(costs: Costs, sizes: object, budget: int) -> dict[str, Spec]:
        weighed.append(costs)
        return dict.fromkeys(costs, SPEC)

    monkeypatch.setattr("uq.quantize.mixing.allocate", chosen)
    tokens = np.zeros((1, 8), np.int32)
    assert plan.budget is not None
    mixed_plan(checkpoint, plan, plan.budget, tokens, SilentProgress(), in_order=in_order)
    assert weighed == [lasting(checkpoint.config, alone) if counted else alone]
