"""The experts of a layer on their grids: one at a time, stacked again in the bundle."""

from __future__ import annotations

from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import layer_tensor
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import QuantTensor
from uq.formats.writer import QuantEntry, TiledRows
from uq.quantize.calibration_engine import GptqSolver, StageStatistics
from uq.quantize.plan import Plan
from uq.quantize.recover import recover
from uq.quantize.scales import checked, quantize_rtn, weight_error

Array = NDArray[np.float32]
LEAST_TOKENS = 8  # input channels for each token that an expert must have seen
SHOWN = 8  # experts that a message names


class ExpertStack:
    """One linear of all experts of a layer, as they are quantized in order."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, layer: int, role: str) -> None:
        self.name = layer_tensor(layer, role)
        self._checkpoint, self._layer, self._role = checkpoint, layer, role
        self._plan, self._options = plan.tensors[self.name], plan.gptq
        self._blocks: list[QuantTensor | TiledRows] = []
        self._errors: list[float] = []
        self._unseen: list[int] = []

    def quantize(self, number: int, tokens: int, statistics: StageStatistics | None) -> Array:
        """The next expert; the weight as it is dequantized.

        Args:
            tokens: calibration tokens that chose it; `statistics` of their inputs.
        """
        weight = self._checkpoint.expert(self._layer, self._role, number)
        enough = statistics is not None and tokens * LEAST_TOKENS >= weight.shape[1]
        solver = statistics.factorize(self._options.damping) if statistics and enough else None
        found = self._codes(number, weight, statistics, solver)
        if self._plan.method == "grid" or solver is None or isinstance(solver, str):
            self._errors.append(weight_error(weight, found))
        else:
            self._errors.append(solver.output_error(weight, found))
        self._blocks.append(self._tiled(checked(self.name, found)))
        return found.dequantize()

    def entry(self) -> QuantEntry:
        """All experts as one tensor."""
        shape = self._checkpoint.tensors[self.name].shape
        plan = self._plan
        return QuantEntry(
            self.name,
            (shape[0], shape[1]),
            plan.spec,
            plan.layout,
            plan.method,
            self._blocks,
            fmean(self._errors),
            self._fallback(),
        )

    def _codes(
        self,
        number: int,
        weight: Array,
        statistics: StageStatistics | None,
        solver: GptqSolver | str | None,
    ) -> QuantTensor:
        spec, method = self._plan.spec, self._plan.method
        if method == "grid":
            return recover(weight, spec, self._checkpoint.tensors[self.name].dtype)[0]
        if statistics is None or solver is None or isinstance(solver, str):
            self._unseen.append(number)
            return quantize_rtn(weight, spec)
        if method == "gptq":
            return solver.quantize(weight, spec, self._options)
        return quantize_rtn(weight, spec, statistics.importance)

    def _tiled(self, tensor: QuantTensor) -> QuantTensor | TiledRows:
        layout, spec = self._plan.layout, self._plan.spec
        whole = tensor.shape[0] % LAYOUTS[layout].row_block(spec) == 0
        return TiledRows.of(tensor, layout) if whole else tensor

    def _fallback(self) -> str | None:
        """Which experts were not quantized as planned, and why."""
        if not self._unseen:
            return None
        names = ", ".join(map(str, self._unseen[:SHOWN]))
        more = len(self._unseen) - SHOWN
        rest = f" and {more} more" if more > 0 else ""
        return f"experts {names}{rest} saw too few calibration tokens; rounded to nearest"
