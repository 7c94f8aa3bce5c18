"""Calibration on a GPU: the arithmetic of `calibrate.py` and `gptq.py` in float16 and float32.

The tokens, both paths, the statistics and the weights in work stay on the device. Inputs of linears
and the weights that they meet are float16, sums float32; what GPTQ does with the second moments is
float32 throughout. Where main memory computes in float64, codes differ at ties: docs/performance.md
says how many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from uq.errors import DeviceError
from uq.formats.config import (
    FULL_HEADS,
    LAYER_SCALAR,
    MLP_WIDTHS,
    PER_LAYER,
    SHARED_KEYS,
    VALUE_NORM,
    GemmaConfig,
)
from uq.kernels.per_layer import Beside
from uq.kernels.products import flat
from uq.kernels.reference import embed
from uq.kernels.vulkan.dense.cells import Cell, Row
from uq.kernels.vulkan.dense.layer import Chunk, KeysValues, Layer, Tokens, power_below
from uq.kernels.vulkan.dense.matrix import Matrix
from uq.kernels.vulkan.dense.workshop import Workshop
from uq.kernels.vulkan.memory import Span
from uq.quantize.calibration_engine import (
    Array,
    ExpertWork,
    LayerRows,
    QuantizedWeights,
    QuantizeStage,
    TokenRows,
    Weights,
)
from uq.quantize.moments import GAIN_RIDGE, token_weights
from uq.quantize.plan import GptqOptions
from uq.quantize.vulkan_gptq import DeviceStatistics
from uq.quantize.vulkan_waiting import Waiting

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
# What `GemmaConfig.extensions` names and is followed here.
FOLLOWED = frozenset({FULL_HEADS, VALUE_NORM, SHARED_KEYS, MLP_WIDTHS, PER_LAYER, LAYER_SCALAR})
# What waits of each batch.
HIDDEN, EXACT_HIDDEN, EXACT_OUT = "hidden", "exact hidden", "exact out"
CONTEXT, MLP_HIDDEN = "context", "mlp hidden"
INPUT_OF = {"self_attn.o_proj": CONTEXT, "mlp.down_proj": MLP_HIDDEN}
HEADROOM = 4.0  # root mean square of weighed outputs as float16, which end at 65504


@contextmanager
def explained() -> Iterator[None]:
    """A device that fails ends the run; what can be done about it does not change the bytes."""
    try:
        yield
    except DeviceError as error:
        if isinstance(error.__cause__, OSError):  # of the disk
            raise
        what = str(error).partition(";")[0]
        raise DeviceError(
            f"calibration on the GPU: {what}; the same command continues (an iGPU with less of "
            "its memory by --max-memory); --device cpu has other codes and needs --restart"
        ) from error


@dataclass(frozen=True)
class Pair:
    """Some sequences on the quantized path, and on the floating-point path when it is followed."""

    quantized: Chunk
    exact: Chunk | None


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


class VulkanCalibration:
    """The calibration tokens in front of some layer, on a device."""

    def __init__(
        self,
        workshop: Workshop,
        config: GemmaConfig,
        rows: Iterable[TokenRows],
        options: GptqOptions,
        waiting: Waiting,
    ) -> None:
        """The arguments between `workshop` and `waiting` are those of `CalibrationEngine.begin`."""
        self._waiting = waiting
        self._workshop, self._config, self._options = workshop, config, options
        self._store, self._cells = workshop.store, workshop.cells
        self._products, self._phase = workshop.products, workshop.stream.phase
        self._shared: dict[tuple[str, int, int], KeysValues] = {}
        self._pairs = [self._placed(number, batch) for number, batch in enumerate(rows)]
        self._tokens = sum(pair.quantized.tokens for pair in self._pairs)

    def _placed(self, number: int, batch: TokenRows) -> Pair:
        exact = None
        if batch.exact is not None:
            exact = self._chunk(EXACT_HIDDEN, number, batch.exact, batch.exact_rows)
        return Pair(self._chunk(HIDDEN, number, batch.quantized, batch.quantized_rows), exact)

    def _chunk(self, what: str, number: int, rows: Array, per_layer: LayerRows | None) -> Chunk:
        embedded = embed(self._config, rows)
        hidden = flat(embedded)
        placed = self._store.put(self._waiting.name(what, number, len(hidden)), hidden)
        self._waiting.keep(what, number, placed)
        beside = Beside() if per_layer is None else Beside(embedded, per_layer)
        return Chunk(placed, rows.shape[0], rows.shape[1], beside)

    def _batches(self) -> Iterator[tuple[int, Pair]]:
        """The pairs, each with its residual stream on the device."""
        for number, pair in enumerate(self._pairs):
            self._waiting.fetch(HIDDEN, number, pair.quantized.hidden)
            if pair.exact is not None:
                self._waiting.fetch(EXACT_HIDDEN, number, pair.exact.hidden)
            yield number, pair

    def _input(self, role: str, number: int, inputs: Sequence[Tokens]) -> Tokens:
        """What a linear that joins the residual stream reads."""
        self._waiting.fetch(INPUT_OF[role], number, inputs[number].half)
        return inputs[number]

    @explained()
    def quantize_layer(
        self,
        layer: int,
        weights: Weights,
        quantize: QuantizeStage,
        experts: ExpertWork | None = None,
    ) -> None:
        """As `CalibrationRun` asks for it."""
        assert experts is None  # `open_engine` refuses such models
        exact, quantized = (self._layer(layer, name) for name in ("exact", "quantized"))
        with self._phase("upload"):
            placed = exact.set_linears(weights)
            for path in (exact, quantized):
                path.set_gains(weights)

        def replace_weights(roles: Sequence[str], statistics: DeviceStatistics) -> None:
            statistics.placed.update(placed)
            found = quantize(roles, statistics)
            with self._phase("upload"):
                self._take_over(found, roles, statistics, quantized, exact, weights)

        attention = [role for role in ATTENTION if role in weights]
        replace_weights(attention, self._input_statistics(quantized, exact, mlp=False))
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
        self._leave(quantized, weights)

    @explained()
    def pass_layer(self, layer: int, exact: Weights, quantized: Weights) -> None:
        """As `CalibrationRun` asks for it."""
        paths = self._layer(layer, "exact"), self._layer(layer, "quantized")
        for path, weights in zip(paths, (exact, quantized), strict=True):
            path.set_linears(weights)
            path.set_gains(weights)
        contexts = self._contexts(paths[1], paths[0])
        self._join("self_attn.o_proj", "post_attention_layernorm", contexts, paths[1])
        hidden = self._mlp_hidden(paths[1], paths[0])
        self._join("mlp.down_proj", "post_feedforward_layernorm", hidden, paths[1])
        self._leave(paths[1], quantized)

    def _take_over(
        self,
        found: Weights,
        roles: Sequence[str],
        statistics: DeviceStatistics,
        quantized: Layer,
        exact: Layer,
        weights: Weights,
    ) -> None:
        """Let the tokens go on with what was found; what was made on the device stays there."""
        for role in roles:
            tensor = found.tensors.get(role) if isinstance(found, QuantizedWeights) else None
            made = statistics.made.get(id(tensor))
            if made is None:
                quantized.set_linears({role: found.get(role, weights[role])})
            else:
                quantized.adopt(role, made, exact)

    def _layer(self, number: int, name: str) -> Layer:
        return Layer(self._config, number, name, self._workshop.tools)

    def _input_statistics(self, quantized: Layer, exact: Layer, *, mlp: bool) -> DeviceStatistics:
        """Of linears behind a norm."""
        n = self._config.hidden_size
        hessian, cross = self._store.matrix("hessian", n, n), None
        with self._phase("moments"):
            for number, pair in self._batches():
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
            for number, pair in self._batches():
                if pair.exact is not None:
                    x = self._context(exact, number, pair.exact, "exact context")
                    self._keep_exact_out(number, exact, "self_attn.o_proj", x)
                name = self._waiting.name(CONTEXT, number, pair.quantized.tokens)
                found.append(self._context(quantized, number, pair.quantized, name))
                self._waiting.keep(CONTEXT, number, found[-1].half)
        return found

    def _context(self, path: Layer, number: int, chunk: Chunk, name: str) -> Tokens:
        x = path.attention_input(chunk)
        return path.context(chunk, x, self._keys(path, number, chunk, x), name)

    def _keys(self, path: Layer, number: int, chunk: Chunk, x: Tokens) -> KeysValues:
        """What the layer reads; what later layers read, too, is kept."""
        source = self._config.kv_source(path.number)
        if source not in self._config.shared_sources:
            return path.keys(chunk, x, ("k heads", "v heads"))
        parts = [f"{path.name} {part} of layer {source}" for part in "kv"]
        key = path.name, source, number
        if source == path.number:
            names = [self._waiting.name(part, number, chunk.tokens) for part in parts]
            self._shared[key] = path.keys(chunk, x, names)
            for part, tokens in zip(parts, self._shared[key], strict=True):
                self._waiting.keep(part, number, tokens.half)
        else:
            for part, tokens in zip(parts, self._shared[key], strict=True):
                self._waiting.fetch(part, number, tokens.half)
        return self._shared[key]

    def _mlp_hidden(self, quantized: Layer, exact: Layer) -> list[Tokens]:
        found = []
        with self._phase("mlp"):
            for number, pair in self._batches():
                if pair.exact is not None:
                    y = exact.mlp_hidden(exact.mlp_input(pair.exact), "exact mlp hidden")
                    self._keep_exact_out(number, exact, "mlp.down_proj", y)
                x = quantized.mlp_input(pair.quantized)
                name = self._waiting.name(MLP_HIDDEN, number, pair.quantized.tokens)
                found.append(quantized.mlp_hidden(x, name))
                self._waiting.keep(MLP_HIDDEN, number, found[-1].half)
        return found

    def _keep_exact_out(self, number: int, exact: Layer, role: str, x: Tokens) -> None:
        out = exact.linear(role, x, self._waiting.name(EXACT_OUT, number, x.half.rows))
        self._waiting.keep(EXACT_OUT, number, out)

    def _exact_out(self, number: int) -> Matrix:
        """Outputs of the linear that joins the stream, on the floating-point path."""
        tokens = self._pairs[number].quantized.tokens
        name = self._waiting.name(EXACT_OUT, number, tokens)
        found = self._store.matrix(name, tokens, self._config.hidden_size)
        self._waiting.fetch(EXACT_OUT, number, found)
        return found

    def _join(self, role: str, norm: str, inputs: Sequence[Tokens], quantized: Layer) -> None:
        with self._phase("join"):
            for number, pair in self._batches():
                out = quantized.linear(role, self._input(role, number, inputs), "out")
                quantized.join(pair.quantized, out, norm)
                self._waiting.keep(HIDDEN, number, pair.quantized.hidden)
                if pair.exact is not None:
                    quantized.join(pair.exact, self._exact_out(number), norm)
                    self._waiting.keep(EXACT_HIDDEN, number, pair.exact.hidden)

    def _leave(self, path: Layer, weights: Weights) -> None:
        """Both paths: what is not quantized is the same on them."""
        if not self._config.per_layer and not self._config.layer_scalar:
            return
        with self._phase("leave"):
            for number, pair in self._batches():
                path.leave(pair.quantized, weights)
                self._waiting.keep(HIDDEN, number, pair.quantized.hidden)
                if pair.exact is not None:
                    path.leave(pair.exact, weights)
                    self._waiting.keep(EXACT_HIDDEN, number, pair.exact.hidden)

    def _output_statistics(
        self, role: str, norm: str, weights: Weights, inputs: Sequence[Tokens], exact: Layer
    ) -> DeviceStatistics:
        """Of a linear whose outputs join the residual stream."""
        weight = weights[role]
        rows, n = weight.shape
        hessian, wanted = self._store.matrix("hessian", n, n), None
        corrects = self._pairs[0].exact is not None
        with self._phase("moments"):
            outputs = self._outputs(role, norm, weights, inputs, exact)
            if corrects:
                wanted = self._store.matrix("wanted", rows, n)
            for number, _ in self._batches():
                x = self._input(role, number, inputs)
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
        median, roots, count = float(np.median(np.concatenate(found))), found, float(self._tokens)
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
        room = np.zeros((len(values), self._room), np.float32)
        for number, part in enumerate(values):
            room[number, : len(part)] = part
        return self._store.vector(name, room.reshape(-1))

    def _of_chunk(self, span: Span, number: int) -> Span:
        return span.part(4 * number * self._room, 4 * self._room)

    @property
    def _room(self) -> int:
        return max(pair.quantized.hidden.height for pair in self._pairs)

    def _sizes(self, role: str, inputs: Sequence[Tokens], exact: Layer) -> list[Array]:
        """(tokens,) per chunk: mean square of each token's output."""
        room, eps = self._room, self._config.rms_norm_eps
        span = self._store.span("sizes", 4 * room * len(inputs))
        for number, pair in enumerate(self._pairs):
            if pair.exact is not None:
                out = self._exact_out(number)
            else:
                out = exact.linear(role, self._input(role, number, inputs), "out")
            self._cells.rows(Row.SIZE, self._of_chunk(span, number), 1, out, eps=eps)
        found = self._store.numbers(span, room * len(inputs)).reshape(-1, room)
        return [found[number, : x.half.rows] for number, x in enumerate(inputs)]

    def _change(self, number: int, outputs: Outputs) -> Matrix:
        """(tokens, rows) float16 times a factor: what the outputs should change by, weighed."""
        pair, out = self._pairs[number], self._exact_out(number)
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
