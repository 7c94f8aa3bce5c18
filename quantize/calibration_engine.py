"""Where the arithmetic of calibration runs: what a device must offer so that layers are quantized
on it.

An engine takes the calibration tokens through the layers, on one path or two, and at each stage of
a layer hands out the second moments of the stage's inputs. What they are made of, arrays in main
memory or buffers of a GPU, stays behind `StageStatistics`. `NumpyEngine` in `calibrate.py` is the
measure: another engine gives its codes up to ties that it states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.formats.spec import QuantTensor, Spec
from uq.quantize.plan import GptqOptions

Array = NDArray[np.float32]
LayerRows = Callable[[int], Array]
Spread = Callable[[Array], Array]
Weights = Mapping[str, Array]  # role -> (out, in) linear, or (size,) gain


@dataclass(frozen=True)
class TokenRows:
    """The embedding's rows for some sequences of the calibration, not multiplied by its scale.

    Attributes:
        quantized: (sequences, length, hidden) float32 of the quantized embedding.
        exact: the same of the checkpoint's; None leaves the floating-point path out.
        quantized_rows, exact_rows: layer -> (sequences, length, size), its part of the per-layer
            embedding on both paths, of models that have one.
        spread: the scaled rows of a path -> its residual streams, of models that have several.
    """

    quantized: Array
    exact: Array | None = None
    quantized_rows: LayerRows | None = None
    exact_rows: LayerRows | None = None
    spread: Spread | None = None


class QuantizedWeights(Mapping[str, Array]):
    """Role -> weight of the linears of a stage, dequantized when it is asked for."""

    def __init__(self, tensors: Mapping[str, QuantTensor], scale: Array) -> None:
        """`scale`: (n,) what the columns of the tensors are multiplied by."""
        self.tensors, self._scale = tensors, scale

    def __getitem__(self, role: str) -> Array:
        found: Array = self.tensors[role].dequantize()
        found /= self._scale
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class GptqSolver(Protocol):
    """The statistics of a stage with their damped Hessian factorized.

    Weights are those of the layer; where the statistics were `rescaled`, their columns are, too.
    """

    def quantize(
        self,
        weight: Array,
        spec: Spec,
        options: GptqOptions,
        blocks: Sequence[Array] | None = None,
    ) -> QuantTensor:
        """GPTQ of one linear, weight (rows, n) finite. A scale beyond float16 is for the caller.

        Args:
            blocks: `Curvature.blocks` of the linear, where an engine uses them.
        """
        ...

    def output_error(self, weight: Array, quantized: QuantTensor) -> float:
        """Root mean square error of the outputs over their root mean square."""
        ...


class StageStatistics(Protocol):
    """Second moments of the inputs of a stage's linears, and of what these can correct."""

    @property
    def importance(self) -> Array:
        """(n,) mean square of each input channel."""
        ...

    def rescaled(self, scale: Array) -> StageStatistics:
        """Of the inputs divided by `scale`, (n,). The statistics it was asked of are used up."""
        ...

    def factorize(self, damping: float) -> GptqSolver | str:
        """What quantizes the stage's linears, or why there is none.

        Args:
            damping: in units of the mean of the Hessian's diagonal.
        """
        ...


@dataclass(frozen=True)
class ExpertWork:
    """What is done with the experts of a layer.

    Attributes:
        read: (role, number) -> the checkpoint's weight.
        quantize: (role, number, tokens that chose it, statistics of their inputs, None without
            tokens) -> the weight that the tokens go on with.
    """

    read: Callable[[str, int], Array]
    quantize: Callable[[str, int, int, StageStatistics | None], Array]


# Roles of a stage and the statistics of their input -> role -> weight that the tokens go on with.
QuantizeStage = Callable[[Sequence[str], StageStatistics], Weights]


class CalibrationRun(Protocol):
    """The calibration tokens in front of some layer."""

    def quantize_layer(
        self,
        layer: int,
        weights: MutableMapping[str, Array],
        quantize: QuantizeStage,
        experts: ExpertWork | None = None,
    ) -> None:
        """Quantize a layer stage by stage, and move the tokens behind it.

        Args:
            weights: role -> float32 weight or gain. The engine may take out what it needs no more.
            quantize: called once per stage.
            experts: of models that have some.
        """
        ...

    def pass_layer(
        self, layer: int, exact: MutableMapping[str, Array], quantized: MutableMapping[str, Array]
    ) -> None:
        """Move the tokens behind a layer that was quantized earlier. The weights may be used up.

        Args:
            exact: of the checkpoint; empty when the floating-point path is left out.
            quantized: role -> dequantized weight, or gain; of an expert under role and number.
        """
        ...


class CalibrationEngine(Protocol):
    """A place to calibrate on."""

    @property
    def name(self) -> str:
        """Of a device whose codes differ from those of main memory at ties; else empty."""
        ...

    @property
    def elsewhere(self) -> bool:
        """Whether it works in a memory of its own: main memory has room for a layer read ahead."""
        ...

    def begin(
        self, config: GemmaConfig, rows: Iterable[TokenRows], options: GptqOptions
    ) -> CalibrationRun:
        """The tokens in front of layer 0.

        Args:
            rows: batches of sequences, in the order in which sums over the tokens are taken.
            options: its `clip`, and the strengths of what corrects the outputs.
        """
        ...
