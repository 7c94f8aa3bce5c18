"""Measures every sensible shape of every product of a decode step and keeps the fastest."""

from __future__ import annotations

from dataclasses import replace

from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Submission
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.model import Layer
from uq.kernels.vulkan.profile import TimedRecorder
from uq.kernels.vulkan.stages import Stages
from uq.kernels.vulkan.tuning import (
    BRANCH,
    CHOOSE,
    GEGLU,
    STORE,
    TELL,
    Shape,
    candidates,
    product_key,
)
from uq.kernels.vulkan.weights import Matrix

REPEATS = 3  # runs that count, the fastest of them


def tune(gpu: Gpu, stages: Stages, cache: Cache, most_lanes: int) -> dict[str, Shape]:
    """Key of a product -> its fastest shape; leaves the activations undefined.

    A shape is measured within all layers: alone, a kernel would find its instructions in the
    caches, and what its shape costs the next kernel would not be seen.

    Args:
        cache: for the keys and values of one token, which is at position 0.
    """
    found: dict[str, Shape] = {}
    for matrix, epilogue in _products(stages):
        shapes = {
            shape: _with(stages, product_key(matrix, epilogue), shape)
            for shape in candidates(matrix, epilogue, most_lanes)
        }
        is_head = epilogue == CHOOSE
        best = min(shapes, key=lambda shape: _measure(gpu, shapes[shape], cache, is_head=is_head))
        stages, found[product_key(matrix, epilogue)] = shapes[best], best
    return found


def _products(stages: Stages) -> list[tuple[Matrix, int]]:
    """Matrices, and what follows their products; of those with one shape the first."""
    found = {
        product_key(*product): product
        for layer in reversed(stages.model.layers)
        for product in reversed(_layer_products(layer))
    }
    return [*reversed(found.values()), (stages.model.head, CHOOSE)]


def _layer_products(layer: Layer) -> list[tuple[Matrix, int]]:
    products = [(layer.out, BRANCH), (layer.down, BRANCH)]
    products += [(matrix, STORE) for matrix, _ in layer.qkv]
    if layer.gate.kind == layer.up.kind and layer.quantile is None:
        products.append((layer.gate, GEGLU))
    if layer.told:
        products += [(layer.told.gate, TELL), (layer.told.projection, BRANCH)]
    if layer.mixture:
        products.append((layer.mixture.gate, GEGLU))
    return products


def _with(stages: Stages, key: str, shape: Shape) -> Stages:
    measured = {**stages.tuning.measured, key: shape}
    return replace(stages, tuning=replace(stages.tuning, measured=measured), columns=1)


def _measure(gpu: Gpu, stages: Stages, cache: Cache, *, is_head: bool) -> float:
    """Microseconds from the first dispatch to the end of the last."""
    recorder = TimedRecorder(gpu)
    if is_head:
        stages.head(recorder)
    else:
        stages.layers(recorder, cache)
    recorder.end()
    submission = Submission(gpu, [recorder.commands])
    seconds = []
    for _ in range(1 + REPEATS):
        submission.run()
        last = recorder.times()[-1]
        seconds.append(last.start + last.duration)
    submission.close()
    recorder.close()
    return min(seconds[1:])
