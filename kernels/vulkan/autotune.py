"""Measures every sensible shape of every product of a decode step and keeps the fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Submission
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.model import Layer
from uq.kernels.vulkan.profile import ClockedRecorder
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

REPEATS = 5  # runs that count, their median


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
        best = _fastest(gpu, shapes, cache, is_head=epilogue == CHOOSE)
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


def _fastest(gpu: Gpu, shapes: Mapping[Shape, Stages], cache: Cache, *, is_head: bool) -> Shape:
    """All of them by turns: the clock of a GPU that waits for the next kernel's compiler falls."""
    trials = {
        shape: _Trial(gpu, stages, cache, is_head=is_head) for shape, stages in shapes.items()
    }
    runs = [{shape: trial.run() for shape, trial in trials.items()} for _ in range(1 + REPEATS)]
    for trial in trials.values():
        trial.close()
    return min(trials, key=lambda shape: median(run[shape] for run in runs[1:]))


class _Trial:
    """All layers, or the head, as they run in a decode step: no clock is read in between."""

    def __init__(self, gpu: Gpu, stages: Stages, cache: Cache, *, is_head: bool) -> None:
        self._recorder = ClockedRecorder(gpu, 2)
        if not is_head:
            stages.embed(self._recorder, decode=False)
        self._recorder.stamp()
        if is_head:
            stages.head(self._recorder)
        else:
            stages.layers(self._recorder, cache)
        self._recorder.stamp()
        self._recorder.end()
        self._submission = Submission(gpu, [self._recorder.commands])

    def run(self) -> float:
        """Microseconds."""
        self._submission.run()
        return self._recorder.micros()[1]

    def close(self) -> None:
        self._submission.close()
        self._recorder.close()
