"""Small random Gemma checkpoints as Hugging Face folders, and their tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
MODEL_TYPES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "vaultgemma": "vaultgemma",
}
CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
}
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
WORDS = """the of and to in is was for that with as on by from at his her which were are had this
not have their one first also two new after into time city world during than other been year"""


@dataclass(frozen=True)
class Tiny:
    """What `tiny_checkpoint` writes; every field is a keyword of the fixture.

    Attributes:
        window, pattern: sliding window in keys; every `pattern`-th layer is full (gemma3 only;
            gemma2 always alternates, gemma has full layers only).
        prefix: `model.`, or `language_model.model.` / `model.language_model.` for a multimodal
            gemma3 with a few vision tensors.
        shards: number of safetensors files; more than one writes an index.
        spread: standard deviation of the logits, about.
        config: keys that replace or extend those of config.json (of its text part).
        extra: further tensors, written as they are under these names.
    """

    family: str = "gemma3"
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 256
    vocab: int = 512
    window: int = 16
    pattern: int = 2
    dtype: str = "bf16"
    shards: int = 1
    tied: bool = True
    prefix: str = "model."
    seed: int = 0
    spread: float = 2.0
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def multimodal(self) -> bool:
        return self.prefix != "model."


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2))


def write_text_model(
    folder: Path,
    kind: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, NDArray[np.float32] | None],
) -> Path:
    """A Hugging Face folder.

    Args:
        kind: `model_type`; of a multimodal model the keys become its `text_config`.
        keys: of the text model.
        tensors: as the file has them; None leaves one out.
    """
    folder.mkdir(parents=True)
    nested = {"model_type": kind, "text_config": keys}
    write_json(folder / "config.json", keys if kind.endswith("_text") else nested)
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    tokenizer_of(int(keys["vocab_size"])).save(str(folder / "tokenizer.json"))
    present = {name: value for name, value in tensors.items() if value is not None}
    save_file(present, folder / "model.safetensors")
    return folder


def config_of(tiny: Tiny) -> dict[str, Any]:
    """config.json as the Hub has them: keys equal to the class defaults are left out."""
    text: dict[str, Any] = {
        "hidden_size": tiny.hidden,
        "intermediate_size": tiny.ffn,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_dim,
        "vocab_size": tiny.vocab,
        "model_type": MODEL_TYPES[tiny.family],
    }
    if tiny.family != "gemma":
        text |= {"sliding_window": tiny.window, "query_pre_attn_scalar": tiny.head_dim}
    if tiny.family == "gemma3":
        text |= {"sliding_window_pattern": tiny.pattern}
    if not tiny.tied:
        text["tie_word_embeddings"] = False
    text |= tiny.config
    dtype = {"torch_dtype": DTYPES[tiny.dtype]}
    if not tiny.multimodal:
        return {"architectures": [CLASSES[tiny.family]]} | text | dtype
    outer: dict[str, Any] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 5],
        "text_config": text,
        "vision_config": {"hidden_size": 8, "num_hidden_layers": 1},
    }
    return outer | dtype | ({} if tiny.tied else {"tie_word_embeddings": False})


def weights_of(tiny: Tiny) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names as in the file. Linears keep the scale of their input, norm gains are 1 + N(0, 0.1)."""
    rng = np.random.default_rng(tiny.seed)

    def normal(*shape: int, std: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    def linear(rows: int, cols: int) -> NDArray[np.float32]:
        return normal(rows, cols, std=cols**-0.5)

    hidden, ffn, dim = tiny.hidden, tiny.ffn, tiny.head_dim
    q_size, kv_size = tiny.heads * dim, tiny.kv_heads * dim
    block = ["input_layernorm", "post_attention_layernorm"]
    outputs = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    norms = {
        "gemma": block,
        "vaultgemma": ["input_layernorm", "pre_feedforward_layernorm"],
    }.get(tiny.family, block + outputs)

    table = tiny.spread * hidden**-0.5
    yield f"{tiny.prefix}embed_tokens.weight", normal(tiny.vocab, hidden, std=table)
    for layer in range(tiny.layers):
        name = f"{tiny.prefix}layers.{layer}."
        for norm in norms:
            yield f"{name}{norm}.weight", normal(hidden, std=0.1)
        if tiny.family == "gemma3":
            yield f"{name}self_attn.q_norm.weight", normal(dim, std=0.1)
            yield f"{name}self_attn.k_norm.weight", normal(dim, std=0.1)
        yield f"{name}self_attn.q_proj.weight", linear(q_size, hidden)
        yield f"{name}self_attn.k_proj.weight", linear(kv_size, hidden)
        yield f"{name}self_attn.v_proj.weight", linear(kv_size, hidden)
        yield f"{name}self_attn.o_proj.weight", linear(hidden, q_size)
        yield f"{name}mlp.gate_proj.weight", linear(ffn, hidden)
        yield f"{name}mlp.up_proj.weight", linear(ffn, hidden)
        yield f"{name}mlp.down_proj.weight", linear(hidden, ffn)
    yield f"{tiny.prefix}norm.weight", normal(hidden, std=0.1)
    if not tiny.tied:
        head = "language_model.lm_head" if tiny.prefix.startswith("language_model.") else "lm_head"
        yield f"{head}.weight", normal(tiny.vocab, hidden, std=table)
    if tiny.multimodal:
        vision = "model." if tiny.prefix == "model.language_model." else ""
        yield f"{vision}vision_tower.vision_model.post_layernorm.weight", normal(8, std=0.1)
        yield f"{vision}vision_tower.vision_model.embeddings.weight", normal(4, 8, std=0.1)
        yield f"{vision}multi_modal_projector.mm_input_projection_weight", normal(8, 4, std=0.1)
    yield from tiny.extra.items()


def write_weights(folder: Path, weights: dict[str, NDArray[np.float32]], tiny: Tiny) -> None:
    names = list(weights)
    if tiny.shards == 1:
        write_shard(folder / "model.safetensors", weights, tiny.dtype)
        return
    where: dict[str, str] = {}
    for number in range(tiny.shards):
        file = f"model-{number + 1:05}-of-{tiny.shards:05}.safetensors"
        mine = names[number :: tiny.shards]
        write_shard(folder / file, {name: weights[name] for name in mine}, tiny.dtype)
        where |= dict.fromkeys(mine, file)
    total = sum(weights[name].size for name in names) * (4 if tiny.dtype == "f32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)


def write_shard(path: Path, weights: Mapping[str, NDArray[np.float32]], dtype: str) -> None:
    """One safetensors file: header size (uint64), JSON header, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, values in weights.items():
        data = encode(values, dtype)
        offsets = [len(body), len(body) + len(data)]
        header[name] = {
            "dtype": dtype.upper(),
            "shape": list(values.shape),
            "data_offsets": offsets,
        }
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """Bytes of a float array in the file's dtype; bf16 rounds to nearest, ties to even."""
    if dtype == "f32":
        return values.tobytes()
    if dtype == "f16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).tobytes()


def tokenizer_of(size: int) -> Tokenizer:
    """A byte-fallback BPE of Gemma's kind with exactly `size` tokens."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\n", "\t", "▁", *(chr(code) for code in range(33, 127)), "é", "世"]
    merges: list[tuple[str, str]] = []
    room = size - len(pieces)
    if room < 0:
        raise ValueError(f"a tiny vocabulary needs at least {len(pieces)} tokens")
    for left, right in word_merges():
        if len(merges) == room:
            break
        merges.append((left, right))
    pieces += [left + right for left, right in merges]
    pieces += [f"<unused{number}>" for number in range(size - len(pieces))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in SPECIALS]
    )
    return tokenizer


def word_merges() -> Iterator[tuple[str, str]]:
    """Left-to-right merges that build each word behind a space, without duplicates."""
    seen: set[str] = set()
    for word in WORDS.split():
        left = "▁"
        for letter in word:
            if left + letter not in seen:
                seen.add(left + letter)
                yield left, letter
            left += letter


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "chat_template": CHAT_TEMPLATE,
    }
