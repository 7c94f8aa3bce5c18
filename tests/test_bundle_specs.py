"""Bundles of every grid: what older readers get, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uq.errors import BundleError
from uq.formats.bundle import open_bundle
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import checksum_line
from uq.formats.spec import SPECS, Spec

SMALL: dict[str, Any] = {"hidden": 128, "ffn": 256, "vocab": 401}
STEPS = [replace(spec, scale_bits=8) for spec in SPECS if spec.group == 64]
EVERY = [*SPECS, *STEPS]
FIRST = [spec for spec in SPECS if spec.bits in (4, 8) and not spec.zero_point]
UP = "model.layers.0.mlp.up_proj.weight"

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def mixed(tiny_bundle: Callable[..., Path]) -> Path:
    """Every width occurs, with scales of 8 bits too; the last tensors begin at INT4 again."""
    return tiny_bundle(specs=EVERY, layers=4, **SMALL)


def manifest_of(bundle: Path) -> Tree:
    tree: Tree = json.loads((bundle / "manifest.json").read_bytes())
    return tree


def refuse(bundle: Path, copy: Path, change: Callable[[Tree], object], message: str) -> None:
    """A copy of the bundle with another manifest, checksum included, does not open."""
    shutil.copytree(bundle, copy)
    tree = manifest_of(copy)
    change(tree)
    data = json.dumps(tree).encode()
    (copy / "manifest.json").write_bytes(data)
    (copy / "manifest.sha256").write_bytes(checksum_line(hashlib.sha256(data).hexdigest()))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_spec_comes_back(
    layout: str, tiny_bundle: Callable[..., Path], bundle_parts: Callable[..., Any]
) -> None:
    options = {"specs": EVERY, "layers": 4, "layout": layout, **SMALL}
    opened = open_bundle(tiny_bundle(**options))
    weights = bundle_parts(**options).weights
    assert {tensor.spec for tensor in weights.values()} == set(EVERY)
    for name, expected in weights.items():
        found = opened.quant(name)
        assert found.spec == expected.spec
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.dequantize(), expected.dequantize())


def test_dequantized_weights_are_exact(bundle_parts: Callable[..., Any]) -> None:
    for tensor in bundle_parts(specs=EVERY, layers=4, **SMALL).weights.values():
        group = tensor.spec.group
        zeros = 0 if tensor.zeros is None else tensor.zeros.repeat(group, axis=1).astype(float)
        expected = (tensor.codes - zeros) * tensor.scales.astype(float).repeat(group, axis=1)
        np.testing.assert_array_equal(tensor.dequantize(), expected)


def test_a_bundle_that_schema_1_can_describe_has_schema_1(tiny_bundle: Callable[..., Path]) -> None:
    tree = manifest_of(tiny_bundle(specs=FIRST, **SMALL))
    assert tree["schema"] == 1
    assert not any("zero_point" in tensor for tensor in tree["tensors"].values())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in FIRST], ids=str)
def test_one_tensor_beyond_it_makes_it_schema_2(
    spec: Spec, tiny_bundle: Callable[..., Path]
) -> None:
    tree = manifest_of(tiny_bundle(specs=[*FIRST, spec], **SMALL))
    assert tree["schema"] == 2
    marked = [t["zero_point"] for t in tree["tensors"].values() if "zero_point" in t]
    assert all(marked) and bool(marked) == spec.zero_point


def test_scales_of_8_bits_make_it_schema_4(tiny_bundle: Callable[..., Path]) -> None:
    tree = manifest_of(tiny_bundle(specs=[Spec(4, 32), Spec(4, 32, scale_bits=8)], **SMALL))
    assert tree["schema"] == 4
    assert {tensor.get("scale_bits") for tensor in tree["tensors"].values()} == {None, 8}


def test_fields_may_say_that_there_is_nothing_new(mixed: Path, tmp_path: Path) -> None:
    tree = manifest_of(mixed)
    for tensor in tree["tensors"].values():
        tensor.setdefault("zero_point", False)
        tensor.setdefault("scale_bits", 16)
    data = json.dumps(tree).encode()
    shutil.copytree(mixed, tmp_path / "copy")
    (tmp_path / "copy/manifest.json").write_bytes(data)
    line = checksum_line(hashlib.sha256(data).hexdigest())
    (tmp_path / "copy/manifest.sha256").write_bytes(line)
    assert open_bundle(tmp_path / "copy").config == open_bundle(mixed).config


def only(bits: int, zero_point: bool = False) -> Callable[[Tree], str]:
    """Name of the first tensor of this kind."""

    def name(tree: Tree) -> str:
        tensors = tree["tensors"].items()
        fitting = (
            str(name)
            for name, tensor in tensors
            if tensor["bits"] == bits and tensor.get("zero_point", False) == zero_point
        )
        return next(fitting)

    return name


@pytest.mark.parametrize(
    ("which", "fields", "message"),
    [
        (only(4), {"bits": 3}, "bits: 3 is not one of 4, 5, 6, 8"),
        (only(4), {"bits": 7}, "bits: 7 is not one of 4, 5, 6, 8"),
        (only(8), {"zero_point": True}, "zero_point: INT8 has no zero points"),
        (only(4), {"zero_point": 1}, "zero_point: expected true or false, found 1"),
        (only(4), {"zero_point": None}, "zero_point: expected true or false, found null"),
        (only(4), {"zero_point": True}, r"is U8 \[\d+, \d+\], but the manifest asks for U8"),
        (only(5), {"bits": 6}, r"is U8 \[\d+, \d+\], but the manifest asks for U8"),
        (only(6), {"bits": 4}, r"is U8 \[\d+, \d+\], but the manifest asks for U8"),
        (only(5, True), {"zero_point": False}, "but the manifest asks for U8"),
        (only(6, True), {"bits": 8}, "zero_point: INT8 has no zero points"),
        (only(4), {"scale_bits": 4}, "scale_bits: 4 is not one of 16, 8"),
        (only(4), {"scale_bits": True}, "scale_bits: expected an integer, found true"),
        (only(4), {"scale_bits": 8}, "but the manifest asks for U8"),
    ],
)
def test_specs_that_contradict_the_format_or_the_shard(
    mixed: Path,
    tmp_path: Path,
    which: Callable[[Tree], str],
    fields: Tree,
    message: str,
) -> None:
    def change(tree: Tree) -> None:
        tree["tensors"][which(tree)].update(fields)

    refuse(mixed, tmp_path / "copy", change, message)


def test_older_schemas_have_nothing_newer(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    five = tiny_bundle(bits=5, **SMALL)
    refuse(five, tmp_path / "five", lambda t: t.update(schema=1), "bits: 5 is not one of 4, 8")
    steps = tiny_bundle(specs=[Spec(5, 32, scale_bits=8)], **SMALL)
    refuse(
        steps, tmp_path / "steps", lambda t: t.update(schema=3), "scale_bits: 8 is not one of 16"
    )
    zeros = tiny_bundle(specs=[Spec(4, 32, True)], **SMALL)
    refuse(zeros, tmp_path / "zeros", lambda t: t.update(schema=1), "schema 1 has no zero points")
