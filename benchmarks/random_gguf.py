"""A GGUF file of a Gemma 3 shape with random weights: Q4_0 layers and a Q8_0 embedding.

What llama.cpp needs to be timed on sizes whose weights are not at hand: speed depends on shapes and
types, not on values. Its vocabulary is made up: prompts are token ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig

BLOCK_BYTES = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q8_0: 34}  # 32 weights
PATTERN = 64  # rows that repeat
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")


def write_random_gguf(config: GemmaConfig, path: Path) -> None:
    """Write `config`'s model to `path`; its norms are all ones."""
    writer = GGUFWriter(path, "gemma3")
    add_sizes(writer, config)
    add_vocabulary(writer, config)
    vocabulary = (config.vocab_size, config.hidden_size)
    _add_matrix(writer, "token_embd", vocabulary, GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(config.hidden_size, np.float32))
    for layer in range(config.num_layers):
        for role, shape in config.linear_shapes(0).items():
            _add_matrix(writer, f"blk.{layer}.{NAMES[role]}", shape, GGMLQuantizationType.Q4_0)
        sizes = dict.fromkeys(NORMS, config.hidden_size)
        sizes |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), config.head_dim)
        for name, size in sizes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: GGUFWriter, config: GemmaConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(config.sliding_window or 0)


def add_vocabulary(writer: GGUFWriter, config: GemmaConfig) -> None:
    """Special tokens, the 256 bytes, then names without a meaning."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
    # As BYTE, what random weights write would be no UTF-8.
    types = [TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * 256
    more = config.vocab_size - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"t{i}" for i in range(more))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([*types, *[TokenType.NORMAL] * more])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)


def _add_matrix(
    writer: GGUFWriter, name: str, shape: tuple[int, int], kind: GGMLQuantizationType
) -> None:
    rows, cols = shape
    width = BLOCK_BYTES[kind]
    blocks = np.random.default_rng(rows + cols).integers(
        0, 256, (PATTERN, cols // 32, width), np.uint8
    )
    unit = cols**-0.5 / (8 if kind == GGMLQuantizationType.Q4_0 else 128)
    blocks[..., :2] = np.frombuffer(np.float16(unit).tobytes(), np.uint8)
    data: NDArray[np.uint8] = np.resize(blocks.reshape(PATTERN, -1), (rows, cols // 32 * width))
    writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
