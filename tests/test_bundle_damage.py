"""Damaged bundles are refused, each in one line that says what is wrong."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.broken_bundles import (
    GAIN,
    SHARD,
    SMALL,
    UP,
    Tree,
    edit_manifest,
    edit_shard,
    refuse,
    write_manifest,
    write_shard,
)
from uq.errors import BundleError
from uq.formats.bundle import open_bundle
from uq.formats.config import EMBEDDING


@pytest.fixture(scope="module")
def pristine(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle(**SMALL)


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def test_unlisted_files_are_ignored(bundle: Path) -> None:
    before = open_bundle(bundle).sha256
    for name in ("report.json", "report.html", "README.md", ".gitattributes"):
        (bundle / name).write_text("anything")
    assert open_bundle(bundle).sha256 == before


def test_one_flipped_bit_in_any_file_is_refused(bundle: Path) -> None:
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    assert len(files) >= 3 + 2 + 1  # shards, manifest and checksum, tokenizer
    for path in files:
        good = path.read_bytes()
        for position in (0, len(good) // 2, len(good) - 1):
            bad = bytearray(good)
            bad[position] ^= 1
            path.write_bytes(bad)
            with pytest.raises(BundleError):
                open_bundle(bundle)
        path.write_bytes(good)
    open_bundle(bundle)


def test_a_lazy_bundle_hashes_a_shard_when_it_is_used(bundle: Path) -> None:
    data = bytearray((bundle / SHARD).read_bytes())
    data[-1] ^= 1
    (bundle / SHARD).write_bytes(data)
    opened = open_bundle(bundle, verify="lazy")
    opened.quant(EMBEDDING)
    opened.layer(1)
    for _ in range(2):
        with pytest.raises(BundleError, match=f"{SHARD}: its hash differs"):
            opened.layer(0)


def test_a_lazy_bundle_hashes_an_asset_when_it_is_read(bundle: Path) -> None:
    data = bytearray((bundle / "tokenizer.json").read_bytes())
    data[100] ^= 1
    (bundle / "tokenizer.json").write_bytes(data)
    opened = open_bundle(bundle, verify="lazy")
    with pytest.raises(BundleError, match="tokenizer.json: its hash differs"):
        opened.tokenizer()


def test_no_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "nothing: has no manifest.json; not a bundle")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "tokenizer.json", SHARD])
def test_missing_files(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refuse(bundle, name)


@pytest.mark.parametrize("name", ["tokenizer.json", SHARD])
def test_truncated_files(bundle: Path, name: str) -> None:
    os.truncate(bundle / name, (bundle / name).stat().st_size - 1)
    refuse(bundle, f"{name}: .* bytes, but manifest.json lists")


def test_a_newer_schema(bundle: Path) -> None:
    edit_manifest(bundle, lambda tree: tree.update(schema=5, uq="9.0", colour="blue"))
    refuse(bundle, "schema 5 is newer than 4.*update uq .*'9.0'")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "manifest.json: expected an object, found \\[\\]"),
        (b"{}", "field 'schema' is missing"),
        (b'{"schema": 1, "schema": 1}', "field 'schema' appears twice"),
        (b'{"schema": NaN}', "NaN is not a number"),
        (b'{"schema":' + b"[" * 100_000, "not valid JSON"),
        (b" " * (16 << 20) + b"{}", "16777218 bytes, more than"),
    ],
)
def test_manifests_that_are_no_objects(bundle: Path, data: bytes, message: str) -> None:
    write_manifest(bundle, data)
    refuse(bundle, message)


def at(path: str, value: object) -> Callable[[Tree], object]:
    """Set the item at `a/b/c`."""
    *parents, last = path.split("/")

    def change(tree: Tree) -> None:
        for key in parents:
            tree = tree[key]
        tree[last] = value

    return change


def without(path: str) -> Callable[[Tree], object]:
    parent, _, last = path.rpartition("/")

    def change(tree: Tree) -> None:
        del (tree[parent] if parent else tree)[last]

    return change


NO_FILE = {"size": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("schema", 0), "schema: expected 1 to 4, found 0"),
        (at("schema", "1"), 'schema: expected an integer, found "1"'),
        (at("schema", True), "schema: expected an integer, found true"),
        (at("two\nlines", "blue"), "is not known"),
        (at("tensors/two\nlines", 1), "expected an object, found 1"),
        (at("colour", "blue"), "field 'colour' is not known"),
        (without("provenance"), "field 'provenance' is missing"),
        (at("calibration", {"name": "x", "sha256": "y"}), "calibration: field 'tokens' is missing"),
        (at("left_out", ["a", 1]), "left_out.1: expected a string, found 1"),
        (at("required_kernels", ["gemv"]), "required_kernels: 'gemv' is not known; update uq"),
        (at("model/head_dim", 0), "model.head_dim: 0 is not in 1.."),
        (at("model/hidden_size", 1 << 40), "model.hidden_size: .* is not in 1.."),
        (at("model/num_heads", 1 << 20), "model.q_size: .* is not in 1.."),
        (at("model/num_layers", 3), "layer_types: 2 items"),
        (at("model/layer_types", ["full_attention", "odd"]), "layer_types: 'odd' is not one of"),
        (at("model/sliding_window", 0), "sliding_window: 0 is not above 0"),
        (at("model/rms_norm_eps", 0.0), "rms_norm_eps: 0.0 is not above 0"),
        (at("model/final_softcap", -1), "final_softcap: -1.0 is not above 0"),
        (at("model/rope_theta", None), "rope_theta: expected a finite number, found null"),
        (at("model/rope_theta", 1e999), "Infinity is not a number"),
        (at("model/bos_token_id", 401), "bos_token_id: 401 is not in 0..400"),
        (at("model/eos_token_ids", [1, -1]), "eos_token_ids: -1 is not in 0..400"),
        (at("model/num_kv_heads", 2), "num_heads: 3 is no multiple of num_kv_heads"),
        (without(f"tensors/{UP}"), f"tensors: {UP} is missing"),
        (without(f"arrays/{GAIN}"), f"arrays: {GAIN} is missing"),
        (at("tensors/extra", None), "tensors.extra: expected an object, found null"),
        (at(f"tensors/{UP}/bits", 5), f"tensors.{UP}.bits: 5 is not one of 4, 8"),
        (at(f"tensors/{UP}/group", 48), "group: 48 is not one of 32, 64, 128"),
        (at(f"tensors/{UP}/group", 64), "group: 96 columns do not divide by 64"),
        (at(f"tensors/{UP}/layout", "gpu"), "layout: 'gpu' is not one of row, igpu, npu-aie2"),
        (at(f"tensors/{UP}/shape", [96, 160]), r"shape: \[96, 160\], but .* \[160, 96\]"),
        (at(f"tensors/{UP}/shape", [160]), "shape: expected 2 items, found 1"),
        (at(f"tensors/{UP}/relative_error", "low"), "relative_error: expected a finite number"),
        (at(f"tensors/{UP}/file", "tokenizer.json"), "'tokenizer.json' is no shard"),
        (at(f"tensors/{UP}/file", "other.safetensors"), "'other.safetensors' is no shard"),
        (at(f"arrays/{GAIN}/dtype", "float16"), "dtype: 'float16' is not one of float32"),
        (at(f"arrays/{GAIN}/shape", [97]), r"shape: \[97\], but the model asks for \[96\]"),
        (at("files/tokenizer.json/size", -1), "size: -1 is negative"),
        (at("files/tokenizer.json/sha256", "A" * 64), "expected 64 lower-case hex digits"),
        (at("files/manifest.json", NO_FILE), "manifest.json: is written outside"),
        (at("files/report.json", NO_FILE), "report.json: is written outside"),
    ],
)
def test_contradictions_in_the_manifest(
    bundle: Path, change: Callable[[Tree], object], message: str
) -> None:
    edit_manifest(bundle, change)
    refuse(bundle, message)


def test_a_tensor_of_another_model(bundle: Path) -> None:
    def add(tree: Tree) -> None:
        tree["tensors"]["lm_head.weight"] = tree["tensors"][EMBEDDING]

    edit_manifest(bundle, add)
    refuse(bundle, "tensors: lm_head.weight is no tensor of this model")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../secret",
        "./a",
        "a//b",
        "",
        "a\\b",
        "C:x",
        "a\nb",
        "a/",
        "\ud800",
    ],
)
def test_file_names_that_leave_the_folder(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_bytes(b"")
    edit_manifest(bundle, lambda tree: tree["files"].update({name: NO_FILE}))
    refuse(bundle, "is not a relative path inside the bundle")


def test_a_file_name_that_the_system_refuses(bundle: Path) -> None:
    edit_manifest(bundle, lambda tree: tree["files"].update({"x" * 300: NO_FILE}))
    refuse(bundle, "cannot be read: File name too long")


def test_a_link_out_of_the_folder(bundle: Path) -> None:
    outside = (bundle / "tokenizer.json").rename(bundle.parent / "tokenizer.json")
    (bundle / "tokenizer.json").symlink_to(outside)
    refuse(bundle, "tokenizer.json: is a link out of the bundle")


def test_a_link_inside_the_folder_is_allowed(bundle: Path) -> None:
    inside = (bundle / "tokenizer.json").rename(bundle / "kept.json")
    (bundle / "tokenizer.json").symlink_to(inside.name)
    open_bundle(bundle)


def test_a_folder_that_is_a_link_is_allowed(bundle: Path) -> None:
    (bundle.parent / "link").symlink_to(bundle)
    assert open_bundle(bundle.parent / "link").name == bundle.name


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_files_that_are_no_regular_files(bundle: Path, make: Callable[[Path], None]) -> None:
    (bundle / "tokenizer.json").unlink()
    make(bundle / "tokenizer.json")
    refuse(bundle, "tokenizer.json: is not a regular file")


def shifted(name: str, start: int, stop: int) -> Callable[[Tree, bytearray], object]:
    def change(header: Tree, data: bytearray) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + start, offsets[1] + stop]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted(UP, -32, -32), "begins at .*, but the tensor before ends at"),
        (shifted(UP, 32, 32), "begins at .*, but the tensor before ends at"),
        (shifted(UP, 0, -32), f"{UP}: offsets .* do not hold U8"),
        (shifted(UP, 1 << 60, 1 << 60), "begins at"),
        (lambda h, d: d.extend(b"\0"), "the tensors take .* bytes, but the data has"),
        (lambda h, d: d.pop(), "the tensors take .* bytes, but the data has"),
        (lambda h, d: h[GAIN].update(dtype="U8"), f"{GAIN}: offsets .* do not hold U8"),
        (lambda h, d: h[GAIN].update(dtype="F16"), "dtype 'F16' is not one of U8, F32"),
        (lambda h, d: h[GAIN].update(shape=[-96]), "do not hold"),
        (lambda h, d: h[GAIN].update(shape=[48, 2]), r"is F32 \[48, 2\], but .* F32 \[96\]"),
        (lambda h, d: h[GAIN].update(dtype="U8", shape=[384]), r"is U8 \[384\], but .* F32"),
        (lambda h, d: h[GAIN].pop("shape"), f"{GAIN}: field 'shape' is missing"),
        (lambda h, d: h[GAIN].update(data_offsets=[0]), "data_offsets: expected 2 items"),
        (lambda h, d: h.update({"spy": h.pop(GAIN)}), "spy is not in the manifest"),
        (lambda h, d: h.update({"spy": h[GAIN]}), "begins at"),
        (lambda h, d: h.update({"two\nlines": h.pop(GAIN)}), "is not in the manifest"),
    ],
)
def test_broken_shards(
    bundle: Path, change: Callable[[Tree, bytearray], object], message: str
) -> None:
    edit_shard(bundle, change)
    refuse(bundle, message)


def test_a_tensor_missing_from_its_shard(bundle: Path) -> None:
    other = "model-00003-of-00003.safetensors"
    edit_manifest(bundle, at(f"tensors/{UP}/file", other))
    refuse(bundle, f"{UP} is (missing|not in the manifest)")


def test_a_misaligned_tensor(tmp_path: Path, tiny_bundle: Callable[..., Path]) -> None:
    """A gain of 8 bytes in front of the tiles: no hole, but they no longer begin at 16 bytes."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle(**SMALL | {"heads": 16, "head_dim": 2}), bundle)
    small = "model.layers.0.self_attn.k_norm.gain"

    def reorder(header: Tree, data: bytearray) -> None:
        pieces = {name: slice(*entry["data_offsets"]) for name, entry in header.items()}
        moved = bytearray()
        for name in sorted(header, key=lambda name: (name != small, pieces[name].start)):
            start = len(moved)
            moved += data[pieces[name]]
            header[name]["data_offsets"] = [start, len(moved)]
        data[:] = moved

    edit_shard(bundle, reorder)
    refuse(bundle, "offset 8 is no multiple of 16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short, or no shard"),
        (b"\0" * 7, "cut short, or no shard"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "cut short, or no shard"),
        ((56).to_bytes(8, "little") + b"{}", "cut short, or no shard"),
        ((2).to_bytes(8, "little") + b"{}", "not padded to 64 bytes"),
        ((56).to_bytes(8, "little") + b"[]".ljust(56), "not padded"),
        ((56).to_bytes(8, "little") + b"{".ljust(56), "not valid JSON"),
        ((56).to_bytes(8, "little") + b"{}".ljust(56), "is missing"),
        ((56).to_bytes(8, "little") + b'{"a":1,"a":2}'.ljust(56), "'a' appears twice"),
        ((56).to_bytes(8, "little") + b'{"a":1}'.ljust(56), "a: expected an object, found 1"),
    ],
)
def test_files_that_are_no_shards(bundle: Path, content: bytes, message: str) -> None:
    write_shard(bundle, content)
    refuse(bundle, f"{SHARD}: .*{message}")


def test_a_huge_header_is_not_read(bundle: Path) -> None:
    length = (16 << 20) + 56
    write_shard(bundle, length.to_bytes(8, "little") + b"{}".ljust(length))
    refuse(bundle, "header of 16777272 bytes")
