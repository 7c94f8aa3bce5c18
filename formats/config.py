"""The shape of a Gemma model: one frozen dataclass for the text models of the whole family.

What differs between the families is data here (post-norms, QK-norm, soft-caps, window pattern), so
that no code that runs a layer asks for the family's name. Which tensors a layer consists of is the
table of its family (`uq.formats.families`).
"""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from uq.formats.decode import OPTIONAL
from uq.formats.families.family import Family, Kind

MAX_COUNT, MAX_LAYERS = 1 << 24, 1024  # of any size of a model; tables are made by layer
SLIDING = "sliding_attention"
FULL = "full_attention"

LAYERS = "model.layers."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
PER_LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
PER_LAYER_PROJECTION = "model.per_layer_model_projection"  # and .weight: of all layers
PER_LAYER_NORM = "model.per_layer_projection_norm"
ALTUP_PROJECTIONS = "model.altup_projections"  # and .0.weight to the last stream's
ALTUP_UNEMBED_PROJECTIONS = "model.altup_unembed_projections"
TABLES = {EMBEDDING: "embedding", HEAD: "head", PER_LAYER_EMBEDDING: "per-layer embedding"}

# What layers may have beyond attention of one head size and a gated MLP, as messages name it.
FULL_HEADS = "full layers with heads of their own"
VALUE_NORM = "values with a norm"
SHARED_KEYS = "shared keys and values"
MLP_WIDTHS = "MLPs of several widths"
PER_LAYER = "per-layer embeddings"
LAYER_SCALAR = "layer scalars"
EXPERTS = "mixture of experts"
ALTUP = "alternating updates"
LAUREL = "augmented residual layers"
SPARSITY = "sparse activations"


@dataclass(frozen=True)
class FullLayers:
    """What the full layers have of their own, where they differ from the sliding ones.

    Attributes:
        rotary_pairs: pairs of a head's components that RoPE turns, the first ones; the others stay.
        key_is_value: the output of k_proj, unnormed and not turned, is the value, too.
    """

    head_dim: int
    num_kv_heads: int
    rotary_pairs: int
    key_is_value: bool


@dataclass(frozen=True)
class PerLayerEmbedding:
    """A second embedding, whose rows hold `size` channels for every layer."""

    vocab_size: int
    size: int


@dataclass(frozen=True)
class AltUp:
    """Residual streams of which a layer computes one and predicts the others.

    Attributes:
        active: the one that is computed.
        scaled: a layer's gain multiplies it where it meets the per-layer embedding.
    """

    streams: int
    active: int
    scaled: bool


@dataclass(frozen=True)
class Experts:
    """MLPs beside a layer's own, of which a router chooses `active` for each token."""

    count: int
    active: int
    intermediate_size: int


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes and options of one text model; every field is resolved, none is "the default".

    Attributes:
        family: whose table of tensors the model has; else for messages and provenance.
        num_kv_heads, head_dim: of every layer, or of the sliding ones where there is a `full`.
        query_pre_attn_scalar: attention scores are multiplied by its inverse square root.
        sliding_window: number of keys a sliding layer sees, its own position included.
        layer_types: `sliding_attention` or `full_attention`, one per layer.
        rope_theta: RoPE base of full layers; `rope_local_theta` that of sliding layers.
        rope_scaling: linear factor by which positions of full layers are divided (1.0: none).
        attn_softcap, final_softcap: `c` in `c * tanh(x / c)`, or None.
        post_norms: the attention and MLP outputs are normed before they join the residual.
        qk_norm: queries and keys are normed per head before RoPE.
        value_norm: values are normed per head, without a gain.
        intermediate_sizes: of the MLP of each layer; empty where all have `intermediate_size`.
        kv_shared_layers: so many last layers have no keys and values; they read those of the last
            layer of their type in front of them.
        layer_scalar: the output of a layer is multiplied by a number of its own.
        laurel_rank: of the product that goes beside attention; 0 where there is none.
        activation_sparsity: of each layer, the share of the gate's channels that a threshold
            takes away; empty where none has one.
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
    value_norm: bool = field(default=False, metadata=OPTIONAL)
    full: FullLayers | None = field(default=None, metadata=OPTIONAL)
    intermediate_sizes: tuple[int, ...] = field(default=(), metadata=OPTIONAL)
    kv_shared_layers: int = field(default=0, metadata=OPTIONAL)
    layer_scalar: bool = field(default=False, metadata=OPTIONAL)
    per_layer: PerLayerEmbedding | None = field(default=None, metadata=OPTIONAL)
    experts: Experts | None = field(default=None, metadata=OPTIONAL)
    altup: AltUp | None = field(default=None, metadata=OPTIONAL)
    laurel_rank: int = field(default=0, metadata=OPTIONAL)
    activation_sparsity: tuple[float, ...] = field(default=(), metadata=OPTIONAL)

    @property
    def embed_scale(self) -> float:
        """Multiplier of an embedding row: the exact square root (float32 run, no bf16 rounding)."""
        return math.sqrt(self.hidden_size)

    @property
    def attention_scale(self) -> float:
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def q_size(self) -> int:
        """Channels of the queries, where all layers are alike."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys, where all layers are alike."""
        return self.num_kv_heads * self.head_dim

    def layer_q_size(self, layer: int) -> int:
        """Channels of a layer's queries."""
        return self.num_heads * self.layer_head_dim(layer)

    def layer_kv_size(self, layer: int) -> int:
        """Channels of a layer's keys, and of its values."""
        return self.layer_kv_heads(layer) * self.layer_head_dim(layer)

    def layer_head_dim(self, layer: int) -> int:
        full = self._full(layer)
        return self.head_dim if full is None else full.head_dim

    def layer_kv_heads(self, layer: int) -> int:
        full = self._full(layer)
        return self.num_kv_heads if full is None else full.num_kv_heads

    def rotary_pairs(self, layer: int) -> int:
        """Pairs of a head's components that RoPE turns, the first ones."""
        full = self._full(layer)
        return self.head_dim // 2 if full is None else full.rotary_pairs

    def key_is_value(self, layer: int) -> bool:
        full = self._full(layer)
        return full is not None and full.key_is_value

    def layer_intermediate_size(self, layer: int) -> int:
        return self.intermediate_sizes[layer] if self.intermediate_sizes else self.intermediate_size

    def sparsity(self, layer: int) -> float:
        """Share of the gate's channels that a threshold takes away; 0 where there is none."""
        return self.activation_sparsity[layer] if self.activation_sparsity else 0.0

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values this one reads; itself where it has its own."""
        own = self.num_layers - self.kv_shared_layers
        if layer < own:
            return layer
        kind = self.layer_types[layer]
        return max(index for index in range(own) if self.layer_types[index] == kind)

    @property
    def shared_sources(self) -> frozenset[int]:
        """Layers whose keys and values others read."""
        layers = range(self.num_layers - self.kv_shared_layers, self.num_layers)
        return frozenset(self.kv_source(layer) for layer in layers)

    def _full(self, layer: int) -> FullLayers | None:
        return None if self.is_sliding(layer) else self.full

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

    def linear_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Role within a layer -> (out_features, in_features), in the order of the forward pass.

        Experts come stacked, one expert's rows behind the other's.
        """
        roles = self._table.layer_roles(self, layer)
        return {
            role.name: role.matrix for role in roles if role.kind in (Kind.LINEAR, Kind.EXPERTS)
        }

    def norm_shapes(self, layer: int) -> dict[str, tuple[int]]:
        """Role within a layer -> shape of the norm's gain."""
        roles = self._table.layer_roles(self, layer)
        return {role.name: (role.shape[0],) for role in roles if role.kind is Kind.NORM}

    def kept_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Role within a layer -> shape of a tensor that is never quantized."""
        roles = self._table.layer_roles(self, layer)
        return {role.name: role.shape for role in roles if role.kind is Kind.KEPT}

    def expert_roles(self, layer: int) -> tuple[str, ...]:
        """The linears that hold all experts."""
        roles = self._table.layer_roles(self, layer)
        return tuple(role.name for role in roles if role.kind is Kind.EXPERTS)

    def expert_rows(self, layer: int, role: str) -> int:
        """Rows of one expert in a linear that holds all."""
        assert self.experts is not None
        return self.linear_shapes(layer)[role][0] // self.experts.count

    def table_shapes(self) -> dict[str, tuple[int, int]]:
        """Canonical name -> shape of the embedding, an untied head, other tables."""
        roles = self._table.model_roles(self)
        return {role.tensor: role.matrix for role in roles if role.kind is Kind.TABLE}

    def model_norms(self) -> dict[str, tuple[int]]:
        """Canonical name -> shape of a gain that belongs to no layer."""
        roles = self._table.model_roles(self)
        return {role.tensor: (role.shape[0],) for role in roles if role.kind is Kind.NORM}

    def model_kept(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of a tensor of no layer that is never quantized."""
        roles = self._table.model_roles(self)
        return {role.tensor: role.shape for role in roles if role.kind is Kind.KEPT}

    @property
    def _table(self) -> Family:
        from uq.formats.families.registry import FAMILIES  # whose families make configurations

        return FAMILIES[self.family]

    def extensions(self) -> tuple[str, ...]:
        """What the layers have beyond attention of one head size and a gated MLP, in words."""
        found = {
            FULL_HEADS: self.full,
            VALUE_NORM: self.value_norm,
            SHARED_KEYS: self.kv_shared_layers,
            MLP_WIDTHS: self.intermediate_sizes,
            PER_LAYER: self.per_layer,
            LAYER_SCALAR: self.layer_scalar,
            EXPERTS: self.experts,
            ALTUP: self.altup,
            LAUREL: self.laurel_rank,
            SPARSITY: self.activation_sparsity,
        }
        return tuple(name for name, present in found.items() if present)

    def norm_before(self, role: str) -> str | None:
        """Role of the norm whose output is the input of a linear, and of nothing else but linears;
        None for o_proj and down_proj."""
        if role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return None if self.laurel_rank else "input_layernorm"
        if role in ("mlp.gate_proj", "mlp.up_proj"):
            # gemma calls the norm in front of the MLP by what it stands behind.
            return "pre_feedforward_layernorm" if self.post_norms else "post_attention_layernorm"
        return None

    def num_parameters(self) -> int:
        shapes: list[tuple[int, ...]] = [
            *self.table_shapes().values(),
            *self.model_norms().values(),
            *self.model_kept().values(),
        ]
        for layer in range(self.num_layers):
            for part in (self.linear_shapes, self.norm_shapes, self.kept_shapes):
                shapes += part(layer).values()
        return sum(map(math.prod, shapes))

    def to_json(self) -> dict[str, Any]:
        """Without the options that the model does not have."""
        left_out = {
            field.name
            for field in fields(self)
            if field.default is not MISSING and getattr(self, field.name) == field.default
        }
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def layer_tensor(layer: int, role: str) -> str:
    """Canonical name of a layer's tensor, as in a text-only Gemma safetensors file."""
    return f"{LAYERS}{layer}.{role}.weight"
