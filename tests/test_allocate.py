"""The allocation against trying every choice."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from uq.errors import UsageError
from uq.formats.spec import Spec
from uq.quantize.allocate import allocate

SPECS = (Spec(4, 64), Spec(4, 32), Spec(5, 64), Spec(8, 64))
SHAPES = {"a": (16, 128), "b": (48, 128), "c": (32, 256), "d": (16, 64)}
SIZES = {name: {spec: spec.nbytes(*shape) for spec in SPECS} for name, shape in SHAPES.items()}


def random_costs(seed: int) -> dict[str, dict[Spec, float]]:
    rng = np.random.default_rng(seed)
    return {
        name: {spec: float(rng.random() * 4.0**-spec.bits) for spec in SPECS} for name in SHAPES
    }


def total(choice: dict[str, Spec], table: dict[str, dict[Spec, float]]) -> float:
    return sum(table[name][spec] for name, spec in choice.items())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [9500, 10000, 14000])
def test_no_other_choice_within_the_budget_costs_less(seed: int, budget: int) -> None:
    costs = random_costs(seed)
    found = allocate(costs, SIZES, budget)
    assert sum(SIZES[name][spec] for name, spec in found.items()) <= budget
    fitting = [
        choice
        for specs in product(SPECS, repeat=len(SHAPES))
        if sum(SIZES[n][s] for n, s in zip(SHAPES, specs, strict=True)) <= budget
        for choice in [dict(zip(SHAPES, specs, strict=True))]
    ]
    assert total(found, costs) == pytest.approx(min(total(c, costs) for c in fitting), rel=1e-12)


def test_a_budget_below_the_smallest_grids_is_refused() -> None:
    with pytest.raises(UsageError, match="8000 bytes do not hold .* take 9248; raise --bpw"):
        allocate(random_costs(0), SIZES, 8000)


def test_a_budget_of_many_units_still_holds() -> None:
    sizes = {name: {s: n * 1009 + s.bits for s, n in c.items()} for name, c in SIZES.items()}
    budget = 10_000_000
    found = allocate(random_costs(1), sizes, budget)
    assert sum(sizes[name][spec] for name, spec in found.items()) <= budget


def test_a_budget_that_only_the_smallest_grids_fit() -> None:
    """In the units of the dynamic programme they are a little more than it."""
    small, large = Spec(4, 64), Spec(8, 64)
    names = ("a", "b", "c")
    costs = {name: {large: 1.0, small: 2.0} for name in names}
    sizes = {name: {large: 140_001, small: 70_001} for name in names}
    assert allocate(costs, sizes, 210_003) == dict.fromkeys(names, small)
