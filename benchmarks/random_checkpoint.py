"""A Hugging Face folder of a true Gemma 3 shape with random weights of Gemma's kind.

    python -m benchmarks.random_checkpoint 27b FOLDER [--layers 2] [--vocabulary 32768] [--seed 0]

What quantizing costs depends on shapes, on the spread of the scales of channels and on outliers,
not on what the model knows. Weights are bfloat16 in files of at most 5 GB with an index, and are
made, rounded and written in pieces: memory does not grow with the model.

What is imitated, roughly as Gemma 3 has it: heavy tails (Student's t), scales of rows and columns
that spread by a third, a few channels of the residual stream that all layers write to far more
strongly than to the others, and norm gains that are large in just these channels.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from benchmarks.shapes import SHAPES, VOCABULARY, shape_config
from uq.formats.checkpoint.checkpoint import expected_shapes
from uq.formats.config import EMBEDDING, GemmaConfig

Array = NDArray[np.float32]
SHARD_BYTES = 5_000_000_000  # as `save_pretrained` cuts them
PIECE = 1 << 24  # weights that are made at once
POOL = (1 << 20) - 3  # values that the rows of all tensors are cut from, at places of their own
TAILS = 5  # degrees of freedom of Student's t
SPREAD = 0.3  # of the logarithm of the scales of rows and of columns
OUTLIERS = 6  # channels of the residual stream
OUTLIER_SCALE = 12.0
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_random_checkpoint(config: GemmaConfig, folder: Path, seed: int = 0) -> None:
    """Write `config`'s model; the same seed gives the same bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    weights = RandomWeights(config, seed)
    shards = cut_shards(expected_shapes(config))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            write_shard(file, shard, weights)
    if len(shards) > 1:
        placed = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        size = sum(2 * math.prod(shape) for shard in shards for shape in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, in as few files of `SHARD_BYTES` as that order allows."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= nbytes
    return shards


def write_shard(
    file: IO[bytes], shapes: dict[str, tuple[int, ...]], weights: RandomWeights
) -> None:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        for piece in weights.pieces(name, shape):
            file.write(piece.data)


class RandomWeights:
    """Stored values of a model's tensors; each depends on the seed and its tensor's name only."""

    def __init__(self, config: GemmaConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        rng = np.random.default_rng(seed)
        pool = rng.standard_t(TAILS, POOL) / math.sqrt(TAILS / (TAILS - 2))  # variance 1
        self._pool = pool.astype(np.float32)
        self._stream = np.ones(config.hidden_size, np.float32)  # scale of each channel
        outliers = rng.choice(config.hidden_size, OUTLIERS, replace=False)
        self._stream[outliers] = OUTLIER_SCALE * rng.uniform(0.5, 1.5, OUTLIERS)

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint16]]:
        """Bits of the bfloat16 values, some rows at a time."""
        rng = np.random.default_rng([self._seed, *name.encode()])
        if len(shape) == 1:
            yield to_bf16(self._norm(name, shape[0], rng))
            return
        rows, cols = shape
        row_scales, col_scales = spread(rows, rng), spread(cols, rng)
        if name == EMBEDDING:
            col_scales *= self._stream / np.float32(math.sqrt(cols))
        else:
            row_scales /= np.float32(math.sqrt(cols))
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # they write to the stream
            row_scales *= self._stream
        places = rng.integers(0, POOL, rows)
        step = max(1, PIECE // cols)
        for start in range(0, rows, step):
            here = slice(start, start + step)
            yield cut_rows(self._pool, places[here], row_scales[here], col_scales)

    def _norm(self, name: str, size: int, rng: np.random.Generator) -> Array:
        """What is stored is the gain less 1."""
        gains = spread(size, rng)
        if size == self._config.hidden_size:
            gains *= np.sqrt(self._stream)
        if "post_" in name:
            gains *= np.float32(0.5)
        return gains - np.float32(1)


def spread(size: int, rng: np.random.Generator) -> Array:
    """Scales around 1."""
    return np.exp(SPREAD * rng.standard_normal(size)).astype(np.float32)


def to_bf16(values: Array) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def cut_rows(
    pool: Array, places: NDArray[np.int64], rows: Array, cols: Array
) -> NDArray[np.uint16]:
    """(rows, cols) bits of bfloat16: values of the pool from each place on, times both scales."""
    values = np.empty((len(rows), len(cols)), np.float32)
    _cut(pool, places, rows, cols, values, bits := np.empty(values.shape, np.uint16))
    return bits


@njit(parallel=True, cache=True)
def _cut(
    pool: Array,
    places: NDArray[np.int64],
    rows: Array,
    cols: Array,
    values: Array,
    out: NDArray[np.uint16],
) -> None:
    for row in prange(len(rows)):
        for col in range(len(cols)):
            values[row, col] = pool[(places[row] + col) % len(pool)] * rows[row] * cols[col]
        bits = values[row].view(np.uint32)
        for col in range(len(cols)):
            word = bits[col]
            out[row, col] = (word + np.uint32(0x7FFF) + ((word >> 16) & np.uint32(1))) >> 16


def hf_config(config: GemmaConfig) -> dict[str, Any]:
    """config.json of a Gemma 3 text model."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }


def tiny_tokenizer() -> Tokenizer:
    """A byte-fallback BPE of Gemma's kind: special tokens, bytes, ASCII, pairs of letters."""
    merges = [(left, right) for left in LETTERS for right in LETTERS]
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)] + [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in SPECIALS]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = shape_config(args.shape, args.layers, args.vocabulary)
    write_random_checkpoint(config, args.folder, args.seed)


if __name__ == "__main__":
    main()
