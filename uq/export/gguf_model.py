"""What a GGUF file says of the model: its keys, and what llama.cpp has no place for.

Keys and names: gguf-py/gguf/constants.py and src/models/gemma*.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gguf import GGUFWriter, RopeScalingType

from uq.errors import UsageError
from uq.formats.checkpoint.gguf_config import ARCHITECTURES, ROLES, gguf_names
from uq.formats.config import (
    EMBEDDING,
    FINAL_NORM,
    FULL,
    HEAD,
    PER_LAYER_EMBEDDING,
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    SLIDING,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.families.reading import pattern_types

GEMMA4 = "gemma4"
ALSO = {"gemma4": GEMMA4, "gemma4_unified": GEMMA4}  # family -> architecture
GEMMA4_ROLES: Mapping[str, str] = MappingProxyType(
    {role: f"{name}.weight" for role, name in ROLES.items()}
    | {
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
        "router.proj": "ffn_gate_inp.weight",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2.weight",
        "post_feedforward_layernorm_1": "post_ffw_norm_1.weight",
        "post_feedforward_layernorm_2": "post_ffw_norm_2.weight",
        "per_layer_input_gate": "inp_gate.weight",
        "per_layer_projection": "proj.weight",
        "post_per_layer_input_norm": "post_norm.weight",
        "layer_scalar": "layer_output_scale.weight",
    }
)
GEMMA4_TABLES: Mapping[str, str] = MappingProxyType(
    {
        EMBEDDING: "token_embd.weight",
        HEAD: "output.weight",
        FINAL_NORM: "output_norm.weight",
        PER_LAYER_EMBEDDING: "per_layer_token_embd.weight",
        f"{PER_LAYER_PROJECTION}.weight": "per_layer_model_proj.weight",
        f"{PER_LAYER_NORM}.weight": "per_layer_proj_norm.weight",
    }
)


def architecture(config: GemmaConfig) -> str:
    return ALSO.get(config.family, config.family)


def takes_merges(config: GemmaConfig) -> bool:
    """Whether llama.cpp splits texts of the architecture by merges, and not by scores."""
    return architecture(config) == GEMMA4


def tensor_names(config: GemmaConfig) -> dict[str, str]:
    """Canonical tensor name -> name in the file."""
    if architecture(config) != GEMMA4:
        return gguf_names(config)
    tables = [*config.table_shapes(), *config.model_norms(), *config.model_kept()]
    names = {name: GEMMA4_TABLES[name] for name in tables}
    for layer in range(config.num_layers):
        for part in (config.linear_shapes, config.norm_shapes, config.kept_shapes):
            for role in part(layer):
                names[layer_tensor(layer, role)] = f"blk.{layer}.{GEMMA4_ROLES[role]}"
    return names


def require_known(config: GemmaConfig) -> None:
    """Refuse a model that llama.cpp has no architecture for, or would run otherwise.

    Raises:
        UsageError: says what it has none for.
    """
    if config.family not in (*ARCHITECTURES, *ALSO):
        raise UsageError(
            f"export of {config.family} to GGUF is not offered{_why_not(config)}; it is of "
            + ", ".join((*ARCHITECTURES, *ALSO))
        )
    if not config.tied_head and config.family in ("gemma", "gemma2"):
        raise UsageError(
            f"llama.cpp has no {config.family} with a head of its own; use another format"
        )
    if config.family in ALSO:
        _require_gemma4(config)


def _why_not(config: GemmaConfig) -> str:
    shared = range(config.num_layers - config.kv_shared_layers, config.num_layers)
    if not shared:
        return ": llama.cpp has no such architecture, or with fixed sizes only"
    return (
        f": llama.cpp wants blk.{shared[0]}.attn_k.weight to blk.{shared[-1]}.attn_v.weight, which "
        "these layers, reading keys and values of others, do not have"
    )


def _require_gemma4(config: GemmaConfig) -> None:
    """What no file can say."""
    own = config.num_layers - config.kv_shared_layers
    sources = [config.kv_source(layer) for layer in range(own, config.num_layers)]
    taken = [own - 1 - config.is_sliding(layer) for layer in range(own, config.num_layers)]
    if sources != taken:
        raise UsageError(
            f"llama.cpp shares the keys and values of layers {own - 2} (sliding) and {own - 1} "
            f"(full), this model those of {sorted(set(sources))}; use another format"
        )
    if config.per_layer is not None and config.per_layer.vocab_size != config.vocab_size:
        raise UsageError(
            f"{PER_LAYER_EMBEDDING}: has {config.per_layer.vocab_size} rows, but llama.cpp wants "
            f"the {config.vocab_size} of the embedding; use another format"
        )
    if config.rope_scaling != 1:
        raise UsageError("llama.cpp has no gemma4 with scaled RoPE; use another format")


def add_model(writer: GGUFWriter, config: GemmaConfig) -> None:
    """All keys of the architecture."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if architecture(config) == GEMMA4:
        _add_gemma4(writer, config)
    else:
        _add_uniform(writer, config)


def _add_uniform(writer: GGUFWriter, config: GemmaConfig) -> None:
    """Layers of one shape."""
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.rope_scaling != 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling)
    if SLIDING in config.layer_types:
        _add_windows(writer, config)
    if config.attn_softcap is not None:
        writer.add_attn_logit_softcapping(config.attn_softcap)
    if config.final_softcap is not None:
        writer.add_final_logit_softcapping(config.final_softcap)


def _add_windows(writer: GGUFWriter, config: GemmaConfig) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_local_theta)
    defaults = ARCHITECTURES[config.family].gguf
    usual = pattern_types(defaults.pattern, config.num_layers) if defaults else ()
    if config.layer_types != usual:
        writer.add_sliding_window_pattern([kind != FULL for kind in config.layer_types])


def _add_gemma4(writer: GGUFWriter, config: GemmaConfig) -> None:
    """Full layers with heads of their own; llama.cpp takes absent soft-caps for 30."""
    assert config.full is not None
    layers = range(config.num_layers)
    writer.add_feed_forward_length([config.layer_intermediate_size(layer) for layer in layers])
    writer.add_head_count_kv([config.layer_kv_heads(layer) for layer in layers])
    writer.add_key_length(config.full.head_dim)
    writer.add_value_length(config.full.head_dim)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count(config.full.head_dim)  # `rope_freqs` says which turn
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base_swa(config.rope_local_theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([config.is_sliding(layer) for layer in layers])
    writer.add_shared_kv_layers(config.kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.per_layer.size if config.per_layer else 0)
    writer.add_final_logit_softcapping(config.final_softcap or 0.0)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.active)
        writer.add_expert_feed_forward_length(config.experts.intermediate_size)
