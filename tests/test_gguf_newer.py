"""GGUF files of gemma3n and gemma4: names and keys of the gguf package, tensors of the folder that
they were written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFWriter
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from safetensors.numpy import load_file

from uq.errors import CheckpointError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.checkpoint.gguf_file import GgufFile
from uq.formats.checkpoint.gguf_metadata import end_tokens
from uq.formats.config import SLIDING, GemmaConfig

Tensors = dict[str, NDArray[np.float32]]
ARCHS = {"gemma3n": gguf.MODEL_ARCH.GEMMA3N, "gemma4": gguf.MODEL_ARCH.GEMMA4}
SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
VARIANTS = [
    ("gemma3n", "plain"),
    ("gemma4", "small"),
    ("gemma4", "large"),
    ("gemma4", "experts"),
    ("gemma4", "all"),
]


def write(folder: Path, arch: str, change: Callable[[GGUFWriter, Tensors], None]) -> Path:
    """A folder's model in a GGUF file; `change` may do so to the tensors, and adds to the keys."""
    config, path = open_checkpoint(folder).config, folder / "model.gguf"
    writer = GGUFWriter(path, arch)
    _common_keys(writer, config)
    (_gemma3n_keys if arch == "gemma3n" else _gemma4_keys)(writer, config)
    _vocabulary(writer, folder, arch)
    tensors = _stored(load_file(folder / "model.safetensors"), arch, config)
    change(writer, tensors)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unchanged(writer: GGUFWriter, tensors: Tensors) -> None:
    pass


def _common_keys(writer: GGUFWriter, config: GemmaConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    widths = [config.layer_intermediate_size(layer) for layer in range(config.num_layers)]
    writer.add_feed_forward_length(widths)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_freq_base_swa(config.rope_local_theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types])
    writer.add_shared_kv_layers(config.kv_shared_layers)
    assert config.final_softcap is not None
    writer.add_final_logit_softcapping(config.final_softcap)
    size = config.per_layer.size if config.per_layer else 0
    writer.add_embedding_length_per_layer_input(size)


def _gemma3n_keys(writer: GGUFWriter, config: GemmaConfig) -> None:
    assert config.altup is not None
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_altup_active_idx(config.altup.active)
    writer.add_altup_num_inputs(config.altup.streams)
    shares = (config.sparsity(layer) for layer in range(config.num_layers))
    quantiles = [NormalDist().inv_cdf(share) if share else -np.inf for share in shares]
    writer.add_activation_sparsity_scale(quantiles)


def _gemma4_keys(writer: GGUFWriter, config: GemmaConfig) -> None:
    assert config.full is not None
    layers = range(config.num_layers)
    writer.add_head_count_kv([config.layer_kv_heads(layer) for layer in layers])
    writer.add_key_length(config.full.head_dim)
    writer.add_key_length_swa(config.head_dim)
    if config.experts:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.active)
        writer.add_expert_feed_forward_length(config.experts.intermediate_size)


def _vocabulary(writer: GGUFWriter, folder: Path, arch: str) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("llama" if arch == "gemma3n" else "gemma4")
    writer.add_token_list(list(model["vocab"]))
    writer.add_token_scores([-float(index) for index in model["vocab"].values()])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(model["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(5)
    writer.add_pad_token_id(0)


def _stored(tensors: Tensors, arch: str, config: GemmaConfig) -> Tensors:
    """Under the names of the gguf package, stacked as the converter of llama.cpp stacks them."""
    names, found = gguf.get_tensor_name_map(ARCHS[arch], config.num_layers), Tensors()
    streams: dict[str, list[NDArray[np.float32]]] = {}
    for name, data in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        scale = next((own for end, own in SCALES.items() if module.endswith(end)), None)
        if scale is not None:
            found[f"blk.{module.split('.')[2]}.{scale}"] = data
        elif "altup_" in module:
            streams.setdefault(module.rpartition(".")[0], []).append(data)
        else:
            found[f"{_name(names, module)}.weight"] = data
    for module, parts in streams.items():
        found[f"{_name(names, module)}.weight"] = np.stack(parts)
    if config.full is not None:
        pairs, half = config.full.rotary_pairs, config.full.head_dim // 2
        found["rope_freqs.weight"] = np.where(np.arange(half) < pairs, 1, 1e30).astype(np.float32)
    return found


def _name(names: Any, module: str) -> str:
    found = names.get_name(module)
    assert isinstance(found, str), module
    return found


@pytest.fixture
def folder(tiny_gemma3n: Callable[..., Path], tiny_gemma4: Callable[..., Path]) -> Any:
    makers = {"gemma3n": tiny_gemma3n, "gemma4": tiny_gemma4}
    return lambda arch, variant, **options: makers[arch](variant, **options)


def whole(checkpoint: Checkpoint) -> Tensors:
    """Every tensor as float32."""
    return {name: checkpoint.whole(name) for name in checkpoint.tensors}


@pytest.mark.parametrize(("arch", "variant"), VARIANTS)
def test_a_gguf_file_is_the_folder_that_it_was_written_from(
    folder: Callable[..., Path], arch: str, variant: str
) -> None:
    source = folder(arch, variant)
    wanted, found = open_checkpoint(source), open_checkpoint(write(source, arch, unchanged))
    config = found.config
    assert config.rms_norm_eps == pytest.approx(wanted.config.rms_norm_eps)
    assert replace(config, rms_norm_eps=wanted.config.rms_norm_eps) == wanted.config
    expected, actual = whole(wanted), whole(found)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_array_equal(actual[name], value, strict=True)


def test_merges_of_a_gemma4_file_are_its_tokenizers(folder: Callable[..., Path]) -> None:
    source = folder("gemma4", "large")
    ours = open_checkpoint(write(source, "gemma4", unchanged)).tokenizer()
    text = "the city of the year, and 世\n\n  more"
    assert ours.encode(text) == open_checkpoint(source).tokenizer().encode(text)


@pytest.mark.parametrize("turn", [b"<end_of_turn>", b"<turn|>"])
def test_the_end_of_a_turn_ends_a_text(turn: bytes) -> None:
    metadata = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.tokens": [b"a", b"<eos>", turn]}
    assert end_tokens(GgufFile(Path("m.gguf"), metadata, {})) == (1, 2)


def without(name: str) -> Callable[[GGUFWriter, Tensors], None]:
    def change(writer: GGUFWriter, tensors: Tensors) -> None:
        del tensors[name]

    return change


def other_factors(writer: GGUFWriter, tensors: Tensors) -> None:
    tensors["rope_freqs.weight"][0] = 2


def split_experts(writer: GGUFWriter, tensors: Tensors) -> None:
    both = tensors.pop("blk.1.ffn_gate_up_exps.weight")
    tensors["blk.1.ffn_gate_exps.weight"], tensors["blk.1.ffn_up_exps.weight"] = np.split(
        both, 2, 1
    )


@pytest.mark.parametrize(
    ("arch", "variant", "change", "message"),
    [
        ("gemma3n", "plain", without("altup_proj.weight"), "altup_projections.0.weight: missing"),
        ("gemma3n", "plain", without("blk.0.laurel_l.weight"), "blk.0.laurel_l.weight is missing"),
        ("gemma4", "small", without("per_layer_token_embd.weight"), "token_embd.weight is missing"),
        ("gemma4", "large", other_factors, "rope_freqs.weight: factors other than 1 in front"),
        ("gemma4", "experts", split_experts, "experts.gate_up_proj.weight: missing"),
    ],
)
def test_what_a_file_lacks_is_one_line(
    folder: Callable[..., Path],
    arch: str,
    variant: str,
    change: Callable[[GGUFWriter, Tensors], None],
    message: str,
) -> None:
    path = write(folder(arch, variant), arch, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
