"""Reading bundles: what was written comes back, and every broken one is refused."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from uq.errors import BundleError
from uq.formats.bundle import open_bundle
from uq.formats.config import EMBEDDING, HEAD
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import checksum_line
from uq.formats.spec import QuantTensor

SMALL: dict[str, Any] = {"hidden": 96, "heads": 3, "kv_heads": 1, "ffn": 160, "vocab": 401}
SHARD = "model-00002-of-00003.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
GAIN = "model.layers.0.input_layernorm.gain"

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def pristine(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle(**SMALL)


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def edit_manifest(bundle: Path, change: Callable[[Tree], object]) -> None:
    """Change the manifest as an author of bundles could: with a matching checksum."""
    tree = json.loads((bundle / "manifest.json").read_bytes())
    change(tree)
    write_manifest(bundle, json.dumps(tree).encode())


def write_manifest(bundle: Path, data: bytes) -> None:
    (bundle / "manifest.json").write_bytes(data)
    (bundle / "manifest.sha256").write_bytes(checksum_line(hashlib.sha256(data).hexdigest()))


def edit_shard(bundle: Path, change: Callable[[Tree, bytearray], object]) -> None:
    """Change header and data of a shard and list its new size and hash."""
    raw = (bundle / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    write_shard(bundle, len(text).to_bytes(8, "little") + text + bytes(data))


def write_shard(bundle: Path, content: bytes) -> None:
    (bundle / SHARD).write_bytes(content)
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, lambda tree: tree["files"].update({SHARD: record}))


def refuse(bundle: Path, message: str) -> None:
    """Both ways of opening refuse, in one line."""
    for verify in ("full", "lazy"):
        with pytest.raises(BundleError, match=message) as caught:
            open_bundle(bundle, verify=verify)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_come_back_bit_for_bit(
    tmp_path: Path,
    bundle_parts: Callable[..., Any],
    tiny_bundle: Callable[..., Path],
    layout: str,
    bits: int,
) -> None:
    options = {"layout": layout, "bits": bits, **SMALL}
    weights = bundle_parts(**options).weights
    opened = open_bundle(tiny_bundle(**options))
    assert set(opened.manifest.tensors) == set(weights)
    for name, expected in weights.items():
        found = opened.quant(name)
        assert found.spec == expected.spec
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("options", [{"family": "gemma"}, {"family": "gemma2"}, {"tied": False}])
def test_every_family_is_complete(
    bundle_parts: Callable[..., Any], tiny_bundle: Callable[..., Path], options: Tree
) -> None:
    parts = bundle_parts(**SMALL, **options)
    opened = open_bundle(tiny_bundle(**SMALL, **options))
    assert opened.config == parts.manifest.model
    assert sorted(opened.names()) == sorted(e.name for shard in parts.shards for e in shard)
    assert (HEAD in opened.names()) == (not opened.config.tied_head)


def test_a_layer_has_its_linears_and_gains(pristine: Path) -> None:
    opened = open_bundle(pristine)
    layer = opened.layer(1)
    assert set(layer) == {*opened.config.linear_shapes(0), *opened.config.norm_shapes(0)}
    for role, shape in opened.config.linear_shapes(0).items():
        weight = layer[role]
        assert isinstance(weight, QuantTensor)
        assert weight.shape == shape
    gain = layer["input_layernorm"]
    assert isinstance(gain, np.ndarray)
    np.testing.assert_array_equal(gain, opened.array("model.layers.1.input_layernorm.gain"))


def test_raw_bytes_are_those_of_the_layout(pristine: Path) -> None:
    raw, record = open_bundle(pristine).raw(UP)
    assert raw.shape == record.stored_shape
    assert not raw.flags.writeable
    tiled = LAYOUTS[record.layout].tile(open_bundle(pristine).quant(UP))
    np.testing.assert_array_equal(raw, tiled)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_safetensors_library_reads_the_shards(
    tiny_bundle: Callable[..., Path], layout: str
) -> None:
    opened = open_bundle(tiny_bundle(layout=layout, **SMALL))
    found = set()
    for file in sorted(opened.path.glob("*.safetensors")):
        with safe_open(file, "np") as shard:
            names = set(shard.keys())
            found |= names
            for name in names:
                tensor = opened.manifest.tensors.get(name)
                expected = opened.raw(name)[0] if tensor else opened.array(name)
                np.testing.assert_array_equal(shard.get_tensor(name), expected)
    assert found == set(opened.names())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_aligned_in_their_files(tiny_bundle: Callable[..., Path], layout: str) -> None:
    alignment = {"igpu": 32, "npu-aie2": 16, "npu-aie2p": 16, "row": 2}[layout]
    for file in tiny_bundle(layout=layout, **SMALL).glob("*.safetensors"):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        assert start % 64 == 0
        for entry in json.loads(raw[8:start]).values():
            wanted = 4 if entry["dtype"] == "F32" else alignment
            assert (start + entry["data_offsets"][0]) % wanted == 0


def test_bits_per_weight_counts_every_stored_byte(pristine: Path) -> None:
    opened = open_bundle(pristine)
    stored = 0
    for file in pristine.glob("*.safetensors"):
        stored += file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    parameters = 401 * 96 + 96 + 2 * ((96 + 2 * 32) * 96 + 96 * 96 + 3 * 96 * 160 + 4 * 96 + 2 * 32)
    assert opened.bits_per_weight == 8 * stored / parameters
    assert opened.nbytes == sum(path.stat().st_size for path in pristine.iterdir())


def test_assets_and_identity(pristine: Path, bundle_parts: Callable[..., Any]) -> None:
    opened = open_bundle(pristine)
    for name, data in bundle_parts(**SMALL).assets.items():
        assert opened.asset(name) == data
    assert opened.tokenizer().decode(opened.tokenizer().encode("the world")) == "the world"
    manifest = (pristine / "manifest.json").read_bytes()
    assert opened.sha256 == hashlib.sha256(manifest).hexdigest()
    assert opened.name == pristine.name


def test_sha256sum_checks_the_manifest(pristine: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "manifest.sha256"]
    assert subprocess.run(command, cwd=pristine, capture_output=True).returncode == 0


def test_what_is_not_there_is_named(pristine: Path) -> None:
    opened = open_bundle(pristine)
    for ask in (opened.quant, opened.raw, opened.array, opened.asset):
        with pytest.raises(BundleError, match="nonsense"):
            ask("nonsense")
    with pytest.raises(BundleError, match=GAIN):
        opened.quant(GAIN)


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
