"""Calibration on a GPU: the same arithmetic as `calibrate.py` and `gptq.py`, in float16 and float32.

The tokens, both paths, the statistics and the weights in work stay on the device. Inputs of linears
and the weights that they meet are float16, sums float32; what GPTQ does with the second moments is
float32 throughout. Where main memory computes in float64, codes differ at ties: docs/performance.md
says how many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.reference import embed, flat
from uq.kernels.vulkan.dense.cells import Cell, Cells, Levels, Row
from uq.kernels.vulkan.dense.factor import inverse_cholesky
from uq.kernels.vulkan.dense.grids import (
    BYTES,
    SYMMETRIC,
    ZEROS,
    Curvature,
    GridKind,
    Quantizer,
)
from uq.kernels.vulkan.dense.layer import Chunk, Layer, Tokens, power_below, row_norms
from uq.kernels.vulkan.dense.matrix import Matrix, Store, padded
from uq.kernels.vulkan.dense.products import Products
from uq.kernels.vulkan.dense.stream import Stream
from uq.kernels.vulkan.device import Gpu, PhysicalGpu
from uq.kernels.vulkan.memory import Arena, Transfers
from uq.kernels.vulkan.pipelines import Pipelines
from uq.quantize.calibration_engine import Array, QuantizeStage, TokenRows, Weights
from uq.quantize.descent import SWEEPS
from uq.quantize.gptq import DIAGONAL_FLOOR, ESCALATION, REFIT_RIDGE, unusable
from uq.quantize.grids import range_steps, symmetric_steps
from uq.quantize.moments import GAIN_RIDGE, token_weights
from uq.quantize.plan import GptqOptions
from uq.quantize.scales import relative_importance

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
HEADROOM = 4.0  # root mean square of weighed outputs as float16, which end at 65504


@dataclass(frozen=True)
class Workshop:
    """A device and all that works on it."""

    gpu: Gpu
    arena: Arena
    transfers: Transfers
    pipelines: Pipelines
    stream: Stream
    store: Store
    products: Products
    cells: Cells

    @classmethod
    def open(cls, physical: PhysicalGpu, pipeline_cache: Path, *, timed: bool = False) -> Workshop:
        """Raises DeviceError: the device fails."""
        gpu = Gpu(physical)
        arena, transfers = Arena(gpu, 0), Transfers(gpu)
        pipelines = Pipelines(gpu, pipeline_cache)
        stream = Stream(gpu, pipelines, transfers, timed=timed)
        store = Store(stream, arena)
        return cls(
            gpu, arena, transfers, pipelines, stream, store, Products(stream), Cells(stream)
        )

    @property
    def tools(self) -> tuple[Stream, Store, Products, Cells]:
        return self.stream, self.store, self.products, self.cells

    def close(self) -> None:
        self.stream.wait()
        for part in (self.pipelines, self.transfers, self.arena, self.gpu):
            part.close()


class VulkanEngine:
    """Calibrates on one GPU."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def begin(
        self, config: GemmaConfig, rows: Iterable[TokenRows], options: GptqOptions
    ) -> VulkanCalibration:
        return VulkanCalibration(self._workshop, config, rows, options)


@dataclass(frozen=True)
class Pair:
    """Some sequences on the quantized path, and on the floating-point path when it is followed."""

    quantized: Chunk
    exact: Chunk | None


class VulkanCalibration:
    """The calibration tokens in front of some layer, on a device."""

    def __init__(
        self,
        workshop: Workshop,
        config: GemmaConfig,
        rows: Iterable[TokenRows],
        options: GptqOptions,
    ) -> None:
        """The arguments are those of `CalibrationEngine.begin`."""
        self._workshop, self._config, self._options = workshop, config, options
        self._store, self._cells = workshop.store, workshop.cells
        self._products, self._phase = workshop.products, workshop.stream.phase
        self._pairs = [self._placed(number, batch) for number, batch in enumerate(rows)]
        self._tokens = sum(pair.quantized.tokens for pair in self._pairs)

    def _placed(self, number: int, batch: TokenRows) -> Pair:
        exact = None
        if batch.exact is not None:
            exact = self._chunk(f"exact hidden {number}", batch.exact)
        return Pair(self._chunk(f"hidden {number}", batch.quantized), exact)

    def _chunk(self, name: str, rows: Array) -> Chunk:
        hidden = self._store.put(name, flat(embed(self._config, rows)))
        return Chunk(hidden, rows.shape[0], rows.shape[1])

    def quantize_layer(self, layer: int, weights: Weights, quantize: QuantizeStage) -> None:
        """As `CalibrationRun` asks for it."""
        exact, quantized = (self._layer(layer, name) for name in ("exact", "quantized"))
        with self._phase("upload"):
            exact.set_weights(weights)
            quantized.set_weights({role: w for role, w in weights.items() if w.ndim == 1})

        def replace_weights(roles: Sequence[str], statistics: DeviceStatistics) -> None:
            found = quantize(roles, statistics)
            with self._phase("upload"):
                quantized.set_weights({role: found.get(role, weights[role]) for role in roles})

        replace_weights(ATTENTION, self._input_statistics(quantized, exact, mlp=False))
        contexts = self._contexts(quantized, exact)
        role, norm = "self_attn.o_proj", "post_attention_layernorm"
        statistics = self._output_statistics(role, norm, weights, contexts, exact)
        replace_weights((role,), statistics)
        self._join(role, norm, contexts, quantized)
        replace_weights(MLP, self._input_statistics(quantized, exact, mlp=True))
        hidden = self._mlp_hidden(quantized, exact)
        role, norm = "mlp.down_proj", "post_feedforward_layernorm"
        replace_weights((role,), self._output_statistics(role, norm, weights, hidden, exact))
        self._join(role, norm, hidden, quantized)

    def pass_layer(self, layer: int, exact: Weights, quantized: Weights) -> None:
        """As `CalibrationRun` asks for it."""
        paths = self._layer(layer, "exact"), self._layer(layer, "quantized")
        paths[0].set_weights(exact)
        paths[1].set_weights(quantized)
        contexts = self._contexts(paths[1], paths[0])
        self._join("self_attn.o_proj", "post_attention_layernorm", contexts, paths[1])
        hidden = self._mlp_hidden(paths[1], paths[0])
        self._join("mlp.down_proj", "post_feedforward_layernorm", hidden, paths[1])

    def _layer(self, number: int, name: str) -> Layer:
        return Layer(self._config, number, name, self._workshop.tools)

    def _input_statistics(self, quantized: Layer, exact: Layer, *, mlp: bool) -> DeviceStatistics:
        """Of linears behind a norm."""
        n = self._config.hidden_size
        hessian, cross = self._store.matrix("hessian", n, n), None
        with self._phase("moments"):
            for number, pair in enumerate(self._pairs):
                chunk = pair.quantized
                x = quantized.mlp_input(chunk) if mlp else quantized.attention_input(chunk)
                alpha = 1.0 / (x.factor**2 * self._tokens)
                self._products.square(hessian, x.half, alpha=alpha, add=number > 0, by_k=True)
                if pair.exact is not None:
                    cross = self._store.matrix("cross", n, n)
                    change = exact.input_change(pair.exact, chunk, mlp=mlp)
                    alpha = 1.0 / (change.factor * x.factor * self._tokens)
                    self._products.multiply(
                        cross, change.half, x.half,
                        alpha=alpha, add=number > 0, a_by_k=True, b_by_k=True,
                    )  # fmt: skip
        return DeviceStatistics.of(self._workshop, hessian, cross=cross)

    def _contexts(self, quantized: Layer, exact: Layer) -> list[Tokens]:
        """Inputs of o_proj on the quantized path; outputs on the other one go to `_exact_out`."""
        found = []
        with self._phase("attention"):
            for number, pair in enumerate(self._pairs):
                if pair.exact is not None:
                    x = exact.context(pair.exact, "exact context")
                    exact.linear("self_attn.o_proj", x, f"exact out {number}")
                found.append(quantized.context(pair.quantized, f"context {number}"))
        return found

    def _mlp_hidden(self, quantized: Layer, exact: Layer) -> list[Tokens]:
        found = []
        with self._phase("mlp"):
            for number, pair in enumerate(self._pairs):
                if pair.exact is not None:
                    y = exact.mlp_hidden(exact.mlp_input(pair.exact), "exact mlp hidden")
                    exact.linear("mlp.down_proj", y, f"exact out {number}")
                x = quantized.mlp_input(pair.quantized)
                found.append(quantized.mlp_hidden(x, f"mlp hidden {number}"))
        return found

    def _exact_out(self, number: int) -> Matrix:
        """Outputs of the linear that joins the stream, on the floating-point path."""
        tokens = self._pairs[number].quantized.tokens
        return self._store.matrix(f"exact out {number}", tokens, self._config.hidden_size)

    def _join(self, role: str, norm: str, inputs: Sequence[Tokens], quantized: Layer) -> None:
        with self._phase("join"):
            for number, pair in enumerate(self._pairs):
                out = quantized.linear(role, inputs[number], "out")
                quantized.join(pair.quantized, out, norm)
                if pair.exact is not None:
                    quantized.join(pair.exact, self._exact_out(number), norm)

    def _output_statistics(
        self, role: str, norm: str, weights: Weights, inputs: Sequence[Tokens], exact: Layer
    ) -> DeviceStatistics:
        """Of a linear whose outputs join the residual stream."""
        weight, config = weights[role], self._config
        rows, n = weight.shape
        with self._phase("moments"):
            sizes = self._sizes(role, inputs, exact)
            roots, count = self._roots(sizes)
            hessian, wanted = self._store.matrix("hessian", n, n), None
            corrects = self._pairs[0].exact is not None
            if corrects:
                wanted = self._store.matrix("wanted", rows, n)
            gain = self._undoing(weights[norm]) if config.post_norms else None
            size = float(np.median(np.concatenate(sizes)))
            factor = power_below(HEADROOM, math.sqrt(size))
            for number, x in enumerate(inputs):
                root = self._store.vector("roots", roots[number])
                weighed = self._store.matrix("weighed", x.half.rows, n, "f16")
                self._cells.run(Cell.HALVES, weighed, other=x.half, by_row=root)
                alpha = 1.0 / (x.factor**2 * count)
                self._products.square(hessian, weighed, alpha=alpha, add=number > 0, by_k=True)
                if wanted is None:
                    continue
                change = self._change(number, root, sizes[number], gain, factor)
                alpha = 1.0 / (x.factor * factor * count)
                self._products.multiply(
                    wanted, change, weighed,
                    alpha=alpha, add=number > 0, a_by_k=True, b_by_k=True,
                )  # fmt: skip
        found = DeviceStatistics.of(self._workshop, hessian, wanted=wanted)
        if corrects:
            found.subtract_present(weight, self._options.correction)
        return found

    def _sizes(self, role: str, inputs: Sequence[Tokens], exact: Layer) -> list[Array]:
        """(tokens,) per chunk: mean square of each token's output."""
        found = []
        for number, x in enumerate(inputs):
            followed = self._pairs[number].exact is not None
            out = self._exact_out(number) if followed else exact.linear(role, x, "out")
            span = self._store.span("sizes", 4 * out.height)
            eps = self._config.rms_norm_eps
            self._cells.rows(Row.SIZE, span, 1, out, eps=eps)
            found.append(self._store.numbers(span, out.rows))
        return found

    def _roots(self, sizes: Sequence[Array]) -> tuple[list[Array], float]:
        """(tokens,) per chunk, roots of the weights of the tokens, and the sum of the weights."""
        if not self._config.post_norms:
            return [np.ones_like(size) for size in sizes], float(self._tokens)
        counts = token_weights([size[:, None] for size in sizes], self._options.clip)
        total = math.fsum(float(count.sum(dtype=np.float64)) for count in counts)
        return [np.sqrt(count[:, 0]) for count in counts], total

    def _undoing(self, gain: Array) -> Array:
        """(rows,) what `undo_norm` multiplies by, but for the size."""
        squared = gain**2
        found: Array = gain / (squared + np.float32(GAIN_RIDGE) * squared.mean())
        return found

    def _change(
        self, number: int, root: object, size: Array, gain: Array | None, factor: float
    ) -> Matrix:
        """(tokens, rows) float16 times `factor`: what the outputs should change by, weighed."""
        pair, out = self._pairs[number], self._exact_out(number)
        assert pair.exact is not None
        change = self._store.matrix("change", out.rows, out.cols, "f16")
        self._cells.rows(
            Row.WANTED,
            change.span,
            change.stride,
            pair.exact.hidden,
            other=pair.quantized.hidden,
            gain=None if gain is None else self._store.vector("undoing", gain),
            sizes=self._store.vector("sizes of tokens", size),
            branch=out,
            factors=root,  # type: ignore[arg-type]
            factor=factor,
            correction=self._options.correction,
            residual=self._options.residual,
        )
        return change


@dataclass(frozen=True)
class DeviceStatistics:
    """`Statistics` on a device, over a power of two; `scale` waits to be applied.

    Attributes:
        diagonal: (n,) of the Hessian, in its unit.
        unit: power of two that the matrices were multiplied by.
        scale: (n,) that the inputs are divided by; None: by 1.
    """

    workshop: Workshop
    hessian: Matrix
    cross: Matrix | None
    wanted: Matrix | None
    diagonal: Array
    unit: float
    scale: Array | None = None

    @classmethod
    def of(
        cls,
        workshop: Workshop,
        hessian: Matrix,
        *,
        cross: Matrix | None = None,
        wanted: Matrix | None = None,
    ) -> DeviceStatistics:
        """Brings the mean of the diagonal to 1 to 2; of `hessian` the lower half is set."""
        workshop.cells.run(Cell.MIRROR, hessian, hessian)
        vector = workshop.store.matrix("diagonal", 1, hessian.cols)
        workshop.cells.run(Cell.GET_DIAGONAL, vector, hessian)
        diagonal = workshop.store.numbers(vector.span, hessian.cols).copy()
        unit = power_below(2.0, float(diagonal.mean(dtype=np.float64)))
        found = cls(workshop, hessian, cross, wanted, diagonal, 1.0)
        return found._scaled(None, unit)

    @property
    def importance(self) -> Array:
        squared = np.float32(1) if self.scale is None else self.scale**2
        found: Array = self.diagonal / (np.float32(self.unit) * squared)
        return found

    def rescaled(self, scale: Array) -> DeviceStatistics:
        """Of the inputs divided by `scale`."""
        return self if (scale == 1).all() else replace(self, scale=scale)

    def subtract_present(self, weight: Array, correction: float) -> None:
        """wanted -= correction * weight H."""
        assert self.wanted is not None
        store, cells = self.workshop.store, self.workshop.cells
        placed = store.put("uploaded", weight)
        peak = row_norms(cells, store, placed)[1]
        factor = power_below(1.0, peak)
        cells.run(Cell.COPY, placed, placed, alpha=factor)
        self.workshop.products.multiply(
            self.wanted, placed, self.hessian, alpha=-correction / factor, add=True
        )

    def factorize(self, damping: float) -> DeviceSolver | str:
        """As `StageStatistics` asks for it."""
        diagonal = self.diagonal
        mean = float(diagonal.mean(dtype=np.float64))
        if not math.isfinite(mean) or mean <= 0:
            return unusable(diagonal.astype(np.float64)[None])
        here = self._applied()
        return here._factorized(damping) or unusable(np.ones((1, 1)))

    def _applied(self) -> DeviceStatistics:
        """With `scale` applied, and the mean of the diagonal at 1 to 2 again."""
        if self.scale is None:
            return self
        mean = float((self.diagonal / self.scale**2).mean(dtype=np.float64))
        return self._scaled(1 / self.scale, power_below(2.0, mean))

    def _scaled(self, factors: Array | None, unit: float) -> DeviceStatistics:
        cells, store = self.workshop.cells, self.workshop.store
        by = None if factors is None else store.vector("column factors", factors)
        for matrix in (self.hessian, self.cross):
            if matrix is not None:
                cells.run(Cell.COPY, matrix, matrix, by_row=by, by_col=by, alpha=unit)
        if self.wanted is not None:
            cells.run(Cell.COPY, self.wanted, self.wanted, by_col=by, alpha=unit)
        squared = np.float32(1) if factors is None else factors**2
        diagonal = self.diagonal * squared * np.float32(unit)
        return replace(self, diagonal=diagonal, unit=self.unit * unit, scale=None)

    def _factorized(self, damping: float) -> DeviceSolver | None:
        workshop, n = self.workshop, self.hessian.cols
        store = workshop.store
        diagonal = self.diagonal.astype(np.float64)
        order = np.argsort(-self.diagonal, kind="stable")
        with workshop.stream.phase("factor"):
            for attempt, factor in enumerate(ESCALATION, start=1):
                floor = DIAGONAL_FLOOR * diagonal.max() if attempt == len(ESCALATION) else 0.0
                damped = np.maximum(diagonal, floor) + factor * damping * diagonal.mean()
                upper = self._upper(order, damped)
                if upper is None:
                    continue
                vector = store.matrix("pivots", 1, n)
                workshop.cells.run(Cell.GET_DIAGONAL, vector, upper)
                left = np.empty(n)
                left[order] = store.numbers(vector.span, n).astype(np.float64) ** -2
                if np.isfinite(left).all():
                    return DeviceSolver(self, self._curvature(order, upper), left)
        return None

    def _curvature(self, order: NDArray[np.intp], upper: Matrix) -> Curvature:
        store, n = self.workshop.store, len(order)
        places = np.empty(n, np.uint32)
        places[order] = np.arange(n, dtype=np.uint32)
        diagonal = store.put("diagonal", self.diagonal[None])
        return Curvature(
            self.hessian,
            diagonal,
            upper,
            store.vector("order", order.astype(np.uint32)),
            store.vector("places", places),
        )

    def _upper(self, order: NDArray[np.intp], damped: NDArray[np.float64]) -> Matrix | None:
        """U of the damped Hessian by place; None where that is not positive definite."""
        workshop, n = self.workshop, len(order)
        store, cells = workshop.store, workshop.cells
        matrix, inverse = store.matrix("damped", n, n), store.matrix("inverse", n, n)
        backwards = store.vector("index", order[::-1].astype(np.uint32))
        cells.run(Cell.SQUARE, matrix, self.hessian, index=backwards)
        entries = store.put("entries", damped[order[::-1]].astype(np.float32)[None])
        cells.run(Cell.SET_DIAGONAL, matrix, entries)
        workshop.stream.clear(inverse.span)
        failed = store.vector("failed", np.zeros(1, np.uint32))
        inverse_cholesky(workshop.stream, workshop.products, matrix, inverse, failed)
        if store.numbers(failed, 1).view(np.uint32)[0]:
            return None
        flip = store.vector("index", np.arange(n - 1, -1, -1, dtype=np.uint32))
        cells.run(Cell.SQUARE, matrix, inverse, index=flip)
        return matrix


class DeviceSolver:
    """A `GptqSolver` on a device."""

    def __init__(
        self, statistics: DeviceStatistics, curvature: Curvature, left: NDArray[np.float64]
    ) -> None:
        """`left`: as `left_variances` gives it."""
        self._statistics, self._curvature, self._left = statistics, curvature, left
        workshop = statistics.workshop
        self._workshop, self._store, self._cells = workshop, workshop.store, workshop.cells
        self._products, self._phase = workshop.products, workshop.stream.phase
        self._quantizer = Quantizer(*workshop.tools)
        self._errors: dict[int, float] = {}  # id of a tensor that was made here

    def quantize(self, weight: Array, spec: Spec, options: GptqOptions) -> QuantTensor:
        """As `quantize_gptq`."""
        quantizer, curvature = self._quantizer, self._curvature
        with self._phase("upload"):
            placed, unit = self._placed(weight)
        with self._phase("target"):
            target, by_place = self._target(placed, unit, options)
        with self._phase("round"):
            grid = quantizer.search(target, _kind(spec), self._importance, unit)
            quantizer.round(by_place, grid, curvature)
        outputs = self._store.matrix("outputs", target.rows, target.cols)
        damping = options.damping * float(self._statistics.diagonal.mean(dtype=np.float64))
        if options.refit:
            with self._phase("refit"):
                self._products.multiply(outputs, target, curvature.hessian)
                quantizer.refit(outputs, grid, curvature, REFIT_RIDGE, unit)
        for _ in range(options.descents):
            with self._phase("descent"):
                quantizer.descend(target, grid, curvature, damping, SWEEPS)
            if options.refit:
                with self._phase("refit"):
                    quantizer.refit(outputs, grid, curvature, REFIT_RIDGE, unit)
        with self._phase("error"):
            error = self._error(placed, grid)
        with self._phase("download"):
            found = self._tensor(grid, spec, unit)
        self._errors[id(found)] = error
        return found

    def output_error(self, weight: Array, quantized: QuantTensor) -> float:
        """As `output_error` of gptq.py."""
        if id(quantized) in self._errors:
            return self._errors[id(quantized)]
        placed, missing = self._placed(weight)[0], self._store.matrix("missing", *weight.shape)
        unit = np.float32(power_below(1.0, float(np.abs(weight).max())))
        self._store.put("missing", (weight - quantized.dequantize()) * unit)
        return self._ratio(placed, missing)

    @property
    def _importance(self) -> Array:
        """(n,) as `scale_importance`, with mean 1."""
        found = np.sqrt(self._statistics.diagonal * self._left).astype(np.float32)
        return relative_importance(found, len(found))

    def _placed(self, weight: Array) -> tuple[Matrix, float]:
        """The weight over a power of two that leaves its largest magnitude at 0.5 to 1."""
        placed = self._store.put("weight", weight)
        unit = 1.0 / power_below(1.0, row_norms(self._cells, self._store, placed)[1])
        self._cells.run(Cell.COPY, placed, placed, alpha=1.0 / unit)
        return placed, unit

    def _target(self, weight: Matrix, unit: float, options: GptqOptions) -> tuple[Matrix, Matrix]:
        """The weight that is rounded, by column and by place."""
        cells, store, products = self._cells, self._store, self._products
        shape, found = (weight.rows, weight.cols), self._statistics
        by_place = store.matrix("by place", *shape)
        curvature = self._curvature
        if found.cross is None and found.wanted is None:
            cells.run(Cell.GATHER, by_place, weight, index=curvature.order)
            return weight, by_place
        goal, target = store.matrix("goal", *shape), store.matrix("target", *shape)
        if found.cross is not None:
            products.multiply(goal, weight, found.cross, alpha=options.correction, b_by_k=True)
        if found.wanted is not None:
            cells.run(Cell.COPY, goal, found.wanted, alpha=1.0 / unit)
        half = store.matrix("slope", *shape)
        cells.run(Cell.GATHER, by_place, goal, index=curvature.order)
        products.multiply(half, by_place, curvature.upper)
        cells.run(Cell.GATHER, by_place, weight, index=curvature.order)
        products.multiply(by_place, half, curvature.upper, add=True, b_by_k=True)
        cells.run(Cell.GATHER, target, by_place, index=curvature.places)
        return target, by_place

    def _error(self, weight: Matrix, grid: Levels) -> float:
        missing = self._store.matrix("missing", weight.rows, weight.cols)
        self._cells.run(Cell.MISSING, missing, weight, grid=grid)
        return self._ratio(weight, missing)

    def _ratio(self, weight: Matrix, missing: Matrix) -> float:
        energy = self._energy(weight)
        return math.sqrt(max(self._energy(missing), 0.0) / energy) if energy > 0 else 0.0

    def _energy(self, matrix: Matrix) -> float:
        """Sum over the rows of m H m^T."""
        outputs = self._store.matrix("slope", matrix.rows, matrix.cols)
        self._products.multiply(outputs, matrix, self._curvature.hessian)
        sums = self._store.span("sums", 4 * matrix.height)
        self._cells.rows(Row.DOT, sums, 1, outputs, other=matrix)
        return math.fsum(self._store.numbers(sums, matrix.rows))

    def _tensor(self, grid: Levels, spec: Spec, unit: float) -> QuantTensor:
        levels, groups = grid.levels, grid.groups
        used = levels.cols // spec.group
        codes = np.ascontiguousarray(self._store.get(levels))
        scales = self._store.numbers(grid.scales, levels.rows * groups) * np.float32(unit)
        scales = scales.reshape(-1, groups)[:, :used].astype(np.float16)
        if not spec.zero_point:
            return QuantTensor(codes, scales, spec)
        lows = self._store.numbers(grid.lows, levels.rows * groups).reshape(-1, groups)
        zeros = (spec.qmin - lows[:, :used]).astype(np.int8)
        return QuantTensor(codes + zeros.repeat(spec.group, axis=1), scales, spec, zeros)


def _kind(spec: Spec) -> GridKind:
    limits = (spec.group, spec.qmin, spec.qmax, spec.zero_step)
    if spec.bits == 8:
        return GridKind(BYTES, *limits, symmetric_steps(spec.qmin))
    if spec.zero_point:
        return GridKind(ZEROS, *limits, range_steps(spec.qmax - spec.qmin))
    return GridKind(SYMMETRIC, *limits, symmetric_steps(spec.qmin))
