"""How much memory a run takes, and how it is made to fit.

The arrays that live together at the worst moment of each stage are added up: an estimate, which
`benchmarks/memory.py` holds against measured peaks. None of it depends on the number of layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import psutil

from uq.errors import UsageError
from uq.formats.checkpoint.content import BLOCK
from uq.formats.config import GemmaConfig, layer_tensor
from uq.quantize.calibrate import STAGES, Stage, token_bytes
from uq.quantize.curvature import EVERY, VOCABULARY, coupled_shapes, stream_size
from uq.quantize.curvature import POSITIONS as POSITIONS_AT_ONCE
from uq.quantize.gptq import OUTPUTS
from uq.quantize.moments import WIDE
from uq.quantize.plan import Plan, WorkSizes
from uq.quantize.probes import (
    POSITIONS,
    PROBE_LENGTH,
    PROBE_WINDOWS,
    TOKEN_BLOCK,
    VOCAB_BLOCK,
    probed_models,
)
from uq.quantize.refit import REFIT_NUMBERS
from uq.quantize.rounding import PIECES_AHEAD
from uq.text import size

PROGRAM = 224 << 20  # that `uq quantize` takes by itself: 172 to 188 MiB measured, and COMPILED
COMPILED = 30 << 20  # kernels and libraries that a run loads beside what it has begun with
TOKENIZER_BYTES = 700  # per token, while a tokenizer.json is put together
ROW_COPIES = 7  # of a block of rows in work, in the Hessian's type; and in float32:
ROW_FLOATS = 5
CURVATURE_COPIES, MISSED_COPIES = 4, 5  # of the outputs' curvature, of what weights miss
GRADIENT_COPIES = 8  # of the widest activations of a batch
SPARSE_COPIES = 3  # more, where a threshold takes some of them away
ROUTED_COPIES = 6  # of all tokens, while their gradients pass through experts
LOGIT_COPIES = 5  # of logits, in float32; sums of them are float64
BATCH_COPIES = 3  # of the inputs of a batch: weighted, and less the other path's
Shapes = tuple[tuple[str, tuple[int, int]], ...]

SHARE = 0.9  # of the free memory that is used without asking
# The usual sizes, then what costs least in time and precision first.
LADDER = (
    WorkSizes(),
    WorkSizes(row_numbers=1 << 22),
    WorkSizes(batch_tokens=1024, row_numbers=1 << 22),
    WorkSizes(batch_tokens=1024, row_numbers=1 << 20, double_width=0),
)


@dataclass(frozen=True)
class Footprint:
    """Memory of a run in bytes, without and with activations; what these take on a disk."""

    base: int
    activations: int

    @property
    def resident(self) -> int:
        """With everything in memory."""
        return self.base + self.activations


@dataclass(frozen=True)
class Load:
    """What a run takes in hand beside the model.

    Attributes:
        tokens, length: of the calibration, and of one of its sequences.
        makes_tokenizer: the checkpoint has no tokenizer.json, as in a GGUF file.
        independent: what the floating-point layers make of the text waits, too.
    """

    tokens: int
    length: int
    threads: int
    makes_tokenizer: bool = False
    independent: bool = False


@dataclass(frozen=True)
class Fitted:
    """A plan with the sizes that fit, what it takes, and whether activations wait on the disk."""

    plan: Plan
    memory: Footprint
    spills: bool

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        return self.memory.base if self.spills else self.memory.resident

    @property
    def spilled(self) -> int:
        """Bytes on the disk."""
        return self.memory.activations if self.spills else 0


def fit(config: GemmaConfig, plan: Plan, load: Load, limit: int | None) -> Fitted:
    """The plan with the first of `LADDER` that fits.

    What is free only decides where activations wait, which changes no byte. The sizes, which do,
    follow from the limit, alike on all machines unless this process is larger than `PROGRAM`; they
    are part of what a resume compares.

    Args:
        limit: `--max-memory` in bytes; None for what is free.

    Raises:
        UsageError: the run does not fit into the limit in any way.
    """
    found = footprint(config, plan, load)
    if limit is None:
        free = int(SHARE * psutil.virtual_memory().available)
        return Fitted(plan, found, plan.calibrated and found.resident > free)
    for work in LADDER if plan.calibrated else LADDER[:1]:
        plan = replace(plan, gptq=replace(plan.gptq, work=work))
        found = footprint(config, plan, load)
        if found.base <= limit:
            return Fitted(plan, found, found.resident > limit)
    raise UsageError(f"--max-memory {size(limit)}: {_what_would_fit(config, plan, load)}")


def _what_would_fit(config: GemmaConfig, plan: Plan, load: Load) -> str:
    """For a plan with the smallest sizes."""
    needed = size(footprint(config, plan, load).base)
    program = _program_bytes(config, load)
    if plan.calibrated:
        rounding = size(program + _rounding_bytes(load.threads))
        return (
            f"this run takes about {needed}, its calibration on the disk and in the smallest "
            f"parts; allow as much, or use --method rtn, which takes about {rounding}"
        )
    single = size(program + _rounding_bytes(1))
    return f"this run takes about {needed}; allow as much (--threads 1 takes about {single})"


def footprint(config: GemmaConfig, plan: Plan, load: Load) -> Footprint:
    """Of a run with the plan's sizes."""
    program, rounding = _program_bytes(config, load), _rounding_bytes(load.threads)
    if not plan.calibrated:
        return Footprint(program + rounding, 0)
    paths = 2 if plan.corrected else 1
    batch = min(load.tokens, max(plan.gptq.work.batch_tokens, load.length))
    moments = [
        _stage_bytes(config, plan, shapes, stage, batch)
        for shapes in layer_kinds(config)
        for stage in STAGES
    ]
    if plan.bends:
        moments.append(_gradient_bytes(config, load, plan.gptq.work, batch))
    if plan.budget is not None:
        moments.append(_probing_bytes(config, plan.gptq.work, batch))
    kept = paths * load.tokens * _beside_bytes(config) + _stack_bytes(config, plan)
    streams = 1 + (config.altup.streams if config.altup else 0)
    waiting = 4 * streams * config.hidden_size if load.independent else 0
    activations = load.tokens * (paths * token_bytes(config) + waiting)
    return Footprint(program + kept + max(rounding, *moments), activations)


def _program_bytes(config: GemmaConfig, load: Load) -> int:
    made = TOKENIZER_BYTES * config.vocab_size if load.makes_tokenizer else 0
    return max(PROGRAM, int(psutil.Process().memory_info().rss) + COMPILED) + made


def _rounding_bytes(threads: int) -> int:
    """Blocks of weights in work, and waiting for the disk."""
    return BLOCK * (PIECES_AHEAD + 12 * threads)


def _beside_bytes(config: GemmaConfig) -> int:
    """Float32 bytes that go with a token beside its activations, always in memory."""
    shared = sum(2 * config.layer_kv_size(layer) for layer in config.shared_sources)
    embedded = config.hidden_size if config.per_layer else 0
    experts = 2 * config.hidden_size if config.experts else 0
    return 4 * (shared + embedded + experts)


def _stack_bytes(config: GemmaConfig, plan: Plan) -> int:
    """Bytes of a layer's experts on their grids, which are written when all are done."""
    names = (layer_tensor(0, role) for role in config.expert_roles(0))
    shapes = config.linear_shapes(0)
    return sum(
        plan.tensors[name].spec.nbytes(*shapes[role])
        for name, role in zip(names, config.expert_roles(0), strict=True)
    )


def layer_kinds(config: GemmaConfig) -> dict[Shapes, int]:
    """Shapes of the linears by role, of each kind of layer, and how many layers are of it."""
    layers = (tuple(config.linear_shapes(layer).items()) for layer in range(config.num_layers))
    return Counter(layers)


def _stage_bytes(config: GemmaConfig, plan: Plan, linears: Shapes, stage: Stage, batch: int) -> int:
    """Weights that are held, and the larger of taking the stage's moments and using them."""
    shapes = dict(linears)
    rows, n = shapes[stage.roles[0]]
    paths = 2 if plan.corrected else 1
    item = 8 if n <= plan.gptq.work.double_width else 4
    hessian = item * n * n
    kept = hessian
    if plan.corrected:
        kept += hessian if stage.norm is None else item * rows * n
    strip = 4 * min(n * n, WIDE**2)
    entering = 4 * batch * (paths * token_bytes(config) // 4 + BATCH_COPIES * n)
    taking = kept + strip + entering
    factorizing = kept + hessian + hessian // 2
    largest = max(shapes[role][0] for role in stage.roles if role in shapes) * n
    block = min(largest, plan.gptq.work.row_numbers) * (ROW_COPIES * item + ROW_FLOATS * 4)
    single = 4 * n * n if item == 8 else 0
    together = _together_bytes(shapes, stage, plan) if plan.bends else 0
    rounding = kept + hessian + single + block + 12 * REFIT_NUMBERS + 5 * largest + together
    return sum(_held(shapes, stage)) + max(taking, factorizing, rounding)


def _together_bytes(shapes: Mapping[str, tuple[int, int]], stage: Stage, plan: Plan) -> int:
    """While rows are rounded together: their curvature, its factor, copies of what they miss."""
    most = 0
    for role in (role for role in stage.roles if role in shapes):
        rows, cols = shapes[role]
        rows = min(rows, OUTPUTS, max(1, plan.gptq.work.row_numbers // cols))
        most = max(most, 4 * rows * (CURVATURE_COPIES * rows + MISSED_COPIES * cols))
    return most


def _gradient_bytes(config: GemmaConfig, load: Load, work: WorkSizes, batch: int) -> int:
    """While gradients are taken: all tokens' streams and slopes, a layer, and a batch in it."""
    stream, tokens = stream_size(config), load.tokens // EVERY
    streams = tokens * (2 * stream + (ROUTED_COPIES * config.hidden_size if config.experts else 0))
    copies = GRADIENT_COPIES + (SPARSE_COPIES if config.activation_sparsity else 0)
    expert = sum(
        config.expert_rows(0, role) * config.linear_shapes(0)[role][1]
        for role in config.expert_roles(0)
    )
    walks = []
    for layer in range(config.num_layers):
        shapes = coupled_shapes(config, layer).values()
        weights = expert + sum(rows * cols for rows, cols in shapes)
        sums = sum(rows * min(rows, OUTPUTS) for rows, _ in shapes)
        widest = max(max(shape) for shape in shapes)
        walks.append(weights + sums + batch * (copies * widest + 8 * stream))
    head = VOCABULARY * (config.hidden_size + LOGIT_COPIES * POSITIONS_AT_ONCE)
    return 4 * (streams + max(*walks, head))


def _held(shapes: Mapping[str, tuple[int, int]], stage: Stage) -> Iterator[int]:
    """Bytes of the layer's weights during a stage: exact from here on, rounded here, codes."""
    sizes = {role: int(np.prod(shape)) for role, shape in shapes.items()}
    later = False
    for other in STAGES:
        later = later or other is stage
        for role in (role for role in other.roles if role in sizes):
            if later:
                yield 4 * sizes[role]
            if other is stage:
                yield 4 * sizes[role]
            yield sizes[role]


def _probing_bytes(config: GemmaConfig, work: WorkSizes, batch: int) -> int:
    """While costs are measured: the probes, a layer, and its widest Hessian twice."""
    shapes = config.linear_shapes(0).values()
    models = 4 + len(shapes) + probed_models(config)
    streams = config.altup.streams if config.altup else 0
    routed = 2 if config.experts else 0
    floats = (1 + streams + routed) * config.hidden_size + _beside_bytes(config) // 4
    state = 4 * PROBE_WINDOWS * PROBE_LENGTH * floats
    widest = max(cols for _, cols in shapes)
    hessian = (8 if widest <= work.double_width else 4) * widest**2
    layer = 4 * sum(rows * cols for rows, cols in shapes)
    tokens = batch * (token_bytes(config) + 4 * BATCH_COPIES * widest)
    positions = PROBE_WINDOWS * len(range(*POSITIONS.indices(PROBE_LENGTH)))
    head = models * positions * VOCAB_BLOCK  # logits
    head = 4 * max(head, TOKEN_BLOCK * (config.hidden_size + 4 * positions))
    strip = 4 * min(widest**2, WIDE**2)
    return models * state + max(layer + 2 * hessian + strip + tokens, models * state + head)
