"""Small random Gemma 4 models, made by the classes of transformers, with every option."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.tiny import write_text_model
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.quantize.pipeline import QuantizeOptions, quantize

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 300,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "final_logit_softcapping": 3.0,
}
# As E2B: per-layer embeddings, shared keys and values, twice as wide MLPs where they are shared.
SMALL = SIZES | {
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 512,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "num_key_value_heads": 1,
}
# As 31B and 12B: the full layers have fewer key heads, and no values of their own.
LARGE = SIZES | {
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "layer_types": None,
    "num_hidden_layers": 7,
}
# As 26B-A4B.
EXPERTS = LARGE | {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
}
ALL = EXPERTS | SMALL | {"num_hidden_layers": 6}
VARIANTS = {"small": SMALL, "large": LARGE, "experts": EXPERTS, "all": ALL}


def write_gemma4(
    folder: Path,
    text: Mapping[str, Any],
    *,
    kind: str = "gemma4_text",
    prefix: str = "model.",
    extra: Mapping[str, NDArray[np.float32] | None] | None = None,
) -> Path:
    """A Hugging Face folder with random float32 weights.

    Args:
        text: keys of the text configuration, as the Hub's files have them.
        kind: `model_type`; of a multimodal model the keys become its `text_config`.
        prefix: of the text model's tensors.
        extra: further tensors, or None for one that is left out.
    """
    tokens = {"eos_token_id": [1, 5], "bos_token_id": 2, "pad_token_id": 0}
    keys = {"model_type": kind.removesuffix("_text") + "_text", **text, **tokens}
    keys = {key: value for key, value in keys.items() if value is not None}
    stored = {prefix + name.removeprefix("model."): value for name, value in _weights(keys).items()}
    return write_text_model(folder, kind, keys, {**stored, **(extra or {})})


def transformers_config(keys: Mapping[str, Any]) -> Any:
    """The text configuration as the classes of transformers resolve it."""
    from transformers import Gemma4TextConfig, Gemma4UnifiedTextConfig

    unified = keys["model_type"] == "gemma4_unified_text"
    found = {key: value for key, value in keys.items() if key != "model_type"}
    return (Gemma4UnifiedTextConfig if unified else Gemma4TextConfig)(
        **json.loads(json.dumps(found))
    )


def transformers_model(keys: Mapping[str, Any]) -> Any:
    """The model, in float32 with its plain attention and experts."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4UnifiedForCausalLM

    config = transformers_config(keys)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    unified = keys["model_type"] == "gemma4_unified_text"
    torch.manual_seed(0)
    return (Gemma4UnifiedForCausalLM if unified else Gemma4ForCausalLM)(config).eval()


def _weights(keys: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Linears keep the scale of their input; gains and scales are 1 + N(0, 0.1).

    Those of queries and keys hold the scale of the scores, which the attention does not have.
    """
    rng = np.random.default_rng(0)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, value in transformers_model(keys).state_dict().items():
        if name == "lm_head.weight":
            continue
        shape = tuple(value.shape)
        noise = rng.standard_normal(shape).astype(np.float32)
        scale = np.float32(0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        weights[name] = noise * scale + np.float32(len(shape) == 1)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] *= np.float32(shape[0] ** -0.25)
    return weights


def loaded_model(folder: Path) -> Any:
    """What `write_gemma4` wrote, in transformers."""
    from safetensors.torch import load_file

    keys = json.loads((folder / "config.json").read_text())
    keys = keys.get("text_config", keys)
    model = transformers_model(keys)
    stored = load_file(folder / "model.safetensors")
    prefix = next(name for name in stored if name.endswith("embed_tokens.weight"))
    prefix = prefix.removesuffix("embed_tokens.weight")
    named = {"model." + name.removeprefix(prefix): value for name, value in stored.items()}
    needed = set(model.state_dict())
    missing, _ = model.load_state_dict(
        {name: value for name, value in named.items() if name in needed}, strict=False
    )
    assert missing in ([], ["lm_head.weight"])
    return model


def transformers_logits(folder: Path) -> Callable[[NDArray[np.int32]], NDArray[np.float32]]:
    """Logits (batch, length, vocab) of what `write_gemma4` wrote, by transformers."""
    import torch

    model = loaded_model(folder)

    def logits(tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        with torch.no_grad():
            out: NDArray[np.float32] = model(torch.from_numpy(tokens).long()).logits.numpy()
        return out

    return logits


def rounded_models(
    write: Callable[..., Path], root: Path, models: Mapping[str, tuple[str, dict[str, Any]]]
) -> Callable[[str], Bundle]:
    """Bundles in INT4, rounded to nearest, by the name of a model; each is made once.

    Args:
        write: the fixture `tiny_gemma4`.
        models: name -> variant, and keys that differ.
    """
    options, made = QuantizeOptions(recipe="int4", method="rtn"), dict[str, Bundle]()

    def make(name: str) -> Bundle:
        if name not in made:
            variant, text = models[name]
            checkpoint = open_checkpoint(write(variant, text=text))
            made[name] = open_bundle(quantize(checkpoint, root / f"{len(made)}", options))
        return made[name]

    return make
