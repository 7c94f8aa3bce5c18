"""A tokenizer.json without the merges that are never used: the same ids, half the loading time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from uq.formats.checkpoint.merges import MAX_TOKEN, concatenate, used_merges


def without_unused_merges(data: bytes) -> bytes:
    """Drop unused merges of a BPE tokenizer; anything else is returned as it is.

    Args:
        data: content of a tokenizer.json.
    """
    try:
        document = json.loads(data)
        model = document["model"]
        vocab: dict[str, int] = model["vocab"]
        merges = [pair(merge) for merge in model["merges"]]
        if not merges or not _is_plain(model, vocab):
            return data
        triples = [(vocab[a], vocab[b], vocab[a + b]) for a, b in merges]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data  # broken, or not BPE: whoever builds the tokenizer says so
    tokens = [b""] * len(vocab)
    for token, index in vocab.items():
        tokens[index] = token.encode("utf-8", "surrogatepass")
    left, right, result = np.array(triples, np.int32).T.copy()
    rank = np.arange(len(merges), dtype=np.int32)
    used = used_merges(*concatenate(tokens), left, right, result, rank)
    model["merges"] = [merges[index] for index in np.flatnonzero(used)]
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")  # which no tokenizer will read


def pair(merge: str | list[str]) -> tuple[str, str]:
    """Old files write a merge as one string with a space between its parts."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _is_plain(model: dict[str, Any], vocab: dict[str, int]) -> bool:
    """Whether a merge joins its two texts as they are, always, and ids have no holes."""
    special = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in special)
        and all(type(index) is int for index in vocab.values())
        and sorted(vocab.values()) == list(range(len(vocab)))
        and max(map(len, vocab)) <= MAX_TOKEN
    )
