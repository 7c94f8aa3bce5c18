"""Vocabulary of a GGUF file -> tokenizer.json.

GGUF keeps SentencePiece's tokens and scores: the encoder merges the neighbours whose concatenation
has the best score, the leftmost of equals. A tokenizer.json has a list of merges instead, and so
have files of gemma4.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError
from uq.formats.checkpoint.gguf_file import GgufFile
from uq.formats.checkpoint.merges import MAX_TOKEN
from uq.formats.decode import shown

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "▁"
KINDS = ("llama", "gemma4")
UNKNOWN_KEY = "tokenizer.ggml.unknown_token_id"
# Gemma's markup tokens that converters store as plain user-defined ones.
TURNS = ("<start_of_turn>", "<end_of_turn>")


def vocabulary_key(file: GgufFile) -> str:
    """SHA-256 of everything that `tokenizer_json` depends on.

    Raises:
        CheckpointError: as `tokenizer_json`.
    """
    raw, scores, types = _vocabulary(file)
    lengths = np.array([len(token) for token in raw], "<i8")
    merges = b"\0".join(_listed_merges(file) or [])
    parts = (lengths.tobytes(), b"".join(raw), scores.tobytes(), types.tobytes(), merges)
    digest = hashlib.sha256(str(file.metadata.get(UNKNOWN_KEY)).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def tokenizer_json(file: GgufFile) -> bytes:
    """A tokenizer.json that gives the ids llama.cpp gives.

    Raises:
        CheckpointError: the file has no vocabulary, or one of another kind than Gemma's.
    """
    raw, scores, types = _vocabulary(file)
    listed = _listed_merges(file)
    try:
        tokens = [token.decode() for token in raw]
        pairs = None if listed is None else [merge.decode().split(" ") for merge in listed]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file.path.name}: a token is not UTF-8: {error}") from error
    unknown = file.metadata.get(UNKNOWN_KEY, 3)
    if type(unknown) is not int or not 0 <= unknown < len(tokens):
        raise CheckpointError(
            f"{file.path.name}: unknown_token_id is {shown(unknown)}, but there are {len(tokens)} "
            "tokens"
        )
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": scored_merges(raw, scores, types) if pairs is None else pairs,
        },
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _vocabulary(file: GgufFile) -> tuple[list[bytes], NDArray[np.float32], NDArray[np.int32]]:
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise CheckpointError(
            f"{file.path.name}: tokenizer {shown(kind)} is not supported; Gemma's is 'llama' "
            "(SentencePiece) or 'gemma4' (merges)"
        )
    try:
        tokens, scores, types = (
            file.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")
        )
    except KeyError as error:
        raise CheckpointError(f"{file.path.name}: metadata {error.args[0]} is missing") from error
    numbers = isinstance(scores, np.ndarray) and isinstance(types, np.ndarray)
    if not (isinstance(tokens, list) and numbers):
        raise CheckpointError(f"{file.path.name}: the vocabulary is no lists of tokens and numbers")
    if max(map(len, tokens), default=0) > MAX_TOKEN:
        raise CheckpointError(f"{file.path.name}: a token has more than {MAX_TOKEN} bytes")
    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(
            f"{file.path.name}: {len(tokens)} tokens, {len(scores)} scores and {len(types)} token "
            "types; expected as many of each"
        )
    return tokens, np.asarray(scores, np.float32), np.asarray(types, np.int32)


def _listed_merges(file: GgufFile) -> list[bytes] | None:
    """Pairs of tokens, best first, of a file that has them; None where scores stand for them."""
    if file.metadata.get("tokenizer.ggml.model") != "gemma4":
        return None
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or any(merge.count(b" ") != 1 for merge in merges):
        raise CheckpointError(f"{file.path.name}: the merges are no list of pairs of tokens")
    return merges


def _added_tokens(tokens: list[str], types: NDArray[np.int32]) -> list[dict[str, Any]]:
    """Tokens that are found in the text before anything is merged."""
    added = []
    for index in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist():
        special = types[index] != USER_DEFINED or tokens[index] in TURNS
        added.append(
            {
                "id": index,
                "content": tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": bool(special),
            }
        )
    return added


def scored_merges(
    raw: list[bytes], scores: NDArray[np.float32], types: NDArray[np.int32]
) -> list[tuple[str, str]]:
    """The merges that are ever used, best score first.

    Args:
        raw: (tokens,) UTF-8.
        scores, types: (tokens,).
    """
    from uq.formats.checkpoint.merges import all_splits, concatenate, used_merges

    data, offsets = concatenate(raw)
    left, right, result = all_splits(data, offsets)
    _, rank = np.unique(-scores[result], return_inverse=True)
    used = used_merges(data, offsets, left, right, result, rank.astype(np.int32))
    # User-defined tokens are cut out of the text before merging; nothing is left to merge.
    used &= types[result] != USER_DEFINED
    kept = np.flatnonzero(used)
    kept = kept[np.argsort(rank[kept], kind="stable")]
    pairs = zip(left[kept].tolist(), right[kept].tolist(), strict=True)
    return [(raw[first].decode(), raw[second].decode()) for first, second in pairs]
