"""Which keys new queries need, and the plan, of few sizes, that computes them.

Lengths are padded so that a text needs few plans: a plan has its own instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.kernels.npu.kernels.attention.plan import NO_WINDOW, Plan, on_all_columns, plan
from uq.kernels.npu.kernels.attention.variant import Variant

STEP = 128  # positions


@dataclass(frozen=True)
class Reach:
    """New queries inside of a padded plan.

    Attributes:
        low: position of the first key that is sent; the first of a block.
        shift: positions by which the plan's queries lie behind the true ones. Its last keys are
            padding then, which causality hides.
    """

    plan: Plan
    low: int
    shift: int
    window: int | None

    @classmethod
    def of(
        cls,
        variant: Variant,
        heads: int,
        kv_heads: int,
        start: int,
        length: int,
        window: int | None,
    ) -> Reach:
        """Of `length` queries from position `start` on; a query sees `window` keys, or all."""
        low = max(0, start + 1 - (window or NO_WINDOW)) // variant.keys * variant.keys
        before = start - low
        if variant.form == "decode":
            padded = _rounded(before + 1) - 1
        else:
            padded, length = _rounded(before), _rounded(length)
        # A plan leaves out keys that no query sees: it must not leave out what the shifted see.
        wide = None if window is None else window + STEP
        made = plan(variant, heads, kv_heads, length, start=padded, window=wide)
        return cls(on_all_columns(made), low, padded - before, window)

    def place(self, queries: NDArray[np.void]) -> None:
        """Give packed queries of the plan their true positions and window."""
        queries["position"] -= self.shift
        queries["window"] = self.window or NO_WINDOW


def _rounded(count: int) -> int:
    return -(-count // STEP) * STEP
