"""Measures every sensible shape of every product of a decode step and keeps the fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.model import Layer
from uq.kernels.vulkan.products import Joining
from uq.kernels.vulkan.profile import TimedRecorder
from uq.kernels.vulkan.stages import Stages
from uq.kernels.vulkan.tuning import BRANCH, CHOOSE, GEGLU, STORE, Shape, candidates, product_key
from uq.kernels.vulkan.weights import Matrix

REPEATS = 3  # runs that count, the fastest of them


@dataclass(frozen=True)
class Product:
    """One product of a step and the stage of it that is measured, on every layer in turn.

    The weights of all layers are more than a cache holds, as in a real step.
    """

    matrix: Matrix
    epilogue: int
    record: Callable[[Stages, Recorder], None]


def tune(gpu: Gpu, stages: Stages, most_lanes: int) -> dict[str, Shape]:
    """Key of a product -> its fastest shape; leaves the activations undefined."""
    found: dict[str, Shape] = {}
    for product in _products(stages):
        key = product_key(product.matrix, product.epilogue)
        shapes = candidates(product.matrix, product.epilogue, most_lanes)
        found[key] = min(shapes, key=lambda shape: _measure(gpu, stages, product, key, shape))
        tuning = replace(stages.tuning, measured={**stages.tuning.measured, **found})
        stages = replace(stages, tuning=tuning)
    return found


def _products(stages: Stages) -> list[Product]:
    """Branches first: in how many parts they come is for who reads them to bear."""
    layer, work = stages.model.layers[0], stages.work

    def everywhere(record: Callable[[Stages, Recorder, Layer], None]) -> Callable[..., None]:
        def all_layers(stages: Stages, recorder: Recorder) -> None:
            for layer in stages.model.layers:
                record(stages, recorder, layer)

        return all_layers

    def joining(stages: Stages, layer: Layer, branch: Matrix) -> Joining:
        parts = stages.tuning.shape(branch, 1, BRANCH).parts
        gains = layer.attention_gain, layer.mlp_gain
        return Joining(work.branch, work.hidden, work.joined, *gains, parts)

    def qkv(stages: Stages, recorder: Recorder, layer: Layer) -> None:
        stages.qkv(recorder, layer, joining(stages, layer, layer.down))

    def out(stages: Stages, recorder: Recorder, layer: Layer) -> None:
        stages.branch(recorder, layer.out, work.context)
        stages.norm(recorder, joining(stages, layer, layer.out))

    def gate(stages: Stages, recorder: Recorder, layer: Layer) -> None:
        stages.gate(recorder, layer, joining(stages, layer, layer.out))

    def down(stages: Stages, recorder: Recorder, layer: Layer) -> None:
        stages.branch(recorder, layer.down, work.gated)
        stages.norm(recorder, joining(stages, layer, layer.down))

    products = [Product(layer.out, BRANCH, everywhere(out))]
    products.append(Product(layer.down, BRANCH, everywhere(down)))
    products += [Product(matrix, STORE, everywhere(qkv)) for matrix, _ in layer.qkv]
    if layer.gate.kind == layer.up.kind:
        products.append(Product(layer.gate, GEGLU, everywhere(gate)))
    products.append(Product(stages.model.head, CHOOSE, Stages.head))
    return products


def _measure(gpu: Gpu, stages: Stages, product: Product, key: str, shape: Shape) -> float:
    """Microseconds from the first dispatch to the end of the last."""
    tried = replace(stages.tuning, measured={**stages.tuning.measured, key: shape})
    recorder = TimedRecorder(gpu)
    product.record(replace(stages, tuning=tried, columns=1), recorder)
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
