"""Exact shifts of input channels between a norm's gain and the weights behind it.

With the input of a linear divided by s and its columns multiplied by s nothing changes, but the
grid of a group now spends more of its precision on channels with a large s. Lin et al., "AWQ"
(2023), section 3.2, with s a power of the channel's root mean square. Here s is a power of two, so
that both products are exact and the model in front of the rounding stays the same to the last bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
LIMIT = 4  # powers of two that a channel is moved by at most


def channel_scale(importance: Array, power: float) -> Array:
    """s, (n,) powers of two around 1: root mean square to the `power`, over the channels' mean.

    Args:
        importance: (n,) mean squares; channels that are never active, or overflow, stay.
    """
    active = (importance > 0) & np.isfinite(importance)
    if not active.any():
        return np.ones_like(importance)
    logs = np.zeros(len(importance))
    logs[active] = power / 2 * np.log2(importance[active].astype(np.float64))
    logs[active] -= logs[active].mean()
    shifts = np.clip(np.rint(logs), -LIMIT, LIMIT)
    scale: Array = np.exp2(shifts).astype(np.float32)
    return scale
