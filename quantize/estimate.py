"""What a run will write, need and take, found out without running it (`uq quantize --dry-run`).

Sizes on the disk are exact. Memory is a sum of the arrays that live at the worst moment, time a
count of operations over rates that are measured here and now on small samples: both are estimates.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial

import numpy as np
import psutil

from uq.formats.checkpoint import Checkpoint
from uq.formats.checkpoint.content import BLOCK
from uq.formats.config import TABLES, GemmaConfig, layer_tensor
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import expected_tensors
from uq.formats.spec import Spec
from uq.formats.towers import stored_bytes
from uq.quantize.calibrate import STAGES
from uq.quantize.candidates import CANDIDATES
from uq.quantize.curvature import EVERY, STATES, VOCABULARY, coupled_shapes
from uq.quantize.factor import factorize
from uq.quantize.gptq import OUTPUTS, Statistics, quantize_gptq
from uq.quantize.job import (
    curvature_on_disk,
    fetched_on_disk,
    fitted_plan,
    recognised_plan,
    worker_threads,
)
from uq.quantize.memory import layer_kinds
from uq.quantize.pipeline import QuantizeOptions
from uq.quantize.plan import GptqOptions, Plan, TensorPlan, WorkSizes
from uq.quantize.probes import (
    LIKELIEST,
    POSITIONS,
    PROBE_LENGTH,
    PROBE_WINDOWS,
    probed_models,
    table_names,
)
from uq.quantize.scales import quantize_rtn
from uq.quantize.sensitivity import SAMPLE_ROWS
from uq.quantize.two_sided import ROUNDS, STEPS, SWEEPS
from uq.text import duration, size, table

TOKENIZER_SECONDS = 4e-6  # per token, likewise
STAGED = {role for stage in STAGES for role in stage.roles}
SAMPLE = 512  # side of the sample matrices
REPEATS, ENOUGH = 8, 0.5  # runs of a sample, or two of them and these seconds
GPTQ_PRODUCTS = 13  # multiplications per weight and input channel, all parts of GPTQ together
OVERHEAD = 1.5  # of a forward pass over its matrix products: norms, softmax, activation


@dataclass(frozen=True)
class Kind:
    """Tensors of one role, which are treated alike."""

    name: str
    tensors: int
    weights: int
    format: str
    method: str
    layout: str
    nbytes: int


@dataclass(frozen=True)
class Estimate:
    """`nbytes` on the disk without the tokenizer, `towers` more for those, and `spilled` while the
    run lasts; memory in bytes; `seconds` on this machine; `sizes` of the work where they are not
    the usual ones.
    """

    recipe: str
    kinds: tuple[Kind, ...]
    nbytes: int
    towers: int
    bits_per_weight: float
    spilled: int
    peak_memory: int
    free_memory: int
    seconds: float
    sizes: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        head = ("tensors", "count", "weights", "format", "method", "layout", "size")
        rows = [(*list(asdict(kind).values())[:-1], size(kind.nbytes)) for kind in self.kinds]
        spilled = f"; {size(self.spilled)} during calibration" if self.spilled else ""
        spilled += f"; {size(self.towers)} for vision and audio towers" if self.towers else ""
        memory = f"about {size(self.peak_memory)} of {size(self.free_memory)} free"
        return "\n".join(
            [
                table(rows, head=head),
                f"disk: {size(self.nbytes)}, {self.bits_per_weight:.2f} bits per weight{spilled}",
                f"memory: {memory} (estimate){self.sizes and f'; {self.sizes}'}",
                f"time: about {duration(self.seconds)} on this machine (estimate)",
            ]
        )


def estimate(checkpoint: Checkpoint, options: QuantizeOptions) -> Estimate:
    """Figures of `quantize(checkpoint, ..., options)`; reads a few rows, writes nothing.

    Raises:
        UsageError: the options do not fit the model or each other.
    """
    config = checkpoint.config
    fitted = fitted_plan(checkpoint, recognised_plan(checkpoint, options), options)
    plan = fitted.plan
    kinds = tuple(_kinds(config, plan))
    gains = 4 * sum(map(math.prod, expected_tensors(config)[1].values()))
    nbytes = gains + sum(kind.nbytes for kind in kinds)
    threads = worker_threads(options)
    source = sum(file.size for file in checkpoint.files().values())
    seconds = _rounding_seconds(checkpoint, plan) + _hashing_seconds(source + nbytes)
    seconds = TOKENIZER_SECONDS * config.vocab_size + seconds / threads
    if plan.calibrated:
        seconds += _layers_seconds(config, plan, options)
        seconds += _together_seconds(config, plan, options)
    if plan.budget is not None:
        seconds += _measuring_seconds(config, plan)
    return Estimate(
        recipe=plan.recipe,
        kinds=kinds,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / config.num_parameters(),
        peak_memory=checkpoint.buffered + fitted.resident,
        towers=stored_bytes(checkpoint.towers, options.towers),
        spilled=fitted.spilled
        + curvature_on_disk(config, plan, options)
        + fetched_on_disk(checkpoint, plan, options),
        sizes="" if plan.gptq.work == WorkSizes() else str(plan.gptq.work),
        free_memory=psutil.virtual_memory().available,
        seconds=seconds,
    )


def _kinds(config: GemmaConfig, plan: Plan) -> Iterator[Kind]:
    shapes = expected_tensors(config)[0]
    tables = table_names(config)
    names = {kind: [name] for name, kind in TABLES.items() if name in shapes}
    for layer in range(config.num_layers):
        for role in config.linear_shapes(layer):
            names.setdefault(role, []).append(layer_tensor(layer, role))
    for kind, members in names.items():
        tensor = plan.tensors[members[0]]
        weights = sum(math.prod(shapes[name]) for name in members)
        mixed = plan.budget is not None and (plan.budget.tables or members[0] not in tables)
        layout = LAYOUTS[tensor.layout]
        nbytes = sum(layout.nbytes(*shapes[name], tensor.spec) for name in members)
        yield Kind(
            name=kind,
            tensors=len(members),
            weights=weights,
            format="mixed" if mixed else str(tensor.spec),
            method=tensor.method,
            layout=tensor.layout,
            nbytes=round(weights * _budgeted_bytes(config, plan)) if mixed else nbytes,
        )


def _budgeted_bytes(config: GemmaConfig, plan: Plan) -> float:
    """Mean bytes per weight of the tensors whose grids are still to be chosen."""
    assert plan.budget is not None
    shapes = expected_tensors(config)[0]
    names = [name for name in shapes if plan.budget.tables or name not in table_names(config)]
    return plan.budget.nbytes / sum(rows * cols for rows, cols in (shapes[n] for n in names))


def _rounding_seconds(checkpoint: Checkpoint, plan: Plan) -> float:
    """One thread's time for all tensors that are rounded to nearest, by one piece of each spec."""
    shapes = expected_tensors(checkpoint.config)[0]
    per_weight: dict[Spec, float] = {}
    total = 0.0
    for name, tensor in plan.tensors.items():
        rows, cols = shapes[name]
        if tensor.method != "rtn":
            continue
        if tensor.spec not in per_weight:
            count = min(rows, max(1, BLOCK // cols))
            took = _fastest(partial(_piece, checkpoint, name, tensor, count))
            per_weight[tensor.spec] = took / (count * cols)
        total += rows * cols * per_weight[tensor.spec]
    return total


def _piece(checkpoint: Checkpoint, name: str, tensor: TensorPlan, rows: int) -> None:
    weight = checkpoint.rows(name, 0, rows)
    LAYOUTS[tensor.layout].tile(quantize_rtn(weight, tensor.spec))


def _hashing_seconds(nbytes: int) -> float:
    sample = bytes(1 << 22)
    return nbytes / len(sample) * _fastest(lambda: hashlib.sha256(sample))


def _layers_seconds(config: GemmaConfig, plan: Plan, options: QuantizeOptions) -> float:
    """All layers: the tokens' way through them, the second moments, GPTQ."""
    rates, kinds = _rates(plan.gptq), layer_kinds(config)
    return sum(
        n * _layer_seconds(dict(kind), _expert_share(config), plan, options, rates)
        for kind, n in kinds.items()
    )


def _layer_seconds(
    linears: Mapping[str, tuple[int, int]],
    share: float,
    plan: Plan,
    options: QuantizeOptions,
    rates: tuple[float, float, float],
) -> float:
    """`share`: of its experts that a token passes through."""
    single, double, per_weight = rates
    tokens, length = options.calibration_tokens, options.calibration_length
    paths = 2 if plan.corrected else 1
    weights = sum(rows * cols for rows, cols in linears.values())
    passed = _passed(linears, share)
    attention = 2 * length * linears["self_attn.o_proj"][1]
    passes = paths + options.independent
    forward = OVERHEAD * 2 * tokens * passes * (passed + attention)
    inputs = {stage: linears[stage.roles[0]] for stage in STAGES}  # (rows, cols)
    widths = [cols for _, cols in inputs.values()]
    moments = tokens * sum(width**2 for width in widths)
    if plan.corrected:
        moments += (
            2
            * tokens
            * sum(
                cols**2 if stage.norm is None else rows * cols
                for stage, (rows, cols) in inputs.items()
            )
        )
    products = GPTQ_PRODUCTS * sum(rows * cols**2 for rows, cols in linears.values())
    products += sum(width**3 for width in widths)
    return (forward + moments) / single + products / double + weights * per_weight


def _expert_share(config: GemmaConfig) -> float:
    """Of a layer's experts, that a token passes through."""
    return config.experts.active / config.experts.count if config.experts else 1.0


def _passed(linears: Mapping[str, tuple[int, int]], share: float) -> float:
    """Weights of a layer that a token passes through."""
    experts = sum(rows * cols for role, (rows, cols) in linears.items() if role not in STAGED)
    return sum(rows * cols for rows, cols in linears.values()) - (1 - share) * experts


def _together_seconds(config: GemmaConfig, plan: Plan, options: QuantizeOptions) -> float:
    """Gradients of the outputs, and the rounding of rows together."""
    if not plan.bends:
        return 0.0
    tokens = options.calibration_tokens // EVERY
    products = 2.0 * config.hidden_size * (2 * tokens * VOCABULARY + 2 * STATES * config.vocab_size)
    for layer in range(config.num_layers):
        passed = _passed(config.linear_shapes(layer), _expert_share(config))
        products += 2 * tokens * round(3 * OVERHEAD) * passed
        for rows, cols in coupled_shapes(config, layer).values():
            block = min(rows, OUTPUTS)
            products += 2 * tokens * rows * block
            products += 2 * ROUNDS * (SWEEPS + STEPS + 1) * rows * cols * (block + cols)
    return products / _rates(plan.gptq)[0]


def _measuring_seconds(config: GemmaConfig, plan: Plan) -> float:
    """The probes' way through the layers and the head, and the search on every grid."""
    single, _, per_weight = _rates(plan.gptq)
    linears = config.linear_shapes(0)
    weights = sum(rows * cols for rows, cols in linears.values())
    models = probed_models(config)
    walks = PROBE_WINDOWS * PROBE_LENGTH * models * config.num_layers / 2
    positions = PROBE_WINDOWS * len(range(*POSITIONS.indices(PROBE_LENGTH)))
    head = positions * config.hidden_size * (models * LIKELIEST + config.vocab_size)
    sampled = sum(min(rows, SAMPLE_ROWS) * cols for rows, cols in linears.values())
    searches = len(CANDIDATES) * config.num_layers * sampled * per_weight
    return OVERHEAD * 2 * (walks * weights + head) / single + searches


@cache
def _rates(gptq: GptqOptions) -> tuple[float, float, float]:
    """Operations per second of float32 and float64 products, and seconds per weight beside them.

    Measured once in a process.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4 * SAMPLE, SAMPLE))
    single = x.astype(np.float32)
    operations = 2 * 4 * SAMPLE**3
    products = [partial(np.matmul, a.T, np.flip(a, 1).copy()) for a in (single, x)]
    rates = [operations / _fastest(product) for product in products]
    hessian = x.T @ x / len(x)
    factor = factorize(hessian, gptq.damping)
    assert factor is not None
    statistics = Statistics(hessian, hessian)
    took = _fastest(lambda: quantize_gptq(single[:SAMPLE], Spec(4, 64), statistics, factor, gptq))
    rest = took / SAMPLE**2 - GPTQ_PRODUCTS * SAMPLE / rates[1]
    return rates[0], rates[1], max(rest, 0.0)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, behind one that compiles: others may use the machine."""
    work()
    took: list[float] = []
    while len(took) < 2 or (len(took) < REPEATS and sum(took) < ENOUGH):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)
