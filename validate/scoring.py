"""How far a model is from its float32 reference, over every entry of the vocabulary.

Both models run to their final hidden states, which are small. The logits are then made anew, one
block of the vocabulary at a time for both, and summed up on the way: no row of logits is ever
whole in memory, and the KL divergence is still that of the full distributions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError, UsageError
from uq.formats.config import GemmaConfig
from uq.formats.disk import disk_errors
from uq.kernels.session import Session
from uq.progress import Progress, SilentProgress
from uq.validate.divergence import Sums
from uq.validate.scores import Scores, join
from uq.validate.text import scored, targets

__all__ = ["ReferenceStates", "Scores", "compare", "final_states", "score", "states_key"]

REFERENCE = "reference"  # backend of float32 on the CPU
TOKEN_BATCH = 8192  # tokens per call of Session.score
STREAMED_BATCH = 32768  # the same where each call reads the weights anew
POSITION_BLOCK = 4096  # positions whose logits are in memory at once ...
VOCAB_BLOCK = 1024  # ... times so many entries of the vocabulary


@dataclass(frozen=True)
class ReferenceStates:
    """Final hidden states of the reference at the scored positions, kept for the next bundle.

    Attributes:
        key: what they were computed from, see `states_key`.
        hidden: (scored tokens, hidden) float32.
    """

    key: str
    hidden: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write an .npz file under its final name in one step.

        Raises:
            DeviceError: the disk is full or broken.
        """
        part = path.with_name(path.name + ".partial")
        try:
            with disk_errors(path, self.hidden.nbytes):
                with part.open("wb") as file:
                    np.savez(file, key=np.array(self.key), hidden=self.hidden)
                part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path, key: str) -> ReferenceStates | None:
        """What `save` wrote, or None: no such file, or one with another key.

        Raises:
            UsageError: the file is something else, which `save` would replace.
        """
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                found = data["key"].item()
                return cls(key, data["hidden"]) if found == key else None
        except (OSError, EOFError, ValueError, KeyError, BadZipFile, AttributeError) as error:
            raise UsageError(
                f"{path}: holds no states of a reference; remove it or give another file"
            ) from error

    @classmethod
    def require_place(cls, path: Path) -> None:
        """Refuse before a long computation a place where `save` would fail behind it.

        Raises:
            UsageError: no file can be written there, or another one would be lost.
        """
        if path.is_dir() or not path.parent.is_dir():
            there = "is a folder" if path.is_dir() else "there is no such folder; make it"
            raise UsageError(f"--reference-states {path}: {there}")
        if not os.access(path.parent, os.W_OK):
            raise UsageError(f"--reference-states {path}: its folder cannot be written into")
        cls.load(path, "")


def states_key(
    fingerprint: Mapping[str, Mapping[str, int | str]],
    config: GemmaConfig,
    chunks: NDArray[np.int32],
    backend: str = REFERENCE,
) -> str:
    """sha256 over the reference's weight files and configuration, where it ran, and the tokens, so
    the text too."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode())
    digest.update(json.dumps(config.to_json(), sort_keys=True).encode())
    digest.update(b"" if backend == REFERENCE else backend.encode())
    digest.update(repr(chunks.shape).encode())
    digest.update(np.ascontiguousarray(chunks, "<i4").tobytes())
    return digest.hexdigest()


def score(
    session: Session,
    reference: Session,
    chunks: NDArray[np.int32],
    progress: Progress | None = None,
    *,
    reference_states: NDArray[np.float32] | None = None,
) -> Scores:
    """Compare a model with its reference on windows of text.

    Args:
        chunks: (n, context) int32, from `uq.validate.text.chunks`.
        reference_states: what `final_states(reference, chunks)` gave before, to save its time.

    Raises:
        DeviceError: a model gives a hidden state that is not finite.
    """
    progress = progress or SilentProgress()
    if reference_states is None:
        reference_states = final_states(reference, chunks, progress, "reference")
    states = final_states(session, chunks, progress, "model")
    return compare(session, states, reference, reference_states, targets(chunks), progress)


def final_states(
    session: Session, chunks: NDArray[np.int32], progress: Progress, label: str
) -> NDArray[np.float32]:
    """Final hidden states at the scored positions, (n * scored, hidden) float32.

    Raises:
        DeviceError: one of them is not finite.
    """
    context = chunks.shape[1]
    step = max(1, (STREAMED_BATCH if is_streamed(session) else TOKEN_BATCH) // context)
    parts = []
    progress.start(-(-len(chunks) // step), label)
    for first in range(0, len(chunks), step):
        batch = chunks[first : first + step]
        hidden = session.score(batch)[:, scored(context)]
        if not np.isfinite(hidden).all():
            raise DeviceError(
                f"{session.device.name}: hidden states in chunks {first} to "
                f"{first + len(batch) - 1} are not finite; the model overflows on this device"
            )
        parts.append(hidden.reshape(-1, hidden.shape[-1]))
        progress.advance(f"chunk {first + len(batch)} of {len(chunks)}")
    progress.close()
    return np.concatenate(parts)


def compare(
    session: Session,
    states: NDArray[np.float32],
    reference: Session,
    reference_states: NDArray[np.float32],
    target: NDArray[np.int32],
    progress: Progress,
) -> Scores:
    """Scores from the hidden states of both models, (n, hidden) each, and the next tokens (n,)."""
    parts = []
    count = len(target)
    step = (4 if is_streamed(reference) else 1) * POSITION_BLOCK
    progress.start(-(-count // step), "logits")
    for first in range(0, count, step):
        block = slice(first, first + step)
        sums = Sums(target[block])
        vocab = session.config.vocab_size
        for start in range(0, vocab, VOCAB_BLOCK):
            progress.work(f"vocabulary {start} of {vocab}")
            stop = min(start + VOCAB_BLOCK, vocab)
            model = session.logits(states[block], start, stop)
            sums.add(reference.logits(reference_states[block], start, stop), model, start)
        parts.append(sums.scores())
        progress.advance(f"token {min(first + step, count)} of {count}")
    progress.close()
    return join(parts)


def is_streamed(session: Session) -> bool:
    """Whether a session reads its weights from the disk or the network at each use."""
    return "streamed" in session.device.features
