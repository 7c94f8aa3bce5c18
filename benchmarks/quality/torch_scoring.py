"""Scores on a device of torch, where transformers runs the weights in float32.

The same figures as `uq.validate.scoring` finds on the CPU, but for the rounding of float32.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.errors import ToolMissing
from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, layer_tensor
from uq.kernels.weights import WeightSource
from uq.validate.scores import Scores, join
from uq.validate.text import scored, targets

Tensor = Any  # torch and transformers are no dependencies

WINDOWS = 2  # whose logits are in memory at once
ROWS = 1 << 16  # of the embedding that travel at once


class TorchModel:
    """One model on the device, whose weights are replaced by those of each row."""

    def __init__(self, folder: Path, reference: WeightSource, device: str) -> None:
        """
        Args:
            folder: the reference as transformers reads it.
            device: of torch, such as `cuda`.

        Raises:
            ToolMissing: torch or transformers is missing, or torch cannot use the device.
        """
        check_device(device)
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM
        self._model = model.from_pretrained(folder, dtype="float32", attn_implementation="eager")
        self._model = self._model.to(device).eval()
        self._reference, self._device = reference, device
        self._loaded: WeightSource | None = None
        self._truth: dict[bytes, Tensor] = {}

    def scores(self, weights: WeightSource, windows: NDArray[np.int32]) -> Scores:
        """Of windows (n, context), beside the reference."""
        truth = self._reference_states(windows)
        states = self._states(weights, windows)
        head, true_head = self._head(), self._true_head
        target = targets(windows).reshape(len(windows), -1)
        parts = []
        for first in range(0, len(windows), WINDOWS):
            block = slice(first, first + WINDOWS)
            logits = (self._logits(truth[block], true_head), self._logits(states[block], head))
            parts.append(compare(*logits, target[block].reshape(-1)))
        return join(parts)

    def _reference_states(self, windows: NDArray[np.int32]) -> Tensor:
        key = windows.tobytes()
        if key not in self._truth:
            self._truth[key] = self._states(self._reference, windows)
        return self._truth[key]

    def _states(self, weights: WeightSource, windows: NDArray[np.int32]) -> Tensor:
        """Final hidden states at the scored positions, (n, scored, hidden)."""
        torch = _torch()
        self._load(weights)
        places, parts = scored(windows.shape[1]), []
        for first in range(0, len(windows), WINDOWS):
            tokens = torch.from_numpy(windows[first : first + WINDOWS]).long().to(self._device)
            with torch.no_grad():
                hidden = self._model.model(tokens, use_cache=False).last_hidden_state
            parts.append(hidden[:, places])
        return torch.cat(parts)

    def _logits(self, states: Tensor, head: Tensor) -> Tensor:
        """(positions, vocab) float64, from products in float32."""
        logits = states.reshape(-1, states.shape[-1]) @ head.T
        if cap := self._reference.config.final_softcap:
            logits = cap * (logits / cap).tanh()
        return logits.double()

    def _load(self, weights: WeightSource) -> None:
        if weights is self._loaded:
            return
        config = weights.config
        for layer in range(config.num_layers):
            for role, weight in weights.layer(layer).items():
                self._set(layer_tensor(layer, role), weight - (1 if weight.ndim == 1 else 0))
        self._set(FINAL_NORM, weights.final_norm() - 1)
        for start in range(0, config.vocab_size, ROWS):
            stop = min(start + ROWS, config.vocab_size)
            self._set(EMBEDDING, weights.embedding(start, stop), slice(start, stop))
            if not config.tied_head:
                self._set(HEAD, weights.head(start, stop), slice(start, stop))
        self._loaded = weights

    def _set(self, name: str, value: NDArray[np.float32], rows: slice = slice(None)) -> None:
        torch = _torch()
        with torch.no_grad():
            self._model.get_parameter(name)[rows].copy_(torch.from_numpy(value))

    def _head(self) -> Tensor:
        """(vocab, hidden) of the weights that are loaded."""
        return self._model.get_output_embeddings().weight.detach()

    @cached_property
    def _true_head(self) -> Tensor:
        loaded = self._loaded
        self._load(self._reference)
        head = self._head().clone()
        if loaded is not None:
            self._load(loaded)
        return head


def compare(reference: Tensor, model: Tensor, target: NDArray[np.int32]) -> Scores:
    """KL = sum p0 (log p0 - log p1) over the whole vocabulary; logits (n, vocab), tokens (n,)."""
    torch = _torch()
    chosen = torch.from_numpy(target).long().to(model.device)[:, None]
    same_top = reference.argmax(1) == model.argmax(1)
    logs = [torch.log_softmax(logits, 1) for logits in (reference, model)]
    kld = (logs[0].exp() * (logs[0] - logs[1])).sum(1).clamp(min=0)
    nll_reference, nll = (-log.gather(1, chosen)[:, 0].cpu().numpy() for log in logs)
    return Scores(
        nll=nll,
        nll_reference=nll_reference,
        kld=kld.cpu().numpy(),
        same_top=same_top.cpu().numpy(),
        delta_p=np.exp(-nll) - np.exp(-nll_reference),
    )


def check_device(name: str) -> None:
    """Raises ToolMissing: torch or transformers is missing, or torch cannot use the device."""
    try:
        _torch().zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ToolMissing(f"--score-device {name}: torch cannot use it: {reason}") from error


def _torch() -> Any:
    try:
        import torch
        import transformers  # noqa: F401 - needed next
    except ImportError as error:
        missing = f"--score-device: {error.name} is not installed: pip install torch transformers"
        raise ToolMissing(missing) from error
    torch.set_float32_matmul_precision("highest")
    return torch
