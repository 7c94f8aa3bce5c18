"""Every pipeline that a session makes, found by recording its stages without a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes import (
    SHAPES,
    SHAPES_4,
    VOCABULARY,
    gemma3n_config,
    gemma4_config,
    shape_config,
)
from benchmarks.vulkan_speed import RandomWeights
from uq.formats.config import GemmaConfig
from uq.formats.spec import GROUPS, SCALE_BITS, SPECS, Spec
from uq.kernels.vulkan.cache import Cache, CacheSize
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.dense.cells import Cell, Row
from uq.kernels.vulkan.dense.matrix import padded
from uq.kernels.vulkan.dense.products import (
    SMALL_MATRIX_CUT,
    cut_constants,
    systems_cut,
)
from uq.kernels.vulkan.extras import EXPERT_DEPTH, TOLD_LANES
from uq.kernels.vulkan.memory import Arena, Span, Transfers
from uq.kernels.vulkan.model import Work, load_model, work_sizes
from uq.kernels.vulkan.persistent import Persistent, knows
from uq.kernels.vulkan.persistent_cuts import cuts
from uq.kernels.vulkan.pipelines import Constants, Pipelines
from uq.kernels.vulkan.prefill import (
    AttentionCut,
    Heads,
    attention_constants,
    gemm_constants,
    gemm_module,
)
from uq.kernels.vulkan.runs import WIDTHS
from uq.kernels.vulkan.stages import Stages
from uq.kernels.vulkan.state import MOST_SEQUENCES, MOST_TOKENS
from uq.kernels.vulkan.tuning import EXPERT_LANES, Tuning
from uq.kernels.vulkan.variants import VARIANTS
from uq.kernels.vulkan.weights import Kind, Loader, Weight
from uq.kernels.vulkan.wide import Abilities

CONTEXT = 8192  # tokens of the KV cache
LAYERS = 7  # the first, sliding and full ones, and one behind a full one: the rest repeats these
LAYERS_4 = 10  # layers of either kind with keys of their own, and without
WAVE, SHARED_BYTES = 64, 65536  # what RADV says of the chips: a subgroup, shared memory
LEAST_SHARED = 32768  # of other drivers of the same chips
MULTIPROCESSORS = 16  # of the middle one
# Of the layers, of the embedding.
USUAL = tuple(Kind.of(Spec(bits, 32, scale_bits=8)) for bits in (4, 8))
INT4Z = Kind.of(Spec(4, 32, zero_point=True, scale_bits=8))
# The other kinds in one model, each with the group that spreads its work most; and the usual ones
# with scales of 16 bits.
OTHERS = [
    Kind.of(spec if Kind.of(replace(spec, scale_bits=8)) in USUAL else replace(spec, scale_bits=8))
    for spec in SPECS
    if spec.group == 32
]
OTHERS += [Kind(name) for name in ("f16", "bf16", "f32")]


@dataclass(frozen=True)
class Case:
    """A pipeline: a module and the names and values of its specialization constants."""

    module: str
    constants: tuple[tuple[str, int | float], ...] = ()


# What no session of these models asks for: a gate and an up of two kinds, tools.
ALONE = (
    Case("geglu", (("CHANNELS", 10240), ("LANES", 256))),
    *(Case(name, (("LANES", 256),)) for name in ("read", "arithmetic", "arithmetic_dot")),
    Case("arithmetic_matrix", (("LANES", 256),)),
    *(
        Case(f"dequantize_int{bits}", (("GROUP", 32), ("SCALE_BITS", scale_bits)))
        for bits in (4, 8)
        for scale_bits in SCALE_BITS
    ),
)


@cache
def cases() -> tuple[Case, ...]:
    """Gemma 3, 3n and 4 as `uq quantize` makes them; in Gemma 3's 4B every kind of weight, and INT8
    activations with and without zero points; and what calibrates the 4B and the 27B."""
    found: dict[Case, None] = {}
    configs = [shape_config(name, LAYERS) for name in SHAPES]
    configs += [gemma4_config(name, LAYERS_4) for name in SHAPES_4] + [gemma3n_config(LAYERS_4)]
    for config in configs:
        found |= dict.fromkeys(session_cases(config, *USUAL))
        found |= dict.fromkeys(prefill_cases(config, [*USUAL, *OTHERS]))
    config = shape_config("4b", LAYERS)
    for kind in OTHERS:
        found |= dict.fromkeys(session_cases(config, kind, kind))
    for kinds in (USUAL, (INT4Z, INT4Z)):
        found |= dict.fromkeys(session_cases(config, *kinds, int8_x=True))
    for kind in (*USUAL, *OTHERS):
        found |= dict.fromkeys((per_layer_case(kind), experts_case(kind)))
    for name in ("4b", "27b"):
        found |= dict.fromkeys(calibration_cases(shape_config(name)))
    return tuple(found | dict.fromkeys(ALONE))


def session_cases(
    config: GemmaConfig, body: Kind, table: Kind, *, int8_x: bool = False
) -> Iterator[Case]:
    inventory = Inventory({"INT8_X": True} if int8_x else {})
    arena, transfers, recorder = Nowhere(), NoTransfers(), Silent()
    loader = Loader(NoWeights(config, body, table), arena, transfers, host=arena)
    model = load_model(config, loader)
    sizes = work_sizes(config, MOST_TOKENS, MOST_SEQUENCES, is_float=table.is_float)
    work = Work.take(arena, sizes)
    sizes_of_caches = [cache_size(config, is_int8=is_int8) for is_int8 in (False, True)]
    caches = [Cache.take(size, arena, transfers) for size in sizes_of_caches]
    abilities = Abilities(True, True, (WAVE, 32, WAVE), SHARED_BYTES)
    tuning = Tuning(integer_dot=True)
    stages = Stages(config, model, work, inventory, tuning, abilities, columns=1)
    for width in WIDTHS:
        wide = replace(stages, columns=width)
        wide.embed(recorder, decode=False)
        for each in caches:
            wide.layers(recorder, each)
        wide.scores(recorder, model.head.from_row(0, 16))
        wide.heads(recorder)
    for each in caches:
        if knows(stages, each.suffix):
            found = cuts(config, MULTIPROCESSORS, SHARED_BYTES)
            for cut in {(cut.lanes, cut.depth): cut for cut in found}.values():
                Persistent.make(stages, each, cut, arena, transfers).record(recorder)
    stages.embed(recorder, decode=True)
    stages.head(recorder)
    stages.choose(recorder, advances=True)
    yield from inventory.cases


def per_layer_case(kind: Kind) -> Case:
    """E2B's per-layer embedding as this kind."""
    sizes = {"LANES": TOLD_LANES, "SIZE": 256, "ROWS": VOCABULARY, "EPS": 1e-6, "SCALE": 1536**-0.5}
    return _case(f"per_layer_{kind.name}", {**sizes, **kind.constants})


def experts_case(kind: Kind) -> Case:
    """The sum of the 26B-A4B's experts of this kind."""
    module = f"experts_{kind.name}" + "_dot" * (not kind.is_float)
    shape = {"LANES": EXPERT_LANES, "ACTIVE": 8, "DEPTH": EXPERT_DEPTH}
    return _case(module, {**shape, **kind.constants})


def cache_size(config: GemmaConfig, *, is_int8: bool = False) -> CacheSize:
    return CacheSize(config, CONTEXT, MOST_TOKENS, MOST_SEQUENCES, is_int8)


def prefill_cases(config: GemmaConfig, kinds: Iterable[Kind]) -> Iterator[Case]:
    """The kernels of many tokens, with every way of multiplying that the chips have."""
    for kind in kinds:
        for matrix, integer_dot in ((True, True), (False, True), (False, False)):
            module = gemm_module(kind, matrix=matrix, integer_dot=integer_dot)
            lanes = VARIANTS[module].subgroup or WAVE
            constants = gemm_constants(module, kind, lanes, SHARED_BYTES, MOST_TOKENS)
            yield Case(module, tuple(sorted(constants.items())))
    yield Case("gemm_half", (("LANES", 256),))
    for layer, slots in enumerate(cache_size(config).slots):
        heads = Heads.of(config, layer)
        cut = AttentionCut.of(heads, WAVE, SHARED_BYTES)
        assert cut is not None
        attention = attention_constants(config, layer, slots) | cut.constants(heads)
        attention |= {"FLOAT_X": False, "PIECES": 1}
        for module in ("attention_prefill", "attention_prefill_int8"):
            yield Case(module, tuple(sorted(attention.items())))


def calibration_cases(config: GemmaConfig) -> Iterator[Case]:
    """The kernels of kernels/vulkan/dense, with matrix instructions."""
    for group in GROUPS:
        sizes: dict[str, int | float] = {"A_BY_K": False, "B_BY_K": True, "ADD": False}
        for shared in (SHARED_BYTES, LEAST_SHARED):
            cut = cut_constants(systems_cut(group, shared), 32)
            yield _case("dense_systems_matrix", sizes | cut | {"GROUP": group})
        sizes |= cut_constants(SMALL_MATRIX_CUT, 32) | {"ADD": True}
        for by_k in (False, True):
            yield _case("dense_half_matrix", sizes | {"A_BY_K": by_k, "B_BY_K": by_k})
            yield _case("dense_float_matrix", sizes | {"B_BY_K": by_k})
        for name in ("round", "descend"):
            yield _case(f"dense_{name}", {"LANES": 64, "GROUP": group})
        for kind in range(3):
            yield _case("dense_search", {"LANES": 64, "GROUP": group, "KIND": kind})
        for n in (config.hidden_size, config.intermediate_size):
            solve = {"LANES": 256, "GROUP": group, "GROUPS": padded(n) // group, "ROUNDS": 64}
            yield _case("dense_solve", dict(solve))
    yield _case("dense_invert", {"LANES": 256})
    for cell, half in product(Cell, (False, True)):
        by = {"BY_ROW": True, "BY_COL": True}
        yield _case("dense_cells", {"LANES": 128, "OP": int(cell), "HALF_OUT": half, **by})
    for row in Row:
        yield _case("dense_rows", {"LANES": 128, "OP": int(row), "HAS_GAIN": True})
    dim = {"LANES": 64, "DIM": config.head_dim}
    heads = {**dim, "DIM_OUT": padded(config.head_dim), "NORM": True, "ROPE": True}
    yield _case("dense_heads", dict(heads))
    yield _case("dense_context", dict(dim))
    for window in (0, 1024):
        yield _case("dense_softmax", {"LANES": 64, "WINDOW": window, "CAP": 50.0})


def _case(module: str, constants: Constants) -> Case:
    return Case(module, tuple(sorted(constants.items())))


class Inventory(Pipelines):
    """Notes what is asked for."""

    def __init__(self, common: Constants) -> None:
        self.layout, self._common = None, common
        self.cases: list[Case] = []

    def get(self, name: str, **constants: int | float) -> Any:
        constants |= self.common(name)
        self.cases.append(Case(name, tuple(sorted(constants.items()))))


class Silent(Recorder):
    def __init__(self) -> None:
        pass

    def dispatch(self, *_: Any) -> None:
        pass

    def barrier(self) -> None:
        pass


class Nowhere(Arena):
    def __init__(self) -> None:
        pass

    def take(self, nbytes: int) -> Span:
        return Span(None, 0, nbytes, 0)


class NoTransfers(Transfers):
    def __init__(self) -> None:
        pass

    def write(self, span: Span, data: NDArray[Any]) -> None:
        pass

    def fill(self, span: Span) -> None:
        pass


class NoWeights(RandomWeights):
    """Shapes and kinds of a model's weights."""

    def __init__(self, config: GemmaConfig, body: Kind, table: Kind) -> None:
        super().__init__(config)
        self._body, self._table = body, table

    def weight(self, name: str) -> Weight:
        shape = self._linears.get(name) or self._tables[name]
        kind = self._body if name in self._linears else self._table
        return Weight(kind, shape, partial(np.empty, 0, np.uint8))
