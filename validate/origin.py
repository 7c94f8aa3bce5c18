"""The checkpoint that a bundle is compared with."""

from __future__ import annotations

from dataclasses import fields

from uq.errors import CheckpointError, UqError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import GemmaConfig
from uq.formats.manifest import Manifest, Provenance

READ_BYTES = 8 << 30  # a larger checkpoint is compared by its file sizes: reading takes minutes
SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "tied_head",
)


def find_reference(
    manifest: Manifest, given: Checkpoint | None, *, keep: bool = False
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The given checkpoint, or the one that the bundle was made from; and warnings about it.

    Args:
        keep: download the weights of the bundle's own; else what is read is fetched from the Hub.

    Raises:
        CheckpointError: the bundle's own checkpoint cannot be opened or has changed, or the given
            one has other shapes than the bundle.
    """
    checkpoint = _open_origin(manifest.provenance, keep) if given is None else given
    _check_shapes(manifest.model, checkpoint)
    differences = [
        *_config_differences(manifest.model, checkpoint.config),
        *_file_differences(manifest.provenance, checkpoint),
    ]
    if differences and given is None:
        raise CheckpointError(
            f"{checkpoint.source.id}: not what the bundle was made from: {differences[0]}; "
            "pass --reference MODEL to compare with it all the same"
        )
    origin = manifest.provenance
    compared = _stated(origin, checkpoint) | _readable(origin, checkpoint)
    if not differences and not compared >= origin.files.keys():
        differences.append("its weight files were compared by name and size alone")
    return checkpoint, tuple(f"reference: {difference}" for difference in differences)


def _open_origin(origin: Provenance, keep: bool) -> Checkpoint:
    try:
        return open_checkpoint(origin.id, revision=origin.revision, stream=not keep)
    except UqError as error:
        raise CheckpointError(
            f"the checkpoint of this bundle cannot be opened; pass --reference MODEL: {error}"
        ) from error


def _check_shapes(config: GemmaConfig, checkpoint: Checkpoint) -> None:
    for name in SHAPES:
        ours, theirs = getattr(config, name), getattr(checkpoint.config, name)
        if ours != theirs:
            raise CheckpointError(
                f"{checkpoint.source.id}: {name} is {theirs}, but {ours} in the bundle; "
                "pass the checkpoint that the bundle was made from"
            )


def _config_differences(ours: GemmaConfig, theirs: GemmaConfig) -> list[str]:
    names = [field.name for field in fields(GemmaConfig)]
    return [
        f"{name} is {getattr(theirs, name)}, but {getattr(ours, name)} in the bundle"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]


def _file_differences(origin: Provenance, checkpoint: Checkpoint) -> list[str]:
    """At most one sentence."""
    files = checkpoint.files()
    expected = {name: record.size for name, record in origin.files.items()}
    if {name: file.size for name, file in files.items()} != expected:
        return ["its weight files differ in name or size from those the bundle was made from"]
    stated, readable = _stated(origin, checkpoint), _readable(origin, checkpoint)
    changed = [n for n in stated if files[n].stated_sha256 != origin.files[n].sha256]
    if not readable <= stated:
        contents = checkpoint.contents()
        changed += [n for n in readable - stated if contents[n] != origin.files[n].content]
    return [f"{changed[0]} has another content than when the bundle was made"] if changed else []


def _stated(origin: Provenance, checkpoint: Checkpoint) -> set[str]:
    """Files whose SHA-256 was stated by their source then and is now: nothing is read."""
    files = checkpoint.files().items()
    return {name for name, file in files if file.stated_sha256 and origin.files[name].sha256}


def _readable(origin: Provenance, checkpoint: Checkpoint) -> set[str]:
    """Files whose content is known and takes seconds to read: they are here, and not large."""
    if checkpoint.streamed or sum(f.size for f in checkpoint.files().values()) > READ_BYTES:
        return set()
    return {name for name, record in origin.files.items() if record.content}
