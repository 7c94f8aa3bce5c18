"""Calibration on a GPU: the arithmetic of `calibrate.py` and `gptq.py` in float16 and float32.

The tokens, both paths, the statistics and the weights in work stay on the device. Inputs of linears
and the weights that they meet are float16, sums float32; what GPTQ does with the second moments is
float32 throughout. Where main memory computes in float64, codes differ at ties: docs/performance.md
says how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

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
from uq.kernels.vulkan.dense.layer import Chunk, KeysValues, Layer, Tokens
from uq.kernels.vulkan.dense.workshop import Workshop
from uq.quantize.calibration_engine import (
    ExpertWork,
    QuantizedWeights,
    QuantizeStage,
    TokenRows,
    Weights,
)
from uq.quantize.plan import GptqOptions
from uq.quantize.vulkan_batches import CONTEXT, MLP_HIDDEN, Batches
from uq.quantize.vulkan_gptq import DeviceStatistics
from uq.quantize.vulkan_moments import Moments
from uq.quantize.vulkan_waiting import Waiting

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
# What `GemmaConfig.extensions` names and is followed here.
FOLLOWED = frozenset({FULL_HEADS, VALUE_NORM, SHARED_KEYS, MLP_WIDTHS, PER_LAYER, LAYER_SCALAR})


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
        self._workshop, self._config, self._waiting = workshop, config, waiting
        self._phase = workshop.stream.phase
        self._shared: dict[tuple[str, int, int], KeysValues] = {}
        self._batches = Batches(workshop.store, config, rows, waiting)
        self._moments = Moments(workshop, config, options, self._batches)

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
        replace_weights(attention, self._moments.of_inputs(quantized, exact, mlp=False))
        contexts = self._contexts(quantized, exact)
        role, norm = "self_attn.o_proj", "post_attention_layernorm"
        statistics = self._moments.of_outputs(role, norm, weights, contexts, exact)
        replace_weights((role,), statistics)
        self._join(role, norm, contexts, quantized)
        replace_weights(MLP, self._moments.of_inputs(quantized, exact, mlp=True))
        hidden = self._mlp_hidden(quantized, exact)
        role, norm = "mlp.down_proj", "post_feedforward_layernorm"
        replace_weights((role,), self._moments.of_outputs(role, norm, weights, hidden, exact))
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

    def _contexts(self, quantized: Layer, exact: Layer) -> list[Tokens]:
        """Inputs of o_proj on the quantized path; outputs on the other one go to `_exact_out`."""
        found = []
        with self._phase("attention"):
            for number, pair in self._batches:
                if pair.exact is not None:
                    x = self._context(exact, number, pair.exact, "exact context")
                    self._batches.keep_exact_out(number, exact, "self_attn.o_proj", x)
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
            for number, pair in self._batches:
                if pair.exact is not None:
                    y = exact.mlp_hidden(exact.mlp_input(pair.exact), "exact mlp hidden")
                    self._batches.keep_exact_out(number, exact, "mlp.down_proj", y)
                x = quantized.mlp_input(pair.quantized)
                name = self._waiting.name(MLP_HIDDEN, number, pair.quantized.tokens)
                found.append(quantized.mlp_hidden(x, name))
                self._waiting.keep(MLP_HIDDEN, number, found[-1].half)
        return found

    def _join(self, role: str, norm: str, inputs: Sequence[Tokens], quantized: Layer) -> None:
        with self._phase("join"):
            for number, pair in self._batches:
                out = quantized.linear(role, self._batches.input(role, number, inputs), "out")
                quantized.join(pair.quantized, out, norm)
                if pair.exact is not None:
                    quantized.join(pair.exact, self._batches.exact_out(number), norm)
                self._batches.keep_hidden(number)

    def _leave(self, path: Layer, weights: Weights) -> None:
        """Both paths: what is not quantized is the same on them."""
        if not self._config.per_layer and not self._config.layer_scalar:
            return
        with self._phase("leave"):
            for number, pair in self._batches:
                path.leave(pair.quantized, weights)
                if pair.exact is not None:
                    path.leave(pair.exact, weights)
                self._batches.keep_hidden(number)
