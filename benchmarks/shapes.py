"""The shapes of the Gemma 3 models, for benchmarks whose weights are made up."""

from __future__ import annotations

from uq.formats.config import FULL, SLIDING, GemmaConfig

# layers, hidden, intermediate, heads, KV heads, head size, window
SHAPES = {
    "270m": (18, 640, 2048, 4, 1, 256, 512),
    "1b": (26, 1152, 6912, 4, 1, 256, 512),
    "4b": (34, 2560, 10240, 8, 4, 256, 1024),
    "12b": (48, 3840, 15360, 16, 8, 256, 1024),
    "27b": (62, 5376, 21504, 32, 16, 128, 1024),
}
VOCABULARY = 262144


def shape_config(name: str, layers: int | None = None, vocabulary: int = VOCABULARY) -> GemmaConfig:
    """The text model `name`; with other numbers of layers or tokens where they are given."""
    all_layers, hidden, intermediate, heads, kv_heads, dim, window = SHAPES[name]
    layers = layers or all_layers
    return GemmaConfig(
        family="gemma3",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=float(dim),
        sliding_window=window,
        layer_types=tuple(SLIDING if (i + 1) % 6 else FULL for i in range(layers)),
        rope_theta=1e6,
        rope_local_theta=1e4,
        rope_scaling=1.0,
        attn_softcap=None,
        final_softcap=None,
        post_norms=True,
        qk_norm=True,
        tied_head=True,
        max_position_embeddings=32768,
        bos_token_id=2,
        eos_token_ids=(1,),
        pad_token_id=0,
    )
