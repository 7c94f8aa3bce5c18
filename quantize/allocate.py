"""The choice of a grid for every tensor: the least total cost within a number of bytes.

A multiple-choice knapsack, solved exactly by dynamic programming over bytes (Kellerer, Pferschy and
Pisinger, "Knapsack Problems", 2004, section 11.5), in units that divide all sizes, or in one
sixty-five-thousandth of the budget where those would be too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.spec import Spec

UNITS = 1 << 16


def allocate(
    costs: Mapping[str, Mapping[Spec, float]],
    sizes: Mapping[str, Mapping[Spec, int]],
    budget: int,
) -> dict[str, Spec]:
    """Tensor -> grid with the smallest sum of costs among those that take at most `budget` bytes.

    Args:
        costs, sizes: tensor -> grid -> cost, bytes; the same tensors and grids in both.

    Raises:
        UsageError: even the smallest grids take more.
    """
    least = sum(min(choices.values()) for choices in sizes.values())
    if least > budget:
        raise UsageError(
            f"{budget} bytes do not hold the tensors: their smallest grids take {least}; "
            "raise --bpw"
        )
    unit = max(
        gcd(*(size for choices in sizes.values() for size in choices.values())),
        -(-budget // UNITS),
    )
    totals = np.zeros(budget // unit + 1)  # least cost within so many units
    picks: list[tuple[list[Spec], NDArray[np.int8]]] = []
    for name, choices in costs.items():
        specs = list(choices)
        offers = np.full((len(specs), len(totals)), np.inf)
        for offer, spec in zip(offers, specs, strict=True):
            taken = -(-sizes[name][spec] // unit)
            if taken < len(totals):
                offer[taken:] = totals[: len(totals) - taken] + choices[spec]
        picks.append((specs, np.argmin(offers, axis=0).astype(np.int8)))
        totals = offers.min(axis=0)
    if not np.isfinite(totals[-1]):  # sizes in whole units are a little more than the budget
        return {name: min(choices, key=choices.__getitem__) for name, choices in sizes.items()}
    return _trace(list(costs), picks, sizes, unit, len(totals) - 1)


def _trace(
    names: list[str],
    picks: list[tuple[list[Spec], NDArray[np.int8]]],
    sizes: Mapping[str, Mapping[Spec, int]],
    unit: int,
    left: int,
) -> dict[str, Spec]:
    """The choices that led to the last tensor's best total, from the last tensor back."""
    chosen: dict[str, Spec] = {}
    for name, (specs, pick) in zip(reversed(names), reversed(picks), strict=True):
        chosen[name] = specs[pick[left]]
        left -= -(-sizes[name][chosen[name]] // unit)
    return {name: chosen[name] for name in names}
