"""Layers quantized with statistics from calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import EMBEDDING, layer_tensor
from uq.formats.spec import QuantTensor
from uq.formats.writer import QuantEntry
from uq.kernels.reference import CheckpointWeights
from uq.progress import Progress
from uq.quantize.calibrate import Calibration
from uq.quantize.gptq import Factor, Statistics, factorize, output_error, quantize_gptq
from uq.quantize.plan import Plan
from uq.quantize.scales import checked, quantize_rtn, weight_error


class CalibratedLayers:
    """Quantizes layer after layer, each on the inputs that the layers before it produce."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, tokens: NDArray[np.int32], progress: Progress
    ) -> None:
        """Begin in front of layer 0.

        Args:
            tokens: (sequences, length) int32.
        """
        self._checkpoint = checkpoint
        self._plan = plan
        self._progress = progress
        rows = CheckpointWeights(checkpoint, resident=False).embedding(tokens)
        flat = rows.reshape(-1, rows.shape[-1])
        rounded = quantize_rtn(flat, plan.tensors[EMBEDDING].spec).dequantize()
        exact = rows if plan.corrected else None
        self._calibration = Calibration(checkpoint.config, rounded.reshape(rows.shape), exact)

    def quantize(self, layer: int) -> list[QuantEntry]:
        """Bundle entries of a layer's linears; the next call is for the next layer."""
        weights = self._checkpoint.layer(layer)
        entries: list[QuantEntry] = []

        def stage(roles: Sequence[str], statistics: Statistics) -> dict[str, QuantTensor]:
            factor = factorize(statistics.hessian, self._plan.gptq.damping)
            found: dict[str, QuantTensor] = {}
            for role in roles:
                name = layer_tensor(layer, role)
                found[role], entry = self._linear(name, weights[role], statistics, factor)
                entries.append(entry)
            return found

        self._calibration.quantize_layer(layer, weights, stage)
        return entries

    def skip(self, layer: int, committed: Mapping[str, QuantTensor | NDArray[np.float32]]) -> None:
        """Go on behind a layer that an earlier run has quantized: role -> weight or gain."""
        self._progress.work(f"layer {layer}, quantized before")
        weights = {
            role: value.dequantize() if isinstance(value, QuantTensor) else value
            for role, value in committed.items()
        }
        exact = self._checkpoint.layer(layer) if self._plan.corrected else {}
        self._calibration.pass_layer(layer, exact, weights)

    def _linear(
        self,
        name: str,
        weight: NDArray[np.float32],
        statistics: Statistics,
        factor: Factor | None,
    ) -> tuple[QuantTensor, QuantEntry]:
        self._progress.work(name)
        plan = self._plan.tensors[name]
        method = plan.method if factor is not None else "rtn"
        if factor is None:  # an activation overflowed, or all of them were zero
            self._progress.note(f"{name}: no usable statistics, rounded to nearest")
            found = quantize_rtn(weight, plan.spec)
            error = weight_error(weight, found)
        else:
            if method == "gptq":
                found = quantize_gptq(weight, plan.spec, statistics, factor, self._plan.gptq)
            else:
                found = quantize_rtn(weight, plan.spec, statistics.importance)
            error = output_error(weight, found, statistics.hessian)
        blocks = [checked(name, found)]
        return found, QuantEntry(name, found.shape, plan.spec, plan.layout, method, blocks, error)
