"""A bundle as a GGUF file, with its own codes and scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
)

from uq.chat import CHAT_FILES, find_template
from uq.errors import BundleError, UsageError
from uq.export.gguf_model import add_model, architecture, takes_merges
from uq.export.gguf_tensors import ROPE_FACTORS, layer_of
from uq.export.gguf_vocabulary import Vocabulary
from uq.export.stored import StoredTensor
from uq.formats.bundle import Bundle
from uq.formats.checkpoint.gguf_config import gguf_config
from uq.formats.checkpoint.gguf_file import read_gguf
from uq.formats.config import SLIDING, GemmaConfig
from uq.formats.disk import disk_errors, write_file
from uq.progress import Progress

ALIGNMENT = 32
TURNS = ("<end_of_turn>", "<turn|>")
FREE = {"eos_token_ids"}  # llama.cpp stops at further tokens, too, by their names
WINDOWS = {"sliding_window", "rope_local_theta"}  # told where there are any


def write_gguf(
    work: Path,
    bundle: Bundle,
    tensors: Sequence[StoredTensor],
    words: Vocabulary,
    progress: Progress,
) -> Path:
    """Write the file into the folder `work`.

    Raises:
        BundleError: llama.cpp would run another model than this.
        DeviceError: the disk is full or broken.
    """
    nbytes = sum(map(_padded, (tensor.nbytes for tensor in tensors)))
    with disk_errors(work, nbytes):
        header = _header(work / "header", bundle, tensors, words)
        total = len(header) + nbytes
        _require_same_model(work / "header", len(header), total, tensors, bundle.config)
        (work / "header").unlink()
    progress.start(len(list(_parts(tensors))), "export")
    path = work / "model.gguf"
    write_file(path, _contents(header, tensors, progress), total)
    progress.close()
    return path


def _header(
    path: Path, bundle: Bundle, tensors: Sequence[StoredTensor], words: Vocabulary
) -> bytes:
    """Everything in front of the data."""
    writer = GGUFWriter(path, architecture(bundle.config))
    writer.add_type(GGUFType.MODEL)
    writer.add_name(bundle.name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(tensors))
    add_model(writer, bundle.config)
    _add_vocabulary(writer, bundle, words)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.read_bytes()
    return header + bytes(_padded(len(header)) - len(header))


def _file_type(tensors: Sequence[StoredTensor]) -> LlamaFileType:
    """The type of most linears; a word for people, readers go by each tensor's own."""
    kinds = Counter(t.kind for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2)
    kind = kinds.most_common(1)[0][0]
    return LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType[f"MOSTLY_{kind}"]


def _add_vocabulary(writer: GGUFWriter, bundle: Bundle, words: Vocabulary) -> None:
    config = bundle.config
    by_merges = takes_merges(config)
    writer.add_tokenizer_model(architecture(config) if by_merges else "llama")
    if by_merges:
        writer.add_token_merges(words.merges)
    else:
        writer.add_tokenizer_pre("default")
    writer.add_token_list(words.tokens)
    writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_ids[0])
    if len(config.eos_token_ids) > 1:
        writer.add_eot_token_id(_end_of_turn(config.eos_token_ids[1:], words))
    if words.unknown is not None:
        writer.add_unk_token_id(words.unknown)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    with suppress(UsageError):  # a base model has none
        writer.add_chat_template(
            find_template({n: bundle.asset(n) for n in CHAT_FILES if n in bundle.manifest.files})
        )


def _end_of_turn(further: Sequence[int], words: Vocabulary) -> int:
    """Of the further tokens at which generation stops, that of a turn."""
    return next((token for token in further if words.tokens[token] in TURNS), further[-1])


def _require_same_model(
    path: Path, header: int, total: int, tensors: Sequence[StoredTensor], config: GemmaConfig
) -> None:
    """Read the file that will be, as llama.cpp does, before its weights are written."""
    with path.open("r+b") as file:
        file.truncate(total)  # takes no room: there is nothing in it
        if tensors[0].name == ROPE_FACTORS:  # a part of the model's shape
            file.seek(header)
            file.writelines(map(bytes, tensors[0].chunks()))
    found = gguf_config(read_gguf(path)).to_json()
    unsaid = FREE if SLIDING in config.layer_types else FREE | WINDOWS
    for key, value in _as_told(config).to_json().items():
        if key not in unsaid and not _same(found.get(key), value):
            raise BundleError(
                f"GGUF cannot say that {key} is {value}: llama.cpp would take {found.get(key)}; "
                "use another format"
            )


def _as_told(config: GemmaConfig) -> GemmaConfig:
    """The model as a file of it has it."""
    per_layer = config.per_layer
    if per_layer is not None:
        per_layer = replace(per_layer, vocab_size=config.vocab_size)
    return replace(config, family=architecture(config), per_layer=per_layer)


def _same(found: Any, wanted: Any) -> bool:
    """Numbers are float32 in the file."""
    if isinstance(wanted, float) and isinstance(found, float):
        return isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def _contents(
    header: bytes, tensors: Sequence[StoredTensor], progress: Progress
) -> Iterator[bytes | memoryview]:
    yield header
    for part, members in _parts(tensors):
        for tensor in members:
            progress.work(tensor.name)
            for chunk in tensor.chunks():
                yield np.ascontiguousarray(chunk).data
            yield bytes(_padded(tensor.nbytes) - tensor.nbytes)
        progress.advance(part)


def _parts(tensors: Sequence[StoredTensor]) -> Iterator[tuple[str, Iterator[StoredTensor]]]:
    """The tensors of no layer, then layer by layer."""
    for layer, members in groupby(tensors, lambda tensor: layer_of(tensor.name)):
        yield "tables" if layer < 0 else f"layer {layer}", members


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
