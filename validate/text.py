"""Text to token chunks, by the protocol of llama.cpp's perplexity tool.

The text is tokenized as a whole and cut into windows without overlap. BOS takes the place of each
window's first token, and only the second half of a window is scored, so that every scored token
has at least half a window of context.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.tokenizer import Tokenizer

MIN_CONTEXT = 4  # the shortest window with a scored position


def chunks(
    tokenizer: Tokenizer, text: str, context: int = 512, max_chunks: int | None = None
) -> NDArray[np.int32]:
    """The first `max_chunks` windows of a text: (n, context) int32.

    Raises:
        UsageError: the text is shorter than one window, or a number is too small.
    """
    if context < MIN_CONTEXT:
        raise UsageError(f"context {context} is too short to score; use at least {MIN_CONTEXT}")
    if max_chunks is not None and max_chunks < 1:
        raise UsageError(f"{max_chunks} chunks leave nothing to score; use at least 1")
    # Nobody vouches for the text: a spelled-out special token in it stays text.
    tokens = np.array(tokenizer.encode(text, bos=True, special=False), np.int32)
    count = min(tokens.size // context, max_chunks or tokens.size)
    if count == 0:
        raise UsageError(
            f"the text has {tokens.size} tokens and a window needs {context}; "
            "use a longer text or a shorter context"
        )
    windows = tokens[: count * context].reshape(count, context)
    windows[:, 0] = tokenizer.bos
    return windows


def scored(context: int) -> slice:
    """Positions of a window whose next token is scored: context / 2 to context - 2."""
    return slice(context // 2, context - 1)


def targets(windows: NDArray[np.int32]) -> NDArray[np.int32]:
    """The tokens that follow the scored positions, window by window: (n * scored,)."""
    positions = scored(windows.shape[1])
    return windows[:, positions.start + 1 : positions.stop + 1].reshape(-1)
