"""How much of a tensor's cost stays once the linears behind it are rounded in view of its error.

Costs are measured one tensor at a time. In order, every linear is rounded towards the outputs and
the residual stream of the floating-point path, on inputs that the rounded linears before it made:
o_proj makes good most of what v_proj lost, and much of what the middle layers lose is made good
behind them. What the first layers lose falls on few tokens, which make the tail of the divergence.

The shares were found on Gemma 3 270M, on texts that are neither in its calibration nor in the
benchmark: for attention and down_proj from linears of a calibrated model put back to floating
point, for the first layers from the divergence of each token. Those of gate and up were set and
confirmed by trial. What stands here are their square roots: with the whole shares other languages
lost a little less, English and code more ("What helped, and what did not" in docs/quality.md).
Other models were not measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from uq.formats.config import GemmaConfig, layer_tensor
from uq.formats.spec import Spec
from uq.quantize.sensitivity import Costs

Profile = tuple[tuple[float, float], ...]  # share of the layers from the first on -> factor there

ROLES: Mapping[str, float] = {
    "self_attn.q_proj": 0.9,
    "self_attn.k_proj": 0.8,
    "self_attn.v_proj": 0.6,
    "self_attn.o_proj": 0.87,
    "mlp.gate_proj": 0.95,
    "mlp.up_proj": 0.95,
}
DOWN = "mlp.down_proj"
DOWN_PROFILE: Profile = ((0.1, 1.3), (0.7, 0.82), (1.0, 0.98))
TAIL_PROFILE: Profile = ((0.2, 1.4), (1.0, 1.0))


def lasting(config: GemmaConfig, costs: Costs) -> dict[str, Mapping[Spec, float]]:
    """The costs, those of the layers' linears times what stays of them.

    Args:
        costs: tensor -> grid -> cost of the tensor rounded alone.
    """
    shares = {
        layer_tensor(layer, role): share(role, layer / config.num_layers)
        for layer in range(config.num_layers)
        for role in config.linear_shapes(layer)
    }
    return {
        name: {spec: shares.get(name, 1.0) * cost for spec, cost in choices.items()}
        for name, choices in costs.items()
    }


def share(role: str, depth: float) -> float:
    """Of a linear whose layer has `depth`, 0 to below 1, of the layers in front of it."""
    own = _at(DOWN_PROFILE, depth) if role == DOWN else ROLES.get(role, 1.0)
    return own * _at(TAIL_PROFILE, depth)


def _at(profile: Profile, depth: float) -> float:
    return next(factor for end, factor in profile if depth < end)
