"""Measures every sensible shape of every product of a decode step and keeps the fastest."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import TypeVar

import numpy as np

from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.memory import Arena, Transfers
from uq.kernels.vulkan.model import Layer
from uq.kernels.vulkan.persistent import Persistent, arena_bytes, model_key, suits
from uq.kernels.vulkan.persistent_cuts import cuts, shapes
from uq.kernels.vulkan.profile import ClockedRecorder
from uq.kernels.vulkan.stages import Stages, with_queries
from uq.kernels.vulkan.state import one_token, views
from uq.kernels.vulkan.tuning import (
    BRANCH,
    CHOOSE,
    GEGLU,
    QUERIES,
    STORE,
    TELL,
    Cut,
    Measured,
    Shape,
    candidates,
    product_key,
)
from uq.kernels.vulkan.weights import Matrix

REPEATS = 5  # runs that count, their median
CHECKED = 16  # tokens for which a cut must give the bits of dispatches
TUNED_AT = 512  # position of the token whose layers are measured

K = TypeVar("K", bound=Hashable)
Record = Callable[[Recorder], None]


def tune(gpu: Gpu, stages: Stages, cache: Cache, transfers: Transfers) -> Measured:
    """The fastest shape of every product, and cut of the layers; leaves the activations undefined.

    A shape is measured within all layers: alone, a kernel would find its instructions in the
    caches, and what its shape costs the next kernel would not be seen.

    Args:
        cache: for the keys and values of `TUNED_AT` tokens and one more.
    """
    transfers.write(stages.work.state, one_token(TUNED_AT))
    stages, products = _tune_products(gpu, stages, cache)
    key = model_key(stages.config)
    stages, queries = _tune_queries(gpu, stages, cache)
    if not suits(stages, cache.suffix, gpu.physical):
        return Measured(products, queries={key: queries})
    cut = _tune_layers(gpu, stages, cache, transfers)
    return Measured(products, {key: cut}, {key: queries})


def _tune_products(gpu: Gpu, stages: Stages, cache: Cache) -> tuple[Stages, dict[str, Shape]]:
    found: dict[str, Shape] = {}
    for matrix, epilogue in _products(stages):
        tried = {
            shape: _with(stages, product_key(matrix, epilogue), shape)
            for shape in candidates(matrix, epilogue, gpu.physical.most_lanes)
        }
        if epilogue == CHOOSE:
            times = _times(gpu, {shape: cut.head for shape, cut in tried.items()})
        else:
            times = _times(gpu, {shape: _layers(cut, cache) for shape, cut in tried.items()})
        best = min(times, key=times.__getitem__)
        stages, found[product_key(matrix, epilogue)] = tried[best], best
    return stages, found


def _tune_queries(gpu: Gpu, stages: Stages, cache: Cache) -> tuple[Stages, int]:
    """Fewer heads a workgroup: more workgroups, shorter code, and keys that are read more often."""
    tried = {count: with_queries(stages, count) for count in range(1, QUERIES + 1)}
    times = _times(gpu, {count: _layers(each, cache) for count, each in tried.items()})
    best = min(times, key=times.__getitem__)
    return tried[best], best


def _tune_layers(gpu: Gpu, stages: Stages, cache: Cache, transfers: Transfers) -> Cut | None:
    """The fastest of the cuts that gives the bits of dispatches, or None where those are faster."""
    physical, config = gpu.physical, stages.config
    found = cuts(config, physical.multiprocessors, physical.shared_bytes)
    records: dict[Cut | None, Record] = {None: _layers(stages, cache)}
    with closing(Arena(gpu, sum(arena_bytes(config, cut) for cut in found))) as arena:
        for cut in found:
            persistent = Persistent.make(stages, cache, cut, arena, transfers)
            records[cut] = _behind_embedding(stages, persistent.record)
        times = _times(gpu, records)
        state = views(transfers.read(stages.work.state).view(np.uint32))
        if state["failed"][0]:
            return None
        for best in sorted(times, key=times.__getitem__):
            if best is None or _agrees(gpu, stages, cache, transfers, best, records[best]):
                return best
    return None


def _agrees(
    gpu: Gpu, stages: Stages, cache: Cache, transfers: Transfers, cut: Cut, record: Record
) -> bool:
    """Whether the final norm's outputs are those of dispatches whose sums have the same order."""
    measured = {**stages.tuning.measured, **shapes(stages.model, cut)}
    alone = replace(stages, tuning=replace(stages.tuning, measured=measured), columns=1)

    def normed(record: Record) -> Iterator[bytes]:
        """Of the first tokens of a context, which read each other's keys and values."""
        trial = _Trial(gpu, record)
        for position in range(CHECKED):
            transfers.write(stages.work.state, one_token(position))
            transfers.fill(stages.work.normed)
            trial.run()
            yield transfers.read(stages.work.normed).tobytes()
        trial.close()

    return list(normed(record)) == list(normed(_layers(alone, cache)))


def _layers(stages: Stages, cache: Cache) -> Record:
    return _behind_embedding(stages, lambda recorder: stages.layers(recorder, cache))


def _behind_embedding(stages: Stages, record: Record) -> Record:
    def both(recorder: Recorder) -> None:
        stages.embed(recorder, decode=False)
        record(recorder)

    return both


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


def _times(gpu: Gpu, records: Mapping[K, Record]) -> dict[K, float]:
    """Microseconds of each, all of them by turns: the clock of a GPU that waits for the next
    kernel's compiler falls."""
    trials = {key: _Trial(gpu, record) for key, record in records.items()}
    runs = [{key: trial.run() for key, trial in trials.items()} for _ in range(1 + REPEATS)]
    for trial in trials.values():
        trial.close()
    return {key: median(run[key] for run in runs[1:]) for key in trials}


class _Trial:
    """What runs in a decode step: no clock is read in between."""

    def __init__(self, gpu: Gpu, record: Record) -> None:
        self._recorder = ClockedRecorder(gpu, 2)
        self._recorder.stamp()
        record(self._recorder)
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
