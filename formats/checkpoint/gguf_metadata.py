"""Typed look-ups in the metadata of a GGUF file, and what all architectures say alike.

Missing keys get the values that llama.cpp gives them (src/models/gemma*.cpp, src/llama-model.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from uq.errors import CheckpointError
from uq.formats.checkpoint.gguf_file import GgufFile
from uq.formats.config import FULL, MAX_COUNT, MAX_LAYERS, SLIDING
from uq.formats.decode import shown
from uq.formats.families.family import GgufDefaults
from uq.formats.families.keys import MAX_NUMBER
from uq.formats.families.reading import pattern_types

ENDS_OF_TURN = (b"<end_of_turn>", b"<turn|>")  # the second is gemma4's


@dataclass(frozen=True)
class Metadata:
    """Typed look-ups; keys are given behind the architecture's prefix."""

    file: GgufFile
    arch: str
    defaults: GgufDefaults

    def get(self, key: str, default: Any) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:
            value = value[0].item()  # one number per layer, all the same
        if type(value) not in (int, float) or not 0 <= value <= MAX_NUMBER:
            found = "missing" if value is None else shown(value)
            raise self.refuse(key, found, "a number")
        return float(value)

    def integer(
        self, key: str, default: int | None = None, most: int = MAX_COUNT, least: int = 1
    ) -> int:
        value = self.number(key, default)
        if value != int(value) or not least <= value <= most:
            kind = "a positive integer" if least else "an integer from 0"
            raise self.refuse(key, f"{value:g}", f"{kind}, at most {most}")
        return int(value)

    def integers(self, key: str, layers: int, default: int | None = None) -> tuple[int, ...]:
        """A positive integer for each layer; a single one counts for all."""
        value = self.get(key, default)
        if not isinstance(value, np.ndarray) or len(value) == 1:
            return (self.integer(key, default),) * layers
        if len(value) < layers or value.dtype.kind not in "iu":
            raise self.refuse(key, shown(value), f"an integer for each of {layers} layers")
        found = tuple(value[:layers].tolist())
        if not all(0 < number <= MAX_COUNT for number in found):
            raise self.refuse(key, shown(value), f"positive integers, at most {MAX_COUNT}")
        return found

    def refuse(self, key: str, found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path.name}: metadata {self.arch}.{key} is {found}; expected {expected}"
        )


def common(meta: Metadata) -> dict[str, Any]:
    """Fields of `GemmaConfig` that every architecture has under the same keys."""
    file, defaults = meta.file, meta.defaults
    if not (causal := meta.get("attention.causal", True)):
        raise meta.refuse("attention.causal", shown(causal), "true; text is causal here")
    layers = meta.integer("block_count", most=MAX_LAYERS)
    types, window = _windows(meta, layers)
    theta, local_theta, scaling = _rope(meta)
    softcap = defaults.attn_softcap
    return {
        "vocab_size": _embedding_rows(file),
        "hidden_size": meta.integer("embedding_length"),
        "num_layers": layers,
        "num_heads": meta.integer("attention.head_count"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "sliding_window": window,
        "layer_types": types,
        "rope_theta": theta,
        "rope_local_theta": local_theta,
        "rope_scaling": scaling,
        "attn_softcap": None if softcap is None else meta.number("attn_logit_softcapping", softcap),
        "final_softcap": meta.number("final_logit_softcapping", defaults.final_softcap) or None,
        "post_norms": defaults.post_norms,
        "qk_norm": defaults.qk_norm,
        "tied_head": "output.weight" not in file.tensors,
        "max_position_embeddings": meta.integer("context_length"),
        "bos_token_id": _token(file, "bos", 2),
        "eos_token_ids": end_tokens(file),
        "pad_token_id": _token(file, "padding", 0),
    }


def _windows(meta: Metadata, layers: int) -> tuple[tuple[str, ...], int]:
    """Layer types and the sliding window; gemma3 without a window has full layers only."""
    if meta.defaults.pattern == 1:
        return (FULL,) * layers, 0
    window = int(meta.number("attention.sliding_window", meta.defaults.window))
    if window == 0:
        return (FULL,) * layers, 0
    pattern = meta.get("attention.sliding_window_pattern", None)
    if isinstance(pattern, np.ndarray):
        if len(pattern) < layers:
            raise CheckpointError(
                f"{meta.file.path.name}: sliding_window_pattern has {len(pattern)} entries for "
                f"{layers} layers"
            )
        return tuple(SLIDING if sliding else FULL for sliding in pattern[:layers]), window
    every = meta.integer("attention.sliding_window_pattern", meta.defaults.pattern)
    return pattern_types(every, layers), window


def _rope(meta: Metadata) -> tuple[float, float, float]:
    """Base of full layers, base of sliding layers, linear factor of full layers."""
    kind = meta.get("rope.scaling.type", "linear")
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 0)) or 1.0
    if kind == "none":
        factor = 1.0
    elif kind != "linear" or (factor != 1 and not meta.defaults.linear_rope):
        raise CheckpointError(
            f"{meta.file.path.name}: RoPE scaling {kind!r} by {factor:g} is not supported for "
            f"{meta.arch}; supported is: linear, for gemma and gemma3"
        )
    theta = meta.number("rope.freq_base", 10000)
    local = meta.defaults.local_theta or theta
    return theta, meta.number("rope.freq_base_swa", local), factor


def _embedding_rows(file: GgufFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path.name}: token_embd.weight is missing")
    return file.tensors["token_embd.weight"].shape[0]


def _token(file: GgufFile, name: str, default: int) -> int:
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(key, default)
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise CheckpointError(f"{file.path.name}: {key} is {shown(value)}; expected a token id")
    return value


def end_tokens(file: GgufFile) -> tuple[int, ...]:
    """End of text, and of a turn where the vocabulary has one, as llama.cpp stops at both."""
    eos = [_token(file, "eos", 1)]
    if "tokenizer.ggml.eot_token_id" in file.metadata:
        eos.append(_token(file, "eot", 1))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        eos += [tokens.index(end) for end in ENDS_OF_TURN if end in tokens]
    return tuple(dict.fromkeys(eos))
