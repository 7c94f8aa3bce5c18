"""What a GGUF file says of the model: its keys, and what llama.cpp has no place for.

Keys and names: gguf-py/gguf/constants.py and src/models/gemma*.cpp of llama.cpp.
"""

from __future__ import annotations

from gguf import GGUFWriter, RopeScalingType

from uq.errors import UsageError
from uq.export.gguf_newer import NEWER
from uq.formats.checkpoint.gguf_config import ARCHITECTURES, READABLE
from uq.formats.config import FULL, SLIDING, GemmaConfig
from uq.formats.families.reading import pattern_types

GEMMA4 = "gemma4"
ALSO = {"gemma4_unified": GEMMA4}  # families whose text is another architecture's


def architecture(config: GemmaConfig) -> str:
    return ALSO.get(config.family, config.family)


def takes_merges(config: GemmaConfig) -> bool:
    """Whether llama.cpp splits texts of the architecture by merges, and not by scores."""
    return architecture(config) == GEMMA4


def require_known(config: GemmaConfig) -> None:
    """Refuse a model that llama.cpp has no architecture for, or would run otherwise.

    Raises:
        UsageError: says what it has none for.
    """
    if architecture(config) not in READABLE:
        raise UsageError(
            f"export of {config.family} to GGUF is not offered: llama.cpp has no such "
            f"architecture; it is of {', '.join((*READABLE, *ALSO))}"
        )
    if not config.tied_head and config.family in ("gemma", "gemma2"):
        raise UsageError(
            f"llama.cpp has no {config.family} with a head of its own; use another format"
        )
    if architecture(config) in NEWER:
        NEWER[architecture(config)].require(config)


def add_model(writer: GGUFWriter, config: GemmaConfig) -> None:
    """All keys of the architecture."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if architecture(config) in NEWER:
        NEWER[architecture(config)].add(writer, config)
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
