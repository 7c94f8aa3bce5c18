"""Path, Hub id or demo name -> Checkpoint."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from uq import __version__
from uq.errors import CheckpointError, UsageError
from uq.formats.checkpoint.cache import kept
from uq.formats.checkpoint.checkpoint import (
    TOKENIZER,
    Checkpoint,
    Source,
    expected_shapes,
)
from uq.formats.checkpoint.compact import without_unused_merges
from uq.formats.checkpoint.demo import DEMO, demo_gguf, demo_licences
from uq.formats.checkpoint.fetched import Fetched
from uq.formats.checkpoint.gguf_config import gguf_config, gguf_tensors
from uq.formats.checkpoint.gguf_file import GgufFile, read_gguf
from uq.formats.checkpoint.gguf_tokenizer import tokenizer_json, vocabulary_key
from uq.formats.checkpoint.head import tied
from uq.formats.checkpoint.hf_config import parse_config, read_json
from uq.formats.checkpoint.hub import (
    download_small,
    download_weights,
    has_weights,
)
from uq.formats.checkpoint.hub_file import hub_files
from uq.formats.checkpoint.read_ahead import BLOCK, WORKERS, read_ahead
from uq.formats.checkpoint.safetensors_file import folder_tensors, stored_tensors, weight_names
from uq.formats.checkpoint.small_file import read_small
from uq.formats.checkpoint.tensors import TensorInfo
from uq.formats.config import FINAL_NORM, HEAD, LAYERS
from uq.formats.decode import printable
from uq.formats.families.registry import FAMILIES
from uq.formats.hub_name import cached_repository, is_hub_id

PREFIXES = ("language_model.model.", "model.language_model.", "model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
PROCESSOR = (  # what prepares images and sound for the towers
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
ASSETS = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    *PROCESSOR,
)
MAX_ASSET = 64 << 20  # bytes; Gemma 3's tokenizer.json has 33 MB
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "GEMMA_TERMS*", "USE_POLICY*")


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, stream: bool = False
) -> Checkpoint:
    """Open a model without reading its weights.

    Args:
        source: folder with config.json and safetensors, GGUF file, Hub id `owner/name`, or
            `demo:gemma-3-270m`.
        revision: branch, tag or commit; for a Hub id only. It is pinned to its commit now.
        stream: leave the weights of a Hub id on the Hub, unless they are in the cache already, and
            fetch what is read; otherwise they are downloaded into the Hugging Face cache.

    Raises:
        UsageError: the source is none of these, or a revision is given for a local one.
        CheckpointError: the model is broken or of a kind that is not supported.
        HubError, ToolMissing: the Hub refused or could not be reached; the demo is not installed.
    """
    name, path = str(source), Path(source)
    if not name:
        raise UsageError("the model's name is empty; give a folder, a GGUF file or a Hub id")
    if path.is_dir() or path.is_file() or name == DEMO:
        if revision is not None:
            raise UsageError(f"{name}: --revision applies to a Hub id only")
        if path.is_dir():
            return _open_folder(path, Source("folder", name))
        if path.suffix == ".safetensors":
            raise UsageError(f"{name}: give the folder that holds it and its config.json")
        return _open_demo() if name == DEMO else _open_gguf(path, Source("gguf", name))
    if is_hub_id(name):
        return _open_hub(name, revision, stream)
    base, _, branch = name.partition("@")
    if branch and is_hub_id(base):
        raise UsageError(f"{name}: give the revision by itself: {base} --revision {branch}")
    raise UsageError(
        f"{name}: no such folder or file; a model is a folder with config.json and safetensors, "
        f"a GGUF file, a Hub id such as google/gemma-3-1b-it, or {DEMO}"
    )


def _open_hub(repo: str, revision: str | None, stream: bool) -> Checkpoint:
    folder = download_small(repo, revision)
    source = Source("hub", repo, folder.name)
    if stream and not has_weights(folder):
        files = hub_files(repo, folder.name, weight_names(folder))
        if files is not None:
            return _streamed(_open_folder(folder, source, stored_tensors(folder, files)))
    download_weights(repo, folder)
    return _open_folder(folder, source)


def _streamed(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, fetching a layer ahead of the one that is read."""
    names = list(checkpoint.tensors)
    tables = [[name] for name in names if not name.startswith(LAYERS)]
    layers = [
        [name for name in names if name.startswith(f"{LAYERS}{index}.")]
        for index in range(checkpoint.config.num_layers)
    ]
    sizes = [sum(checkpoint.tensors[name].nbytes for name in layer) for layer in layers]
    ahead = max(*sizes, WORKERS * BLOCK)
    checkpoint.buffered, checkpoint.fetched = 2 * ahead, Fetched()
    steps, towers = [*tables, *layers], [[name] for name in checkpoint.towers]
    checkpoint.tensors = read_ahead(checkpoint.tensors, steps, ahead, checkpoint.fetched)
    checkpoint.towers = read_ahead(checkpoint.towers, towers, ahead, Fetched())
    return checkpoint


def _open_folder(
    folder: Path, source: Source, stored: dict[str, TensorInfo] | None = None
) -> Checkpoint:
    """`stored` are the tensors of files that do not lie in the folder."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        hint = f"; to open a GGUF file, give its path: {gguf}" if gguf else ""
        raise CheckpointError(f"{folder}: has no config.json{hint}")
    generation = folder / "generation_config.json"
    config = parse_config(
        read_json(config_file), generation=read_json(generation) if generation.is_file() else {}
    )
    stored = folder_tensors(folder) if stored is None else stored
    family = FAMILIES[config.family]
    tensors, towers = canonical_names(stored, family.stored_names), tower_tensors(stored)
    tensors = tied(tensors) if config.tied_head else tensors
    return Checkpoint(
        source,
        config,
        tensors,
        dtype=_describe_dtype(tensors.values()),
        norm_offset=family.norm_offset,
        left_out=_unread(tensors, expected_shapes(config)),
        towers=towers,
        load_assets=lambda: _folder_assets(folder),
    )


def _open_gguf(
    path: Path, source: Source, licences: Callable[[], dict[str, bytes]] = dict
) -> Checkpoint:
    file = read_gguf(path)
    config = gguf_config(file)
    tensors = gguf_tensors(file, config)
    return Checkpoint(
        source,
        config,
        tensors,
        dtype=_gguf_dtype(file, tensors.values()),
        norm_offset=0.0,  # the converter stores 1 + w
        left_out=(),
        load_assets=lambda: _gguf_assets(file) | licences(),
    )


def _open_demo() -> Checkpoint:
    return _open_gguf(demo_gguf(), Source("demo", DEMO), demo_licences)


def canonical_names(
    stored: dict[str, TensorInfo], stored_roles: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Tensors of the text model under their canonical names, whatever prefix the files use.

    Args:
        stored_roles: role within a layer -> role as the files have it, where it is another one.
    """
    prefix = text_prefix(stored)
    roles = {found: role for role, found in stored_roles.items()}
    named = {
        _canonical(name.removeprefix(prefix), roles): info
        for name, info in stored.items()
        if name.startswith(prefix)
    }
    head = next((stored[name] for name in HEADS if name in stored), None)
    return named | ({HEAD: head} if head else {})


def text_prefix(stored: Collection[str]) -> str:
    """What the names of the text model's tensors begin with in the files."""
    return next((p for p in PREFIXES if p + FINAL_NORM.removeprefix("model.") in stored), "model.")


def tower_tensors(stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Of a multimodal model, what is not its text model."""
    prefix = text_prefix(stored)
    if prefix == "model.":
        return {}
    text = (prefix, *HEADS)
    return {name: info for name, info in stored.items() if not name.startswith(text)}


def _canonical(name: str, roles: Mapping[str, str]) -> str:
    """`layers.3.router.scale` -> `model.layers.3.router.scale.weight`."""
    *place, role = name.removesuffix(".weight").split(".")
    return ".".join(["model", *place, roles.get(role, role), "weight"])


def _unread(tensors: Mapping[str, TensorInfo], needed: Collection[str]) -> tuple[str, ...]:
    """Of the text model, what no computation takes: keys of shared layers, biases, rewards."""
    unread = [info for name, info in tensors.items() if name not in needed]
    if not unread:
        return ()
    size, first = sum(info.nbytes for info in unread), printable(unread[0].name)
    return (f"tensors that the model does not use: {len(unread)}, {size:,} bytes, e.g. {first}",)


def _describe_dtype(tensors: Iterable[TensorInfo]) -> str:
    """The dtype that holds most bytes, `mixed` if the matrices have others too."""
    sizes: Counter[str] = Counter()
    for info in tensors:
        if len(info.shape) == 2:
            sizes[info.dtype] += info.nbytes
    if not sizes:
        return "unknown"
    (most, _), *others = sizes.most_common()
    return f"{most} mixed" if others else most


def _gguf_dtype(file: GgufFile, tensors: Iterable[TensorInfo]) -> str:
    from gguf import LlamaFileType

    try:
        name: str = LlamaFileType(file.metadata["general.file_type"]).name
    except (KeyError, ValueError, TypeError):
        return _describe_dtype(tensors)
    return name.lower().removeprefix("mostly_").removeprefix("all_")


def _folder_assets(folder: Path) -> dict[str, bytes]:
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(f"{folder}: has no {TOKENIZER}; copy it from the original model")
    names = [name for name in ASSETS if (folder / name).exists()]
    names += sorted(path.name for pattern in LICENCES for path in folder.glob(pattern))
    assets = {name: _asset(folder, name) for name in names}
    original = assets[TOKENIZER]
    kept_as = _tokenizer_file(hashlib.sha256(original).hexdigest())
    return assets | {TOKENIZER: kept(kept_as, lambda: without_unused_merges(original))}


def _asset(folder: Path, name: str) -> bytes:
    """A file that the bundle will carry on, so no link to a file elsewhere on this machine.

    Raises:
        CheckpointError: it is one, or no file, or larger than any real one.
        DeviceError: the disk failed.
    """
    home = cached_repository(folder) or folder
    if not (folder / name).resolve().is_relative_to(home.resolve()):
        raise CheckpointError(f"{folder / name}: is a link out of the folder; copy the file itself")
    return read_small(folder / name, MAX_ASSET)


def _tokenizer_file(key: str) -> str:
    """Where the cache keeps a finished tokenizer: another version may make another one."""
    return f"tokenizers/{__version__}-{key}.json"


def _gguf_assets(file: GgufFile) -> dict[str, bytes]:
    kept_as = _tokenizer_file(vocabulary_key(file))
    assets = {TOKENIZER: kept(kept_as, lambda: tokenizer_json(file))}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        assets["chat_template.jinja"] = template.encode()
    return assets
