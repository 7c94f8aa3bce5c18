"""The texts that are scored, cut into windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.tokenizer import Tokenizer
from uq.validate.text import DEFAULT_TEXT, chunks

CONTEXT = 512
DEFAULT_NAME = "jargon"


@dataclass(frozen=True)
class EvaluationText:
    """`windows` is (n, CONTEXT) int32."""

    name: str
    windows: NDArray[np.int32]


def text_files(folder: Path) -> dict[str, Path]:
    """Name -> file: the shipped held-out text, then every `*.txt` of the folder."""
    return {DEFAULT_NAME: DEFAULT_TEXT} | {
        path.stem: path for path in sorted(folder.glob("*.txt")) if path.stem.lower() != "readme"
    }


def read_texts(
    files: Mapping[str, Path], tokenizer: Tokenizer, windows: int
) -> tuple[EvaluationText, ...]:
    """Up to `windows` windows of each text, spread evenly over it.

    Raises:
        UsageError: a text cannot be read or is shorter than one window.
    """
    return tuple(
        EvaluationText(name, spread(_chunks(path, tokenizer), windows))
        for name, path in files.items()
    )


def spread(windows: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """`count` of the windows, from the first to the last; all where there are fewer."""
    places = np.linspace(0, len(windows) - 1, min(count, len(windows)))
    return windows[places.astype(np.intp)]


def _chunks(path: Path, tokenizer: Tokenizer) -> NDArray[np.int32]:
    try:
        return chunks(tokenizer, path.read_text("utf-8"), CONTEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
