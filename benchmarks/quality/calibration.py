"""The calibration draws: the same windows of uq's calibration text for every quantizer."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.formats.tokenizer import Tokenizer
from uq.quantize.pipeline import DEFAULTS, QuantizeOptions
from uq.quantize.text import read_text, token_sequences


@dataclass(frozen=True)
class Draw:
    """One choice of calibration windows.

    Attributes:
        number: 0 are the windows that uq takes by default, the others are drawn at random.
        tokens: .npy file, (windows, length) int32, `<bos>` first.
        text: the same windows as UTF-8 text, for tools that tokenize themselves.
        count: of the tokens.
        sha256: of the tokens.
    """

    number: int
    tokens: Path
    text: Path
    count: int
    sha256: str

    @property
    def seed(self) -> int | None:
        """Of `token_sequences` and of `uq quantize --calibration-seed`."""
        return self.number or None


def draw(number: int, tokenizer: Tokenizer, tokens: int, work: Path) -> Draw:
    """Write one draw of about `tokens` tokens into `work`.

    Raises:
        UsageError: the calibration text is shorter than one window.
    """
    length = min(DEFAULTS.calibration_length, tokens)
    windows = token_sequences(
        tokenizer,
        read_text(QuantizeOptions().calibration),
        sequences=tokens // length,
        length=length,
        seed=number or None,
    )
    digest = hashlib.sha256(np.ascontiguousarray(windows, "<i4").tobytes()).hexdigest()
    folder = work / "calibration" / digest[:16]
    if not folder.exists():
        _write(folder, windows, tokenizer)
    return Draw(number, folder / "tokens.npy", folder / "text.txt", windows.size, digest)


def _write(folder: Path, windows: NDArray[np.int32], tokenizer: Tokenizer) -> None:
    """Both files under their names in one step: a run beside this one may be reading them."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    draft.mkdir(parents=True, exist_ok=True)
    np.save(draft / "tokens.npy", windows)
    pieces = [tokenizer.decode(window[1:].tolist()) for window in windows]
    (draft / "text.txt").write_text("\n\n".join(pieces), "utf-8")
    try:
        draft.rename(folder)
    except OSError:  # the other run was first
        shutil.rmtree(draft)
