"""What lies in each shard of a bundle: the tables (0), then a layer each."""

from __future__ import annotations

import math
from collections.abc import MutableMapping

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import GemmaConfig, layer_tensor
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import expected_tensors, gain_name
from uq.formats.writer import ArrayEntry, BundleWriter, Entry
from uq.progress import Progress
from uq.quantize.farm import Farm
from uq.quantize.layers import LayerSource, arrays
from uq.quantize.plan import Plan
from uq.quantize.rounding import RoundedTensors


class ShardSource:
    """What each shard consists of, made in the order of the shards.

    Attributes:
        shards: those that are still to be made.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        calibrated: LayerSource | None,
        shards: range,
        farm: Farm,
        progress: Progress,
        contents: MutableMapping[str, str],
    ) -> None:
        """
        Args:
            calibrated: quantizes the layers; without it they are rounded to nearest.
            contents: the hashes of what the shards are made from are entered here; all of a
                shard's by the time it is written.
        """
        self._checkpoint = checkpoint
        self._contents = contents
        self.shards = shards
        self._calibrated = calibrated
        names = [
            name
            for index in shards
            if index == 0 or calibrated is None
            for name in shard_tensors(checkpoint.config, index)
        ]
        self._rounded = RoundedTensors(checkpoint, plan, names, farm, progress.work, contents)

    def skip(self, writer: BundleWriter) -> None:
        """Bring the calibration behind the layers that are already written."""
        if self._calibrated is not None:
            for layer in range(self.shards.start - 1):
                self._calibrated.skip(layer, writer.read_layer)

    def entries(self, index: int) -> list[Entry]:
        """What belongs to no layer (0), or layer `index - 1`."""
        if index == 0:
            return [*self._round(index), *self._model_arrays()]
        layer = index - 1
        if self._calibrated is not None:
            return self._calibrated.quantize(layer)
        gains = self._checkpoint.gains(layer, self._contents)
        kept = self._checkpoint.kept(layer, self._contents)
        return [*self._round(index), *arrays(layer, gains, kept)]

    def is_whole(self, index: int) -> bool:
        """Whether the entries of a shard are in memory; others are made while they are written."""
        return index > 0 and self._calibrated is not None

    def _model_arrays(self) -> list[Entry]:
        checkpoint, contents = self._checkpoint, self._contents
        norms, kept = checkpoint.config.model_norms(), checkpoint.config.model_kept()
        return [
            *(ArrayEntry(gain_name(name), checkpoint.gain(name, contents)) for name in norms),
            *(ArrayEntry(name, checkpoint.whole(name, contents)) for name in kept),
        ]

    def _round(self, index: int) -> list[Entry]:
        return [self._rounded.entry(name) for name in shard_tensors(self._checkpoint.config, index)]


def shard_tensors(config: GemmaConfig, index: int) -> list[str]:
    """Quantized tensors of a shard: the tables (0), or the linears of layer `index - 1`."""
    if index == 0:
        return list(config.table_shapes())
    return [layer_tensor(index - 1, role) for role in config.linear_shapes(index - 1)]


def shard_sources(config: GemmaConfig, index: int) -> list[str]:
    """Tensors that a shard is made from: those of `shard_tensors`, norms, and what is kept."""
    if index == 0:
        rest = [*config.model_norms(), *config.model_kept()]
    else:
        roles = (*config.norm_shapes(index - 1), *config.kept_shapes(index - 1))
        rest = [layer_tensor(index - 1, role) for role in roles]
    return [*shard_tensors(config, index), *rest]


def shard_bytes(config: GemmaConfig, plan: Plan) -> list[int]:
    """Bytes of the tensors of each shard: by their layout, or float32."""
    shapes, floats = expected_tensors(config)
    stored = {name: 4 * math.prod(shape) for name, shape in floats.items()}
    for name, tensor in plan.tensors.items():
        stored[name] = LAYOUTS[tensor.layout].nbytes(*shapes[name], tensor.spec)
    return [
        sum(stored.get(name) or stored[gain_name(name)] for name in shard_sources(config, index))
        for index in range(1 + config.num_layers)
    ]
