"""What is in a checkpoint or a bundle, from headers and the manifest alone: no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import TABLES
from uq.formats.hub_bundle import is_hub_bundle
from uq.formats.manifest import MANIFEST, TOWERS, Manifest
from uq.formats.towers import open_towers


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    Attributes:
        format: `bf16`, `q4_k`, `int4 g64`...
        layout, method, relative_error: of a bundle's quantized tensors, else None.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    format: str
    layout: str | None = None
    method: str | None = None
    relative_error: float | None = None

    @property
    def kind(self) -> str:
        """Role within a layer; all norms are one kind."""
        if self.name in TABLES:
            return TABLES[self.name]
        role = re.sub(r"^model\.(layers\.\d+\.)?|\.(weight|gain)$", "", self.name)
        return "norms" if "norm" in role.rpartition(".")[2] else role


@dataclass(frozen=True)
class Kind:
    """All tensors of one kind, e.g. every layer's `mlp.down_proj`.

    Attributes:
        stored_as: the formats, layouts and methods that occur, the most frequent first.
        relative_error: mean over the tensors, None where it is not known.
    """

    kind: str
    tensors: int
    weights: int
    nbytes: int
    bits_per_weight: float
    stored_as: tuple[str, ...]
    relative_error: float | None


@dataclass(frozen=True)
class Towers:
    """Vision and audio towers beside the text model; `int8` of them are stored as INT8."""

    tensors: int
    int8: int
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """A model that was looked into.

    Attributes:
        what: `checkpoint` or `bundle`.
        plan: recipe and options of a bundle, empty for a checkpoint.
        provenance: where the weights came from, and with what a bundle was made.
        left_out: one sentence for each part of the source that a bundle does not hold.
    """

    what: str
    name: str
    nbytes: int
    bits_per_weight: float
    parameters: int
    config: dict[str, Any]
    plan: dict[str, Any]
    provenance: dict[str, Any]
    kinds: tuple[Kind, ...]
    tensors: tuple[Tensor, ...]
    left_out: tuple[str, ...]
    towers: Towers | None = None


def inspect(source: str, *, revision: str | None = None) -> Contents:
    """Look into a bundle (a folder with a manifest) or else a checkpoint.

    Raises:
        BundleError, CheckpointError, HubError, UsageError: as opening them does.
    """
    if (Path(source) / MANIFEST).is_file() or is_hub_bundle(source, revision):
        name = f"{source}@{revision}" if revision else source
        return _bundle_contents(open_bundle(name, verify="lazy"))
    return _checkpoint_contents(open_checkpoint(source, revision=revision, stream=True))


def _checkpoint_contents(checkpoint: Checkpoint) -> Contents:
    tensors = [
        Tensor(name, info.shape, info.nbytes, info.dtype)
        for name, info in checkpoint.tensors.items()
    ]
    files = {name: file.size for name, file in checkpoint.files().items()}
    return _contents(
        "checkpoint",
        checkpoint.source.id,
        tensors,
        config=checkpoint.config.to_json(),
        plan={},
        provenance=asdict(checkpoint.source) | {"dtype": checkpoint.dtype, "files": files},
        left_out=checkpoint.left_out,
        towers=_checkpoint_towers(checkpoint),
    )


def _bundle_contents(bundle: Bundle) -> Contents:
    manifest = bundle.manifest
    made = asdict(manifest)
    provenance = made["provenance"] | {key: made[key] for key in ("uq", "calibration", "tools")}
    return _contents(
        "bundle",
        bundle.name,
        list(_bundle_tensors(manifest)),
        config=manifest.model.to_json(),
        plan={"recipe": manifest.recipe} | dict(manifest.options),
        provenance=provenance | {"sha256": bundle.sha256},
        left_out=manifest.left_out,
        towers=bundle_towers(bundle),
    )


def _checkpoint_towers(checkpoint: Checkpoint) -> Towers | None:
    towers = checkpoint.towers.values()
    return Towers(len(towers), 0, sum(info.nbytes for info in towers)) if towers else None


def bundle_towers(bundle: Bundle) -> Towers | None:
    """What a bundle holds beside the text model; no weights are read."""
    if TOWERS not in bundle.manifest.files:
        return None
    towers = open_towers(bundle.path / TOWERS).values()
    stored = sum(tensor.info.nbytes for tensor in towers)
    return Towers(len(towers), sum(tensor.is_int8 for tensor in towers), stored)


def _bundle_tensors(manifest: Manifest) -> Iterable[Tensor]:
    for name, record in manifest.tensors.items():
        yield Tensor(
            name,
            record.shape,
            prod(record.stored_shape),
            str(record.spec),
            record.layout,
            record.method,
            record.relative_error,
        )
    for name, array in manifest.arrays.items():
        yield Tensor(name, array.shape, 4 * prod(array.shape), array.dtype)


def _contents(what: str, name: str, tensors: list[Tensor], **rest: Any) -> Contents:
    nbytes = sum(tensor.nbytes for tensor in tensors)
    parameters = sum(prod(tensor.shape) for tensor in tensors)
    by_kind: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault(tensor.kind, []).append(tensor)
    return Contents(
        what=what,
        name=name,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / parameters,
        parameters=parameters,
        kinds=tuple(_summary(kind, members) for kind, members in by_kind.items()),
        tensors=tuple(tensors),
        **rest,
    )


def _summary(kind: str, tensors: list[Tensor]) -> Kind:
    weights = sum(prod(tensor.shape) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    formats = Counter(
        " ".join(filter(None, (tensor.format, tensor.layout, tensor.method))) for tensor in tensors
    )
    errors = [t.relative_error for t in tensors if t.relative_error is not None]
    return Kind(
        kind,
        len(tensors),
        weights,
        nbytes,
        8 * nbytes / weights,
        tuple(name for name, _ in formats.most_common()),
        sum(errors) / len(errors) if errors else None,
    )
