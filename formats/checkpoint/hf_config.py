"""config.json of a Hugging Face folder -> GemmaConfig.

Configurations on the Hub are sparse: what equals the default of the transformers class is left out.
The defaults below are those of GemmaConfig, Gemma2Config and Gemma3TextConfig in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uq.errors import CheckpointError
from uq.formats.checkpoint.small_file import read_small
from uq.formats.config import FULL, MAX_COUNT, MAX_LAYERS, SLIDING, GemmaConfig
from uq.formats.decode import parse_json, shown

JSON = Mapping[str, Any]
MAX_NUMBER = 1e30
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Family:
    """Defaults of one configuration class, and what the family does that no key says."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int
    pattern: int
    theta: float
    local_theta: float | None
    attn_softcap: float | None
    final_softcap: float | None
    post_norms: bool
    qk_norm: bool


GEMMA = Family(
    "gemma", 256000, 3072, 24576, 28, 16, 16, 8192, 1, 1e4, None, None, None, False, False
)
GEMMA2 = Family("gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, 2, 1e4, None, 50.0, 30.0, True, False)
GEMMA3 = Family("gemma3", 262208, 2304, 9216, 26, 8, 4, 131072, 6, 1e6, 1e4, None, None, True, True)
FAMILIES = {"gemma": GEMMA, "gemma2": GEMMA2, "gemma3_text": GEMMA3, "gemma3": GEMMA3}


@dataclass(frozen=True)
class Keys:
    """Typed look-ups in a JSON object; messages name the file and the key."""

    file: str
    data: JSON

    def refuse(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {key} is {shown(self.data[key])}; expected {expected}"
        )

    def integer(self, key: str, default: int, most: int = MAX_COUNT) -> int:
        value = self.data.get(key, default)
        if type(value) is not int or not 0 < value <= most:
            raise self.refuse(key, f"a positive integer, at most {most}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.data.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= MAX_NUMBER:
            raise self.refuse(key, "a positive number")
        return float(value)

    def optional(self, key: str, default: float | None) -> float | None:
        if self.data.get(key, default) is None:
            return None
        return self.number(key, 0.0 if default is None else default)

    def token(self, key: str, default: int) -> int:
        value = self.data.get(key, default)
        if type(value) is not int or not 0 <= value <= MAX_COUNT:
            raise self.refuse(key, "a token id")
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """An id, a list of ids or null."""
        value = self.data.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or not 0 <= token <= MAX_COUNT for token in ids):
            raise self.refuse(key, "a token id or a list of them")
        return tuple(ids)

    def object(self, key: str) -> JSON:
        value = self.data.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, or not a JSON object.
    """
    data = parse_json(read_small(path), str(path), CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def parse_config(
    data: JSON, file: str = "config.json", generation: JSON | None = None
) -> GemmaConfig:
    """Resolve every field of the text model.

    Args:
        data: config.json; of a multimodal gemma3 the `text_config` is used.
        file: its name, for messages.
        generation: generation_config.json, which may name more end-of-sequence tokens.

    Raises:
        CheckpointError: another architecture, a feature that is not supported, or a broken value.
    """
    family = _family(data, file)
    outer = Keys(file, data)
    text = outer.object("text_config") if data["model_type"] == "gemma3" else data
    keys = Keys(file, {key: data[key] for key in TOKEN_KEYS if key in data} | dict(text))
    _refuse_unsupported(family, keys)
    layers = keys.integer("num_hidden_layers", family.num_layers, MAX_LAYERS)
    head_dim = keys.integer("head_dim", 256)
    types = _layer_types(family, keys, layers)
    theta, local_theta, scaling = _rope(family, keys)
    eos = [*keys.tokens("eos_token_id"), *outer.tokens("eos_token_id")]
    eos += Keys("generation_config.json", generation or {}).tokens("eos_token_id")
    config = GemmaConfig(
        family=family.name,
        vocab_size=keys.integer("vocab_size", family.vocab_size),
        hidden_size=keys.integer("hidden_size", family.hidden_size),
        intermediate_size=keys.integer("intermediate_size", family.intermediate_size),
        num_layers=layers,
        num_heads=keys.integer("num_attention_heads", family.num_heads),
        num_kv_heads=keys.integer("num_key_value_heads", family.num_kv_heads),
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        query_pre_attn_scalar=(
            head_dim if family is GEMMA else keys.number("query_pre_attn_scalar", 256)
        ),
        sliding_window=(keys.integer("sliding_window", 4096) if SLIDING in types else 0),
        layer_types=types,
        rope_theta=theta,
        rope_local_theta=local_theta,
        rope_scaling=scaling,
        attn_softcap=_attn_softcap(family, keys),
        final_softcap=(
            None
            if family is GEMMA
            else keys.optional("final_logit_softcapping", family.final_softcap)
        ),
        post_norms=family.post_norms,
        qk_norm=family.qk_norm,
        tied_head=bool(data.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
        max_position_embeddings=keys.integer("max_position_embeddings", family.max_positions),
        bos_token_id=keys.token("bos_token_id", 2),
        eos_token_ids=tuple(dict.fromkeys(eos)) or (1,),
        pad_token_id=keys.token("pad_token_id", 0),
    )
    check_heads(config, file)
    return config


def check_heads(config: GemmaConfig, file: str) -> None:
    """Refuse head counts that no attention can have.

    Raises:
        CheckpointError: key-value heads do not divide the heads, or head_dim is odd.
    """
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{file}: {config.num_heads} attention heads do not divide by "
            f"{config.num_kv_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{file}: head_dim is {config.head_dim}; RoPE needs an even number")


def _family(data: JSON, file: str) -> Family:
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{file}: model_type {shown(model_type)} is not supported; supported are: "
            + ", ".join(FAMILIES)
        )
    return FAMILIES[model_type]


def _refuse_unsupported(family: Family, keys: Keys) -> None:
    data = keys.data
    if "quantization_config" in data:
        raise CheckpointError(
            f"{keys.file}: the weights are quantized already (quantization_config); "
            "use the checkpoint in bf16, f16 or f32"
        )
    for flag in ("attention_bias", "use_bidirectional_attention"):
        if data.get(flag):
            raise keys.refuse(flag, "false; the other variant is not supported")
    key = "hidden_activation"
    if family is GEMMA and data.get(key) is None:
        key = "hidden_act"
    # "gelu" in an old gemma config means the tanh form; transformers replaces it silently.
    allowed = ["gelu_pytorch_tanh", *(["gelu"] if key == "hidden_act" else [])]
    if data.get(key, "gelu_pytorch_tanh") not in allowed:
        raise keys.refuse(key, "gelu_pytorch_tanh")


def _attn_softcap(family: Family, keys: Keys) -> float | None:
    # gemma3 in transformers accepts the key and never applies it; gemma does not know it.
    if family is not GEMMA2:
        return None
    return keys.optional("attn_logit_softcapping", family.attn_softcap)


def _layer_types(family: Family, keys: Keys, layers: int) -> tuple[str, ...]:
    if family is GEMMA:
        return (FULL,) * layers
    types = keys.data.get("layer_types")
    if types is None:
        return pattern_types(_pattern(family, keys), layers)
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


def _pattern(family: Family, keys: Keys) -> int:
    if family is not GEMMA3:
        return family.pattern
    old = keys.integer("_sliding_window_pattern", family.pattern)
    return keys.integer("sliding_window_pattern", old)


def _rope(family: Family, keys: Keys) -> tuple[float, float, float]:
    """Base of full layers, base of sliding layers, linear factor of full layers.

    New files hold `rope_parameters` (per layer type in gemma3), old ones `rope_theta`,
    `rope_local_base_freq` and `rope_scaling`.
    """
    full: JSON = keys.object("rope_parameters")
    local: JSON = {}
    if family is GEMMA3:
        nested = Keys(f"{keys.file}: rope_parameters", full)
        full, local = nested.object(FULL), nested.object(SLIDING)
    full = dict(full) | dict(keys.object("rope_scaling"))
    theta = _theta(keys, full, "rope_theta", family.theta)
    scaling = _linear_factor(keys.file, full)
    if family.local_theta is None:
        if scaling != 1 and family is GEMMA2:
            raise CheckpointError(f"{keys.file}: rope_scaling is not supported for gemma2")
        return theta, theta, scaling
    local_theta = _theta(keys, local, "rope_local_base_freq", family.local_theta)
    if _linear_factor(keys.file, local) != 1:
        raise CheckpointError(
            f"{keys.file}: rope_parameters scale the sliding layers; only full layers may be"
        )
    return theta, local_theta, scaling


def _theta(keys: Keys, parameters: JSON, old_key: str, default: float) -> float:
    inner = Keys(f"{keys.file}: rope_parameters", parameters)
    return inner.number("rope_theta", keys.number(old_key, default))


def _linear_factor(file: str, parameters: JSON) -> float:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear") or parameters.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(
            f"{file}: RoPE of type {shown(kind)} is not supported; supported are: default, linear"
        )
    if kind == "default":
        return 1.0
    return Keys(f"{file}: rope_scaling", parameters).number("factor", 1.0)
