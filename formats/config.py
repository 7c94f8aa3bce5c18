"""The shape of a Gemma model: one frozen dataclass for gemma, gemma2 and gemma3 text.

What differs between the families is data here (post-norms, QK-norm, soft-caps, window pattern), so
that no code that runs a layer asks for the family's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MAX_COUNT, MAX_LAYERS = 1 << 24, 1024  # of any size of a model; tables are made by layer
SLIDING = "sliding_attention"
FULL = "full_attention"

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes and options of one text model; every field is resolved, none is "the default".

    Attributes:
        family: `gemma`, `gemma2` or `gemma3`; for messages and provenance only.
        query_pre_attn_scalar: attention scores are multiplied by its inverse square root.
        sliding_window: number of keys a sliding layer sees, its own position included.
        layer_types: `sliding_attention` or `full_attention`, one per layer.
        rope_theta: RoPE base of full layers; `rope_local_theta` that of sliding layers.
        rope_scaling: linear factor by which positions of full layers are divided (1.0: none).
        attn_softcap, final_softcap: `c` in `c * tanh(x / c)`, or None.
        post_norms: the attention and MLP outputs are normed before they join the residual.
        qk_norm: queries and keys are normed per head before RoPE.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    query_pre_attn_scalar: float
    sliding_window: int
    layer_types: tuple[str, ...]
    rope_theta: float
    rope_local_theta: float
    rope_scaling: float
    attn_softcap: float | None
    final_softcap: float | None
    post_norms: bool
    qk_norm: bool
    tied_head: bool
    max_position_embeddings: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def embed_scale(self) -> float:
        """Multiplier of an embedding row: the exact square root (float32 run, no bf16 rounding)."""
        return math.sqrt(self.hidden_size)

    @property
    def attention_scale(self) -> float:
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    def window(self, layer: int) -> int | None:
        """Number of keys visible to a query of this layer, or None for all."""
        return self.sliding_window if self.is_sliding(layer) else None

    def theta(self, layer: int) -> float:
        return self.rope_local_theta if self.is_sliding(layer) else self.rope_theta

    def position_scale(self, layer: int) -> float:
        """Positions are multiplied by this before RoPE (linear scaling, full layers only)."""
        return 1.0 if self.is_sliding(layer) else 1.0 / self.rope_scaling

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Role within a layer -> (out_features, in_features), in the order of the forward pass."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.q_size, hidden),
            "self_attn.k_proj": (self.kv_size, hidden),
            "self_attn.v_proj": (self.kv_size, hidden),
            "self_attn.o_proj": (hidden, self.q_size),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }

    def norm_before(self, role: str) -> str | None:
        """Role of the norm whose output is the input of a linear; None for o_proj and down_proj."""
        if role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return "input_layernorm"
        if role in ("mlp.gate_proj", "mlp.up_proj"):
            # gemma calls the norm in front of the MLP by what it stands behind.
            return "pre_feedforward_layernorm" if self.post_norms else "post_attention_layernorm"
        return None

    def norm_shapes(self) -> dict[str, tuple[int]]:
        """Role within a layer -> shape of the norm's gain.

        gemma's `post_attention_layernorm` is the norm in front of the MLP; from gemma2 on that
        norm is `pre_feedforward_layernorm` and `post_*` are applied to the outputs.
        """
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.post_norms:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes: dict[str, tuple[int]] = {name: (self.hidden_size,) for name in names}
        if self.qk_norm:
            shapes |= {f"self_attn.{x}_norm": (self.head_dim,) for x in "qk"}
        return shapes

    def num_parameters(self) -> int:
        linear = sum(rows * cols for rows, cols in self.linear_shapes().values())
        norms = sum(shape[0] for shape in self.norm_shapes().values())
        tables = 1 if self.tied_head else 2
        table = self.vocab_size * self.hidden_size
        return self.num_layers * (linear + norms) + tables * table + self.hidden_size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GemmaConfig:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError: a field is missing or of the wrong type.
        """
        known: dict[str, Any] = {field.name: data[field.name] for field in fields(cls)}
        for name in ("layer_types", "eos_token_ids"):
            known[name] = tuple(known[name])
        return cls(**known)


def layer_tensor(layer: int, role: str) -> str:
    """Canonical name of a layer's tensor, as in a text-only Gemma safetensors file."""
    return f"model.layers.{layer}.{role}.weight"
