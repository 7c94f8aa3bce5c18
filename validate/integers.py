"""What a device loses by keeping integers beside the weights: its own run against its float run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uq.progress import SilentProgress
from uq.validate.divergence import Sums
from uq.validate.report import Estimate
from uq.validate.scoring import VOCAB_BLOCK, final_states
from uq.validate.text import chunks, read_text, targets

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.kernels.session import Session

WINDOW = 256  # tokens of the text that uq ships; those of its second half are scored


@dataclass(frozen=True)
class IntegerLoss:
    """Mean KL(float || integers) of `tokens` positions, in nats."""

    kld: Estimate
    tokens: int

    def __str__(self) -> str:
        return (
            f"Mean KL to the same device's float run: {self.kld.value:.2g} ± {self.kld.stderr:.1g} "
            f"over {self.tokens} tokens of text."
        )


@dataclass(frozen=True)
class Answers:
    """Logits of a model behind tokens of a text, kept so that it need not stay in memory.

    Attributes:
        tokens: (1, window) int32.
        logits: (n, vocab) float32, at the scored positions.
    """

    tokens: NDArray[np.int32]
    logits: NDArray[np.float32]

    @classmethod
    def of(cls, session: Session, bundle: Bundle, window: int = WINDOW) -> Answers:
        """Raises DeviceError: the device fails, or the model overflows on it."""
        tokens = chunks(bundle.tokenizer(), read_text(None).content, window, 1)
        states = final_states(session, tokens, SilentProgress(), "integers")
        return cls(tokens, session.logits(states, 0, session.config.vocab_size))

    def loss(self, exact: Session) -> IntegerLoss:
        """Against the float run of the model, `exact`."""
        states = final_states(exact, self.tokens, SilentProgress(), "float")
        sums, vocab = Sums(targets(self.tokens)), exact.config.vocab_size
        for start in range(0, vocab, VOCAB_BLOCK):
            stop = min(start + VOCAB_BLOCK, vocab)
            sums.add(exact.logits(states, start, stop), self.logits[:, start:stop], start)
        facts = sums.scores().kld_facts
        return IntegerLoss(Estimate(facts.mean, facts.stderr), len(states))
