"""What weights, activations and the KV cache lose, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uq.kernels.numerics import ACTIVATIONS, FLOAT, KV, Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Session
from uq.kernels.weights import BundleWeights
from uq.progress import Progress
from uq.validate.report import Estimate, Loss
from uq.validate.scores import Scores
from uq.validate.scoring import compare, final_states
from uq.validate.text import targets

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle


def losses(
    bundle: Bundle,
    truth: Session,
    truth_states: NDArray[np.float32],
    tokens: NDArray[np.int32],
    activations: str,
    kv: str,
    progress: Progress,
) -> tuple[Loss, ...]:
    """One entry for the weights and one for each further thing that is quantized; or none.

    Args:
        truth_states: what `final_states` gives of the reference.
        activations, kv: names in `ACTIVATIONS` and `KV`; with `float` twice nothing is computed.

    Raises:
        UsageError: the numerics do not fit the model's shapes.
        DeviceError: a hidden state is not finite.
    """
    steps = list(_steps(activations, kv))
    if len(steps) == 1:
        return ()
    weights, found = BundleWeights(bundle), []
    for name, numerics in steps:
        session = ReferenceSession(weights, numerics=numerics)
        states = final_states(session, tokens, progress, name)
        scores = compare(session, states, truth, truth_states, targets(tokens), progress)
        found.append(_loss(name, scores))
    return tuple(found)


def _steps(activations: str, kv: str) -> Iterator[tuple[str, Numerics]]:
    """Name and numerics of each row; every one includes those before it."""
    yield "weights", FLOAT
    if activations != "float":
        yield f"+ {activations.upper()} activations", Numerics(ACTIVATIONS[activations])
    if kv != "float":
        yield f"+ {kv.upper()} KV cache", Numerics(ACTIVATIONS[activations], KV[kv])


def _loss(name: str, scores: Scores) -> Loss:
    kld = scores.kld_facts
    return Loss(
        name,
        Estimate(kld.mean, kld.stderr),
        scores.same_top_percent.value,
        scores.perplexity_ratio,
    )
