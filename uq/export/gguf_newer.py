"""Keys of gemma3n and gemma4 in a GGUF file, and which of them llama.cpp runs as they are.

Sources: src/models/gemma3n.cpp, gemma4.cpp and src/llama-model.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType

from gguf import GGUFWriter

from uq.errors import UsageError
from uq.formats.config import PER_LAYER_EMBEDDING, SLIDING, AltUp, GemmaConfig

# What llama.cpp has in its code for every gemma3n, whatever the file says.
OWN_KEYS = 20
STREAMS = AltUp(streams=4, active=0, scaled=True)
LAUREL_RANK, PER_LAYER_SIZE = 64, 256
SPARSE_LAYERS, SPARSITY = 10, 0.95
FINAL_SOFTCAP = 30.0


@dataclass(frozen=True)
class Architecture:
    """What a file says of models whose layers differ.

    Attributes:
        require: refuses, by a UsageError, a model that llama.cpp would run otherwise.
        add: writes the keys that other architectures do not have.
    """

    require: Callable[[GemmaConfig], None]
    add: Callable[[GGUFWriter, GemmaConfig], None]


def require_gemma3n(config: GemmaConfig) -> None:
    for name, (found, wanted) in _in_the_code(config).items():
        if found != wanted:
            raise UsageError(
                f"llama.cpp runs every gemma3n with {name}: {wanted}; this model has {found}; use "
                "another format"
            )
    _require_common(config)


def _in_the_code(config: GemmaConfig) -> dict[str, tuple[object, object]]:
    """What llama.cpp takes from no file: the model's value, and llama.cpp's."""
    assert config.altup is not None and config.per_layer is not None
    layers, altup = config.num_layers, config.altup
    sparse = min(SPARSE_LAYERS, layers)
    pattern = (SPARSITY,) * sparse + (0.0,) * (layers - sparse)
    shares = tuple(config.sparsity(layer) for layer in range(layers))
    gates = f"{SPARSITY} in the first {sparse} layers"
    return {
        "layers with own keys": (layers - config.kv_shared_layers, min(OWN_KEYS, layers)),
        "residual streams": (altup.streams, STREAMS.streams),
        "active stream": (altup.active, STREAMS.active),
        "a gain of the active stream": (altup.scaled, STREAMS.scaled),
        "laurel_rank": (config.laurel_rank, LAUREL_RANK),
        "per-layer channels": (config.per_layer.size, PER_LAYER_SIZE),
        "MLP widths": (len(set(config.intermediate_sizes)) or 1, 1),
        "sparse gates": (gates if shares == pattern else "others", gates),
        "final_softcap": (config.final_softcap, FINAL_SOFTCAP),
    }


def require_gemma4(config: GemmaConfig) -> None:
    if SLIDING not in config.layer_types:
        raise UsageError(f"llama.cpp ends itself on a gemma4 without {SLIDING}; use another format")
    _require_common(config)


def _require_common(config: GemmaConfig) -> None:
    """What no file can say."""
    own = config.num_layers - config.kv_shared_layers
    sources = [config.kv_source(layer) for layer in range(own, config.num_layers)]
    taken = [own - 1 - config.is_sliding(layer) for layer in range(own, config.num_layers)]
    if sources != taken:
        raise UsageError(
            f"llama.cpp shares the keys and values of layers {own - 2} (sliding) and {own - 1} "
            f"(full), this model those of {sorted(set(sources))}; use another format"
        )
    if config.per_layer is not None and config.per_layer.vocab_size > config.vocab_size:
        raise UsageError(
            f"{PER_LAYER_EMBEDDING}: has {config.per_layer.vocab_size} rows, but llama.cpp wants "
            f"the {config.vocab_size} of the embedding; use another format"
        )
    if config.rope_scaling != 1:
        raise UsageError(f"llama.cpp has no {config.family} with scaled RoPE; use another format")


def add_gemma3n(writer: GGUFWriter, config: GemmaConfig) -> None:
    """llama.cpp reads few of these keys; other readers do not know what it has in its code."""
    assert config.altup is not None
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_altup_active_idx(config.altup.active)
    writer.add_altup_num_inputs(config.altup.streams)
    shares = (config.sparsity(layer) for layer in range(config.num_layers))
    writer.add_activation_sparsity_scale(
        [NormalDist().inv_cdf(share) if share else float("-inf") for share in shares]
    )
    _add_common(writer, config)


def add_gemma4(writer: GGUFWriter, config: GemmaConfig) -> None:
    """Full layers with heads of their own."""
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
    _add_common(writer, config)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.active)
        writer.add_expert_feed_forward_length(config.experts.intermediate_size)


def _add_common(writer: GGUFWriter, config: GemmaConfig) -> None:
    """llama.cpp takes absent soft-caps for 30."""
    layers = range(config.num_layers)
    writer.add_rope_freq_base_swa(config.rope_local_theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([config.is_sliding(layer) for layer in layers])
    writer.add_shared_kv_layers(config.kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.per_layer.size if config.per_layer else 0)
    writer.add_final_logit_softcapping(config.final_softcap or 0.0)


NEWER: Mapping[str, Architecture] = MappingProxyType(
    {
        "gemma3n": Architecture(require_gemma3n, add_gemma3n),
        "gemma4": Architecture(require_gemma4, add_gemma4),
    }
)
