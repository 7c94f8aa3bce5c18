"""Folders of safetensors against the safetensors library; broken ones are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from uq.errors import CheckpointError, UsageError
from uq.formats.checkpoint import open_checkpoint

Tiny = Callable[..., Path]
MULTIMODAL = ("language_model.model.", "model.language_model.")


def oracle(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of a folder as float32, read by the safetensors library."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= {name: t.to(torch.float32).numpy() for name, t in load_file(path).items()}
    return tensors


def single_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON header of a safetensors file and leave the data as it is."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_layer_reads_linears_and_gains(tiny_checkpoint: Tiny, family: str, dtype: str) -> None:
    folder = tiny_checkpoint(family=family, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    config, stored = checkpoint.config, oracle(folder)
    layer = checkpoint.layer(1)
    assert set(layer) == set(config.linear_shapes(0)) | set(config.norm_shapes(0))
    for role in config.linear_shapes(0):
        assert_array_equal(layer[role], stored[f"model.layers.1.{role}.weight"], strict=True)
    for role in config.norm_shapes(0):
        gain = 1 + stored[f"model.layers.1.{role}.weight"]
        assert_array_equal(layer[role], gain, strict=True)
    assert checkpoint.dtype == dtype


def test_embedding_rows_are_read_unscaled(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    rows = open_checkpoint(folder).embedding(100, 164)
    assert_array_equal(rows, oracle(folder)["model.embed_tokens.weight"][100:164], strict=True)


def test_empty_range_of_rows_is_empty(tiny_checkpoint: Tiny) -> None:
    assert open_checkpoint(tiny_checkpoint()).embedding(5, 5).shape == (0, 128)


def test_final_norm_is_a_gain(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    assert_array_equal(
        open_checkpoint(folder).final_norm(), 1 + oracle(folder)["model.norm.weight"]
    )


def test_shards_read_like_one_file(tiny_checkpoint: Tiny) -> None:
    one, three = open_checkpoint(tiny_checkpoint()), open_checkpoint(tiny_checkpoint(shards=3))
    assert len(three.files()) == 3
    assert_array_equal(one.embedding(0, 512), three.embedding(0, 512))
    for role, weight in one.layer(0).items():
        assert_array_equal(weight, three.layer(0)[role])


@pytest.mark.parametrize("prefix", MULTIMODAL)
@pytest.mark.parametrize("tied", [True, False])
def test_multimodal_text_part_is_read(tiny_checkpoint: Tiny, prefix: str, tied: bool) -> None:
    folder = tiny_checkpoint(prefix=prefix, tied=tied)
    stored, checkpoint = oracle(folder), open_checkpoint(folder)
    assert_array_equal(
        checkpoint.layer(0)["mlp.down_proj"], stored[f"{prefix}layers.0.mlp.down_proj.weight"]
    )
    head = next((w for name, w in stored.items() if name.endswith("lm_head.weight")), None)
    expected = stored[f"{prefix}embed_tokens.weight"] if head is None else head
    assert_array_equal(checkpoint.head(0, 512), expected)


@pytest.mark.parametrize("prefix", MULTIMODAL)
def test_towers_are_told_from_the_text_model(tiny_checkpoint: Tiny, prefix: str) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(prefix=prefix))
    assert len(checkpoint.towers) == 3
    assert checkpoint.left_out == ()


def test_untied_head_is_read(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(tied=False)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.config.tied_head
    assert_array_equal(checkpoint.head(7, 9), oracle(folder)["lm_head.weight"][7:9])


def test_unknown_tensors_are_named(tiny_checkpoint: Tiny) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint = open_checkpoint(tiny_checkpoint(extra={name: np.ones(16, np.float32)}))
    assert checkpoint.left_out == (
        f"tensors that the model does not use: 1, 32 bytes, e.g. {name}",
    )
    assert not any("inv_freq" in name for name in checkpoint.tensors)


def test_copy_of_a_tied_head_is_the_embedding(tiny_checkpoint: Tiny) -> None:
    embedding = oracle(tiny_checkpoint())["model.embed_tokens.weight"]
    folder = tiny_checkpoint(extra={"lm_head.weight": embedding.astype(np.float32)})
    checkpoint = open_checkpoint(folder)
    assert_array_equal(checkpoint.head(0, 512), embedding)
    assert checkpoint.left_out == ()


def test_tied_head_alone_is_the_embedding(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    weights = load_file(single_file(folder))
    embedding = weights.pop("model.embed_tokens.weight")
    save_file(weights | {"lm_head.weight": embedding}, single_file(folder))
    found = open_checkpoint(folder).embedding(0, 512)
    assert_array_equal(found, embedding.to(torch.float32).numpy())


@pytest.mark.parametrize("prefix", ["model.", *MULTIMODAL])
@pytest.mark.parametrize("shape", [(512, 128), (500, 128), (512,)])
def test_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(
    tiny_checkpoint: Tiny, prefix: str, shape: tuple[int, ...]
) -> None:
    folder = tiny_checkpoint(prefix=prefix, extra={"lm_head.weight": np.ones(shape, np.float32)})
    with pytest.raises(CheckpointError, match=r'lm_head\.weight.*set "tie_word_embeddings": false'):
        open_checkpoint(folder)


def test_single_file_goes_before_an_index_that_does_not_name_it(tiny_checkpoint: Tiny) -> None:
    folder, base = tiny_checkpoint(seed=1), tiny_checkpoint(shards=2)
    for path in base.glob("model*"):
        shutil.copy(path, folder)
    expected = load_file(single_file(folder))["model.norm.weight"].to(torch.float32).numpy()
    assert_array_equal(open_checkpoint(folder).final_norm(), expected + 1)


def test_fingerprint_hashes_every_weight_file(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(shards=2)
    expected = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.glob("*.safetensors"))
    }
    assert open_checkpoint(folder).fingerprint() == expected


def test_assets_are_the_files_beside_the_weights(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    (folder / "LICENSE").write_text("terms")
    (folder / "README.md").write_text("model card")
    assets = open_checkpoint(folder).assets()
    assert sorted(assets) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert assets["config.json"] == (folder / "config.json").read_bytes()


def test_source_says_where_the_model_came_from(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    source = open_checkpoint(folder).source
    assert (source.kind, source.id, source.revision) == ("folder", str(folder), None)


# Refusals: each names the file, the tensor and what was expected.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_value_that_is_not_finite_is_named(tiny_checkpoint: Tiny, dtype: str, value: float) -> None:
    folder = tiny_checkpoint(dtype=dtype)
    weight = oracle(folder)["model.layers.1.mlp.up_proj.weight"]
    info = open_checkpoint(folder).tensors["model.layers.1.mlp.up_proj.weight"]
    position = info.offset + (3 * weight.shape[1] + 5) * (info.nbytes // weight.size)
    torch_dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    raw = torch.tensor([value], dtype=torch_dtype).view(torch.uint8).numpy().tobytes()
    with single_file(folder).open("r+b") as file:
        file.seek(position)
        file.write(raw)
    checkpoint = open_checkpoint(folder)
    checkpoint.layer(0)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.layer(1)
    assert str(caught.value) == (
        f"model.safetensors: model.layers.1.mlp.up_proj.weight[3, 5]: {value}; 1 values in 256 "
        "rows are not finite, the checkpoint is broken"
    )


def test_values_whose_sum_overflows_are_accepted(tiny_checkpoint: Tiny) -> None:
    huge = np.full((512, 128), 3e38, np.float32)
    folder = tiny_checkpoint(dtype="f32", extra={"model.embed_tokens.weight": huge})
    assert_array_equal(open_checkpoint(folder).embedding(0, 512), huge)


def test_header_larger_than_the_file_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    single_file(folder).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert refusal(folder) == (
        "model.safetensors: header of 1099511627776 bytes in a file of 10: not a safetensors "
        "file, or cut short"
    )


def test_empty_weight_file_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    single_file(folder).write_bytes(b"")
    assert "header of 0 bytes in a file of 0" in refusal(folder)


@pytest.mark.parametrize("header", [b"{nonsense", b"[1, 2]", b"\xff\xfe"])
def test_header_that_is_not_a_json_object_is_refused(tiny_checkpoint: Tiny, header: bytes) -> None:
    folder = tiny_checkpoint()
    single_file(folder).write_bytes(len(header).to_bytes(8, "little") + header)
    assert refusal(folder).startswith(
        ("model.safetensors: header is not ", "model.safetensors: header: not ")
    )


def test_truncated_shard_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    message = refusal(folder)
    assert message.startswith(f"{shard.name}: {shard.stat().st_size} bytes, but model.norm.weight")
    assert "cut short" in message


NAME = "model.layers.0.mlp.up_proj.weight"
BROKEN_ENTRIES = [
    ({"data_offsets": [-2, 65534]}, "data offsets -2:65534, shape (256, 128): out of range"),
    ({"data_offsets": [8, 4]}, "data offsets 8:4"),
    ({"data_offsets": [0, 12]}, "12 bytes, but shape (256, 128) of bf16 takes 65536"),
    ({"data_offsets": [1 << 40, (1 << 40) + 65536]}, "ends at"),
    ({"data_offsets": [0]}, "broken header entry"),
    ({"shape": [256, "x"]}, "broken header entry"),
    ({"dtype": "F8_E4M3"}, "dtype f8_e4m3 is not supported; use a checkpoint in bf16, f16 or f32"),
    ({"dtype": "I16"}, "dtype i16 is not supported"),
    ({"shape": [128, 256]}, "shape (128, 256), expected (256, 128)"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_ENTRIES)
def test_broken_tensor_entry_is_refused(
    tiny_checkpoint: Tiny, change: dict[str, Any], message: str
) -> None:
    folder = tiny_checkpoint()
    edit_header(single_file(folder), lambda header: header[NAME].update(change))
    found = refusal(folder)
    assert message in found
    assert NAME in found
    assert found.startswith("model.safetensors: ")


def test_missing_tensor_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    edit_header(single_file(folder), lambda header: header.pop(NAME))
    assert refusal(folder) == f"{NAME}: missing; expected shape (256, 128)"


def test_missing_untied_head_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(config={"tie_word_embeddings": False})
    assert refusal(folder) == "lm_head.weight: missing; expected shape (512, 128)"


def test_missing_shard_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors is missing" in refusal(folder)


def test_tensor_that_only_the_index_knows_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(shards=2)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_bytes())
    data["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    assert "model.ghost is missing, but model.safetensors.index.json says" in refusal(folder)


@pytest.mark.parametrize(
    "index", ["nonsense", "[]", '{"weight_map": {"a": "../secret.safetensors"}}', "{}"]
)
def test_broken_index_is_refused(tiny_checkpoint: Tiny, index: str) -> None:
    folder = tiny_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    assert refusal(folder).startswith("model.safetensors.index.json: ")


def test_file_cut_after_opening_is_refused_when_read(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    checkpoint = open_checkpoint(folder)
    single_file(folder).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot read 1024 bytes"):
        checkpoint.embedding(0, 4)


def test_folder_without_weights_is_refused(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    single_file(folder).unlink()
    assert refusal(folder) == (
        f"{folder}: has no weights; expected model.safetensors or model.safetensors.index.json"
    )


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: has no config.json"


def test_folder_with_a_gguf_file_says_how_to_open_it(tmp_path: Path) -> None:
    (tmp_path / "gemma.gguf").touch()
    assert refusal(tmp_path).endswith(f"give its path: {tmp_path / 'gemma.gguf'}")


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_broken_config_is_refused(tiny_checkpoint: Tiny, text: str) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: ")


def test_folder_without_tokenizer_is_refused_when_asked_for(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        open_checkpoint(folder).assets()


@pytest.mark.parametrize("name", ["./no/such/folder", "gemma", "/missing", "a/b/c", "x/y.gguf"])
def test_source_that_is_nothing_says_what_is_accepted(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(name)
    assert str(caught.value) == (
        f"{name}: no such folder or file; a model is a folder with config.json and safetensors, "
        "a GGUF file, a Hub id such as google/gemma-3-1b-it, or demo:gemma-3-270m"
    )


def test_single_safetensors_file_is_refused(tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match="give the folder that holds it"):
        open_checkpoint(single_file(tiny_checkpoint()))


def test_revision_of_a_local_folder_is_refused(tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match="applies to a Hub id only"):
        open_checkpoint(tiny_checkpoint(), revision="main")
