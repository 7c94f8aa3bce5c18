"""A GGUF file of a Gemma 3 or 4 shape with random weights: Q4_0 linears, Q8_0 embeddings.

What llama.cpp needs to be timed on sizes whose weights are not at hand: speed depends on shapes and
types, not on values. Types are those that `llama-quantize` gives each tensor in a Q4_0 file, but
embeddings, which are Q8_0 as in a bundle. The vocabulary is made up: prompts are token ids.

    python -m benchmarks.random_gguf e2b model.gguf [--layers N]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from numpy.typing import NDArray

from benchmarks.shapes import text_config
from uq.export.gguf_model import add_model, architecture
from uq.formats.checkpoint.checkpoint import expected_shapes
from uq.formats.checkpoint.gguf_config import gguf_names
from uq.formats.config import PER_LAYER_PROJECTION, GemmaConfig, layer_tensor

BLOCK_BYTES = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q8_0: 34}  # 32 weights
FLOATS = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
ALIGNMENT = 32
PATTERN = 64  # rows that repeat
CHUNK = 1 << 26  # bytes that a thread writes at a time


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `shape` has the rows' length last."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        if self.kind in FLOATS:
            return np.dtype(FLOATS[self.kind]).itemsize * self.shape[-1]
        return self.shape[-1] // 32 * BLOCK_BYTES[self.kind]

    @property
    def nbytes(self) -> int:
        return self.row_bytes * prod(self.shape[:-1])


def write_random_gguf(config: GemmaConfig, path: Path) -> None:
    """Write `config`'s model to `path`; gains and the like are all ones."""
    found, factors = list(tensors(config)), rope_factors(config)
    writer = GGUFWriter(path, architecture(config))
    add_model(writer, config)
    add_vocabulary(writer, config)
    for tensor in found:
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.nbytes, tensor.kind)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    _write_data(path, found, factors)


def tensors(config: GemmaConfig) -> Iterator[Tensor]:
    """All but the factors of RoPE."""
    shapes = expected_shapes(config)
    quantized = {
        layer_tensor(layer, role)
        for layer in range(config.num_layers)
        for role in (*config.linear_shapes(layer), "per_layer_input_gate", "per_layer_projection")
    }
    for name, stored in gguf_names(config).items():
        kind = GGMLQuantizationType.F32
        if name in config.table_shapes():
            kind = GGMLQuantizationType.Q8_0
        elif name in quantized:
            kind = GGMLQuantizationType.Q4_0
        elif name.startswith(PER_LAYER_PROJECTION):
            kind = GGMLQuantizationType.F16
        yield Tensor(stored, shapes[name], kind)


def bytes_met(config: GemmaConfig) -> int:
    """Bytes of weights that a token meets: of experts those that it chooses, and no tables of which
    it reads a row."""
    experts = config.experts
    total = 0
    for tensor in tensors(config):
        if tensor.name == "per_layer_token_embd.weight":
            total += tensor.row_bytes
        elif experts and "_exps" in tensor.name:
            total += tensor.nbytes * experts.active // experts.count
        elif config.tied_head or tensor.name != "token_embd.weight":
            total += tensor.nbytes
    return total


def rope_factors(config: GemmaConfig) -> NDArray[np.float32] | None:
    """What the full layers of gemma4 divide angles by: pairs that do not turn by very much."""
    if config.full is None:
        return None
    pairs = np.arange(config.full.head_dim // 2)
    return np.where(pairs < config.full.rotary_pairs, 1, 1e30).astype(np.float32)


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


def _write_data(path: Path, found: list[Tensor], factors: NDArray[np.float32] | None) -> None:
    """Behind the header, pieces of tensors on all cores."""
    place, pieces = _aligned(path.stat().st_size), list[tuple[int, int, NDArray[np.uint8]]]()
    for tensor in found:
        pattern = _pattern(tensor)
        step = max(1, CHUNK // pattern.nbytes) * pattern.nbytes
        for start in range(0, tensor.nbytes, step):
            pieces.append((place + start, min(step, tensor.nbytes - start), pattern))
        place += _aligned(tensor.nbytes)
    if factors is not None:
        pieces.append((place, factors.nbytes, factors.view(np.uint8)))
        place += _aligned(factors.nbytes)
    with path.open("r+b") as file, ThreadPoolExecutor() as pool:
        file.truncate(place)

        def write(piece: tuple[int, int, NDArray[np.uint8]]) -> None:
            start, size, pattern = piece
            data = np.resize(pattern, size).data
            while data:
                done = os.pwrite(file.fileno(), data, start)
                data, start = data[done:], start + done

        list(pool.map(write, pieces))


def _pattern(tensor: Tensor) -> NDArray[np.uint8]:
    """Bytes that repeat."""
    cols = tensor.shape[-1]
    if tensor.kind in FLOATS:
        values = np.ones(cols)
        if len(tensor.shape) > 1:
            values = np.random.default_rng(cols).standard_normal((PATTERN, cols)) * cols**-0.5
        return values.astype(FLOATS[tensor.kind]).reshape(-1).view(np.uint8)
    width = BLOCK_BYTES[tensor.kind]
    rng = np.random.default_rng(prod(tensor.shape[:-1]) + cols)
    blocks = rng.integers(0, 256, (PATTERN, cols // 32, width), np.uint8)
    unit = cols**-0.5 / (8 if tensor.kind == GGMLQuantizationType.Q4_0 else 128)
    blocks[..., :2] = np.frombuffer(np.float16(unit).tobytes(), np.uint8)
    return blocks.reshape(-1)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape")
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    write_random_gguf(text_config(args.shape, args.layers), args.path)


if __name__ == "__main__":
    main()
