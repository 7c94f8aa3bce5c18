"""Vision and audio towers travel in a bundle, as they are or in INT8, and out of it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors import safe_open

from tests.gemma4 import SMALL as GEMMA4
from tests.test_publish import report_of
from tests.tiny import tokenizer_of
from uq.cli import main
from uq.errors import BundleError, UqError
from uq.export.export import ExportOptions, export
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.safetensors_file import folder_tensors
from uq.formats.checkpoint.tensors import read_rows
from uq.formats.manifest import TOWERS
from uq.formats.towers import from_int8, to_int8
from uq.progress import SilentProgress
from uq.publish.card import card_data, render_card
from uq.quantize.pipeline import QuantizeOptions, quantize

PREFIX = "model.language_model."
Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Tiny) -> Path:
    """A text model with a few tensors of a tower, one of them a single number."""
    folder = tiny_checkpoint(
        prefix=PREFIX, extra={"model.audio_tower.limit": np.array([3.5], np.float32)}
    )
    (folder / "preprocessor_config.json").write_text('{"size": 8}')
    return folder


def made(source: Path, out: Path, towers: str = "keep", progress: Any = None) -> Bundle:
    options = QuantizeOptions(method="rtn", towers=towers)
    progress = progress or SilentProgress()
    return open_bundle(quantize(open_checkpoint(source), out, options, progress))


@pytest.fixture(scope="module")
def kept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return made(source, tmp_path_factory.mktemp("kept") / "b")


@pytest.fixture(scope="module")
def rounded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return made(source, tmp_path_factory.mktemp("rounded") / "b", "int8")


def test_towers_keep_their_bytes_names_and_types(source: Path, kept: Bundle) -> None:
    stored = folder_tensors(source)
    towers = kept.towers()
    assert set(towers) == {n for n in stored if not n.startswith(PREFIX)} and len(towers) == 4
    for name, tower in towers.items():
        info = stored[name]
        assert (tower.dtype, tower.shape) == (info.dtype, info.shape)
        found = np.concatenate([piece.reshape(-1) for piece in tower.pieces()])
        assert_array_equal(found, info.file.read(info.offset, info.nbytes))
    assert kept.manifest.schema == 3
    assert kept.manifest.left_out == ()


def test_safetensors_reads_the_file_of_the_towers(source: Path, kept: Bundle) -> None:
    with (
        safe_open(kept.path / TOWERS, "pt") as ours,
        safe_open(source / "model.safetensors", "pt") as theirs,
    ):
        for name in ours.keys():  # noqa: SIM118
            assert (ours.get_tensor(name) == theirs.get_tensor(name)).all()


def test_int8_rounds_matrices_within_half_a_step(source: Path, rounded: Bundle) -> None:
    towers = rounded.towers()
    assert {name for name, tower in towers.items() if tower.is_int8} == {
        "model.vision_tower.vision_model.embeddings.weight",
        "model.multi_modal_projector.mm_input_projection_weight",
    }
    for name, info in folder_tensors(source).items():
        if name in towers and towers[name].is_int8:
            values = read_rows(info, 0, info.shape[0])
            found = np.concatenate(list(towers[name].values()))
            assert (np.abs(found - values) <= np.abs(values).max(axis=1, keepdims=True) / 253).all()


def test_int8_keeps_what_lies_on_its_grid() -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (5, 9))
    codes[:, 0], codes[4] = 127, 0
    values = codes.astype(np.float32) * np.array([[0.5], [2], [1 / 64], [8], [1]], np.float32)
    assert_array_equal(from_int8(to_int8(values)), values)


def test_transformers_sees_images_through_an_export(tmp_path: Path) -> None:
    """Same logits as the source with the bundle's text weights, in float32."""
    import torch
    from transformers import Gemma3ForConditionalGeneration

    folder = tiny_multimodal(tmp_path / "source")
    bundle = made(folder, tmp_path / "b")
    out = export(bundle, tmp_path / "hf", ExportOptions("hf")).path
    expected = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    found = Gemma3ForConditionalGeneration.from_pretrained(out).eval()
    with torch.no_grad():
        for name, weight in expected.model.language_model.named_parameters():
            canonical = f"model.{name}"
            if canonical in bundle.manifest.tensors:
                weight.copy_(torch.from_numpy(bundle.quant(canonical).dequantize()))
        ids = torch.tensor([[2, 300, 511, 511, 511, 511, 301, 302]])
        pixels = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 511).long()}
        wanted, logits = expected(**inputs).logits, found(**inputs).logits
        blind = found(**inputs | {"pixel_values": pixels * 0}).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (blind - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_compressed_tensors_leaves_the_towers_alone(tmp_path: Path) -> None:
    import torch
    from transformers import Gemma3ForConditionalGeneration

    bundle = made(tiny_multimodal(tmp_path / "source"), tmp_path / "b")
    folders = [
        export(bundle, tmp_path / form, ExportOptions(form)).path
        for form in ("hf", "compressed-tensors")
    ]
    plain, packed = (Gemma3ForConditionalGeneration.from_pretrained(path) for path in folders)
    ids = torch.tensor([[2, 300, 511, 511, 511, 511, 301, 302]])
    pixels = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 511).long()}
    with torch.no_grad():
        wanted, logits = plain(**inputs).logits, packed(**inputs).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def tiny_multimodal(folder: Path) -> Path:
    """A random Gemma 3 with a vision tower of one layer, as transformers saves it."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 16,
        "query_pre_attn_scalar": 32,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 8,
        "num_attention_heads": 2, "patch_size": 2, "vision_use_head": False,
    }  # fmt: skip
    ids = {"image_token_index": 511, "boi_token_index": 509, "eoi_token_index": 510}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.save_pretrained(folder)
    tokenizer_of(512).save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("form", ["hf", "compressed-tensors"])
def test_gemma4_sees_images_through_an_export(
    multimodal_gemma4: Bundle, tmp_path: Path, form: str
) -> None:
    """The tokens of an image see each other, which the text model alone does not do."""
    import torch
    from transformers import Gemma4ForConditionalGeneration

    bundle = multimodal_gemma4
    out = export(bundle, tmp_path / form, ExportOptions(form)).path
    source = bundle.manifest.provenance.id
    expected = Gemma4ForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    found = Gemma4ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in expected.model.language_model.named_parameters():
            if f"model.{name}" in bundle.manifest.tensors:
                weight.copy_(torch.from_numpy(bundle.quant(f"model.{name}").dequantize()))
        ids = torch.tensor([[2, 300, 509, 511, 511, 511, 511, 510, 301, 302]])
        places = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])
        patches = torch.rand((1, 16, 48), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "image_position_ids": places}
        inputs |= {"mm_token_type_ids": (ids == 511).long(), "pixel_values": patches}
        wanted, logits = expected(**inputs).logits, found(**inputs).logits
        blind = found(**inputs | {"pixel_values": patches * 0}).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (blind - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.fixture(scope="module")
def multimodal_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random Gemma 4 with a vision tower of one layer, as transformers saves it."""
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    folder = tmp_path_factory.mktemp("gemma4") / "source"
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "global_head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
        "position_embedding_size": 16, "default_output_length": 4,
    }  # fmt: skip
    ids = {"image_token_id": 511, "boi_token_id": 509, "eoi_token_id": 510, "video_token_id": 508}
    sound = {"audio_token_id": 507, "boa_token_id": 506, "eoa_token_index": 505}
    text = GEMMA4 | {"use_bidirectional_attention": "vision"}
    torch.manual_seed(0)
    config = Gemma4Config(text_config=text, vision_config=vision, **ids, **sound)
    Gemma4ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer_of(512).save(str(folder / "tokenizer.json"))
    (folder / "processor_config.json").write_text("{}")
    return made(folder, folder.with_name("bundle"))


def test_a_gguf_says_that_it_has_no_towers(kept: Bundle, tmp_path: Path) -> None:
    made_file = export(kept, tmp_path / "m.gguf", ExportOptions("gguf"))
    assert "mmproj" in made_file.left_out[0]


def test_int8_towers_are_exported_with_the_bundles_values(rounded: Bundle, tmp_path: Path) -> None:
    out = export(rounded, tmp_path / "hf", ExportOptions("hf"))
    assert out.rounded == ()
    stored, towers = folder_tensors(out.path), rounded.towers()
    for name, tower in towers.items():
        if tower.is_int8:
            found = read_rows(stored[name], 0, tower.shape[0])
            assert_array_equal(found, np.concatenate(list(tower.values())))


def test_dropped_towers_are_named(source: Path, tmp_path: Path) -> None:
    bundle = made(source, tmp_path / "b", "drop")
    assert bundle.towers() == {}
    assert bundle.manifest.left_out == ("towers and projectors: 4 tensors, 146 bytes",)
    assert "preprocessor_config.json" not in bundle.manifest.files
    assert bundle.manifest.schema < 3


def test_the_processor_goes_with_the_towers(kept: Bundle) -> None:
    assert kept.asset("preprocessor_config.json") == b'{"size": 8}'


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_missing_processor_is_told_in_one_line(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "source")
    (folder / "preprocessor_config.json").unlink()
    notes = Notes()
    made(folder, tmp_path / "b", progress=notes)
    (line,) = [line for line in notes.lines if line.startswith("towers:")]
    assert "has no preprocessor_config.json" in line and "\n" not in line


def test_a_run_killed_before_the_towers_goes_on(
    source: Path, kept: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("uq.quantize.pipeline.tower_entries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(source, tmp_path / "b")
    assert (tmp_path / "b.partial" / "model-00003-of-00003.safetensors").exists()
    assert made(source, tmp_path / "b").sha256 == kept.sha256


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_goes_on_with_the_same_towers_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("uq.quantize.pipeline.tower_entries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(source, tmp_path / "b")
    with pytest.raises(UqError, match="towers"):
        made(source, tmp_path / "b", "int8")


def test_a_changed_tower_is_refused(source: Path, tmp_path: Path) -> None:
    path = made(source, tmp_path / "b").path / TOWERS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"towers\.safetensors: its hash differs"):
        open_bundle(tmp_path / "b")


def test_dry_run_and_inspect_count_the_towers(
    source: Path, kept: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), "--method", "rtn", "--dry-run", "--json"]) == 0
    nbytes = sum(info.nbytes for n, info in folder_tensors(source).items() if PREFIX not in n)
    assert json.loads(capsys.readouterr().out)["towers"] == nbytes
    assert main(["inspect", str(kept.path)]) == 0
    told = capsys.readouterr().out
    assert f"towers and projectors: 4 tensors, {nbytes} B, as in the source" in told


def test_the_model_card_names_the_towers(kept: Bundle, rounded: Bundle) -> None:
    for bundle, how in ((kept, "as they are"), (rounded, "2 of them in INT8")):
        report = report_of(bundle.path)
        data = card_data(bundle, report, "google/gemma", "gemma")
        card = render_card(bundle, report, data, "me/mm", {})
        assert f"holds the 4 tensors of the source's towers and projectors, {how}" in card
        assert "uq export me/mm --format hf" in card
