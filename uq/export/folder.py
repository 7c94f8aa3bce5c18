"""A Hugging Face folder: a safetensors file for the tables, one for each layer, and an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uq.export.stored import ITEM_BYTES, SAFETENSORS, Losses, StoredTensor, rounded
from uq.formats.bundle import Bundle
from uq.formats.checkpoint.checkpoint import expected_shapes
from uq.formats.config import GemmaConfig, layer_tensor
from uq.formats.disk import write_file
from uq.formats.families.registry import FAMILIES
from uq.formats.manifest import gain_name
from uq.formats.shard import make_header, shard_file
from uq.progress import Progress

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # transformers refuses a file without it
Shards = Sequence[Sequence[StoredTensor]]


class FloatTensors:
    """Weights of a bundle in a floating-point type; what that loses is counted in `losses`."""

    def __init__(self, bundle: Bundle, dtype: str, losses: Losses) -> None:
        self._bundle, self._dtype, self._losses = bundle, dtype, losses
        self._names, self._shapes = file_names(bundle.config), expected_shapes(bundle.config)
        self._norm_offset = np.float32(FAMILIES[bundle.config.family].norm_offset)

    def matrix(self, name: str) -> list[StoredTensor]:
        """A quantized tensor, dequantized; experts are a stack, as in transformers."""

        def chunks() -> Iterator[Any]:
            for piece in self._bundle.pieces(name):
                yield rounded(name, piece.dequantize(), self._dtype, self._losses)

        return [self._tensor(name, chunks)]

    def norm(self, name: str) -> StoredTensor:
        """A norm's weight as transformers has it: the gain, or that less one."""

        def chunks() -> Iterator[Any]:
            weight = self._bundle.array(gain_name(name)) - self._norm_offset
            yield rounded(name, weight, self._dtype, self._losses)

        return self._tensor(name, chunks)

    def kept(self, name: str) -> StoredTensor:
        """What is never quantized."""

        def chunks() -> Iterator[Any]:
            yield rounded(name, self._bundle.array(name), self._dtype, self._losses)

        return self._tensor(name, chunks)

    def _tensor(self, name: str, chunks: Callable[[], Iterator[Any]]) -> StoredTensor:
        shape = self._shapes[name]
        nbytes = int(np.prod(shape)) * ITEM_BYTES[self._dtype]
        return StoredTensor(self._names[name], SAFETENSORS[self._dtype], shape, nbytes, chunks)


def file_names(config: GemmaConfig) -> dict[str, str]:
    """Canonical name -> name in a folder that transformers saves for the text model alone."""
    family = FAMILIES[config.family]
    names = {role.tensor: role.tensor for role in family.model_roles(config)}
    for layer in range(config.num_layers):
        for role in family.layer_roles(config, layer):
            stored = layer_tensor(layer, family.stored_names.get(role.name, role.name))
            names[layer_tensor(layer, role.name)] = (
                stored.removesuffix(".weight") if role.bare else stored
            )
    return names


def shards(
    bundle: Bundle, floats: FloatTensors, linear: Callable[[str], list[StoredTensor]]
) -> Shards:
    """The tensors of every file: the tables, then layer by layer.

    Args:
        linear: how a linear's weight is stored, by its canonical name.
    """
    config = bundle.config
    tables = [tensor for name in config.table_shapes() for tensor in floats.matrix(name)]
    norms, kept = map(floats.norm, config.model_norms()), map(floats.kept, config.model_kept())
    found = [[*tables, *norms, *kept]]
    for layer in range(config.num_layers):
        parts = (config.linear_shapes, config.norm_shapes, config.kept_shapes)
        linears, gains, rest = (
            [layer_tensor(layer, role) for role in part(layer)] for part in parts
        )
        stored = [tensor for name in linears for tensor in linear(name)]
        found.append([*stored, *map(floats.norm, gains), *map(floats.kept, rest)])
    return found


def write_folder(
    work: Path, files: Shards, assets: Mapping[str, bytes], progress: Progress
) -> Path:
    """Write everything into `work`, which is returned.

    Raises:
        DeviceError: the disk is full or broken.
    """
    progress.start(len(files), "export")
    where: dict[str, str] = {}
    for index, tensors in enumerate(files):
        name = shard_file(index, len(files))
        _write_shard(work / name, tensors)
        where |= {tensor.name: name for tensor in tensors}
        progress.advance(name)
    progress.close()
    total = sum(tensor.nbytes for file in files for tensor in file)
    listing = {"metadata": {"total_size": total}, "weight_map": where}
    for name, data in {**assets, INDEX: to_json(listing)}.items():
        write_file(work / name, [data], len(data))
    return work


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _write_shard(path: Path, tensors: Sequence[StoredTensor]) -> None:
    header = make_header({t.name: (t.kind, t.shape) for t in tensors}, METADATA)
    write_file(path, _contents(header, tensors), len(header) + sum(t.nbytes for t in tensors))


def _contents(header: bytes, tensors: Iterable[StoredTensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        for chunk in tensor.chunks():
            yield np.ascontiguousarray(chunk).data
