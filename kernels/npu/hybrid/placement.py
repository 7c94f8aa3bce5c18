"""Which layers' attention an NPU can run, and why others stay on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from uq.errors import UsageError
from uq.formats.config import GemmaConfig
from uq.kernels.npu.kernels.attention.variant import Variant
from uq.kernels.session import AttentionPlace

LONGEST = 8192  # keys: so far the emulator's attention was compared with its twin


def obstacle(config: GemmaConfig, layer: int, device: str, bits: int, context: int) -> str | None:
    """Why there is no kernel for the attention of a layer; None when there is one.

    Args:
        context: tokens that the session may hold.
    """
    try:
        Variant(device, config.head_dim, bits)
    except UsageError as error:
        return str(error)
    seen = min(context, config.window(layer) or context)
    if seen > LONGEST:
        return f"a query may see {seen} keys; attention is checked up to {LONGEST}"
    return None


def described(obstacles: Sequence[str | None], npu: str) -> tuple[AttentionPlace, ...]:
    """One entry for neighbouring layers that share their place and its reason."""
    places = []
    for reason, numbered in groupby(enumerate(obstacles), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in numbered]
        name = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        places.append(AttentionPlace(name, "cpu" if reason else npu, reason))
    return tuple(places)
