"""The checkpoint that a bundle is compared with."""

from __future__ import annotations

from dataclasses import fields

from uq.errors import CheckpointError, UqError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import GemmaConfig
from uq.formats.manifest import Manifest, Provenance

HASHED_BYTES = 8 << 30  # a larger checkpoint is compared by its file sizes: hashing takes minutes
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
    if _is_slow_to_hash(checkpoint):
        differences.append("its weight files are large and were compared by name and size alone")
    return checkpoint, tuple(f"reference: {difference}" for difference in differences)


def _is_slow_to_hash(checkpoint: Checkpoint) -> bool:
    """Whether the files are here and large; the Hub keeps the hashes of its own."""
    nbytes = sum(file.size for file in checkpoint.files().values())
    return not checkpoint.streamed and nbytes > HASHED_BYTES


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
    """At most one sentence. Hashes are compared where reading the files takes seconds."""
    sizes = {name: file.size for name, file in checkpoint.files().items()}
    expected = {name: record.size for name, record in origin.files.items()}
    if sizes != expected:
        return ["its weight files differ in name or size from those the bundle was made from"]
    if _is_slow_to_hash(checkpoint):
        return []
    found = checkpoint.fingerprint()
    changed = [name for name, file in origin.files.items() if found[name]["sha256"] != file.sha256]
    return [f"{changed[0]} has another content than when the bundle was made"] if changed else []
