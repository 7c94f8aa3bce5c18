"""The CPU's matrix products and layout against float64, and against each other bit for bit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.layouts import LAYOUTS
from uq.formats.row_scales import round_scales
from uq.formats.spec import SPECS, QuantTensor, Spec
from uq.kernels.cpu.elementwise import Activations, quantize_rows
from uq.kernels.cpu.embedding import embed
from uq.kernels.cpu.gemm import gemm, gemm_scratch
from uq.kernels.cpu.gemv import gemv
from uq.kernels.cpu.intrinsics import PAIR_ORDER
from uq.kernels.cpu.layout import GROUP_BYTES, SCALES, Arena, Linear, WeightSource, pack

Floats = NDArray[np.float32]
TOKENS = 30  # two wide tiles, one narrow, two single rows


@dataclass(frozen=True)
class Record:
    shape: tuple[int, int]
    spec: Spec
    layout: str


@dataclass(frozen=True)
class Weights(WeightSource):
    """A source of weights in memory, named by their index."""

    tensors: Sequence[QuantTensor]
    layout: str = "igpu"

    def raw(self, name: str) -> tuple[NDArray[np.uint8], Record]:
        tensor = self.tensors[int(name)]
        record = Record(tensor.shape, tensor.spec, self.layout)
        return LAYOUTS[self.layout].tile(tensor), record

    def array(self, name: str) -> Floats:
        raise KeyError(name)


def random_weight(rows: int, cols: int, spec: Spec, seed: int = 0) -> QuantTensor:
    rng = np.random.default_rng(seed)
    groups = (rows, cols // spec.group)
    codes = rng.integers(spec.qmin, spec.qmax + 1, (rows, cols), dtype=np.int8)
    scales = rng.standard_normal(groups) * 0.01  # signed, as the format allows
    zeros = rng.integers(-8, 8, groups, dtype=np.int8) * np.int8(spec.zero_step)
    return QuantTensor(codes, scales.astype("f2"), spec, zeros if spec.zero_point else None)


def packed(*tensors: QuantTensor, layout: str = "igpu") -> tuple[Arena, Linear]:
    names = [str(index) for index in range(len(tensors))]
    arena = pack(Weights(tensors, layout), {"all": names})
    return arena, arena.linears["all"]


def quantized(x: Floats) -> Activations:
    result = Activations.empty(*x.shape)
    quantize_rows(x, *result.arrays)
    return result


def by_gemm(arena: Arena, linear: Linear, x: Activations) -> Floats:
    tokens = len(x.codes)
    out = np.full((tokens, linear.width), np.nan, np.float32)
    scratch = np.full((os.cpu_count() or 1, gemm_scratch(tokens)), np.nan)
    gemm(arena.data, linear.parts, x.codes, x.scales, out, scratch.astype(np.float32))
    return out


def by_gemv(arena: Arena, linear: Linear, x: Activations) -> Floats:
    out = np.full((len(x.codes), linear.width), np.nan, np.float32)
    for row in range(len(out)):
        one = slice(row, row + 1)
        gemv(arena.data, linear.parts, x.codes[one], x.scales[one], x.offsets[one], out[one])
    return out


def activations(tokens: int, cols: int) -> Floats:
    """Random numbers of very different sizes from chunk to chunk."""
    rng = np.random.default_rng(1)
    sizes = 10.0 ** rng.uniform(-3, 3, (tokens, cols // 32, 1))
    return (
        (rng.standard_normal((tokens, cols // 32, 32)) * sizes).reshape(tokens, cols).astype("f4")
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (37, 640), (1, 2176)], ids=str)
def test_products_are_those_of_the_dequantized_weight(rows: int, cols: int, spec: Spec) -> None:
    weight = random_weight(rows, cols, spec)
    x = activations(TOKENS, cols)
    matrix = weight.dequantize().astype(np.float64)
    out = by_gemm(*packed(weight), quantized(x))[:, :rows]
    # Half a step of each activation, and some roundings of float32.
    steps = np.abs(x.reshape(TOKENS, -1, 32)).max(axis=2).repeat(32, axis=1) / 32767
    bound = (0.5 * steps + 2e-6 * np.abs(x)) @ np.abs(matrix).T
    assert (np.abs(out - x.astype(np.float64) @ matrix.T) <= bound).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_token_has_the_bits_of_many(spec: Spec) -> None:
    arena, linear = packed(random_weight(75, 2176, spec))
    x = quantized(activations(TOKENS, 2176))
    np.testing.assert_array_equal(by_gemv(arena, linear, x), by_gemm(arena, linear, x))


def test_weights_of_different_grids_share_a_call() -> None:
    sizes = [48, 17, 33, 5]
    weights = [random_weight(sizes[i % 4], 256, spec, i) for i, spec in enumerate(SPECS)]
    arena, linear = packed(*weights)
    x = quantized(activations(TOKENS, 256))
    for product in (by_gemm, by_gemv):
        together = product(arena, linear, x)
        for weight, column in zip(weights, linear.columns, strict=True):
            alone = product(*packed(weight), x)
            np.testing.assert_array_equal(together[:, column:][:, : alone.shape[1]], alone)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.group == 64], ids=str)
def test_every_layout_opens_to_the_same_bytes(layout: str, spec: Spec) -> None:
    weight = random_weight(40, 320, spec)
    arena, linear = packed(weight, layout=layout)
    expected, _ = packed(weight)
    end = linear.parts[0, SCALES] + 3 * 5 * linear.parts[0, GROUP_BYTES]  # row blocks, groups
    np.testing.assert_array_equal(arena.data[:end], expected.data[:end])


NARROW = [Spec(4, 32), Spec(5, 64, zero_point=True), Spec(6, 128), Spec(8, 32)]


def narrow_weight(spec: Spec) -> QuantTensor:
    weight = random_weight(75, 640, replace(spec, scale_bits=8))
    return replace(weight, scales=round_scales(weight.scales))


@pytest.mark.parametrize("spec", NARROW, ids=str)
def test_scales_of_8_bits_give_the_bits_of_the_same_in_16(spec: Spec) -> None:
    weight, x = narrow_weight(spec), quantized(activations(TOKENS, 640))
    (arena, linear), expanded = packed(weight), packed(weight.expanded())
    for product in (by_gemm, by_gemv):
        found = product(arena, linear, x)
        np.testing.assert_array_equal(found, product(*expanded, x))
        part, row = linear.rows(40, 60)
        assert (row, part.width) == (32, 32)
        np.testing.assert_array_equal(product(arena, part, x), found[:, 32:64])
    assert linear.nbytes == weight.spec.nbytes(*weight.shape) < expanded[1].nbytes


@pytest.mark.parametrize("spec", NARROW, ids=str)
def test_embedding_rows_with_scales_of_8_bits_are_exact(spec: Spec) -> None:
    weight, tokens = narrow_weight(spec), np.array([0, 74, 16], np.int32)
    arena, linear = packed(weight)
    out = np.empty((3, 640), np.float32)
    embed(tokens, arena.data, linear.parts, np.float32(2), out)
    np.testing.assert_array_equal(out, 2 * weight.dequantize()[tokens])


def test_the_layout_is_the_documented_one() -> None:
    """Word i of a lane holds channels 8 i .. 8 i + 7 of its row, as code + 8."""
    weight = random_weight(20, 160, Spec(4, 32))
    arena, linear = packed(weight)
    words = arena.data[: 32 * 160 // 2].view(np.uint32).reshape(2, 5, 4, 16)
    row, channel = 18, 75
    word = int(words[row // 16, channel // 32, channel % 32 // 8, row % 16])
    shift = 8 * (channel % 4) + 4 * (channel % 8 // 4)
    assert (word >> shift & 15) - 8 == weight.codes[row, channel]
    assert linear.nbytes == weight.spec.nbytes(*weight.shape)


def test_high_bits_lie_behind_the_nibbles_of_their_chunk() -> None:
    """Bits 4 and 5 of channels 0 .. 15 of a chunk in word 4, of 16 .. 31 in word 5; zero points."""
    weight = random_weight(20, 160, Spec(6, 32, True))
    arena, linear = packed(weight)
    words = arena.data[: 32 * 160 * 6 // 8].view(np.uint32).reshape(2, 5, 6, 16)
    row, channel = 18, 64 + 21
    word = int(words[1, 2, 5, 2])
    high = word >> 8 * (channel % 4) + 2 * (channel % 16 // 4) & 3
    assert high == (int(weight.codes[row, channel]) + 32) >> 4
    groups = arena.data[linear.parts[0, SCALES] :][: 10 * 40].reshape(2, 5, 40)
    nibble = int(groups[1, 2, 32 + 1]) & 15  # of row 18
    assert weight.zeros is not None
    assert 4 * (nibble - 8) == weight.zeros[row, 2]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_embedding_rows_are_exact(spec: Spec) -> None:
    table = random_weight(50, 384, spec)
    arena, linear = packed(table)
    tokens = np.array([0, 49, 17, 16, 15], np.int32)
    hidden = np.empty((5, 384), np.float32)
    embed(tokens, arena.data, linear.parts, np.float32(2.5), hidden)
    expected = table.dequantize()[tokens] * np.float32(2.5)
    np.testing.assert_array_equal(hidden, expected)
    embed(tokens[2:3], arena.data, linear.parts, np.float32(2.5), hidden[:1])
    np.testing.assert_array_equal(hidden[0], expected[2])


@pytest.mark.parametrize("spec", [Spec(8, 64), Spec(5, 32), Spec(6, 64, True)], ids=str)
@pytest.mark.parametrize(("start", "stop"), [(0, 75), (16, 32), (5, 6), (31, 70)])
def test_rows_of_a_weight_by_themselves(start: int, stop: int, spec: Spec) -> None:
    arena, whole = packed(random_weight(75, 256, spec))
    x = quantized(activations(3, 256))
    part, first = whole.rows(start, stop)
    out = by_gemm(arena, part, x)[:, start - first : stop - first]
    np.testing.assert_array_equal(out, by_gemm(arena, whole, x)[:, start:stop])


def test_activations_are_rounded_to_sixteen_bits() -> None:
    x = activations(4, 96)
    result = quantized(x)
    peak = np.abs(x.reshape(4, 3, 32)).max(axis=2)
    order = [first + channel for first in range(0, 96, 8) for channel in PAIR_ORDER]
    codes = np.empty_like(result.codes)
    codes[:, order] = result.codes
    values = codes.reshape(4, 3, 32) * result.scales[:, :, None].astype(np.float64)
    np.testing.assert_allclose(result.scales, peak / 32767, rtol=3e-7)
    assert (np.abs(values - x.reshape(4, 3, 32)) <= peak[:, :, None] / 32767 * 0.51).all()
    np.testing.assert_array_equal(result.offsets, -8 * codes.reshape(4, 3, 32).sum(2, np.int32))


def test_zeros_give_zeros() -> None:
    weight = random_weight(16, 64, Spec(4, 32))
    zero_scales = QuantTensor(weight.codes, np.zeros_like(weight.scales), weight.spec)
    x = activations(2, 64)
    assert not by_gemv(*packed(zero_scales), quantized(x)).any()
    assert not by_gemm(*packed(weight), quantized(np.zeros_like(x))).any()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_activation_breaks_the_output(broken: float) -> None:
    x = activations(2, 64)
    x[1, 40] = broken
    out = by_gemm(*packed(random_weight(16, 64, Spec(8, 32))), quantized(x))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def digest_of_products() -> str:
    """Hash of products that touch every instruction of the two kernels."""
    arena, linear = packed(*[random_weight(35, 128, spec) for spec in SPECS])
    x = quantized(activations(TOKENS, 128))
    products = np.stack([by_gemm(arena, linear, x), by_gemv(arena, linear, x)])
    inputs = x.codes.tobytes() + x.scales.tobytes() + x.offsets.tobytes()
    return hashlib.sha256(inputs + products.tobytes()).hexdigest()


def test_processors_without_wide_vectors_give_the_same_bits(tmp_path: Path) -> None:
    """The generic instructions, on a processor that numba believes to be of 2013.

    In a cache of their own: where processes of two processors compile a function at the same time,
    numba's cache may hand one the code of the other.
    """
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
    environment["NUMBA_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest_of_products()


if __name__ == "__main__":
    print(digest_of_products())
