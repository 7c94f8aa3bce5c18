"""GGUF files, written and read back by the gguf package; broken ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from uq.errors import CheckpointError
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.gguf_file import read_gguf

ARCHS = {
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}
HIDDEN, FFN, HEAD_DIM, HEADS, KV_HEADS, VOCAB = 256, 512, 64, 4, 2, 96
METADATA = {
    "context_length": 1024,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "block_count": 2,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def shapes(arch: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of a small model."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    if arch != "gemma":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer: dict[str, tuple[int, ...]] = {norm: (HIDDEN,) for norm in norms} | {
        "self_attn.q_proj": (q_size, HIDDEN),
        "self_attn.k_proj": (kv_size, HIDDEN),
        "self_attn.v_proj": (kv_size, HIDDEN),
        "self_attn.o_proj": (HIDDEN, q_size),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    if arch == "gemma3":
        layer |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
    named = {f"model.layers.{i}.{role}": s for i in range(layers) for role, s in layer.items()}
    return named | {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}


def write_gguf(
    path: Path,
    arch: str = "gemma3",
    dtype: str = "F16",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, NDArray[np.float32]] | None = None,
) -> Path:
    """A small random model under the names that the gguf package gives; norms stay float32."""
    writer = GGUFWriter(path, arch)
    values = METADATA | (metadata or {})
    for key, value in values.items():
        add_value(writer, key if key.startswith("!") else f"{arch}.{key}", value)
    layers = int(values["block_count"])
    names = gguf.get_tensor_name_map(ARCHS.get(arch, gguf.MODEL_ARCH.GEMMA3), layers)
    rng = np.random.default_rng(0)
    kind = GGMLQuantizationType[dtype]
    for name, shape in shapes(arch, layers).items():
        data = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            data = gguf.quants.quantize(data, kind)
        stored = names.get_name(name)
        assert stored is not None
        writer.add_tensor(f"{stored}.weight", data, raw_dtype=kind if len(shape) == 2 else None)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    key = key.removeprefix("!")
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def oracle(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor as float32, read by the gguf package."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(path).tensors
    }


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_1"])
@pytest.mark.parametrize("arch", list(ARCHS))
def test_layer_reads_every_role_dequantized(tmp_path: Path, arch: str, dtype: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", arch, dtype)
    checkpoint, stored = open_checkpoint(path), oracle(path)
    names = gguf.get_tensor_name_map(ARCHS[arch], 2)
    for role, weight in checkpoint.layer(1).items():
        name = f"{names.get_name(f'model.layers.1.{role}')}.weight"
        assert_array_equal(weight, stored[name], strict=True)
    assert checkpoint.dtype == dtype.lower()


def test_norms_are_gains_already(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    assert_array_equal(open_checkpoint(path).final_norm(), oracle(path)["output_norm.weight"])


def test_row_blocks_of_a_quantized_embedding(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", dtype="Q8_0")
    assert_array_equal(
        open_checkpoint(path).embedding(40, 56), oracle(path)["token_embd.weight"][40:56]
    )


def test_output_tensor_makes_the_head_untied(tmp_path: Path) -> None:
    head = np.random.default_rng(1).standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    path = write_gguf(tmp_path / "model.gguf", extra={"output.weight": head})
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.tied_head
    assert_array_equal(checkpoint.head(0, VOCAB), head)


# The values that llama.cpp gives to keys that a file lacks.


def test_gemma3_defaults(tmp_path: Path) -> None:
    keys = {"attention.sliding_window": 32, "block_count": 6, "rope.freq_base": 1e6}
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=keys)).config
    assert config.layer_types == ("sliding_attention",) * 5 + ("full_attention",)
    assert (config.rope_theta, config.rope_local_theta, config.rope_scaling) == (1e6, 1e4, 1.0)
    assert config.query_pre_attn_scalar == HEAD_DIM
    assert (config.attn_softcap, config.final_softcap, config.vocab_size) == (None, None, VOCAB)
    assert (config.qk_norm, config.post_norms, config.eos_token_ids) == (True, True, (1,))


def test_gemma3_without_a_window_has_full_layers_only(tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf")).config
    assert config.layer_types == ("full_attention",) * 2


def test_gemma3_27b_scales_scores_by_hidden_per_head(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", metadata={"block_count": 62, "attention.head_count": 4})
    assert open_checkpoint(path).config.query_pre_attn_scalar == HIDDEN / HEADS


def test_gemma2_defaults(tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", "gemma2")).config
    assert config.layer_types == ("sliding_attention", "full_attention")
    assert (config.sliding_window, config.attn_softcap, config.final_softcap) == (4096, 50, 30)
    assert (config.rope_theta, config.rope_local_theta, config.qk_norm) == (1e4, 1e4, False)


def test_gemma_defaults(tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", "gemma")).config
    assert config.layer_types == ("full_attention",) * 2
    assert (config.post_norms, config.final_softcap, config.rope_theta) == (False, None, 1e4)


def test_linear_scaling_and_window_pattern_are_read(tmp_path: Path) -> None:
    keys = {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "rope.freq_base_swa": 2e4,
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": [False, True],
    }
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=keys)).config
    assert config.layer_types == ("full_attention", "sliding_attention")
    assert (config.rope_scaling, config.rope_local_theta) == (8.0, 2e4)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "architecture 'llama' is not supported; supported are: gemma, gemma2, gemma3"),
    ("gemma5", {}, "architecture 'gemma5' is not supported; the nearest is gemma"),
    ("gemma3", {"rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
    ("gemma2", {"rope.scaling.factor": 4.0}, "RoPE scaling 'linear' by 4 is not supported"),
    ("gemma3", {"attention.head_count_kv": 3}, "4 attention heads do not divide by 3"),
    ("gemma3", {"attention.head_count": "4"}, "attention.head_count is '4'; expected a number"),
    ("gemma3", {"attention.causal": False}, "attention.causal is False; expected true"),
    ("gemma3", {"feed_forward_length": [512, 256]}, "feed_forward_length is array"),
    ("gemma3", {"feed_forward_length": 1024}, "shape (512, 256), expected (1024, 256)"),
    ("gemma3", {"!split.count": 2}, "llama-gguf-split --merge"),
    (
        "gemma3",
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]},
        "1 entries for 2 layers",
    ),
]


@pytest.mark.parametrize(("arch", "keys", "message"), REFUSED)
def test_unsupported_models_are_refused(
    tmp_path: Path, arch: str, keys: dict[str, Any], message: str
) -> None:
    assert message in refusal(write_gguf(tmp_path / "m.gguf", arch, metadata=keys))


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    message = "model.layers.1.mlp.up_proj.weight: missing; expected shape (512, 256)"
    assert refusal(path) == message


def test_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", dtype="Q8_0")
    info = open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"]
    with path.open("r+b") as file:
        file.seek(info.offset)
        file.write(np.float16(np.nan).tobytes())
    with pytest.raises(CheckpointError, match=r"m\.gguf: blk\.0\.ffn_up\.weight\[0, 0\]: nan; 32"):
        open_checkpoint(path).layer(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGML" + data[4:], "starts with b'GGML', not b'GGUF'"),
        (lambda data: data[:4] + b"\x09" + data[5:], "GGUF version 9 is not supported"),
        (lambda data: data[:10], "10 bytes: not a GGUF file"),
        (lambda data: data[:200], "broken or cut short within the header"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "broken or cut short"),
        (lambda data: data[:-1], "the file is cut short; copy or download it again"),
        (lambda data: data.replace(b"block_count\x04", b"block_count\x63"), "value type 99"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(change(path.read_bytes()))
    assert message in refusal(path)


VOCABULARY = {
    "!tokenizer.ggml.model": "llama",
    "!tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "<0x41>", "a", "b", "ab", "▁"],
    "!tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0],
    "!tokenizer.ggml.token_type": [3, 3, 3, 2, 6, 1, 1, 1, 1],
    "!tokenizer.chat_template": "{{ messages }}",
}


def test_tokenizer_is_rebuilt_from_the_vocabulary(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=VOCABULARY))
    assert checkpoint.tokenizer().encode("a abA<eos>") == [2, 5, 8, 7, 4, 1]
    assert checkpoint.assets()["chat_template.jinja"] == b"{{ messages }}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "gpt2", "tokenizer 'gpt2' is not supported; Gemma's is 'llama'"),
        ("scores", None, "metadata tokenizer.ggml.scores is missing"),
        ("scores", [0.0], "9 tokens, 1 scores and 9 token types"),
        ("unknown_token_id", 9, "unknown_token_id is 9, but there are 9 tokens"),
    ],
)
def test_broken_vocabulary_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    keys = VOCABULARY | {f"!tokenizer.ggml.{key}": value}
    keys = {name: item for name, item in keys.items() if item is not None}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=keys)).assets()


@pytest.mark.parametrize("dtype", ["F16", "Q4_0"])
def test_header_agrees_with_the_gguf_package(tmp_path: Path, dtype: str) -> None:
    keys = VOCABULARY | {"!flag": True, "!text": "ünïcode", "!flags": [True, False], "!alone": -1.5}
    path = write_gguf(tmp_path / "m.gguf", dtype=dtype, metadata=keys)
    ours, theirs = read_gguf(path), GGUFReader(path)
    assert len(ours.metadata) == len(keys) + len(METADATA) + 1
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        if isinstance(value, list):
            value = [item.decode() for item in value]
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        assert value == expected, key
    assert {
        tensor.name: (
            tuple(int(size) for size in reversed(tensor.shape)),
            tensor.tensor_type.name.lower(),
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        for tensor in theirs.tensors
    } == {t.name: (t.shape, t.dtype, t.offset, t.nbytes) for t in ours.tensors.values()}


@pytest.mark.real
def test_real_model_is_gemma_3_270m(real_gguf: Path) -> None:
    checkpoint = open_checkpoint(real_gguf)
    config = checkpoint.config
    assert (config.family, config.num_layers, config.hidden_size) == ("gemma3", 18, 640)
    assert (config.sliding_window, config.eos_token_ids) == (512, (1, 106))
    assert config.num_parameters() == 268_098_176
    assert (checkpoint.dtype, checkpoint.source.kind) == ("q4_k_m", "gguf")
