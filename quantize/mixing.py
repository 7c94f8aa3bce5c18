"""From a budget to a plan: what every grid costs, measured once, and the best use of the bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, replace

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.checkpoint.cache import kept
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import expected_tensors
from uq.formats.spec import Spec
from uq.progress import Progress
from uq.quantize.allocate import allocate
from uq.quantize.candidates import candidates
from uq.quantize.lasting import lasting
from uq.quantize.plan import Budget, Plan
from uq.quantize.sensitivity import DAMPING, Measured, measure_costs

VERSION = 8  # of the measurement: costs kept by another one are not used
# Tensors that are told of: so many at most, each of so many nats per token or more.
SENSITIVE, HARMFUL = 5, 0.02


def mixed_plan(
    checkpoint: Checkpoint,
    plan: Plan,
    budget: Budget,
    tokens: NDArray[np.int32],
    progress: Progress,
    *,
    in_order: bool,
) -> Plan:
    """The plan with the grids that cost least within the budget.

    Tensors that lie on their grid keep it, and its bytes count. The costs are kept in the cache,
    for a run that is continued and for other budgets.

    Args:
        in_order: each layer is calibrated on what the rounded layers before it make of the text.

    Raises:
        UsageError: the smallest grids take more than the budget.
    """
    shapes = expected_tensors(checkpoint.config)[0]
    fixed = {name for name, tensor in plan.tensors.items() if tensor.method == "grid"}
    measured = _kept_costs(checkpoint, plan, budget, tokens, progress)
    costs = {name: choices for name, choices in measured.costs.items() if name not in fixed}
    if in_order and plan.corrected:
        costs = lasting(checkpoint.config, costs)

    def stored(name: str, spec: Spec) -> int:
        return LAYOUTS[plan.tensors[name].layout].nbytes(*shapes[name], spec)

    taken = sum(stored(name, plan.tensors[name].spec) for name in fixed & set(measured.costs))
    sizes = {
        name: {spec: stored(name, spec) for spec in choices} for name, choices in costs.items()
    }
    chosen = allocate(costs, sizes, budget.nbytes - taken)
    tensors = {
        name: replace(tensor, spec=chosen.get(name, tensor.spec))
        for name, tensor in plan.tensors.items()
    }
    return replace(plan, tensors=tensors, budget=None, sensitive=most_sensitive(measured.plain))


def most_sensitive(plain: Mapping[str, float]) -> dict[str, float]:
    """Those that do harm, most first, in two digits: more would depend on the machine."""
    harmful = (name for name in plain if plain[name] >= HARMFUL)
    first = sorted(harmful, key=lambda name: (-plain[name], name))[:SENSITIVE]
    return {name: float(f"{plain[name]:.2g}") for name in first}


def _kept_costs(
    checkpoint: Checkpoint,
    plan: Plan,
    budget: Budget,
    tokens: NDArray[np.int32],
    progress: Progress,
) -> Measured:
    def make() -> bytes:
        found = measure_costs(
            checkpoint, tokens, plan.gptq, tables=budget.tables, progress=progress
        )
        costs = {name: list(choices.values()) for name, choices in found.costs.items()}
        return json.dumps({"costs": costs, "plain": found.plain}).encode()

    key = {
        "version": VERSION,
        "source": {name: [file.size, file.version] for name, file in checkpoint.files().items()},
        "revision": checkpoint.source.revision,
        "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "gptq": [DAMPING, plan.gptq.equalize, astuple(plan.gptq.work)],
        "tables": budget.tables,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    stored = json.loads(kept(f"costs-{digest[:32]}.json", make))
    shapes = expected_tensors(checkpoint.config)[0]
    costs = {
        name: dict(zip(candidates(shapes[name][1]), choices, strict=True))
        for name, choices in stored["costs"].items()
    }
    return Measured(costs, stored["plain"])
