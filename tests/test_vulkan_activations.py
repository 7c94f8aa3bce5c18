"""INT8 activations on Vulkan: kernels against NumPy twins, models against the emulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_cpu_session import random_tokens
from tests.test_vulkan_kernels import GRIDS, norm_in_float16, normal, random_tensor, rms_norm
from tests.test_vulkan_prefill import gemm, halves
from tests.vulkan_lab import Floats, Lab, give_matrices, no_messages, product  # noqa: F401
from uq.errors import UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.backends import device_numerics
from uq.kernels.numerics import ACTIVATIONS, FLOAT, KV, Int8Activations, Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.sources import BundleSource, CheckpointSource
from uq.kernels.vulkan.weights import Kind, tiles_of
from uq.kernels.weights import BundleWeights

INT8 = Numerics(ACTIVATIONS["int8"])
WORDS = 40  # of 128 channels: the codes, 4 scales, 4 sums


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"), {"INT8_X": True})
    yield lab
    lab.close()


@dataclass(frozen=True)
class Codes:
    """Activations as the device holds them: (columns, pieces of 32, ...)."""

    codes: NDArray[np.int32]
    scales: Floats
    sums: NDArray[np.int32]

    @classmethod
    def read(cls, lab: Lab, x: Floats) -> Codes:
        columns, tiles = len(x), tiles_of(x.shape[1])
        words = lab.get(lab.activations(x), np.uint32, columns, tiles, WORDS)
        codes = np.ascontiguousarray(words[..., :32]).view(np.int8)
        codes = codes.reshape(columns, tiles, 2, 4, 16).swapaxes(2, 3)
        scales, sums = words[..., 32:36], words[..., 36:]
        return cls(
            codes.reshape(columns, 4 * tiles, 32).astype(np.int32),
            np.ascontiguousarray(scales).view(np.float32).reshape(columns, -1),
            np.ascontiguousarray(sums).view(np.int32).reshape(columns, -1),
        )


def test_codes_are_those_of_the_emulation(lab: Lab) -> None:
    """A GPU may divide with an error of 2.5 units: a code at a tie may be the other one."""
    x = normal(3, 160) * np.array([[1], [1e-20], [3e6]], np.float32)
    x[1, 32:64] = 0
    found = Codes.read(lab, x)
    pieces = x.reshape(3, 5, 32)
    scales = np.abs(pieces).max(axis=2) / np.float32(127)
    np.testing.assert_allclose(found.scales[:, :5], scales, rtol=4e-7)
    exact = pieces / np.where(scales == 0, 1, scales)[..., None].astype(np.float64)
    assert np.abs(found.codes[:, :5] - exact).max() <= 0.5 + 127 * 8e-7
    np.testing.assert_array_equal(found.codes.sum(axis=2), found.sums)
    assert np.abs(found.codes).max() == 127 and not found.codes[:, 5:].any()
    emulated = Int8Activations().rounded(x)
    kept = (found.codes * found.scales[..., None])[:, :5].reshape(3, 160)
    assert (np.abs(kept - emulated) > 1e-6 * np.abs(x)).mean() < 0.01


def test_ties_go_to_even_and_what_is_next_to_nothing_to_zero(lab: Lab) -> None:
    """Bit for bit: 127 / 127 is exact on every device."""
    x = np.zeros((2, 160), np.float32)
    x[:, :32] = np.arange(32) * np.array([[1], [-1]]) + 0.5
    x[:, 64:96] = np.float32(1e-31) * normal(2, 32)
    x[:, 96:] = np.rint(40 * normal(2, 64)).clip(-126, 126)
    x[:, [31, 127, 159]] = 127
    found = Codes.read(lab, x)
    kept = (found.codes * found.scales[..., None])[:, :5].reshape(2, 160)
    np.testing.assert_array_equal(kept, Int8Activations().rounded(x))
    np.testing.assert_array_equal(found.codes[0, 0, :4], [0, 2, 2, 4])
    np.testing.assert_array_equal(found.codes[1, 0, :4], [0, 0, -2, -2])
    assert not found.codes[:, 1:3].any()


def test_a_norm_in_float16_has_codes_too(lab: Lab) -> None:
    """For matrix instructions. A code at a tie may be the other one."""
    hidden, gain = normal(3, 160), 1e4 * normal(160, seed=1)
    exact = rms_norm(hidden.astype(np.float64), gain).astype(np.float32)
    found, expected = norm_in_float16(lab, hidden, gain), Int8Activations().rounded(exact)
    step = np.abs(exact).reshape(3, 5, 32).max(axis=2).repeat(32, axis=1) / 127
    error = np.abs(found[:, :160] - expected)
    assert (error <= 1.01 * step).all()
    assert (error > 2.0**-10 * np.abs(expected)).mean() < 0.01
    assert (found[:, 160:] == 0).all()


def twin(weight: QuantTensor, x: Codes) -> Floats:
    """The order of gemv.comp with one slice: pieces of 32 exact, a row's tiles one after the other,
    then the four pieces of a tile by twos. Every step is one rounding to float32."""
    spec, (rows, cols) = weight.spec, weight.codes.shape
    pieces = weight.codes.astype(np.int32)
    if weight.zeros is not None:
        pieces = pieces - np.repeat(weight.zeros.astype(np.int32), spec.group, axis=1)
    scales = np.repeat(weight.scales.astype(np.float32), spec.group // 32, axis=1)
    products = np.einsum("rpk,cpk->crp", pieces.reshape(rows, -1, 32), x.codes[:, : cols // 32])
    terms = products.astype(np.float32) * (scales * x.scales[:, None, : cols // 32])
    lanes = np.zeros((len(x.codes), rows, 4), np.float32)
    for piece in range(cols // 32):
        lanes[..., piece % 4] += terms[..., piece]
    pairs = lanes[..., ::2] + lanes[..., 1::2]
    joined: Floats = pairs[..., 0] + pairs[..., 1]
    return joined


@pytest.mark.parametrize(
    ("spec", "dotted"),
    [*((spec, "_dot") for spec in GRIDS), *((spec, "") for spec in GRIDS[::3])],
    ids=str,
)
def test_products_are_those_of_the_twin_bit_for_bit(lab: Lab, spec: Spec, dotted: str) -> None:
    """Four columns beside each other, or one."""
    cols = math.lcm(160, spec.group)
    tensor, kind, x = random_tensor(37, cols, spec), Kind.of(spec), normal(4, cols)
    span, expected = lab.weight(tensor, kind), twin(tensor, Codes.read(lab, x))
    for columns in (x, x[:1]):
        name, size = f"gemv_{kind.name}{dotted}", tensor.codes.shape
        y = product(lab, name, span, kind, size, columns, LANES=64)
        np.testing.assert_array_equal(y, expected[: len(columns)])


@pytest.mark.parametrize("dotted", ["", "_dot"])
@pytest.mark.parametrize("spec", [Spec(4, 32), Spec(5, 64, zero_point=True)], ids=str)
def test_products_of_many_tokens(lab: Lab, spec: Spec, dotted: str) -> None:
    """Sums of pieces in another order than the twin's."""
    cols = math.lcm(160, spec.group)
    tensor, kind, x = random_tensor(37, cols, spec), Kind.of(spec), normal(19, cols)
    span, expected = lab.weight(tensor, kind), twin(tensor, Codes.read(lab, x))
    y = gemm(lab, f"gemm_{kind.name}{dotted}", span, kind, tensor.codes.shape, x)
    bound = 2e-6 * np.abs(x).max(axis=1)[:, None] * np.abs(tensor.dequantize()).sum(axis=1)
    assert (np.abs(y - expected) <= bound).all()
    assert np.abs(y - x @ tensor.dequantize().T).max() > 1e-3  # 16 bits would be nearer


def test_matrix_instructions_get_the_same_values_in_float16(lab: Lab) -> None:
    x = normal(4, 160)
    rows, units = halves(lab, x)
    kept = Codes.read(lab, x)
    expected = (kept.codes * kept.scales[..., None].astype(np.float64)).reshape(4, 256)
    found = lab.get(rows, np.float16, 4, 256) * lab.get(units, np.float32, 4)[:, None]
    np.testing.assert_allclose(found, expected, rtol=2.0**-11, atol=1e-8)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(tiny_bundle(layers=3, vocab=700, group=64))


def opened(bundle: Bundle, cache: Path, **options: Any) -> VulkanSession:
    source = BundleSource(bundle)
    return VulkanSession(bundle.config, source, choose(), pipeline_cache=cache, **options)


@pytest.mark.parametrize("integer_dot", [True, False])
def test_a_model_answers_like_the_emulation(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, integer_dot: bool
) -> None:
    """Hidden states differ from float's by much more than from their INT8 twin's. Keys and values
    are INT8 in both: float16 keys are so far from the twin's float32 ones that codes near ties turn
    over, and the two end as far from each other as from float."""
    if not integer_dot:
        has = type(choose()).has
        without = lambda gpu, name: name != "shaderIntegerDotProduct" and has(gpu, name)  # noqa: E731
        monkeypatch.setattr(type(choose()), "has", without)
    numerics = Numerics(ACTIVATIONS["int8"], KV["int8"])
    session = opened(bundle, tmp_path, max_context=64, numerics=numerics)
    tokens = random_tokens(bundle.config, 1, 12)
    reference, exact = (
        ReferenceSession(BundleWeights(bundle), numerics=each) for each in (numerics, FLOAT)
    )
    actual, emulated, floats = (each.score(tokens)[0] for each in (session, reference, exact))
    loss = np.linalg.norm(emulated - floats)
    assert loss > 0.1 and np.linalg.norm(actual - emulated) <= 0.2 * loss
    logits, expected = (each.logits(emulated, 0, 700) for each in (session, reference))
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    session.close()


def test_matrix_instructions_lose_as_much(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pass of many tokens, as the emulation. Codes near ties turn over."""
    give_matrices(monkeypatch)
    session = opened(bundle, tmp_path, max_context=64, numerics=INT8)
    tokens, weights = random_tokens(bundle.config, 1, 48), BundleWeights(bundle)
    emulation, exact = (ReferenceSession(weights, numerics=each) for each in (INT8, FLOAT))
    actual, emulated, floats = (each.score(tokens)[0] for each in (session, emulation, exact))
    loss = np.linalg.norm(emulated - floats)
    assert 0.9 * loss < np.linalg.norm(actual - floats) < 1.1 * loss
    session.close()


def test_floats_are_not_multiplied_with_integers(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint())
    source = CheckpointSource(checkpoint, "f16")
    with pytest.raises(UsageError, match="INT8 activations need weights of integers"):
        VulkanSession(checkpoint.config, source, choose(), pipeline_cache=tmp_path, numerics=INT8)


@pytest.mark.parametrize(
    ("device", "numerics", "kept"),
    [
        ("vulkan", INT8, INT8),
        ("vulkan:0", Numerics(kv=KV["int8"]), Numerics(kv=KV["int8"])),
        ("vulkan", Numerics(kv=KV["int4"]), FLOAT),
        ("cpu", INT8, FLOAT),
        ("auto", INT8, FLOAT),
    ],
)
def test_a_validated_device_runs_with_what_it_has(
    device: str, numerics: Numerics, kept: Numerics
) -> None:
    assert device_numerics(device, numerics) == kept
