"""A bundle's model -> config.json of transformers' text model, read back to be sure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from uq.errors import BundleError
from uq.formats.checkpoint.hf_config import parse_config
from uq.formats.config import FULL, SLIDING, GemmaConfig

TANH_GELU = "gelu_pytorch_tanh"
JSON = dict[str, Any]


def text_config(config: GemmaConfig) -> JSON:
    """config.json of a text model.

    Raises:
        BundleError: it cannot say what the model is.
    """
    model_type, architecture, more = CLASSES[config.family]
    found = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tied_head,
        **token_ids(config),
        **more(config),
    }
    if parse_config(found) != config:
        raise BundleError(
            f"transformers has no {model_type} model of this kind: it takes other numbers than the "
            "bundle's for RoPE, soft-caps, the scale of the scores or the sizes of some layers"
        )
    return found


def token_ids(config: GemmaConfig) -> JSON:
    eos = list(config.eos_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id,
    }


def _gemma(config: GemmaConfig) -> JSON:
    return {"hidden_act": TANH_GELU, "rope_parameters": _full_rope(config)}


def _windowed(config: GemmaConfig) -> JSON:
    """What all have that came after gemma."""
    window = {"sliding_window": config.sliding_window} if config.sliding_window else {}
    return {
        "hidden_activation": TANH_GELU,
        "layer_types": list(config.layer_types),
        "final_logit_softcapping": config.final_softcap,
        **window,
    }


def _capped(config: GemmaConfig) -> JSON:
    """Of gemma2 and vaultgemma."""
    return _windowed(config) | _scores(config) | {"rope_parameters": _full_rope(config)}


def _gemma3(config: GemmaConfig) -> JSON:
    return _windowed(config) | _scores(config) | {"rope_parameters": _two_ropes(config)}


def _gemma3n(config: GemmaConfig) -> JSON:
    assert config.per_layer is not None and config.altup is not None
    layers = range(config.num_layers)
    return {
        **_windowed(config),
        "rope_parameters": _two_ropes(config),
        "intermediate_size": [config.layer_intermediate_size(layer) for layer in layers],
        "activation_sparsity_pattern": [config.sparsity(layer) for layer in layers],
        "num_kv_shared_layers": config.kv_shared_layers,
        "hidden_size_per_layer_input": config.per_layer.size,
        "vocab_size_per_layer_input": config.per_layer.vocab_size,
        "altup_num_inputs": config.altup.streams,
        "altup_active_idx": config.altup.active,
        "altup_correct_scale": config.altup.scaled,
        "laurel_rank": config.laurel_rank,
    }


def _gemma4(config: GemmaConfig) -> JSON:
    assert config.full is not None
    full = {
        "rope_type": "proportional",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": 2 * config.full.rotary_pairs / config.full.head_dim,
    }
    if config.rope_scaling != 1:
        full["factor"] = config.rope_scaling
    fewer = config.full.num_kv_heads if config.full.key_is_value else None
    return {
        **_windowed(config),
        "rope_parameters": {FULL: full, SLIDING: _local_rope(config)},
        "global_head_dim": config.full.head_dim,
        "attention_k_eq_v": config.full.key_is_value,
        "num_global_key_value_heads": fewer,
        "num_kv_shared_layers": config.kv_shared_layers,
        "use_double_wide_mlp": bool(config.intermediate_sizes),
    }


def _gemma4_with_extras(config: GemmaConfig) -> JSON:
    found = _gemma4(config) | {"hidden_size_per_layer_input": 0}
    if config.per_layer is not None:
        found["hidden_size_per_layer_input"] = config.per_layer.size
        found["vocab_size_per_layer_input"] = config.per_layer.vocab_size
    if config.experts is not None:
        found["enable_moe_block"] = True
        found["num_experts"] = config.experts.count
        found["top_k_experts"] = config.experts.active
        found["moe_intermediate_size"] = config.experts.intermediate_size
    return found


CLASSES: Mapping[str, tuple[str, str, Callable[[GemmaConfig], JSON]]] = MappingProxyType(
    {
        "gemma": ("gemma", "GemmaForCausalLM", _gemma),
        "gemma2": ("gemma2", "Gemma2ForCausalLM", _capped),
        "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _gemma3),
        "vaultgemma": ("vaultgemma", "VaultGemmaForCausalLM", _capped),
        "gemma3n": ("gemma3n_text", "Gemma3nForCausalLM", _gemma3n),
        "gemma4": ("gemma4_text", "Gemma4ForCausalLM", _gemma4_with_extras),
        "gemma4_unified": ("gemma4_unified_text", "Gemma4UnifiedForCausalLM", _gemma4),
    }
)


def _scores(config: GemmaConfig) -> JSON:
    scalar = config.query_pre_attn_scalar
    return {
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attn_softcap,
    }


def _full_rope(config: GemmaConfig) -> JSON:
    if config.rope_scaling == 1:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    factor = {"factor": config.rope_scaling}
    return {"rope_type": "linear", "rope_theta": config.rope_theta, **factor}


def _local_rope(config: GemmaConfig) -> JSON:
    return {"rope_type": "default", "rope_theta": config.rope_local_theta}


def _two_ropes(config: GemmaConfig) -> JSON:
    return {FULL: _full_rope(config), SLIDING: _local_rope(config)}
