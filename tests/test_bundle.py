"""Reading bundles: what was written comes back, and every broken one is refused."""

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.broken_bundles import GAIN, SMALL, UP, Tree
from uq.errors import BundleError
from uq.formats.bundle import open_bundle
from uq.formats.config import HEAD
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import QuantTensor


@pytest.fixture(scope="module")
def pristine(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle(**SMALL)


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
