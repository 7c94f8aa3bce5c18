"""The mixture of experts beside a layer's own MLP, in float32.

A router chooses some experts for each token by its hidden state in front of the MLP; what they give
is added up by the router's shares (Shazeer et al., Outrageously Large Neural Networks).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import Experts, GemmaConfig
from uq.kernels.elementwise import gelu_product
from uq.kernels.numerics import FLOAT, Numerics
from uq.kernels.products import flat, linear, rms_norm
from uq.kernels.weights import Weights

Array = NDArray[np.float32]
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def experts_output(
    config: GemmaConfig, weights: Weights, hidden: Array, numerics: Numerics = FLOAT
) -> Array:
    """What the experts add to the MLP's output, both behind norms of their own.

    Args:
        hidden: (batch, length, hidden) residual stream in front of the MLP.
        numerics: of the experts; the router's input is float32.
    """
    x = numerics.linear_input(experts_input(config, weights, hidden))
    out = np.zeros_like(x)  # (tokens, hidden)
    for expert, tokens, shares in chosen(config, weights, hidden):
        y = numerics.linear_input(expert_hidden(weights[f"{GATE_UP}.{expert}"], x[tokens]))
        out[tokens] += linear(y, weights[f"{DOWN}.{expert}"]) * shares[:, None]
    return leave_experts(config, weights, out).reshape(hidden.shape)


def leave_experts(config: GemmaConfig, weights: Weights, out: Array) -> Array:
    """What the sum of the chosen experts' outputs is when it joins the MLP's."""
    return rms_norm(out, weights["post_feedforward_layernorm_2"], config.rms_norm_eps)


def experts_input(config: GemmaConfig, weights: Weights, hidden: Array) -> Array:
    """What each expert is given of the tokens that choose it: (tokens, hidden)."""
    return rms_norm(flat(hidden), weights["pre_feedforward_layernorm_2"], config.rms_norm_eps)


def expert_hidden(gate_up: Array, x: Array) -> Array:
    """Input of an expert's down projection: gelu(gate) * up, (tokens, intermediate)."""
    both = linear(x, gate_up)  # (tokens, 2 * intermediate)
    gate, up = (np.ascontiguousarray(part) for part in np.split(both, 2, axis=1))
    gelu_product(gate, up)
    return gate


def chosen(
    config: GemmaConfig, weights: Weights, hidden: Array
) -> Iterator[tuple[int, NDArray[np.intp], Array]]:
    """Each expert that some token chose, those tokens, and the share it has in each."""
    assert config.experts is not None
    return by_expert(*route(config, config.experts, weights, hidden))


def by_expert(
    indices: NDArray[np.intp], shares: Array
) -> Iterator[tuple[int, NDArray[np.intp], Array]]:
    """`chosen` from what `route` gives."""
    for expert in np.unique(indices):
        tokens, places = np.nonzero(indices == expert)
        yield int(expert), tokens, shares[tokens, places]


def route(
    config: GemmaConfig, experts: Experts, weights: Weights, hidden: Array
) -> tuple[NDArray[np.intp], Array]:
    """The experts of each token, the likeliest first, and their shares: (tokens, active) each.

    Shares are the softmax over all experts, those of the chosen ones scaled to a sum of 1, times a
    number of each expert.
    """
    gain = weights["router.scale"] * np.float32(config.hidden_size**-0.5)
    x = rms_norm(flat(hidden), gain, config.rms_norm_eps)
    scores = linear(x, weights["router.proj"])
    return choose(experts, scores, weights["router.per_expert_scale"])


def choose(experts: Experts, scores: Array, scale: Array) -> tuple[NDArray[np.intp], Array]:
    """`route` from the router's scores (tokens, experts); scale: (experts,)."""
    indices = np.argsort(-scores, axis=1, kind="stable")[:, : experts.active]
    top = np.take_along_axis(scores, indices, axis=1)
    shares = np.exp(top - top[:, :1])
    shares /= shares.sum(axis=1, keepdims=True)
    return indices, shares * scale[indices]
