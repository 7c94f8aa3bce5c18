"""Layers quantized with statistics from calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.checkpoint.content import read_contents
from uq.formats.config import layer_tensor
from uq.formats.manifest import gain_name
from uq.formats.spec import QuantTensor
from uq.formats.writer import ArrayEntry, Entry, QuantEntry
from uq.kernels.weights import LayerWeights
from uq.progress import Progress
from uq.quantize.background import LayersAhead
from uq.quantize.calibrate import PLAIN
from uq.quantize.calibration_engine import (
    CalibrationEngine,
    CalibrationRun,
    ExpertWork,
    GptqSolver,
    QuantizedWeights,
    StageStatistics,
)
from uq.quantize.committed import CommittedLayer
from uq.quantize.curvature import Curvature
from uq.quantize.equalize import channel_scale
from uq.quantize.expert_rounding import ExpertStack
from uq.quantize.plan import GptqOptions, Plan
from uq.quantize.recover import misfit, recover
from uq.quantize.scales import checked, quantize_rtn, weight_error
from uq.quantize.token_rows import token_rows

Array = NDArray[np.float32]


Written = Mapping[str, QuantTensor | NDArray[np.float32]]  # role -> weight or gain


class LayerSource(Protocol):
    """Calibrated layers, asked for in their order; each is quantized, or skipped at the start."""

    def quantize(self, layer: int) -> list[Entry]:
        """Bundle entries of a layer."""
        ...

    def skip(self, layer: int, read: Callable[[int], Written]) -> None:
        """Go on behind a layer that an earlier run has quantized; `read` gives it back."""
        ...


class CalibratedLayers:
    """Quantizes layer after layer, each on the inputs that the layers before it produce."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        tokens: NDArray[np.int32],
        engine: CalibrationEngine,
        progress: Progress,
        contents: MutableMapping[str, str],
        idle: Event,
        curvature: Curvature | None = None,
    ) -> None:
        """Begin in front of layer 0.

        Args:
            tokens: (sequences, length) int32.
            engine: where the tokens go through the layers, and GPTQ is run.
            contents: the hashes of the layers that are quantized are entered here.
            idle: set while nothing is being written; only then are layers read ahead.
            curvature: of the outputs of all linears.
        """
        self._checkpoint = checkpoint
        self._plan = plan
        self._progress = progress
        self._quantizer = LayerQuantizer(checkpoint, plan, progress, contents, curvature)
        self._read: Callable[[int], dict[str, Array]] = partial(checkpoint.layer, contents=contents)
        if engine.elsewhere:
            self._read = LayersAhead(checkpoint, contents, idle)
        rows = token_rows(checkpoint, plan, tokens)
        self._calibration = engine.begin(checkpoint.config, rows, options_of(plan))

    def quantize(self, layer: int) -> list[Entry]:
        """Bundle entries of a layer; the next call is for the next layer."""
        return self._quantizer.quantize(layer, self._read(layer), self._calibration)

    def skip(self, layer: int, read: Callable[[int], Written]) -> None:
        """Go on behind a layer that an earlier run has quantized."""
        self._progress.work(f"layer {layer}, quantized before")
        source = CommittedLayer(self._checkpoint, layer, read(layer))
        weights = LayerWeights(source, layer, resident=False)
        exact: dict[str, Array] = {}
        if self._plan.corrected:
            exact = LayerWeights(self._checkpoint, layer, resident=False)
        self._calibration.pass_layer(layer, exact, weights)


class LayerQuantizer:
    """Quantizes a layer on what its linears see of the calibration."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        progress: Progress,
        contents: MutableMapping[str, str],
        curvature: Curvature | None = None,
    ) -> None:
        """`contents`: the hashes of experts, which are read one by one, are entered here."""
        self._curvature = curvature
        self._checkpoint = checkpoint
        self._plan = plan
        self._progress = progress
        self._contents = contents

    @np.errstate(over="ignore", invalid="ignore")
    def quantize(
        self, layer: int, weights: dict[str, Array], calibration: CalibrationRun
    ) -> list[Entry]:
        """Bundle entries of the layer that the tokens are in front of; takes them behind it.

        Args:
            weights: `Checkpoint.layer`, used up.
        """
        gains = {role: weights[role] for role in self._checkpoint.config.norm_shapes(layer)}
        linears: list[Entry] = []

        def stage(roles: Sequence[str], statistics: StageStatistics) -> QuantizedWeights:
            scale = self._equalize(layer, roles, statistics.importance, gains)
            statistics = statistics.rescaled(scale)
            importance = statistics.importance
            solver = statistics.factorize(self._plan.gptq.damping)
            found: dict[str, QuantTensor] = {}
            for role in roles:
                name = layer_tensor(layer, role)
                found[role], entry = self._linear(name, weights[role], scale, importance, solver)
                linears.append(entry)
            return QuantizedWeights(found, scale)

        stacks = {
            role: ExpertStack(self._checkpoint, self._plan, layer, role)
            for role in self._checkpoint.config.expert_roles(layer)
        }
        experts = self._expert_work(layer, stacks) if stacks else None
        calibration.quantize_layer(layer, weights, stage, experts)
        kept = {role: weights[role] for role in self._checkpoint.config.kept_shapes(layer)}
        return [*linears, *map(self._stacked, stacks.values()), *arrays(layer, gains, kept)]

    def _expert_work(self, layer: int, stacks: Mapping[str, ExpertStack]) -> ExpertWork:
        def quantize(role: str, number: int, tokens: int, found: StageStatistics | None) -> Array:
            if number == 0:
                self._progress.work(stacks[role].name)
            return stacks[role].quantize(number, tokens, found)

        return ExpertWork(partial(self._checkpoint.expert, layer), quantize)

    def _stacked(self, stack: ExpertStack) -> QuantEntry:
        """The entry of all experts; their source is hashed, and what fell back is told."""
        entry, info = stack.entry(), self._checkpoint.tensors[stack.name]
        if entry.fallback is not None:
            self._progress.note(f"{stack.name}: {entry.fallback}")
        with ThreadPoolExecutor(1) as pool:
            self._contents.update(read_contents({stack.name: info}, pool))
        return entry

    def _equalize(
        self,
        layer: int,
        roles: Sequence[str],
        importance: NDArray[np.float32],
        gains: dict[str, NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """(n,) factors of the columns of a stage; divides the gain in front by them.

        All 1 where a weight lies on its grid: other columns would take it off.
        """
        norm = self._checkpoint.config.norm_before(roles[0])
        methods = {self._plan.tensors[layer_tensor(layer, role)].method for role in roles}
        if norm is None or "grid" in methods or not self._plan.uses_gptq:
            return np.ones_like(importance)
        scale = channel_scale(importance, self._plan.gptq.equalize)
        gains[norm] = gains[norm] / scale
        return scale

    def _linear(
        self,
        name: str,
        weight: NDArray[np.float32],
        scale: NDArray[np.float32],
        importance: NDArray[np.float32],
        solver: GptqSolver | str,
    ) -> tuple[QuantTensor, QuantEntry]:
        self._progress.work(name)
        plan = self._plan.tensors[name]
        found, method, fallback = self._codes(name, weight, scale, importance, solver)
        if fallback is not None:
            self._progress.note(f"{name}: {fallback}")
        if method == "grid" or isinstance(solver, str):
            error = weight_error(weight * scale, found)
        else:
            error = solver.output_error(weight, found)
        blocks = [checked(name, found)]
        return found, QuantEntry(
            name, found.shape, plan.spec, plan.layout, method, blocks, error, fallback
        )

    def _codes(
        self,
        name: str,
        weight: NDArray[np.float32],
        scale: NDArray[np.float32],
        importance: NDArray[np.float32],
        solver: GptqSolver | str,
    ) -> tuple[QuantTensor, str, str | None]:
        """The quantized tensor, the method, and why it is not the planned one."""
        spec, method = self._plan.tensors[name].spec, self._plan.tensors[name].method
        gptq = self._plan.gptq
        if method == "grid":
            found, fits = recover(weight * scale, spec, self._checkpoint.tensors[name].dtype)
            return found, method, misfit(int(fits.sum()), fits.size)
        if isinstance(solver, str):
            return quantize_rtn(weight * scale, spec), "rtn", f"{solver}; rounded to nearest"
        if method == "gptq":
            return solver.quantize(weight, spec, gptq, self._outputs(name, weight)), method, None
        return quantize_rtn(weight * scale, spec, importance), method, None

    def _outputs(self, name: str, weight: NDArray[np.float32]) -> list[Array] | None:
        """Curvature of a linear's outputs."""
        if self._curvature is None:
            return None
        return self._curvature.blocks(name, weight.shape, self._plan.gptq.work.row_numbers)


def options_of(plan: Plan) -> GptqOptions:
    """How tokens are weighed and outputs corrected."""
    plain = replace(PLAIN, work=plan.gptq.work)
    return plan.gptq if plan.uses_gptq else plain  # rtn weighs all tokens alike


def arrays(
    layer: int, gains: Mapping[str, NDArray[np.float32]], kept: Mapping[str, NDArray[np.float32]]
) -> list[Entry]:
    """What a layer keeps in float32: norms, and what is never quantized."""
    return [
        *(ArrayEntry(gain_name(layer_tensor(layer, role)), gains[role]) for role in gains),
        *(ArrayEntry(layer_tensor(layer, role), kept[role]) for role in kept),
    ]
