"""What quantization did to the weights: bytes by kind of tensor, error by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import TABLES, layer_tensor
from uq.formats.manifest import gain_name
from uq.validate.report import KindSize, LayerError

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.formats.checkpoint import Checkpoint
    from uq.formats.manifest import Manifest, TensorRecord

ROWS = 4096  # rows of the embedding that are compared at a time
KINDS = (*TABLES.values(), "attention", "mlp", "experts", "other", "norms")
PARTS = {".self_attn.": "attention", ".mlp.": "mlp", ".experts.": "experts"}

Array = NDArray[np.float32]


def kind_of(name: str) -> str:
    """The kind of a canonical tensor name: norms are stored as `.gain`, all else as `.weight`."""
    if "norm" in name.split(".")[-2] and name.endswith((".weight", ".gain")):
        return "norms"
    if name in TABLES:
        return TABLES[name]
    return next((kind for part, kind in PARTS.items() if part in name), "other")


def kind_sizes(manifest: Manifest, checkpoint: Checkpoint) -> tuple[KindSize, ...]:
    """Weights and stored bytes (padding of the layout included) by kind; empty kinds left out."""
    counts, stored = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for name, tensor in manifest.tensors.items():
        counts[kind_of(name)] += math.prod(tensor.shape)
        stored[kind_of(name)] += math.prod(tensor.stored_shape)
    for name, array in manifest.arrays.items():
        counts[kind_of(name)] += math.prod(array.shape)
        stored[kind_of(name)] += 4 * math.prod(array.shape)
    source = dict.fromkeys(KINDS, 0)
    for name, info in checkpoint.tensors.items():
        source[kind_of(name)] += info.nbytes
    return tuple(
        KindSize(kind, counts[kind], stored[kind], source[kind], 8 * stored[kind] / counts[kind])
        for kind in KINDS
        if counts[kind]
    )


def weight_errors(
    bundle: Bundle, checkpoint: Checkpoint, layer_done: Callable[[int], None]
) -> tuple[LayerError, ...]:
    """Relative error of every quantized tensor; one layer of the checkpoint in memory at a time.

    Args:
        layer_done: called with the index of each layer behind it.
    """
    errors = list(_table_errors(bundle, checkpoint))
    for index in range(checkpoint.config.num_layers):
        weights = checkpoint.layer(index)
        errors += [
            _expert_errors(bundle, checkpoint, index, role)
            for role in checkpoint.config.expert_roles(index)
        ]
        for role in (role for role in checkpoint.config.linear_shapes(index) if role in weights):
            name = layer_tensor(index, role)
            ours = bundle.quant(name).dequantize() / _moved(bundle, index, role, weights)
            error, size = _squares(weights[role], ours)
            errors.append(_entry(name, bundle.manifest.tensors[name], error, size))
        layer_done(index)
    return tuple(errors)


def _moved(bundle: Bundle, layer: int, role: str, weights: Mapping[str, Array]) -> Array:
    """(in,) what the quantizer took from the gain in front of a linear into the linear's columns.

    1 where the gain is 0: nothing can be taken from it.
    """
    norm = bundle.config.norm_before(role)
    if norm is None:
        return np.ones(1, np.float32)
    gain = bundle.array(gain_name(layer_tensor(layer, norm)))
    moved: Array = np.where(gain == 0, np.float32(1), weights[norm] / np.where(gain == 0, 1, gain))
    return moved


def _table_errors(bundle: Bundle, checkpoint: Checkpoint) -> Iterator[LayerError]:
    """What is read by row: in blocks of rows."""
    for name, (rows, _) in checkpoint.config.table_shapes().items():
        yield _error_by_rows(bundle, checkpoint, name, rows, ROWS)


def _expert_errors(bundle: Bundle, checkpoint: Checkpoint, layer: int, role: str) -> LayerError:
    """Of all experts together: one of them in memory at a time."""
    config, name = checkpoint.config, layer_tensor(layer, role)
    rows = config.linear_shapes(layer)[role][0]
    return _error_by_rows(bundle, checkpoint, name, rows, config.expert_rows(layer, role))


def _error_by_rows(
    bundle: Bundle, checkpoint: Checkpoint, name: str, rows: int, step: int
) -> LayerError:
    """Of a tensor whose columns the quantizer leaves alone, `step` rows at a time."""
    error, size = 0.0, 0.0
    for start in range(0, rows, step):
        block = start, min(start + step, rows)
        squares = _squares(checkpoint.rows(name, *block), bundle.rows(name, *block).dequantize())
        error, size = error + squares[0], size + squares[1]
    return _entry(name, bundle.manifest.tensors[name], error, size)


def _squares(weight: Array, approximation: Array) -> tuple[float, float]:
    """Squared norms of the difference and of the weight, summed in float64."""
    approximation -= weight
    return _square(approximation), _square(weight)


def _square(values: Array) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


def _entry(name: str, record: TensorRecord, error: float, size: float) -> LayerError:
    # a tensor of zeros is exact whatever its scale
    relative = math.sqrt(error / size) if size else 0.0
    return LayerError(name, record.bits, record.group, relative, record.method, record.fallback)
