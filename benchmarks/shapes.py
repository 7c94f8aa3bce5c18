"""The shapes of Gemma 3, 3n and 4 models, for benchmarks whose weights are made up."""

from __future__ import annotations

from dataclasses import replace

from uq.formats.config import (
    FULL,
    SLIDING,
    AltUp,
    Experts,
    FullLayers,
    GemmaConfig,
    PerLayerEmbedding,
)

# layers, hidden, intermediate, heads, KV heads, head size, window
SHAPES = {
    "270m": (18, 640, 2048, 4, 1, 256, 512),
    "1b": (26, 1152, 6912, 4, 1, 256, 512),
    "4b": (34, 2560, 10240, 8, 4, 256, 1024),
    "12b": (48, 3840, 15360, 16, 8, 256, 1024),
    "27b": (62, 5376, 21504, 32, 16, 128, 1024),
}
# The same, and a full layer comes so often; with heads of 512, a quarter of which turns.
SHAPES_4 = {
    "e2b": (35, 1536, 6144, 8, 1, 256, 512, 5),
    "26b-a4b": (30, 2816, 2112, 16, 8, 256, 1024, 6),
}
LAYERS_3N, SHARED_3N = 30, 10  # of Gemma 3n's E2B
NAME_3N = "3n-e2b"
NAMES = (*SHAPES, *SHAPES_4, NAME_3N)
VOCABULARY = 262144
SHARED = 20 / 35  # layers of the E2B without keys of their own


def text_config(name: str, layers: int | None = None) -> GemmaConfig:
    """The text model `name` of any family, with other numbers of layers where they are given."""
    if name == NAME_3N:
        return gemma3n_config(layers or LAYERS_3N)
    return shape_config(name, layers) if name in SHAPES else gemma4_config(name, layers)


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


def gemma4_config(name: str, layers: int | None = None) -> GemmaConfig:
    """The text model `name` of Gemma 4; fewer layers share as many of their keys in proportion."""
    sizes = SHAPES_4[name]
    layers = layers or sizes[0]
    _, hidden, intermediate, heads, kv_heads, dim, window, period = sizes
    base = replace(
        shape_config("1b", layers),
        family="gemma4",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        query_pre_attn_scalar=1.0,
        sliding_window=window,
        layer_types=tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)),
        final_softcap=30.0,
        value_norm=True,
        layer_scalar=True,
    )
    if name == "e2b":
        shared = min(round(layers * SHARED), layers - period)
        return replace(
            base,
            full=FullLayers(2 * dim, kv_heads, rotary_pairs=dim // 4, key_is_value=False),
            intermediate_sizes=(intermediate,) * (layers - shared) + (2 * intermediate,) * shared,
            kv_shared_layers=shared,
            per_layer=PerLayerEmbedding(VOCABULARY, 256),
        )
    return replace(
        base,
        full=FullLayers(2 * dim, 2, rotary_pairs=dim // 4, key_is_value=True),
        experts=Experts(count=128, active=8, intermediate_size=704),
    )


def gemma3n_config(layers: int = LAYERS_3N) -> GemmaConfig:
    """The text model of Gemma 3n's E2B; fewer layers share as many of their keys in proportion."""
    sparse = layers // 3
    return replace(
        shape_config("1b", layers),
        family="gemma3n",
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=8,
        num_kv_heads=2,
        query_pre_attn_scalar=1.0,
        layer_types=tuple(SLIDING if (i + 1) % 5 else FULL for i in range(layers)),
        final_softcap=30.0,
        value_norm=True,
        kv_shared_layers=layers * SHARED_3N // LAYERS_3N,
        per_layer=PerLayerEmbedding(VOCABULARY, 256),
        altup=AltUp(streams=4, active=0, scaled=True),
        laurel_rank=64,
        activation_sparsity=(0.95,) * sparse + (0.0,) * (layers - sparse),
    )
