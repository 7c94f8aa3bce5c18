"""The towers of a bundle, and the names that the text model has beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from uq.export.folder import Shards
from uq.export.stored import ITEM_BYTES, SAFETENSORS, Losses, StoredTensor, rounded
from uq.formats.config import HEAD
from uq.formats.towers import TowerTensor

Towers = Mapping[str, TowerTensor]


def with_towers(files: Shards, towers: Towers, dtype: str, losses: Losses) -> Shards:
    """The text model under the names of a multimodal checkpoint, and a file with the towers.

    Towers keep the source's bytes; those that the bundle has in INT8 are stored in `dtype`.
    """
    if not towers:
        return files
    renamed = [[replace(t, name=source_name(t.name, towers)) for t in file] for file in files]
    return [*renamed, [_stored(tower, dtype, losses) for tower in towers.values()]]


def source_name(name: str, towers: Towers) -> str:
    """Canonical name -> name in a checkpoint that has such towers.

    The Hub's put all of the text model behind `language_model.`, newer ones all but the head behind
    `model.`, and the towers, too.
    """
    newer = all(tower.startswith("model.") for tower in towers)
    if name == HEAD:
        return HEAD if newer else f"language_model.{HEAD}"
    prefix = "model.language_model." if newer else "language_model.model."
    return prefix + name.removeprefix("model.")


def tower_modules(towers: Towers) -> list[str]:
    """Patterns of compressed-tensors for the modules that the towers are."""
    names = {tower.removeprefix("model.").partition(".")[0] for tower in towers}
    return [rf"re:.*{name}.*" for name in sorted(names)]


def _stored(tower: TowerTensor, dtype: str, losses: Losses) -> StoredTensor:
    if not tower.is_int8:
        kind = tower.dtype.upper()
        return StoredTensor(tower.name, kind, tower.shape, tower.nbytes, tower.pieces)

    def chunks() -> Iterator[Any]:
        for values in tower.values():
            yield rounded(tower.name, values, dtype, losses)

    nbytes = prod(tower.shape) * ITEM_BYTES[dtype]
    return StoredTensor(tower.name, SAFETENSORS[dtype], tower.shape, nbytes, chunks)
