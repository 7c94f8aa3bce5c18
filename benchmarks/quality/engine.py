"""Scores by llama.cpp's own engine: its logits, its rounding of activations, the same windows.

`llama-perplexity --kl-divergence` compares a model with log-probabilities that it reads from a
file, and takes the tokens from that file, too. Here the file is written from the reference, so that
the model is held against the same truth as every other row.

The file codes a log-probability in 16 bits between the largest of its row and 16 below, which
changes a mean by less than 1e-5 here. Of single windows the tool prints running means in five
decimals: their errors are larger than those of other rows by a tenth.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.errors import NotRun
from benchmarks.quality.results import Figure, TextScores
from uq.validate.scores import estimate

TOOL = "llama-perplexity"
RANGE, LEVELS = np.float32(16), np.float32(65535)
NUMBER = r"\s+(-?[\d.]+) ±\s+[\d.naninf-]+"
LINE = re.compile(rf"^\s*\d+{NUMBER}{NUMBER}{NUMBER}{NUMBER} %{NUMBER} %", re.MULTILINE)
TOTALS = {
    "kld": r"Mean +KLD:",
    "kld_p99_9": r"99\.9% +KLD:",
    "ratio": r"Mean PPL\(Q\)/PPL\(base\) +:",
    "same_top": r"Same top p:",
}


@dataclass(frozen=True)
class Engine:
    """llama.cpp's tool; `str` names its bytes."""

    tool: Path
    threads: int

    @cached_property
    def version(self) -> str:
        return hashlib.sha256(self.tool.read_bytes()).hexdigest()

    def __str__(self) -> str:
        return f"{TOOL} {self.version}"

    def scores(
        self,
        model: Path,
        windows: NDArray[np.int32],
        logits: Iterable[NDArray[np.float32]],
        draft: Path,
    ) -> TextScores:
        """Run a GGUF file on windows (n, context).

        Args:
            logits: of the reference, (scored, vocab) for each window.
            draft: a file to write in between: 2 bytes for each of these numbers.

        Raises:
            NotRun: the tool failed, or said something else than expected.
        """
        try:
            with draft.open("wb") as file:
                write_truth(file, windows, logits)
            return read_scores(self._run(model, windows.shape[1], draft), len(windows))
        finally:
            draft.unlink(missing_ok=True)

    def _run(self, model: Path, context: int, truth: Path) -> str:
        options = {"-c": context, "-b": context, "-t": self.threads}
        words = [str(word) for pair in options.items() for word in pair]
        files = ["-m", str(model), "--kl-divergence-base", str(truth)]
        done = subprocess.run(
            [str(self.tool), "--kl-divergence", *files, *words],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            raise NotRun(f"{TOOL} failed ({done.returncode}): {last}")
        return done.stdout + done.stderr


def write_truth(
    file: BinaryIO, windows: NDArray[np.int32], logits: Iterable[NDArray[np.float32]]
) -> None:
    """A file as `llama-perplexity --kl-divergence-base` writes it."""
    count, context = windows.shape
    for number, rows in enumerate(logits):
        if number == 0:
            file.write(b"_logits_")
            file.write(np.array([context, rows.shape[1], count], "<i4").tobytes())
            file.write(windows.astype("<i4").tobytes())
        file.write(coded(rows).tobytes())


def coded(logits: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Log-probabilities of rows (n, vocab): a scale and the least as float32, codes, padding."""
    n, vocab = logits.shape
    below = logits - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(below).sum(axis=1, keepdims=True, dtype=np.float64))
    least = np.maximum(below.min(axis=1, keepdims=True), -RANGE)
    scale = -least / LEVELS
    np.maximum(below, least, out=below)
    below -= least
    below /= np.maximum(scale, np.float32(1e-30))
    head = np.concatenate([scale, least - total.astype(np.float32)], axis=1)
    found = np.zeros((n, 4 + vocab + vocab % 2), "<u2")
    found[:, :4] = head.astype("<f4").view("<u2")
    found[:, 4 : 4 + vocab] = np.rint(below, out=below)
    return found


def read_scores(output: str, windows: int) -> TextScores:
    """What the tool printed of so many windows.

    Raises:
        NotRun: it is not all there.
    """
    totals = {name: _total(pattern, output) for name, pattern in TOTALS.items()}
    lines = [[float(word) for word in line] for line in LINE.findall(output)]
    if len(lines) != windows:
        raise NotRun(f"{TOOL}: figures of {len(lines)} windows, expected {windows}")
    _, ratios, klds, _, same_top = map(_parts, zip(*lines, strict=True))
    error = estimate(ratios).stderr
    return TextScores(
        kld=Figure(totals["kld"], estimate(klds).stderr),
        kld_p99_9=totals["kld_p99_9"],
        same_top_percent=Figure(totals["same_top"], estimate(same_top).stderr),
        perplexity_ratio=Figure(totals["ratio"], totals["ratio"] * error),
        kld_windows=tuple(klds.tolist()),
    )


def _total(pattern: str, output: str) -> float:
    found = re.search(pattern + r"\s+(-?[\d.]+)", output)
    if found is None:
        raise NotRun(f"{TOOL}: no line like {pattern!r} in its output")
    return float(found[1])


def _parts(running: Sequence[float]) -> NDArray[np.float64]:
    """What was averaged, from its running means."""
    counts = np.arange(1, len(running) + 1)
    return np.diff(np.array(running) * counts, prepend=0.0)
