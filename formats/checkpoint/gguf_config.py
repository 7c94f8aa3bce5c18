"""GGUF metadata and tensor names -> GemmaConfig and canonical names.

Missing keys get the values that llama.cpp gives them (src/models/gemma*.cpp, src/llama-model.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from uq.errors import CheckpointError
from uq.formats.checkpoint.gguf_file import GgufFile
from uq.formats.checkpoint.hf_config import check_heads
from uq.formats.config import (
    EMBEDDING,
    FINAL_NORM,
    FULL,
    HEAD,
    MAX_COUNT,
    MAX_LAYERS,
    SLIDING,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.decode import shown
from uq.formats.families.family import GgufDefaults
from uq.formats.families.keys import MAX_NUMBER
from uq.formats.families.reading import pattern_types
from uq.formats.families.registry import FAMILIES, known

ARCHITECTURES = {name: family for name, family in FAMILIES.items() if family.gguf is not None}
END_OF_TURN = b"<end_of_turn>"
ROLES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


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
            raise CheckpointError(
                f"{self.file.path.name}: metadata {self.arch}.{key} is {found}; expected a number"
            )
        return float(value)

    def integer(self, key: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        value = self.number(key, default)
        if value != int(value) or not 1 <= value <= most:
            raise CheckpointError(
                f"{self.file.path.name}: metadata {self.arch}.{key} is {value:g}; "
                f"expected a positive integer, at most {most}"
            )
        return int(value)


def gguf_config(file: GgufFile) -> GemmaConfig:
    """Resolve every field of the model.

    Raises:
        CheckpointError: another architecture, one part of a split file, or a missing or
            unsupported value.
    """
    arch = file.metadata.get("general.architecture")
    family = known(arch, ARCHITECTURES, f"{file.path.name}: architecture")
    defaults = family.gguf
    assert defaults is not None
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file.path.name}: one part of a split GGUF; join the parts with "
            "llama-gguf-split --merge"
        )
    meta = Metadata(file, family.name, defaults)
    layers, heads = (
        meta.integer("block_count", most=MAX_LAYERS),
        meta.integer("attention.head_count"),
    )
    hidden = meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", max(hidden // heads, 1))
    types, window = _windows(meta, layers)
    theta, local_theta, scaling = _rope(meta)
    config = GemmaConfig(
        family=family.name,
        vocab_size=_embedding_rows(file),
        hidden_size=hidden,
        intermediate_size=meta.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=meta.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
        query_pre_attn_scalar=float(
            hidden // heads if defaults.scaled_layers == layers else head_dim
        ),
        sliding_window=window,
        layer_types=types,
        rope_theta=theta,
        rope_local_theta=local_theta,
        rope_scaling=scaling,
        attn_softcap=_attn_softcap(meta),
        final_softcap=meta.number("final_logit_softcapping", defaults.final_softcap) or None,
        post_norms=defaults.post_norms,
        qk_norm=defaults.qk_norm,
        tied_head="output.weight" not in file.tensors,
        max_position_embeddings=meta.integer("context_length"),
        bos_token_id=_token(file, "bos", 2),
        eos_token_ids=_eos(file),
        pad_token_id=_token(file, "padding", 0),
    )
    check_heads(config, file.path.name)
    return config


def gguf_names(config: GemmaConfig) -> dict[str, str]:
    """Canonical tensor name -> name in a GGUF file."""
    roles = dict(ROLES)
    if not config.post_norms:
        # gemma has one norm in front of the MLP, which is post_attention_layernorm there.
        roles["post_attention_layernorm"] = "ffn_norm"
    names = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight"}
    if not config.tied_head:
        names[HEAD] = "output.weight"
    for layer in range(config.num_layers):
        for role in (*config.linear_shapes(layer), *config.norm_shapes(layer)):
            names[layer_tensor(layer, role)] = f"blk.{layer}.{roles[role]}.weight"
    return names


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


def _attn_softcap(meta: Metadata) -> float | None:
    default = meta.defaults.attn_softcap
    return None if default is None else meta.number("attn_logit_softcapping", default)


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


def _eos(file: GgufFile) -> tuple[int, ...]:
    """End of text, and of a turn where the vocabulary has one, as llama.cpp stops at both."""
    eos = [_token(file, "eos", 1)]
    if "tokenizer.ggml.eot_token_id" in file.metadata:
        eos.append(_token(file, "eot", 1))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and END_OF_TURN in tokens:
        eos.append(tokens.index(END_OF_TURN))
    return tuple(dict.fromkeys(eos))
