"""A model on a device, ready to be recorded: what a session needs and closes together."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError, UsageError
from uq.formats.config import (
    ALTUP,
    EMBEDDING,
    EXPERTS,
    FULL_HEADS,
    LAUREL,
    LAYER_SCALAR,
    MLP_WIDTHS,
    PER_LAYER,
    SHARED_KEYS,
    SPARSITY,
    VALUE_NORM,
    GemmaConfig,
)
from uq.kernels.numerics import ACTIVATIONS, FLOAT, KV, Numerics
from uq.kernels.session import require_known
from uq.kernels.vulkan.autotune import TUNED_AT, tune
from uq.kernels.vulkan.cache import Cache, CacheSize, check_memory
from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu, PhysicalGpu
from uq.kernels.vulkan.heaps import SHARING
from uq.kernels.vulkan.imports import Placement, open_imports
from uq.kernels.vulkan.mailbox import Mailbox
from uq.kernels.vulkan.memory import HOST, Arena, Span, Transfers, aligned
from uq.kernels.vulkan.model import (
    COLUMNS,
    HEAD_ROWS,
    Model,
    Work,
    host_names,
    kept_bytes,
    load_model,
    weight_names,
    work_sizes,
)
from uq.kernels.vulkan.persistent import Persistent, arena_bytes, model_key, tuned
from uq.kernels.vulkan.pipelines import Pipelines
from uq.kernels.vulkan.prefill import head_shapes
from uq.kernels.vulkan.runs import Runs, fitting
from uq.kernels.vulkan.stages import MOST_HEAD_DIM, Stages, with_queries
from uq.kernels.vulkan.state import MOST_BLOCKS, MOST_TOKENS
from uq.kernels.vulkan.tuning import QUERIES, Measured, Tuning, read_measured, write_measured
from uq.kernels.vulkan.updates import MOST_STREAMS
from uq.kernels.vulkan.weights import Loader, Source, padded_rows, weight_bytes
from uq.kernels.vulkan.wide import Abilities, fits_tiles

# What `GemmaConfig.extensions` names and the kernels compute.
COMPUTED = frozenset(
    {
        *(FULL_HEADS, VALUE_NORM, SHARED_KEYS, MLP_WIDTHS, LAYER_SCALAR, PER_LAYER, EXPERTS),
        *(ALTUP, LAUREL, SPARSITY),
    }
)


class Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


class Engine:
    """Weights, activations and kernels of one model on one device."""

    def __init__(
        self,
        config: GemmaConfig,
        source: Source,
        physical: PhysicalGpu,
        pipeline_cache: Path,
        max_context: int,
        widest: int = MOST_TOKENS,
        *,
        slots: int = 1,
        numerics: Numerics = FLOAT,
        in_place: bool = True,
    ) -> None:
        """
        Args:
            pipeline_cache: folder in which the driver's compiled kernels are kept.
            widest: tokens that a pass may have.
            slots: sequences that are decoded at a time, each with a KV cache.
            in_place: weights stay in the bundle's mapped files where the device can read them.

        Raises:
            DeviceError: the model does not fit, is not of a size the kernels know, or the device
                fails.
            UsageError: the kernels have no such numerics.
        """
        check_sizes(config)
        is_float = source.weight(EMBEDDING).kind.is_float
        check_numerics(config, numerics, is_float=is_float)
        self.config, self._is_int8 = config, numerics.kv is not None
        abilities = Abilities.of(physical)
        many = widest if fits_tiles(config, abilities) else COLUMNS
        self.widest = widest = min(max(widest, COLUMNS), many)
        if slots > widest:
            raise UsageError(f"{slots} sequences of such heads at a time; use up to {widest}")
        weights = weight_bytes(source, weight_names(config)) + kept_bytes(config)
        if physical.kind in SHARING:
            weights += weight_bytes(source, host_names(config))
        rows = max(COLUMNS, fitting(slots, widest))
        sizes = work_sizes(config, widest, rows, is_float=is_float)
        small = sum(map(aligned, sizes.values()))
        check_memory(physical, weights + small, self._cache_size(max_context, slots))
        self._closing = ExitStack()
        self.gpu = self._keep(Gpu(physical))
        self.close = weakref.finalize(self, _close, self.gpu, self._closing)
        self.transfers = self._keep(Transfers(self.gpu))
        common = {"INT8_X": numerics.activations is not None}
        self.pipelines = self._keep(Pipelines(self.gpu, pipeline_cache, common))
        activations = self._keep(Arena(self.gpu, small))
        self.model = self._load(source, in_place=in_place)
        self.work = Work.take(activations, sizes)
        for span in self.work.spans:
            self.transfers.fill(span)  # padding must be finite: it meets weights of zero
        self.mailbox = self._keep(Mailbox(self.gpu, self.work.state))
        suffix = "-int8" if numerics.activations else ""
        self._measured = pipeline_cache / f"{physical.identity}{suffix}.json"
        tuning = Tuning(physical.has("shaderIntegerDotProduct"))
        stages = Stages(
            config,
            self.model,
            self.work,
            self.pipelines,
            tuning,
            abilities,
            columns=1,
        )
        self._stages = self._tuned(stages, read_measured(self._measured))

    @property
    def _suffix(self) -> str:
        return "_int8" if self._is_int8 else ""

    def _load(self, source: Source, *, in_place: bool) -> Model:
        """The model; its weights in an arena but for those that are read in place."""
        imports = open_imports(self.gpu) if in_place else None
        copied = weight_names(self.config)
        if imports:
            self._keep(imports)
            copied = [name for name in copied if not imports.holds(source.weight(name).mapped)]
        kept = kept_bytes(self.config)
        arena = self._keep(Arena(self.gpu, weight_bytes(source, copied) + kept))
        on_host = weight_bytes(source, host_names(self.config))
        host = self._keep(Arena(self.gpu, on_host, HOST))
        model = load_model(self.config, Loader(source, arena, self.transfers, imports, host))
        in_files, refusal = (imports.nbytes, imports.refusal) if imports else (0, "")
        self.placement = Placement(in_files, arena.nbytes, refusal)
        return model

    def tune(self) -> None:
        """Measure what cuts the products best here; recordings that are made later use it.

        The result is kept for this device and driver.
        """
        size = replace(self._cache_size(TUNED_AT + 1, 1), tokens=1)
        with closing(Arena(self.gpu, size.arena_bytes)) as arena:
            cache = Cache.take(size, arena, self.transfers)
            found = tune(self.gpu, self._stages, cache, self.transfers)
        known = read_measured(self._measured).updated(found)
        write_measured(self._measured, known)
        self._stages = self._tuned(self._stages, known)

    def _tuned(self, stages: Stages, known: Measured) -> Stages:
        stages = with_queries(stages, known.queries.get(model_key(self.config), QUERIES))
        return tuned(stages, known, self._suffix, self.gpu.physical)

    def runs(self, capacity: int, slots: int = 1) -> Runs:
        """Passes and decode steps over new KV caches of `capacity` tokens each."""
        size = self._cache_size(capacity, slots)
        cut = self._stages.tuning.cut
        more = arena_bytes(self.config, cut) if cut else 0
        arena = self._keep(Arena(self.gpu, size.arena_bytes + more))
        cache, persistent = Cache.take(size, arena, self.transfers), None
        if cut:
            persistent = Persistent.make(self._stages, cache, cut, arena, self.transfers)
        runs = Runs(self.gpu, self._stages, cache, self.mailbox, self.widest, persistent)
        return self._keep(runs)

    def _cache_size(self, capacity: int, slots: int) -> CacheSize:
        return CacheSize(self.config, capacity, self.widest, slots, self._is_int8)

    def read_floats(self, span: Span, rows: int, columns: int) -> NDArray[np.float32]:
        """The first rows of float32 activations."""
        data = self.transfers.read(span.part(0, 4 * rows * columns))
        return data.view(np.float32).reshape(rows, columns)

    def logits(self, hidden: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """As `Session.logits`."""
        out = np.empty((len(hidden), stop - start), np.float32)
        for first in range(0, len(hidden), self.widest):
            block = slice(first, min(first + self.widest, len(hidden)))
            for row in range(start, stop, HEAD_ROWS):
                end = min(row + HEAD_ROWS, stop)
                out[block, row - start : end - start] = self._scores(hidden[block], row, end)
        return out

    def _scores(self, hidden: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """`logits` of up to `widest` rows and `HEAD_ROWS` tokens of the vocabulary."""
        first = start // 16 * 16
        rows = self.model.head.from_row(first, stop - first)
        self.transfers.write(self.work.normed, hidden)
        recorder = Recorder(self.gpu)
        replace(self._stages, columns=fitting(len(hidden), self.widest)).scores(recorder, rows)
        recorder.end()
        submission = Submission(self.gpu, [recorder.commands])
        submission.run()
        for part in (submission, recorder):
            part.close()
        found = self.read_floats(self.work.scores, len(hidden), padded_rows(rows.rows))
        cap, found = self.config.final_softcap, found[:, start - first : stop - first]
        return cap * np.tanh(found / np.float32(cap)) if cap else found

    def _keep(self, resource: C) -> C:
        self._closing.callback(resource.close)
        return resource


def _close(gpu: Gpu, closing: ExitStack) -> None:
    with suppress(DeviceError):  # a device that is lost has said so before
        gpu.wait()
    with suppress(DeviceError):
        closing.close()


def check_sizes(config: GemmaConfig) -> None:
    """Refuse sizes that the kernels cannot cut up.

    Raises:
        DeviceError: a size is no multiple of what a lane holds, or a layer has parts that the
            kernels do not compute.
    """
    require_known(config, "the Vulkan engine", "use --device cpu", COMPUTED)
    if config.num_heads > MOST_BLOCKS:
        raise DeviceError(
            f"the Vulkan kernels take up to {MOST_BLOCKS} heads, not {config.num_heads}; "
            "use --device cpu"
        )
    if config.altup and config.altup.streams > MOST_STREAMS:
        raise DeviceError(
            f"the Vulkan kernels take up to {MOST_STREAMS} residual streams, not "
            f"{config.altup.streams}; use --device cpu"
        )
    if (largest := max(head.dim for head in head_shapes(config))) > MOST_HEAD_DIM:
        raise DeviceError(
            f"the Vulkan kernels take heads of up to {MOST_HEAD_DIM} channels, not {largest}; "
            "use --device cpu"
        )
    for name, size, unit in _sizes(config):
        if size % unit:
            raise DeviceError(
                f"the Vulkan kernels need a {name} that divides by {unit}, not {size}; "
                "use --device cpu"
            )


def _sizes(config: GemmaConfig) -> Iterator[tuple[str, int, int]]:
    """What must divide by what: name, size, unit."""
    yield "hidden_size", config.hidden_size, 32
    for layer in range(config.num_layers):
        yield "head_dim", config.layer_head_dim(layer), 8
        yield "intermediate_size", config.layer_intermediate_size(layer), 32
        yield "query size", config.layer_q_size(layer), 32
    if config.per_layer:
        yield "hidden_size_per_layer_input", config.per_layer.size, 16
    if config.experts:
        yield "moe_intermediate_size", config.experts.intermediate_size, 32


def check_numerics(config: GemmaConfig, numerics: Numerics, *, is_float: bool) -> None:
    """Refuse integers that the kernels do not have.

    Args:
        is_float: the weights are floating point.

    Raises:
        UsageError: other than INT8, in other groups than 32 channels or of other weights than
            integers, or the model's sizes do not divide by their groups.
    """
    if not has_numerics(numerics):
        raise UsageError(
            "the Vulkan kernels have INT8 activations and INT8 keys and values in groups of 32, "
            "and no other integers"
        )
    if is_float and numerics.activations is not None:
        raise UsageError("INT8 activations need weights of integers; leave them float")
    numerics.check(config)


def has_numerics(numerics: Numerics) -> bool:
    """Whether the kernels have these integers."""
    activations = ACTIVATIONS["float"], ACTIVATIONS["int8"]
    return numerics.activations in activations and numerics.kv in (KV["float"], KV["int8"])
