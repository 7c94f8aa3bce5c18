"""Layouts against the formulas of formats/README.md, spelled out one code at a time."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.layout import Layout
from uq.formats.layouts import LAYOUTS
from uq.formats.row_scales import round_scales, split_scales
from uq.formats.spec import BITS, SPECS, QuantTensor, Spec

README = Path(__file__).parents[1] / "formats" / "README.md"
STEPS = [replace(spec, scale_bits=8) for spec in SPECS if spec.group == 32 << spec.bits % 3]
SHAPES = [(1, 128), (8, 256), (16, 128), (17, 384), (32, 640), (33, 1152)]

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
each_spec = pytest.mark.parametrize("spec", [*SPECS, *STEPS], ids=str)

Field = tuple[int, int, int, int]  # byte, its lowest bit, lowest bit of the code, number of bits


def random_tensor(shape: tuple[int, int], spec: Spec, seed: int = 0) -> QuantTensor:
    """Codes and zero points over the whole grid; scales of both signs."""
    rng = np.random.default_rng(seed)
    groups = (shape[0], shape[1] // spec.group)
    codes = rng.integers(spec.qmin, spec.qmax + 1, shape, dtype=np.int8)
    scales = rng.standard_normal(groups).astype(np.float16)
    if spec.row_step:
        scales = round_scales(scales)
    zeros = rng.integers(-8, 8, groups, dtype=np.int8) * np.int8(spec.zero_step)
    return QuantTensor(codes, scales, spec, zeros if spec.zero_point else None)


def outputs(name: str, spec: Spec) -> int:
    """N of an NPU layout."""
    return 16 if name == "npu-aie2p" and spec.bits < 8 else 8


def zero_bytes(name: str, spec: Spec, cols: int) -> int:
    """Z, the size of a plane of zero points."""
    groups = cols // spec.group
    if not spec.zero_point:
        return 0
    if name == "row":
        return 2 * -(-groups // 4)
    if name == "igpu":
        return max(16, 1024 // spec.group)
    return 16 * -(-outputs(name, spec) * groups // 32)


def scale_bytes(name: str, spec: Spec, cols: int) -> int:
    """V, the size of a plane of scales; of `igpu`: in a tile."""
    n = {"row": 1, "igpu": 16}.get(name, outputs(name, spec))
    groups = (128 if name == "igpu" else cols) // spec.group
    if not spec.row_step:
        return 2 * n * groups
    fill = 2 if name == "row" else 16
    return fill * -(-n * groups // fill)


def tile_start(spec: Spec, cols: int, r: int, c: int) -> int:
    """t of `igpu`."""
    size = 256 * spec.bits + scale_bytes("igpu", spec, cols) + zero_bytes("igpu", spec, cols)
    return size * (r // 16 * -(-cols // 128) + c // 128) + 32 * (r // 16) * spec.row_step


def block_bytes(name: str, spec: Spec, cols: int) -> int:
    """S of `row` and of the NPU layouts."""
    n = 1 if name == "row" else outputs(name, spec)
    planes = scale_bytes(name, spec, cols) + zero_bytes(name, spec, cols)
    return n * (cols * spec.bits // 8 + 2 * spec.row_step) + planes


def place_step(name: str, spec: Spec, cols: int, r: int) -> int:
    """Offset of the step of row r."""
    if name == "row":
        return r * block_bytes(name, spec, cols) + cols * spec.bits // 8
    if name == "igpu":
        return tile_start(spec, cols, 16 * (r // 16 + 1), 0) - 32 + 2 * (r % 16)
    n = outputs(name, spec)
    return block_bytes(name, spec, cols) * (r // n) + 2 * (r % n)


def masks(start: int, h: int, e: int) -> list[Field]:
    """Bits 4 and up of code number e."""
    return [(start + 4 * h * (e // 32) + 4 * j + e % 32 // 8, e % 8, 4 + j, 1) for j in range(h)]


def place_code(name: str, spec: Spec, cols: int, r: int, c: int) -> list[Field]:
    """Where the bits of code (r, c) lie."""
    bits, h = spec.bits, spec.high_bits
    if name == "row":
        start = r * block_bytes(name, spec, cols)
        if bits == 8:
            return [(start + c, 0, 0, 8)]
        return [(start + c // 2, 4 * (c % 2), 0, 4), *masks(start + cols // 2, h, c)]
    if name == "igpu":
        t, lane, k = tile_start(spec, cols, r, c), 4 * (r % 16) + c % 128 // 32, c % 32
        if bits == 8:
            return [(t + 1024 * (k // 16) + 16 * lane + k % 16, 0, 0, 8)]
        low = (t + 16 * lane + 4 * (k // 8) + k % 4, 4 * (k // 4 % 2), 0, 4)
        m = h * (k // 4)
        return [low, (t + 1024 + 4 * h * lane + 4 * (m // 8) + k % 4, m % 8, 4, h)]
    n = outputs(name, spec)
    start = block_bytes(name, spec, cols) * (r // n) + zero_bytes(name, spec, cols)
    start += scale_bytes(name, spec, cols) + 2 * n * spec.row_step + 4 * n * bits * (c // 32)
    e = n * (c % 32) + r % n
    if bits == 8:
        return [(start + e, 0, 0, 8)]
    return [(start + e // 2, 4 * (e % 2), 0, 4), *masks(start + 16 * n, h, e)]


def place_scale(name: str, spec: Spec, cols: int, r: int, g: int) -> tuple[int, int]:
    """Offset of the scales that scale (r, g) is one of, and its number there."""
    bits, group, step = spec.bits, spec.group, 2 * spec.row_step
    if name == "row":
        return r * block_bytes(name, spec, cols) + cols * bits // 8 + step, g
    if name == "igpu":
        c = g * group
        number = r % 16 * (128 // group) + c % 128 // group
        return tile_start(spec, cols, r, c) + 256 * bits, number
    n = outputs(name, spec)
    return block_bytes(name, spec, cols) * (r // n) + n * step, n * g + r % n


def place_zero(name: str, spec: Spec, cols: int, r: int, g: int) -> tuple[int, int]:
    """Offset and nibble of zero point (r, g)."""
    start, number = place_scale(name, spec, cols, r, g)
    return start + scale_bytes(name, spec, cols) + number // 2, number % 2


def tile_slowly(name: str, tensor: QuantTensor) -> bytes:
    """Every code, scale and zero point put where the specification says; the rest stays zero."""
    spec, (rows, cols) = tensor.spec, tensor.shape
    image = bytearray(LAYOUTS[name].nbytes(rows, cols, spec))
    for (r, c), code in np.ndenumerate(tensor.codes):
        for offset, bit, first, width in place_code(name, spec, cols, r, c):
            image[offset] |= (int(code) >> first & ((1 << width) - 1)) << bit
    scales: NDArray[np.generic] = tensor.scales.astype("<f2")
    if spec.row_step:
        steps, scales = split_scales(tensor.scales)
        for r, step in enumerate(steps):
            offset = place_step(name, spec, cols, r)
            image[offset : offset + 2] = step.astype("<f2").tobytes()
    for (r, g), scale in np.ndenumerate(scales):
        start, number = place_scale(name, spec, cols, r, g)
        offset = start + scale.nbytes * number
        image[offset : offset + scale.nbytes] = scale.tobytes()
    if tensor.zeros is not None:
        for (r, g), zero in np.ndenumerate(tensor.zeros):
            offset, nibble = place_zero(name, spec, cols, r, g)
            image[offset] |= (int(zero) // spec.zero_step & 15) << (4 * nibble)
    return bytes(image)


def equal(found: QuantTensor, expected: QuantTensor) -> None:
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales.view("u2"), expected.scales.view("u2"))
    assert (found.zeros is None) == (expected.zeros is None)
    if found.zeros is not None:
        np.testing.assert_array_equal(found.zeros, expected.zeros)


@each_layout
@each_spec
@pytest.mark.parametrize("shape", [(16, 256), (33, 128), (5, 384)], ids=str)
def test_bytes_are_where_the_formulas_put_them(
    layout: Layout, spec: Spec, shape: tuple[int, int]
) -> None:
    tensor = random_tensor(shape, spec)
    assert layout.tile(tensor).tobytes() == tile_slowly(layout.name, tensor)


@each_layout
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.group == 32], ids=str)
@pytest.mark.parametrize("cols", [32, 96, 160])
def test_columns_beside_whole_tiles(layout: Layout, spec: Spec, cols: int) -> None:
    tensor = random_tensor((19, cols), spec)
    assert layout.tile(tensor).tobytes() == tile_slowly(layout.name, tensor)
    equal(layout.untile(layout.tile(tensor), tensor.shape, spec), tensor)


@each_layout
@each_spec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_untile_inverts_tile(layout: Layout, spec: Spec, shape: tuple[int, int]) -> None:
    tensor = random_tensor(shape, spec)
    tiled = layout.tile(tensor)
    tiled.flags.writeable = False
    equal(layout.untile(tiled, shape, spec), tensor)
    assert tiled.size == layout.nbytes(*shape, spec)


@each_layout
@each_spec
def test_tile_inverts_untile(layout: Layout, spec: Spec) -> None:
    """Without padding a layout is a permutation: it keeps arbitrary bytes, too."""
    shape = (32, 1024)
    noise = np.random.default_rng(3).bytes(layout.nbytes(*shape, spec))
    data = np.frombuffer(noise, np.uint8)
    if spec.bits == 8 or spec.zero_point or spec.row_step:
        tensor = layout.untile(data, shape, spec)
        np.maximum(tensor.codes, spec.qmin, out=tensor.codes)  # -128 is off the grid
        if spec.row_step:  # noise has steps of any bits
            tame = np.nan_to_num(tensor.scales).clip(-1000, 1000)
            tensor = replace(tensor, scales=round_scales(tame))
        data = layout.tile(tensor)  # without the padding of zero points
    assert layout.tile(layout.untile(data, shape, spec)).tobytes() == data.tobytes()


@each_layout
@each_spec
def test_row_blocks_can_be_tiled_one_after_the_other(layout: Layout, spec: Spec) -> None:
    tensor = random_tensor((70, 256), spec)
    cuts = [0, 16, 64, 70]
    pieces = [layout.tile(tensor.rows(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert b"".join(piece.tobytes() for piece in pieces) == layout.tile(tensor).tobytes()


@each_layout
@pytest.mark.parametrize("spec", [Spec(8, 64), Spec(6, 32, True)], ids=str)
def test_tensors_larger_than_a_chunk(layout: Layout, spec: Spec) -> None:
    tensor = random_tensor((3000, 640), spec)
    equal(layout.untile(layout.tile(tensor), tensor.shape, spec), tensor)


@each_layout
@each_spec
def test_blocks_keep_the_alignment(layout: Layout, spec: Spec) -> None:
    for cols in (128, 640, 1152):
        assert layout.block(cols, spec).itemsize % layout.alignment == 0


@each_layout
@each_spec
def test_real_shapes_are_stored_without_padding(layout: Layout, spec: Spec) -> None:
    stored, counted = layout.nbytes(2048, 640, spec), spec.nbytes(2048, 640)
    # Planes of zero points and of scales in 8 bits are filled up to the layout's alignment.
    filled = 0.0625 * spec.zero_point + 0.0125 * spec.row_step
    assert counted <= stored <= counted + filled / 8 * 2048 * 640


@each_layout
@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (5, 16), (6, -33), (8, -128)])
def test_codes_off_the_grid_are_refused(layout: Layout, bits: int, code: int) -> None:
    tensor = random_tensor((16, 128), Spec(bits, 64))
    tensor.codes[7, 100] = code
    with pytest.raises(ValueError, match="codes outside"):
        layout.tile(tensor)


@each_layout
@pytest.mark.parametrize("zeros", [None, np.full((16, 2), 9, "i1"), np.full((16, 2), 3, "i1")])
def test_zero_points_off_the_grid_are_refused(
    layout: Layout, zeros: NDArray[np.int8] | None
) -> None:
    tensor = replace(random_tensor((16, 128), Spec(5, 64)), spec=Spec(5, 64, True), zeros=zeros)
    with pytest.raises(ValueError, match="zero points (missing|outside)"):
        layout.tile(tensor)


@each_layout
def test_zero_points_without_a_place_are_refused(layout: Layout) -> None:
    tensor = replace(random_tensor((16, 128), Spec(5, 64, True)), spec=Spec(5, 64))
    with pytest.raises(ValueError, match="zero points given with int5 g64"):
        layout.tile(tensor)


@each_layout
def test_a_group_that_does_not_divide_is_refused(layout: Layout) -> None:
    tensor = random_tensor((16, 96), Spec(4, 32))
    with pytest.raises(ValueError, match="96 columns do not divide by group 64"):
        layout.tile(QuantTensor(tensor.codes, tensor.scales, Spec(4, 64)))


@each_layout
def test_data_of_another_length_is_refused(layout: Layout) -> None:
    spec = Spec(4, 32)
    tiled = layout.tile(random_tensor((32, 128), spec))
    with pytest.raises(ValueError, match="bytes"):
        layout.untile(tiled, (64, 128), spec)


def example_tensor(shape: tuple[int, int], spec: Spec) -> QuantTensor:
    """The tensor of the worked examples in the specification."""
    r, c = np.indices(shape)
    step = 16 if spec.bits == 8 else 3
    codes = (step * r + c) % (spec.qmax - spec.qmin + 1) + spec.qmin
    r, g = np.indices((shape[0], shape[1] // spec.group))
    scales = (0x3C00 + 16 * r + g).astype(np.uint16).view(np.float16)
    if spec.row_step:
        scales = ((1 + r % 8 / 8) * ((16 * r + g) % 255 - 127)).astype(np.float16)
    zeros = ((r + g) % 16 - 8) * spec.zero_step if spec.zero_point else None
    return QuantTensor(
        codes.astype(np.int8), scales, spec, None if zeros is None else zeros.astype(np.int8)
    )


def test_worked_examples_of_the_specification() -> None:
    line = r"\| `([\w-]+)` \| (\d)(z?)(s?) \| (\d+) \| (\d+) x (\d+) \| (\d+) \| `([0-9a-f ]+)` \|"
    examples = re.findall(line, README.read_text())
    assert {name for name, *_ in examples} == set(LAYOUTS)
    assert {name for name, _, _, s, *_ in examples if s} == set(LAYOUTS)
    assert {(int(bits), z) for _, bits, z, *_ in examples} >= {(b, "") for b in BITS} | {(4, "z")}
    for name, bits, z, s, group, rows, cols, offset, expected in examples:
        spec = Spec(int(bits), int(group), z == "z", 8 if s else 16)
        tensor = example_tensor((int(rows), int(cols)), spec)
        tiled = LAYOUTS[name].tile(tensor).tobytes()
        found = tiled[int(offset) :][: len(bytes.fromhex(expected))]
        assert found.hex(" ") == expected, (name, spec, offset)
