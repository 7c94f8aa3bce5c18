"""Tensors that several architectures share: the common block, and what later ones add to it."""

from __future__ import annotations

from uq.formats.config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    PER_LAYER_EMBEDDING,
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    GemmaConfig,
)
from uq.formats.families.family import Kind, Role


def tables_and_norm(config: GemmaConfig) -> tuple[Role, ...]:
    """Embedding, head where it is untied, and the norm in front of the head."""
    table = (config.vocab_size, config.hidden_size)
    tables = [EMBEDDING] if config.tied_head else [EMBEDDING, HEAD]
    return (
        *(_model_role(name, Kind.TABLE, *table) for name in tables),
        _model_role(FINAL_NORM, Kind.NORM, config.hidden_size),
    )


def block(config: GemmaConfig, layer: int) -> tuple[Role, ...]:
    """Attention and MLP with their norms.

    gemma's `post_attention_layernorm` is the norm in front of the MLP; from gemma2 on that
    norm is `pre_feedforward_layernorm` and `post_*` are applied to the outputs.
    """
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    owns_keys = config.kv_source(layer) == layer
    heads = ("qk" if owns_keys else "q") if config.qk_norm else ""
    return (
        *_attention(config, layer, owns_keys),
        *_mlp(config, layer),
        *(norm(name, config.hidden_size) for name in norms),
        *(norm(f"self_attn.{x}_norm", config.layer_head_dim(layer)) for x in heads),
    )


def per_layer_tables(config: GemmaConfig) -> tuple[Role, ...]:
    """What gives every layer its part of the per-layer embedding."""
    if config.per_layer is None:
        return ()
    size = config.per_layer.size
    channels = config.num_layers * size
    return (
        _model_role(PER_LAYER_EMBEDDING, Kind.TABLE, config.per_layer.vocab_size, channels),
        Role(PER_LAYER_PROJECTION, Kind.KEPT, (channels, config.hidden_size)),
        Role(PER_LAYER_NORM, Kind.NORM, (size,)),
    )


def per_layer_inputs(config: GemmaConfig) -> tuple[Role, ...]:
    """What a layer does with its part of the per-layer embedding."""
    if config.per_layer is None:
        return ()
    size, hidden = config.per_layer.size, config.hidden_size
    return (
        Role("per_layer_input_gate", Kind.KEPT, (size, hidden)),
        Role("per_layer_projection", Kind.KEPT, (hidden, size)),
        norm("post_per_layer_input_norm", hidden),
    )


def linear(name: str, rows: int, cols: int) -> Role:
    return Role(name, Kind.LINEAR, (rows, cols))


def norm(name: str, size: int) -> Role:
    return Role(name, Kind.NORM, (size,))


def _attention(config: GemmaConfig, layer: int, owns_keys: bool) -> tuple[Role, ...]:
    hidden, q, kv = config.hidden_size, config.layer_q_size(layer), config.layer_kv_size(layer)
    keys = ("k" if config.key_is_value(layer) else "kv") if owns_keys else ""
    return (
        linear("self_attn.q_proj", q, hidden),
        *(linear(f"self_attn.{x}_proj", kv, hidden) for x in keys),
        linear("self_attn.o_proj", hidden, q),
    )


def _mlp(config: GemmaConfig, layer: int) -> tuple[Role, ...]:
    hidden, size = config.hidden_size, config.layer_intermediate_size(layer)
    return (
        linear("mlp.gate_proj", size, hidden),
        linear("mlp.up_proj", size, hidden),
        linear("mlp.down_proj", hidden, size),
    )


def _model_role(tensor: str, kind: Kind, *shape: int) -> Role:
    return Role(tensor.removesuffix(".weight"), kind, shape)
