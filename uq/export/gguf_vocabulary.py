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

from gguf import TokenType

from uq.errors import BundleError
from uq.formats.checkpoint.compact import pair
from uq.formats.decode import printable
from uq.formats.tokenizer import BYTE

NO_MERGE = -1e6  # score of a token that nothing is merged into; llama.cpp never looks at it
UNUSED = "[PAD{}]"


@dataclass(frozen=True)
class Vocabulary:
    """One entry for each row of the embedding.

    Attributes:
        merges: the best first, `left right`; of use where no scores are.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    unknown: int
    merges: list[str]


def vocabulary(data: bytes, size: int, *, scored: bool) -> Vocabulary:
    """The vocabulary in a tokenizer.json, filled up to `size` with tokens that are never used.

    Args:
        scored: tokens have scores in the place of merges.

    Raises:
        BundleError: the order of its merges cannot be said by scores, a merge has a blank, or it
            has too many tokens.
    """
    document = json.loads(data)
    model: dict[str, Any] = document["model"]
    added = {token["content"]: token for token in document["added_tokens"]}
    ids: dict[str, int] = model["vocab"] | {name: token["id"] for name, token in added.items()}
    if max(ids.values()) >= size:
        raise BundleError(
            f"tokenizer.json: has token {max(ids.values())}, but the embedding {size} rows; GGUF "
            "cannot hold this model"
        )
    merges = [pair(merge) for merge in model["merges"]]
    scores = _scores(merges, added) if scored else {}
    tokens = [UNUSED.format(index) for index in range(size)]
    values, types = [NO_MERGE] * size, [int(TokenType.UNUSED)] * size
    for token, index in ids.items():
        tokens[index] = token
        values[index] = scores.get(token, NO_MERGE)
        types[index] = int(_type(token, added, model["unk_token"]))
    joined = [] if scored else [_joined(*merge) for merge in merges]
    return Vocabulary(tokens, values, types, ids[model["unk_token"]], joined)


def _joined(left: str, right: str) -> str:
    if " " in left + right:
        raise BundleError(f"tokenizer.json: GGUF has no merge of {printable(left + right)}")
    return f"{left} {right}"


def _scores(merges: list[tuple[str, str]], added: Mapping[str, Any]) -> dict[str, float]:
    """Token -> minus the place of its first merge.

    Raises:
        BundleError: the merges of a token do not stand together.
    """
    scores: dict[str, float] = {}
    last = ""
    for place, (left, right) in enumerate(merges):
        token = left + right
        if token in added or token == last:  # added tokens are cut out before anything is merged
            continue
        if token in scores:
            raise BundleError(
                f"tokenizer.json: the merges of {printable(token)} do not stand together; GGUF "
                "has one score a token and would split texts otherwise"
            )
        scores[token], last = -float(place), token
    return scores


def _type(token: str, added: Mapping[str, Any], unknown: str) -> TokenType:
    if token == unknown:
        return TokenType.UNKNOWN
    if token in added:
        return TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if BYTE.fullmatch(token) else TokenType.NORMAL
