"""A bundle as a compressed-tensors folder: linears keep their codes, W4A16 or W8A16."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from uq.errors import UsageError
from uq.export.folder import FloatTensors, Shards, shards
from uq.export.packed import Scheme, common_scheme, packed_codes, packed_zeros, repeated_scales
from uq.export.stored import ITEM_BYTES, SAFETENSORS, Losses, StoredTensor, rounded
from uq.formats.bundle import Bundle
from uq.formats.config import GemmaConfig, layer_tensor
from uq.text import size

FUSED = (  # linears that vLLM runs as one: module, its linears
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
Schemes = dict[str, Scheme]


def schemes(bundle: Bundle, *, zero_points: bool) -> Schemes:
    """Canonical name of each linear's weight -> how it is stored."""
    found: Schemes = {}
    for layer in range(bundle.config.num_layers):
        present = bundle.config.linear_shapes(layer)  # some layers have no keys, or no values
        for module, linears in FUSED:
            roles = [f"{module}.{linear}" for linear in linears]
            names = [layer_tensor(layer, role) for role in roles if role in present]
            specs = [bundle.manifest.tensors[name].spec for name in names]
            scheme = common_scheme(specs, zero_points=zero_points)
            found |= dict.fromkeys(names, scheme)
    return found


def compressed_shards(bundle: Bundle, chosen: Schemes, dtype: str, losses: Losses) -> Shards:
    """The tensors of every file; tables, norms and stacks of experts are stored in `dtype`."""
    floats = FloatTensors(bundle, dtype, losses)

    def linear(name: str) -> list[StoredTensor]:
        if name not in chosen:
            return floats.matrix(name)
        return list(_linear(bundle, name, chosen[name], dtype, losses))

    return shards(bundle, floats, linear)


def kept_modules(config: GemmaConfig) -> list[str]:
    """Patterns of compressed-tensors for the linears of transformers that are never quantized."""
    layers = range(config.num_layers)
    inside = {
        role: None for i in layers for role, shape in config.kept_shapes(i).items() if shape[1:]
    }
    outside = [name.removesuffix(".weight") for name in config.model_kept()]
    return [rf"re:.*{re.escape(name)}$" for name in (*inside, *outside)]


def quantization_config(chosen: Schemes, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The key of config.json that transformers and vLLM read.

    Args:
        ignored: patterns of further linears that stay as they are.
    """
    members: dict[Scheme, list[str]] = {}
    for name, scheme in chosen.items():
        members.setdefault(scheme, []).append(_pattern(name))
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(members) == 1 else list(dict.fromkeys(patterns)),
            "weights": scheme.to_json(),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for index, (scheme, patterns) in enumerate(members.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *ignored],
        "kv_cache_scheme": None,
    }


def widening(bundle: Bundle, chosen: Schemes, dtype: str) -> str:
    """What to tell the user of what takes more bits than in the bundle."""
    records = bundle.manifest.tensors
    floats = [name for name in records if name not in chosen]
    nbytes = ITEM_BYTES[dtype] * sum(prod(records[name].shape) for name in floats)
    told = f"{len(floats)} tables and stacks of experts are {dtype}, {size(nbytes)}"
    wider = [name for name, scheme in chosen.items() if scheme.bits > records[name].spec.bits]
    if not wider:
        return told
    return (
        f"{told}; {len(wider)} of {len(chosen)} linears take 8 bits: they, or others that vLLM "
        "runs as one with them, have zero points, 5 or 6 bits; what uq quantize --group 128 makes "
        "keeps 4 bits"
    )


def require_scales(bundle: Bundle, chosen: Schemes, dtype: str) -> None:
    """Refuse scales that `dtype` would round; float16 and float32 hold all.

    Raises:
        UsageError: names the tensors and what would be lost.
    """
    if dtype != "bfloat16":
        return
    lost, losses = [], Losses()
    for name in chosen:
        scales = bundle.quant(name).scales.astype(np.float32)
        rounded(name, scales, dtype, losses)
        lost = list(losses.tensors)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UsageError(
            f"{lost[0]}{more}: bfloat16 cannot hold the scales; rounding them would change the "
            f"weights by {losses.relative_error:.2%} (root mean square); use --dtype float16 or "
            "float32, or --allow-rounding"
        )


def _linear(
    bundle: Bundle, name: str, scheme: Scheme, dtype: str, losses: Losses
) -> Iterator[StoredTensor]:
    rows, cols = bundle.manifest.tensors[name].shape
    groups = cols // scheme.group
    kind = "float16" if dtype == "float32" else dtype  # the scales are float16 already

    def scales() -> Iterator[Any]:
        tensor = bundle.quant(name)
        values = repeated_scales(tensor, scheme)
        yield (
            values if kind == "float16" else rounded(name, values.astype(np.float32), kind, losses)
        )

    def stored(part: str, kind: str, shape: tuple[int, ...], chunks: Any) -> StoredTensor:
        item = {"I32": 4, "I64": 8}.get(kind, 2)
        nbytes = item * int(np.prod(shape))
        return StoredTensor(f"{name}_{part}", kind, shape, nbytes, chunks)

    words = (rows, cols * scheme.bits // 32)
    yield stored("shape", "I64", (2,), lambda: iter([np.array([rows, cols], "<i8")]))
    yield stored("packed", "I32", words, lambda: iter([packed_codes(bundle.quant(name), scheme)]))
    if not scheme.symmetric:
        yield stored(
            "zero_point",
            "I32",
            (-(-rows // 8), groups),
            lambda: iter([packed_zeros(bundle.quant(name), scheme)]),
        )
    yield stored("scale", SAFETENSORS[kind], (rows, groups), scales)


def _pattern(name: str) -> str:
    """Matches a linear, and those fused with it, in a text model and within a multimodal one.

    vLLM looks for q, k and v even where a layer has no v.
    """
    *place, linear, _ = name.removeprefix("model.").split(".")
    fused = next(linears for module, linears in FUSED if module == place[-1] and linear in linears)
    prefixes = r"(model|model\.language_model|language_model\.model)"
    return r"\.".join([f"re:^{prefixes}", *place, f"({'|'.join(fused)})$"])
