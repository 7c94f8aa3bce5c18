"""tokenizer.json -> the vocabulary of a GGUF file.

A tokenizer.json has a list of merges, the best first. GGUF has a score for each token, and whoever
reads it merges the neighbours whose concatenation has the best score. So a token's score is the
place of its merges in the list, which must stand together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import TokenType

from uq.errors import BundleError
from uq.formats.checkpoint.compact import pair
from uq.formats.checkpoint.gguf_tokenizer import SPACE, scored_merges
from uq.formats.checkpoint.merges import concatenate, used_merges
from uq.formats.decode import printable
from uq.formats.tokenizer import BYTE

NO_MERGE = -1e6  # score of a token that nothing is merged into
UNUSED = "[PAD{}]"
CUT_OUT = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class Vocabulary:
    """One entry for each row of the embedding.

    Attributes:
        unknown: id for what no token stands for; None where bytes stand for everything.
        merges: the best first, `left right`; of use where no scores are.
        beyond: tokens that the embedding has no row of.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    unknown: int | None
    merges: list[str]
    beyond: tuple[str, ...]


def vocabulary(data: bytes, size: int, *, scored: bool) -> Vocabulary:
    """The vocabulary in a tokenizer.json, filled up to `size` with tokens that are never used.

    Added tokens without a row, as `<image_soft_token>` in text models of Gemma 3, are left out.

    Args:
        scored: tokens have scores in the place of merges.

    Raises:
        BundleError: the order of its merges cannot be said by scores, a merge has a blank, or it
            has too many tokens.
    """
    document = json.loads(data)
    model: dict[str, Any] = document["model"]
    if (last := max(model["vocab"].values())) >= size:
        raise BundleError(
            f"tokenizer.json: has token {last}, but the embedding {size} rows; GGUF cannot hold "
            "this model"
        )
    added = {token["content"]: token for token in document["added_tokens"]}
    beyond = tuple(name for name, token in added.items() if token["id"] >= size)
    added = {name: token for name, token in added.items() if token["id"] < size}
    ids: dict[str, int] = model["vocab"] | {name: token["id"] for name, token in added.items()}
    merges = [pair(merge) for merge in model["merges"]]
    types = {token: _type(token, added, model["unk_token"]) for token in ids}
    scores = _scores(merges, types) if scored else {}
    found = Vocabulary(
        [UNUSED.format(index) for index in range(size)],
        [NO_MERGE] * size,
        [int(TokenType.UNUSED)] * size,
        ids.get(model["unk_token"]),
        [] if scored else [_joined(*merge) for merge in merges],
        beyond,
    )
    for token, index in ids.items():
        found.tokens[index] = token
        found.scores[index] = scores.get(token, NO_MERGE)
        found.types[index] = int(types[token])
    if scored:
        _require_same_merges(found, merges, ids)
    return found


def _joined(left: str, right: str) -> str:
    if " " in left + right:
        raise BundleError(f"tokenizer.json: GGUF has no merge of {printable(left + right)}")
    return f"{left} {right}"


def _scores(merges: Merges, types: Mapping[str, TokenType]) -> dict[str, float]:
    """Token -> minus the place of its first merge.

    Raises:
        BundleError: the merges of a token do not stand together.
    """
    scores: dict[str, float] = {}
    last = ""
    for place, (left, right) in enumerate(merges):
        token = left + right
        if types.get(token) in CUT_OUT or token == last:
            continue
        if token in scores:
            raise BundleError(
                f"tokenizer.json: the merges of {printable(token)} do not stand together; GGUF "
                "has one score a token and would split texts otherwise"
            )
        scores[token], last = -float(place), token
    return scores


def _type(token: str, added: Mapping[str, Any], unknown: str | None) -> TokenType:
    """Whether a token is cut out of the text before anything is merged, and as what.

    Spaces of a text become `▁` before merges and behind added tokens, so those of Gemma that are
    runs of `▁` are never cut out of it: merges make them.
    """
    if token == unknown:
        return TokenType.UNKNOWN
    if token in added and added[token]["special"]:
        return TokenType.CONTROL
    if token in added and SPACE not in token:
        return TokenType.USER_DEFINED
    return TokenType.BYTE if BYTE.fullmatch(token) else TokenType.NORMAL


def _require_same_merges(found: Vocabulary, merges: Merges, ids: Mapping[str, int]) -> None:
    """Merge by the scores, as a reader does, and compare with what the list makes of each token.

    Raises:
        BundleError: a reader would merge something else.
    """
    raw = [token.encode("utf-8", "surrogatepass") for token in found.tokens]
    scores, types = np.array(found.scores, np.float32), np.array(found.types, np.int32)
    told = _of_text(scored_merges(raw, scores, types), found, ids)
    listed = _of_text(_used(raw, merges, ids), found, ids)
    if told == listed:
        return
    left, right = min(set(told) ^ set(listed), default=listed[0])  # else only their order
    raise BundleError(
        f"tokenizer.json: scores, which GGUF has, cannot say what becomes of {printable(left)} and "
        f"{printable(right)}; llama.cpp would split texts otherwise"
    )


def _used(raw: list[bytes], merges: Merges, ids: Mapping[str, int]) -> Merges:
    """The merges that are ever used, best first."""
    if not merges:
        return []
    triples = [(ids[left], ids[right], ids[left + right]) for left, right in merges]
    left, right, result = np.array(triples, np.int32).T.copy()
    rank = np.arange(len(merges), dtype=np.int32)
    used = used_merges(*concatenate(raw), left, right, result, rank)
    return [merges[index] for index in np.flatnonzero(used)]


def _of_text(merges: Merges, found: Vocabulary, ids: Mapping[str, int]) -> Merges:
    """Without those that make what is cut out: nothing is left to merge there."""
    return [
        (left, right) for left, right in merges if found.types[ids[left + right]] not in CUT_OUT
    ]
