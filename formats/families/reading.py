"""What the configurations of several architectures say alike, read with their class defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uq.errors import CheckpointError
from uq.formats.config import FULL, MAX_LAYERS, SLIDING
from uq.formats.decode import shown
from uq.formats.families.keys import JSON, Keys

TANH_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Defaults:
    """Sizes that a configuration class of transformers fills in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int


def sizes(keys: Keys, defaults: Defaults) -> dict[str, Any]:
    """Fields of `GemmaConfig` that every configuration has under the same keys.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    refuse_unsupported(keys)
    return {
        "vocab_size": keys.integer("vocab_size", defaults.vocab_size),
        "hidden_size": keys.integer("hidden_size", defaults.hidden_size),
        "intermediate_size": keys.integer("intermediate_size", defaults.intermediate_size),
        "num_layers": keys.integer("num_hidden_layers", defaults.num_layers, MAX_LAYERS),
        "num_heads": keys.integer("num_attention_heads", defaults.num_heads),
        "num_kv_heads": keys.integer("num_key_value_heads", defaults.num_kv_heads),
        "head_dim": keys.integer("head_dim", 256),
        "rms_norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tied_head": keys.flag("tie_word_embeddings", default=True),
        "max_position_embeddings": keys.integer("max_position_embeddings", defaults.max_positions),
        "bos_token_id": keys.token("bos_token_id", 2),
        "eos_token_ids": keys.tokens("eos_token_id") or (1,),
        "pad_token_id": keys.token("pad_token_id", 0),
    }


def refuse_unsupported(keys: Keys) -> None:
    """Raises CheckpointError: quantized weights, or attention with biases or of later tokens."""
    if keys.data.get("quantization_config") is not None:
        raise CheckpointError(
            f"{keys.file}: the weights are quantized already (quantization_config); "
            "use the checkpoint in bf16, f16 or f32"
        )
    refuse_flag(keys, "attention_bias")
    if not keys.data.get("is_causal", True):
        raise keys.refuse("is_causal", "true; text is causal here")


def refuse_variants(keys: Keys) -> None:
    """Raises CheckpointError: attention that looks ahead, or layers of sizes of their own."""
    refuse_flag(keys, "use_bidirectional_attention")
    if keys.data.get("per_layer_config"):
        raise keys.refuse("per_layer_config", "none; the layers of this architecture are alike")


def refuse_flag(keys: Keys, flag: str) -> None:
    if keys.data.get(flag):
        raise keys.refuse(flag, "false; the other variant is not supported")


def require_tanh_gelu(
    keys: Keys, key: str = "hidden_activation", also: tuple[str | None, ...] = ()
) -> None:
    """Raises CheckpointError: another activation than gelu in its tanh form."""
    if keys.data.get(key, TANH_GELU) not in (TANH_GELU, *also):
        raise keys.refuse(key, TANH_GELU)


def layer_types(keys: Keys, layers: int, pattern: int) -> tuple[str, ...]:
    """Of every layer; where the file has none, every `pattern`-th is full."""
    types = keys.data.get("layer_types")
    if types is None:
        return pattern_types(pattern, layers)
    if not isinstance(types, list) or any(kind not in (SLIDING, FULL) for kind in types):
        raise keys.refuse("layer_types", f"a list of {SLIDING} and {FULL}")
    if len(types) != layers:
        raise CheckpointError(
            f"{keys.file}: layer_types has {len(types)} entries for {layers} layers"
        )
    return tuple(types)


def pattern_types(pattern: int, layers: int) -> tuple[str, ...]:
    """Every `pattern`-th layer is full, the others are sliding."""
    return tuple(SLIDING if (layer + 1) % pattern else FULL for layer in range(layers))


def window(keys: Keys, types: tuple[str, ...], default: int = 4096) -> int:
    """Of sliding layers; 0 where there are none."""
    return keys.integer("sliding_window", default) if SLIDING in types else 0


def single_rope(keys: Keys, default: float = 1e4) -> tuple[float, float]:
    """Base and linear factor of models whose layers all turn alike."""
    if {FULL, SLIDING} & set(keys.object("rope_parameters")):
        raise keys.refuse("rope_parameters", "one object for all layers")
    parameters = {**keys.object("rope_parameters"), **keys.object("rope_scaling")}
    return theta(keys, parameters, "rope_theta", default), linear_factor(keys.file, parameters)


def theta(keys: Keys, parameters: JSON, old_key: str, default: float) -> float:
    """RoPE base out of new parameters, or of the key that old files have for it."""
    inner = Keys(f"{keys.file}: rope_parameters", parameters)
    return inner.number("rope_theta", keys.number(old_key, default))


def linear_factor(file: str, parameters: JSON) -> float:
    """What positions are divided by."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear"):
        raise CheckpointError(
            f"{file}: RoPE of type {shown(kind)} is not supported; supported are: default, linear"
        )
    inner = Keys(f"{file}: RoPE of type {kind}", parameters)
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise inner.refuse("partial_rotary_factor", "1")
    if kind == "default":
        return 1.0
    return inner.number("factor", 1.0)


def two_ropes(keys: Keys) -> tuple[float, float, float]:
    """Base of full layers, base of sliding layers, linear factor of full layers.

    New files hold `rope_parameters` per layer type, old ones `rope_theta`, `rope_local_base_freq`
    and `rope_scaling`.
    """
    nested = Keys(f"{keys.file}: rope_parameters", keys.object("rope_parameters"))
    full = {**nested.object(FULL), **keys.object("rope_scaling")}
    local = nested.object(SLIDING)
    refuse_scaled(keys.file, local)
    return (
        theta(keys, full, "rope_theta", 1e6),
        theta(keys, local, "rope_local_base_freq", 1e4),
        linear_factor(keys.file, full),
    )


def refuse_scaled(file: str, local: JSON) -> None:
    """Raises CheckpointError: the positions of sliding layers are divided."""
    if (factor := linear_factor(file, local)) != 1:
        raise CheckpointError(
            f"{file}: the RoPE of {SLIDING} is scaled by {factor:g}; only {FULL} may be"
        )


def shared_layers(keys: Keys, types: tuple[str, ...], default: int) -> int:
    """Last layers without keys and values; each needs one of its type in front of them."""
    key = "num_kv_shared_layers"
    shared = keys.data.get(key, default) or 0  # null is none
    if type(shared) is not int or not 0 <= shared <= len(types):
        raise keys.refuse(key, f"a number of the {len(types)} layers")
    if set(types[: len(types) - shared]) != set(types):
        raise CheckpointError(
            f"{keys.file}: {key} is {shared}, which leaves no layer of some type with keys and "
            "values"
        )
    return shared
