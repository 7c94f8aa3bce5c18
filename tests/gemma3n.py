"""Small random Gemma 3n models, made by the classes of transformers, with every option."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.tiny import write_text_model

SLIDING, FULL = "sliding_attention", "full_attention"
# As E2B and E4B: four streams of which the first is active, shared keys and values, sparse gates.
PLAIN: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 500,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "layer_types": [*[SLIDING, FULL] * 2, SLIDING],
    "num_kv_shared_layers": 2,
    "sliding_window": 300,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.0, 0.0],
    "final_logit_softcapping": 3.0,
}
# What no published model has: another active stream, widths that differ, an untied head.
OTHER = PLAIN | {
    "altup_active_idx": 2,
    "altup_num_inputs": 3,
    "altup_correct_scale": False,
    "tie_word_embeddings": False,
    "num_kv_shared_layers": 0,
    "layer_types": [SLIDING, FULL, SLIDING],
    "num_hidden_layers": 3,
    "activation_sparsity_pattern": [0.0, 0.0, 0.7],
    "intermediate_size": [128, 192, 64],
    "final_logit_softcapping": 20.0,
}
# What llama.cpp has in its code, at small widths: sparse gates in the first ten layers, the keys of
# layers 18 and 19 shared, streams, ranks and per-layer channels of E2B's size.
PUBLISHED = PLAIN | {
    "hidden_size_per_layer_input": 256,
    "num_hidden_layers": 22,
    "layer_types": [*[*[SLIDING] * 4, FULL] * 4, SLIDING, FULL],
    "num_kv_shared_layers": 2,
    "laurel_rank": 64,
    "activation_sparsity_pattern": [*[0.95] * 10, *[0.0] * 12],
    "final_logit_softcapping": 30.0,
}
VARIANTS = {"plain": PLAIN, "other": OTHER, "published": PUBLISHED}


def write_gemma3n(
    folder: Path,
    text: Mapping[str, Any],
    *,
    kind: str = "gemma3n_text",
    prefix: str = "model.",
    extra: Mapping[str, NDArray[np.float32] | None] | None = None,
) -> Path:
    """A Hugging Face folder with random float32 weights.

    Args:
        text: keys of the text configuration, as the Hub's files have them.
        kind: `model_type`; of a multimodal model the keys become its `text_config`.
        prefix: of the text model's tensors.
        extra: further tensors, other values, or None for a tensor that is left out.
    """
    keys = {"model_type": "gemma3n_text", **text, "eos_token_id": [1, 5]}
    stored = {
        name if name == "lm_head.weight" else prefix + name.removeprefix("model."): value
        for name, value in _weights(keys).items()
    }
    return write_text_model(folder, kind, keys, {**stored, **(extra or {})})


def transformers_config(keys: Mapping[str, Any]) -> Any:
    """The text configuration as the class of transformers resolves it."""
    from transformers import Gemma3nTextConfig

    found = {key: value for key, value in keys.items() if key != "model_type"}
    return Gemma3nTextConfig(**json.loads(json.dumps(found)))


def transformers_model(keys: Mapping[str, Any]) -> Any:
    """The model, in float32 with its plain attention."""
    from transformers import Gemma3nForCausalLM

    config = transformers_config(keys)
    config._attn_implementation = "eager"
    return Gemma3nForCausalLM(config).eval()


def _weights(keys: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Linears keep the scale of their input; gains are 1 + N(0, 0.1).

    Those of queries and keys hold the scale of the scores, which the attention does not have.
    """
    rng = np.random.default_rng(0)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, value in transformers_model(keys).state_dict().items():
        shape = tuple(value.shape)
        noise = rng.standard_normal(shape).astype(np.float32)
        scale = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        if "modality_router" in name:  # its input is divided by hidden_size, behind a norm
            scale *= shape[-1]
        if "coefs" in name:  # else streams cancel, and a norm makes the rounding of the rest large
            scale *= 0.3
        weights[name] = noise * np.float32(scale) + np.float32(len(shape) == 1)
        if "post_" in name:  # else a deep model magnifies rounding a hundredfold
            weights[name] *= np.float32(min(1, 5 / keys["num_hidden_layers"]))
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] *= np.float32(shape[0] ** -0.25)
    if keys.get("tie_word_embeddings", True):
        del weights["lm_head.weight"]
    return weights


def loaded_model(folder: Path) -> Any:
    """What `write_gemma3n` wrote, in transformers."""
    from safetensors.torch import load_file

    model = transformers_model(json.loads((folder / "config.json").read_text()))
    missing, unexpected = model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    assert (missing, unexpected) in (([], []), (["lm_head.weight"], []))
    return model


def transformers_logits(folder: Path) -> Callable[[NDArray[np.int32]], NDArray[np.float32]]:
    """Logits (batch, length, vocab) of what `write_gemma3n` wrote, by transformers."""
    import torch

    model = loaded_model(folder)

    def logits(tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        with torch.no_grad():
            out: NDArray[np.float32] = model(torch.from_numpy(tokens).long()).logits.numpy()
        return out

    return logits
