"""How long a run takes, counted in operations over rates that are measured here and now.

An estimate, within a factor of 2: other programs use the machine, and large matrices the memory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import DTypeLike

from uq.formats.checkpoint import Checkpoint
from uq.formats.checkpoint.content import BLOCK
from uq.formats.config import GemmaConfig
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import expected_tensors
from uq.formats.spec import Spec
from uq.quantize import refit, two_sided
from uq.quantize.calibrate import STAGES
from uq.quantize.candidates import CANDIDATES
from uq.quantize.curvature import EVERY, STATES, VOCABULARY, coupled_shapes
from uq.quantize.factor import factorize
from uq.quantize.gptq import OUTPUTS, Statistics, quantize_gptq
from uq.quantize.job import worker_threads
from uq.quantize.options import QuantizeOptions
from uq.quantize.plan import GptqOptions, Plan, TensorPlan
from uq.quantize.probes import LIKELIEST, POSITIONS, PROBE_LENGTH, PROBE_WINDOWS, probed_models
from uq.quantize.scales import quantize_rtn
from uq.quantize.sensitivity import SAMPLE_ROWS

TOKENIZER_SECONDS = 4e-6  # per token, while a tokenizer.json is put together
STAGED = {role for stage in STAGES for role in stage.roles}
SAMPLE = 512  # side of the sample matrices
WIDEST = 4096  # columns of a sample that memory, and not arithmetic, holds up
REPEATS, ENOUGH = 8, 0.5  # runs of a sample, or two of them and these seconds
OVERHEAD = 1.5  # of a pass over its matrix products: norms, softmax, activation
PASSES = 3  # over the layers for a gradient: forth, forth again on the way back, back
REFIT_PRODUCTS = refit.STEPS + 2  # of all rows with the moments of their inputs
Shape = tuple[int, int]


def run_seconds(checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions, nbytes: int) -> float:
    """Of a run that writes so many bytes."""
    config = checkpoint.config
    source = sum(file.size for file in checkpoint.files().values())
    seconds = _rounding_seconds(checkpoint, plan) + _hashing_seconds(source + nbytes)
    seconds = TOKENIZER_SECONDS * config.vocab_size + seconds / worker_threads(options)
    if plan.calibrated:
        rates = Rates.measured(plan.gptq)
        for layer in range(config.num_layers):
            seconds += _moments_seconds(config, layer, plan, options, rates)
            if plan.uses_gptq:
                seconds += sum(_gptq_seconds(config, layer, plan.gptq, rates))
        if plan.bends:
            seconds += _gradient_seconds(config, options, rates)
        if plan.budget is not None:
            seconds += _measuring_seconds(config, rates)
    return seconds


@dataclass(frozen=True)
class Rates:
    """Of this machine.

    Attributes:
        single, double: operations per second of products in float32 and float64.
        per_weight: seconds of GPTQ for a weight beside its products.
    """

    single: float
    double: float
    per_weight: float

    @staticmethod
    @cache
    def measured(gptq: GptqOptions) -> Rates:
        """Once in a process."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((4 * SAMPLE, SAMPLE))
        factor = factorize(x.T @ x / len(x), gptq.damping)
        assert factor is not None
        statistics, weight = Statistics(x.T @ x / len(x), None), x[:SAMPLE].astype(np.float32)
        took = _fastest(lambda: quantize_gptq(weight, Spec(4, 64), statistics, factor, gptq))
        plain = Rates(_rate(4 * SAMPLE, SAMPLE, np.float32), _rate(4 * SAMPLE, SAMPLE, float), 0.0)
        products = _alone_seconds((SAMPLE, SAMPLE), gptq, plain)
        return Rates(plain.single, plain.double, max(took - products, 0.0) / SAMPLE**2)


@cache
def _narrow_rate(cols: int) -> float:
    """Operations per second of the product of a few rows with a matrix of so many columns."""
    return _rate(two_sided.ROWS, cols, np.float32)


def _rate(rows: int, cols: int, dtype: DTypeLike) -> float:
    """Operations per second of the product of (rows, cols) and (cols, cols)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, cols)).astype(dtype)
    matrix = rng.standard_normal((cols, cols)).astype(dtype)
    return 2 * rows * cols**2 / _fastest(lambda: x @ matrix)


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


def _moments_seconds(
    config: GemmaConfig, layer: int, plan: Plan, options: QuantizeOptions, rates: Rates
) -> float:
    """The tokens' way through a layer, and the second moments of its inputs."""
    tokens, length = options.calibration_tokens, options.calibration_length
    linears = config.linear_shapes(layer)
    passes = (2 if plan.corrected else 1) + options.independent
    attention = 2 * length * linears["self_attn.o_proj"][1]
    products = OVERHEAD * 2 * tokens * passes * (_passed(config, layer) + attention)
    for stage in STAGES:
        rows, cols = linears[stage.roles[0]]
        products += tokens * cols**2
        if plan.corrected:
            products += 2 * tokens * (cols**2 if stage.norm is None else rows * cols)
    return products / rates.single


def _gptq_seconds(
    config: GemmaConfig, layer: int, gptq: GptqOptions, rates: Rates
) -> Iterator[float]:
    """Rounding the linears of a layer, and factorizing the moments of their inputs."""
    coupled = coupled_shapes(config, layer)
    for stage in STAGES:
        yield coupled[stage.roles[0]][1] ** 3 / rates.double
    for shape in coupled.values():
        alone = _alone_seconds(shape, gptq, rates)
        yield alone if gptq.outputs is None else _together_seconds(shape, gptq, rates)
    for role in config.expert_roles(layer):
        assert config.experts is not None
        rows, cols = config.expert_rows(layer, role), config.linear_shapes(layer)[role][1]
        single = _alone_seconds((rows, cols), gptq, rates) + cols**3 / rates.double
        yield config.experts.count * single


def _alone_seconds(shape: Shape, gptq: GptqOptions, rates: Rates) -> float:
    """GPTQ of a linear, each row for itself: target and rounding, then refits and descents."""
    rows, cols = shape
    refits = (1 + gptq.descents) if gptq.refit else 0
    double = 5 * rows * cols**2
    single = 2 * rows * cols**2 * (REFIT_PRODUCTS * refits + gptq.descents)
    return double / rates.double + single / rates.single + rows * cols * rates.per_weight


def _together_seconds(shape: Shape, gptq: GptqOptions, rates: Rates) -> float:
    """The same a few rows at a time, then all rows of a part over again."""
    rows, cols = shape
    descents, block = min(gptq.descents, two_sided.DESCENTS), min(rows, OUTPUTS)
    refits = (1 + descents) if gptq.refit else 0
    narrow = 2 * rows * cols**2 * (REFIT_PRODUCTS * refits + descents + 1)
    steps = two_sided.ROUNDS * (two_sided.SWEEPS + two_sided.STEPS + 1)
    refined = 2 * steps * rows * cols * (block + cols) / rates.single
    found = narrow / _narrow_rate(min(cols, WIDEST)) + 4 * rows * cols**2 / rates.double + refined
    return found + rows * cols * rates.per_weight


def _passed(config: GemmaConfig, layer: int) -> float:
    """Weights of a layer that a token passes through."""
    share = config.experts.active / config.experts.count if config.experts else 1.0
    return sum(
        rows * cols * (1.0 if role in STAGED else share)
        for role, (rows, cols) in config.linear_shapes(layer).items()
    )


def _gradient_seconds(config: GemmaConfig, options: QuantizeOptions, rates: Rates) -> float:
    """Gradients of the outputs, and their moments."""
    tokens = options.calibration_tokens // EVERY
    products = 2.0 * config.hidden_size * (2 * tokens * VOCABULARY + 2 * STATES * config.vocab_size)
    for layer in range(config.num_layers):
        moments = sum(
            rows * min(rows, OUTPUTS) for rows, _ in coupled_shapes(config, layer).values()
        )
        products += 2 * tokens * (PASSES * OVERHEAD * _passed(config, layer) + moments)
    return products / rates.single


def _measuring_seconds(config: GemmaConfig, rates: Rates) -> float:
    """The probes' way through the layers and the head, and the search on every grid."""
    linears = config.linear_shapes(0)
    models = probed_models(config)
    walks = PROBE_WINDOWS * PROBE_LENGTH * models * config.num_layers / 2
    positions = PROBE_WINDOWS * len(range(*POSITIONS.indices(PROBE_LENGTH)))
    head = positions * config.hidden_size * (models * LIKELIEST + config.vocab_size)
    sampled = sum(min(rows, SAMPLE_ROWS) * cols for rows, cols in linears.values())
    searches = len(CANDIDATES) * config.num_layers * sampled * rates.per_weight
    return OVERHEAD * 2 * (walks * _passed(config, 0) + head) / rates.single + searches


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, behind one that compiles: others may use the machine."""
    work()
    took: list[float] = []
    while len(took) < 2 or (len(took) < REPEATS and sum(took) < ENOUGH):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)
