"""How much memory a run takes, and how it is made to fit.

The arrays that live together at the worst moment of each stage are added up: an estimate, which
`benchmarks/memory.py` holds against measured peaks. None of it depends on the number of layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import psutil

from uq.errors import UsageError
from uq.formats.checkpoint.content import BLOCK
from uq.formats.config import GemmaConfig
from uq.quantize.calibrate import BATCH_TOKENS, STAGES, Stage, token_bytes
from uq.quantize.gptq import ROW_NUMBERS
from uq.quantize.moments import WIDE
from uq.quantize.plan import Plan
from uq.quantize.probes import PROBE_LENGTH, PROBE_WINDOWS, probed_layers
from uq.quantize.refit import REFIT_NUMBERS
from uq.quantize.rounding import PIECES_AHEAD
from uq.text import size

COMPILED = 30 << 20  # kernels and libraries that a run loads beside what it has begun with
TOKENIZER_BYTES = 700  # per token, while a tokenizer.json is put together
ROW_COPIES = 7  # of a block of rows in work, in the Hessian's type; and in float32:
ROW_FLOATS = 5
BATCH_COPIES = 3  # of the inputs of a batch: weighted, and less the other path's
Shapes = tuple[tuple[str, tuple[int, int]], ...]

SHARE = 0.9  # of the free memory that is used without asking


@dataclass(frozen=True)
class Footprint:
    """Memory of a run in bytes, without and with activations; what these take on a disk."""

    base: int
    activations: int

    @property
    def resident(self) -> int:
        """With everything in memory."""
        return self.base + self.activations


def footprint(
    config: GemmaConfig, plan: Plan, tokens: int, threads: int, *, makes_tokenizer: bool = False
) -> Footprint:
    """Of a run on `tokens` calibration tokens.

    Args:
        makes_tokenizer: the checkpoint has no tokenizer.json, as in a GGUF file.
    """
    program = int(psutil.Process().memory_info().rss) + COMPILED
    if makes_tokenizer:
        program += TOKENIZER_BYTES * config.vocab_size
    rounding = BLOCK * (PIECES_AHEAD + 12 * threads)
    if not plan.calibrated:
        return Footprint(program + rounding, 0)
    paths = 2 if plan.corrected else 1
    batch = min(tokens, BATCH_TOKENS)
    moments = [
        _stage_bytes(config, plan, shapes, stage, batch)
        for shapes in layer_kinds(config)
        for stage in STAGES
    ]
    if plan.budget is not None:
        moments.append(_probing_bytes(config, batch))
    return Footprint(program + max(rounding, *moments), paths * tokens * token_bytes(config))


def spills(found: Footprint, limit: int | None) -> bool:
    """Whether the activations wait on the disk; the bytes of the bundle are the same.

    Args:
        limit: `--max-memory` in bytes; None for what is free.

    Raises:
        UsageError: the run does not fit into the limit either way.
    """
    if limit is None:
        free = int(SHARE * psutil.virtual_memory().available)
        return found.resident > free
    if found.base > limit:
        raise UsageError(
            f"--max-memory {size(limit)}: this run takes about {size(found.base)}, its calibration "
            "on the disk; allow as much, or use --method rtn, which takes under 1 GiB"
        )
    return found.resident > limit


def layer_kinds(config: GemmaConfig) -> dict[Shapes, int]:
    """Shapes of the linears by role, of each kind of layer, and how many layers are of it."""
    layers = (tuple(config.linear_shapes(layer).items()) for layer in range(config.num_layers))
    return Counter(layers)


def _stage_bytes(config: GemmaConfig, plan: Plan, linears: Shapes, stage: Stage, batch: int) -> int:
    """Weights that are held, and the larger of taking the stage's moments and using them."""
    shapes = dict(linears)
    rows, n = shapes[stage.roles[0]]
    paths = 2 if plan.corrected else 1
    item = 8 if n <= WIDE else 4
    hessian = item * n * n
    kept = hessian
    if plan.corrected:
        kept += hessian if stage.norm is None else item * rows * n
    strip = 4 * min(n * n, WIDE**2)
    entering = 4 * batch * (paths * token_bytes(config) // 4 + BATCH_COPIES * n)
    taking = kept + strip + entering
    factorizing = kept + hessian + hessian // 2
    largest = max(shapes[role][0] for role in stage.roles if role in shapes) * n
    block = min(largest, ROW_NUMBERS) * (ROW_COPIES * item + ROW_FLOATS * 4)
    single = 4 * n * n if item == 8 else 0
    rounding = kept + hessian + single + block + 8 * REFIT_NUMBERS + 5 * largest
    return sum(_held(shapes, stage)) + max(taking, factorizing, rounding)


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


def _probing_bytes(config: GemmaConfig, batch: int) -> int:
    """While costs are measured: the probes, a layer, and its widest Hessian twice."""
    shapes = config.linear_shapes(0).values()
    models = 4 + len(shapes) * (1 + len(probed_layers(config.num_layers)))
    state = 4 * PROBE_WINDOWS * PROBE_LENGTH * config.hidden_size
    widest = max(cols for _, cols in shapes)
    hessian = (8 if widest <= WIDE else 4) * widest**2
    layer = 4 * sum(rows * cols for rows, cols in shapes)
    tokens = batch * (token_bytes(config) + 4 * BATCH_COPIES * widest)
    head = 4 * 3 * PROBE_WINDOWS * PROBE_LENGTH * config.vocab_size
    strip = 4 * min(widest**2, WIDE**2)
    return models * state + max(layer + 2 * hessian + strip + tokens, models * state + head)
