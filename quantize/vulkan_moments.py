"""Second moments of what linears see on a device, and of what can correct them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.dense.cells import Cell, Row
from uq.kernels.vulkan.dense.layer import Layer, Tokens, power_below
from uq.kernels.vulkan.dense.matrix import Matrix
from uq.kernels.vulkan.dense.workshop import Workshop
from uq.kernels.vulkan.memory import Span
from uq.quantize.calibration_engine import Array, Weights
from uq.quantize.moments import GAIN_RIDGE, token_weights
from uq.quantize.plan import GptqOptions
from uq.quantize.vulkan_batches import Batches
from uq.quantize.vulkan_gptq import DeviceStatistics

HEADROOM = 4.0  # root mean square of weighed outputs as float16, which end at 65504


@dataclass(frozen=True)
class Outputs:
    """What is known of the outputs of a linear that joins the residual stream.

    Attributes:
        sizes, roots: of every token, its mean square and the root of its weight.
        count: sum of the weights.
        gain: (rows,) what `undo_norm` multiplies by, but for the size; None without a norm.
        factor: of changes of the outputs as float16.
    """

    sizes: Span
    roots: Span
    count: float
    gain: Span | None
    factor: float


class Moments:
    """Takes the statistics of a stage over all batches."""

    def __init__(
        self, workshop: Workshop, config: GemmaConfig, options: GptqOptions, batches: Batches
    ) -> None:
        self._workshop, self._config, self._options = workshop, config, options
        self._store, self._cells = workshop.store, workshop.cells
        self._products, self._phase = workshop.products, workshop.stream.phase
        self._batches = batches

    def of_inputs(self, quantized: Layer, exact: Layer, *, mlp: bool) -> DeviceStatistics:
        """Of linears behind a norm."""
        n = self._config.hidden_size
        hessian, cross = self._store.matrix("hessian", n, n), None
        with self._phase("moments"):
            for number, pair in self._batches:
                chunk = pair.quantized
                x = quantized.mlp_input(chunk) if mlp else quantized.attention_input(chunk)
                alpha = 1.0 / (x.factor**2 * self._batches.tokens)
                self._products.square(hessian, x.half, alpha=alpha, add=number > 0, by_k=True)
                if pair.exact is not None:
                    cross = self._store.matrix("cross", n, n)
                    change = exact.input_change(pair.exact, chunk, mlp=mlp)
                    alpha = 1.0 / (change.factor * x.factor * self._batches.tokens)
                    self._products.multiply(
                        cross, change.half, x.half,
                        alpha=alpha, add=number > 0, a_by_k=True, b_by_k=True,
                    )  # fmt: skip
        return DeviceStatistics.of(self._workshop, hessian, cross=cross)

    def of_outputs(
        self, role: str, norm: str, weights: Weights, inputs: Sequence[Tokens], exact: Layer
    ) -> DeviceStatistics:
        """Of a linear whose outputs join the residual stream."""
        weight = weights[role]
        rows, n = weight.shape
        hessian, wanted = self._store.matrix("hessian", n, n), None
        corrects = self._batches.corrects
        with self._phase("moments"):
            outputs = self._outputs(role, norm, weights, inputs, exact)
            if corrects:
                wanted = self._store.matrix("wanted", rows, n)
            for number, _ in self._batches:
                x = self._batches.input(role, number, inputs)
                root = self._of_chunk(outputs.roots, number)
                weighed = self._store.matrix("weighed", x.half.rows, n, "f16")
                self._cells.run(Cell.HALVES, weighed, other=x.half, by_row=root)
                alpha = 1.0 / (x.factor**2 * outputs.count)
                self._products.square(hessian, weighed, alpha=alpha, add=number > 0, by_k=True)
                if wanted is None:
                    continue
                change = self._change(number, outputs)
                alpha = 1.0 / (x.factor * outputs.factor * outputs.count)
                self._products.multiply(
                    wanted, change, weighed,
                    alpha=alpha, add=number > 0, a_by_k=True, b_by_k=True,
                )  # fmt: skip
        found = DeviceStatistics.of(self._workshop, hessian, wanted=wanted)
        if corrects:
            found.subtract_present(weight, self._options.correction)
        return found

    def _outputs(
        self,
        role: str,
        norm: str,
        weights: Weights,
        inputs: Sequence[Tokens],
        exact: Layer,
    ) -> Outputs:
        found = self._sizes(role, inputs, exact)
        median, roots, count = (
            float(np.median(np.concatenate(found))),
            found,
            float(self._batches.tokens),
        )
        gain = None
        if self._config.post_norms:
            counts = token_weights([size[:, None] for size in found], self._options.clip)
            count = math.fsum(float(each.sum(dtype=np.float64)) for each in counts)
            roots = [np.sqrt(each[:, 0]) for each in counts]
            squared = weights[norm] ** 2  # as `undo_norm`
            undoing = weights[norm] / (squared + np.float32(GAIN_RIDGE) * squared.mean())
            gain = self._store.vector("undoing", undoing)
        else:
            roots = [np.ones_like(size) for size in found]
        sizes, weighing = self._of_tokens("sizes of tokens", found), self._of_tokens("roots", roots)
        return Outputs(sizes, weighing, count, gain, power_below(HEADROOM, math.sqrt(median)))

    def _of_tokens(self, name: str, values: Sequence[Array]) -> Span:
        """Numbers of all tokens; those of a chunk begin at its multiple of the largest one."""
        room = np.zeros((len(values), self._batches.room), np.float32)
        for number, part in enumerate(values):
            room[number, : len(part)] = part
        return self._store.vector(name, room.reshape(-1))

    def _of_chunk(self, span: Span, number: int) -> Span:
        return span.part(4 * number * self._batches.room, 4 * self._batches.room)

    def _sizes(self, role: str, inputs: Sequence[Tokens], exact: Layer) -> list[Array]:
        """(tokens,) per chunk: mean square of each token's output."""
        room, eps = self._batches.room, self._config.rms_norm_eps
        span = self._store.span("sizes", 4 * room * len(inputs))
        for number, pair in enumerate(self._batches.pairs):
            if pair.exact is not None:
                out = self._batches.exact_out(number)
            else:
                out = exact.linear(role, self._batches.input(role, number, inputs), "out")
            self._cells.rows(Row.SIZE, self._of_chunk(span, number), 1, out, eps=eps)
        found = self._store.numbers(span, room * len(inputs)).reshape(-1, room)
        return [found[number, : x.half.rows] for number, x in enumerate(inputs)]

    def _change(self, number: int, outputs: Outputs) -> Matrix:
        """(tokens, rows) float16 times a factor: what the outputs should change by, weighed."""
        pair, out = self._batches.pairs[number], self._batches.exact_out(number)
        assert pair.exact is not None
        change = self._store.matrix("change", out.rows, out.cols, "f16")
        self._cells.rows(
            Row.WANTED,
            change.span,
            change.stride,
            pair.exact.hidden,
            other=pair.quantized.hidden,
            gain=outputs.gain,
            sizes=self._of_chunk(outputs.sizes, number),
            branch=out,
            factors=self._of_chunk(outputs.roots, number),
            factor=outputs.factor,
            correction=self._options.correction,
            residual=self._options.residual,
        )
        return change
