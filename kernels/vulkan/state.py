"""Where sequences stand, as the kernels see it: struct `State`, for GLSL and for NumPy.

The host writes it in front of a submit; the kernels move it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME = "state.glsl"
MOST_TOKENS = 512  # columns of a pass
MOST_SEQUENCES = 64  # of a decode step
MOST_STEPS = 16  # decode steps of a submit; no more than may be taken back
MOST_STOPS = 8  # tokens that end a text
MOST_BLOCKS = 128  # workgroups of attention in a column of a decode step
NOBODY = 0xFFFFFFFF


@dataclass(frozen=True)
class Field:
    """`count` words of 32 bits, and what they are."""

    name: str
    kind: str
    count: int
    meaning: str


POSTED = (
    Field("count", "uint", 1, "columns of this pass that are tokens"),
    Field("run_count", "uint", 1, "of `run_columns`"),
    Field("stop_count", "uint", 1, "of `stops`"),
    Field("stops", "uint", MOST_STOPS, "tokens that end a text"),
    Field("tokens", "uint", MOST_TOKENS, "of each column"),
    Field("positions", "uint", MOST_TOKENS, "tokens in front of each column's"),
    Field("slots", "uint", MOST_TOKENS, "the KV cache of each column"),
    Field("run_columns", "uint", MOST_TOKENS, "first column of neighbours in one sequence"),
    Field("run_tokens", "uint", MOST_TOKENS, "their number"),
    Field("temperatures", "float", MOST_SEQUENCES, "0: the likeliest token"),
    Field("top_ks", "uint", MOST_SEQUENCES, "0: all tokens"),
    Field("top_ps", "float", MOST_SEQUENCES, "1: all tokens"),
    Field("draws", "float", MOST_SEQUENCES * MOST_STEPS, "random numbers in [0, 1) for each token"),
)
KEPT = (
    Field("done", "uint", MOST_SEQUENCES, "1: the sequence stays as it is"),
    Field("made", "uint", MOST_SEQUENCES, "tokens that were appended since the submit began"),
    Field("failed", "uint", 1, "1: workgroups have waited for each other in vain"),
    Field("choices", "uint", MOST_SEQUENCES, "the token that follows"),
    Field("generated", "uint", MOST_SEQUENCES * MOST_STEPS, "the tokens that were appended"),
)
OWN = (Field("arrived", "uint", 64 + MOST_SEQUENCES * MOST_BLOCKS, "workgroups, by counter"),)
FIELDS = POSTED + KEPT + OWN

POSTED_WORDS = sum(field.count for field in POSTED)
KEPT_WORDS = sum(field.count for field in KEPT)
STATE_BYTES = 4 * sum(field.count for field in FIELDS)

CHOOSE_COUNTER, ATTENTION_COUNTER = 0, 64  # in `arrived`


def state_header() -> str:
    """The text of `state.glsl`."""
    constants = {"MAX_STEPS": MOST_STEPS, "MAX_SEQUENCES": MOST_SEQUENCES}
    members = [f"    {_member(field)};  // {field.meaning}" for field in FIELDS]
    return "\n".join(
        [
            "// Generated from kernels/vulkan/state.py.",
            *(f"const uint {name} = {value};" for name, value in constants.items()),
            "layout(buffer_reference, std430, buffer_reference_align = 16) buffer State {",
            *members,
            "};",
            "",
        ]
    )


def _member(field: Field) -> str:
    return f"{field.kind} {field.name}" + f"[{field.count}]" * (field.count > 1)


def views(words: NDArray[np.uint32]) -> dict[str, NDArray[Any]]:
    """Field -> its part of `words`, float32 where the kernels see floats."""
    found: dict[str, NDArray[Any]] = {}
    start = 0
    for field in FIELDS:
        part = words[start : start + field.count]
        found[field.name] = part.view(np.float32) if field.kind == "float" else part
        start += field.count
    return found


def blank() -> NDArray[np.uint32]:
    """A state in which nothing happens: no column is a token, every sequence is done."""
    words = np.zeros(STATE_BYTES // 4, np.uint32)
    views(words)["done"][:] = 1
    return words


def one_token(position: int = 0) -> NDArray[np.uint32]:
    """A state in which the first column is a token."""
    words = blank()
    views(words)["count"][0] = 1
    views(words)["positions"][0] = position
    return words
