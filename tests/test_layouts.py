"""Layouts against the formulas of formats/README.md, spelled out one code at a time."""

import re
from pathlib import Path

import numpy as np
import pytest

from uq.formats.layouts import LAYOUTS, Layout
from uq.formats.spec import BITS, GROUPS, QuantTensor, Spec

README = Path(__file__).parents[1] / "formats" / "README.md"
OUTPUTS = {("npu-aie2", 4): 8, ("npu-aie2", 8): 8, ("npu-aie2p", 4): 16, ("npu-aie2p", 8): 8}
SPECS = [Spec(bits, group) for bits in BITS for group in GROUPS]
SHAPES = [(1, 128), (8, 256), (16, 128), (17, 384), (32, 640), (33, 1152)]

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"int{s.bits}g{s.group}")


def random_tensor(shape: tuple[int, int], spec: Spec, seed: int = 0) -> QuantTensor:
    """Codes over the whole grid; scales of any bits but NaN, negative ones included."""
    rng = np.random.default_rng(seed)
    rows, cols = shape
    codes = rng.integers(spec.qmin, spec.qmax + 1, shape, dtype=np.int8)
    scales = rng.standard_normal((rows, cols // spec.group)).astype(np.float16)
    return QuantTensor(codes, scales, spec)


def place_code(name: str, spec: Spec, cols: int, r: int, c: int) -> tuple[int, int]:
    """Offset and nibble of code (r, c)."""
    bits, group = spec.bits, spec.group
    if name == "row":
        start = r * (cols * bits // 8 + 2 * (cols // group))
        return (start + c // 2, c % 2) if bits == 4 else (start + c, 0)
    if name == "igpu":
        t = (256 * bits + 2 * 16 * (128 // group)) * (r // 16 * -(-cols // 128) + c // 128)
        lane, k = 4 * (r % 16) + c % 128 // 32, c % 32
        if bits == 4:
            return t + 16 * lane + 4 * (k // 8) + k % 4, k // 4 % 2
        return t + 1024 * (k // 16) + 16 * lane + k % 16, 0
    n = OUTPUTS[name, bits]
    start = n * (2 * (cols // group) + cols * bits // 8) * (r // n) + 2 * n * (cols // group)
    e = n * c + r % n
    return (start + e // 2, e % 2) if bits == 4 else (start + e, 0)


def place_scale(name: str, spec: Spec, cols: int, r: int, g: int) -> int:
    """Offset of scale (r, g)."""
    bits, group = spec.bits, spec.group
    if name == "row":
        return r * (cols * bits // 8 + 2 * (cols // group)) + cols * bits // 8 + 2 * g
    if name == "igpu":
        c = g * group
        t = (256 * bits + 2 * 16 * (128 // group)) * (r // 16 * -(-cols // 128) + c // 128)
        return t + 256 * bits + 2 * (r % 16 * (128 // group) + c % 128 // group)
    n = OUTPUTS[name, bits]
    return n * (2 * (cols // group) + cols * bits // 8) * (r // n) + 2 * (n * g + r % n)


def tile_slowly(name: str, tensor: QuantTensor) -> bytes:
    """Every code and scale put where the specification says; the rest stays zero."""
    spec, (rows, cols) = tensor.spec, tensor.shape
    image = bytearray(LAYOUTS[name].nbytes(rows, cols, spec))
    for (r, c), code in np.ndenumerate(tensor.codes):
        offset, nibble = place_code(name, spec, cols, r, c)
        image[offset] |= (int(code) & (0xF if spec.bits == 4 else 0xFF)) << (4 * nibble)
    for (r, g), scale in np.ndenumerate(tensor.scales):
        offset = place_scale(name, spec, cols, r, g)
        image[offset : offset + 2] = scale.astype("<f2").tobytes()
    return bytes(image)


@each_layout
@each_spec
@pytest.mark.parametrize("shape", [(16, 256), (33, 128), (5, 384)], ids=str)
def test_bytes_are_where_the_formulas_put_them(
    layout: Layout, spec: Spec, shape: tuple[int, int]
) -> None:
    tensor = random_tensor(shape, spec)
    assert layout.tile(tensor).tobytes() == tile_slowly(layout.name, tensor)


@each_layout
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [32, 96, 160])
def test_columns_beside_whole_tiles(layout: Layout, bits: int, cols: int) -> None:
    tensor = random_tensor((19, cols), Spec(bits, 32))
    assert layout.tile(tensor).tobytes() == tile_slowly(layout.name, tensor)
    np.testing.assert_array_equal(
        layout.untile(layout.tile(tensor), tensor.shape, tensor.spec).codes, tensor.codes
    )


@each_layout
@each_spec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_untile_inverts_tile(layout: Layout, spec: Spec, shape: tuple[int, int]) -> None:
    tensor = random_tensor(shape, spec)
    tiled = layout.tile(tensor)
    tiled.flags.writeable = False
    back = layout.untile(tiled, shape, spec)
    np.testing.assert_array_equal(back.codes, tensor.codes)
    np.testing.assert_array_equal(back.scales.view(np.uint16), tensor.scales.view(np.uint16))
    assert tiled.size == layout.nbytes(*shape, spec)


@each_layout
@each_spec
def test_tile_inverts_untile(layout: Layout, spec: Spec) -> None:
    """Without padding a layout is a permutation: it keeps arbitrary bytes, too."""
    shape = (32, 256)
    noise = np.random.default_rng(3).bytes(layout.nbytes(*shape, spec))
    data = np.frombuffer(noise, np.uint8)
    if spec.bits == 8:
        tensor = layout.untile(data, shape, spec)
        np.maximum(tensor.codes, -127, out=tensor.codes)  # -128 is off the grid
        data = layout.tile(tensor)
    assert layout.tile(layout.untile(data, shape, spec)).tobytes() == data.tobytes()


@each_layout
@each_spec
def test_row_blocks_can_be_tiled_one_after_the_other(layout: Layout, spec: Spec) -> None:
    tensor = random_tensor((70, 256), spec)
    cuts = [0, 16, 64, 70]
    pieces = [
        layout.tile(QuantTensor(tensor.codes[a:b], tensor.scales[a:b], spec))
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    assert b"".join(piece.tobytes() for piece in pieces) == layout.tile(tensor).tobytes()


@each_layout
def test_tensors_larger_than_a_chunk(layout: Layout) -> None:
    tensor = random_tensor((3000, 640), Spec(8, 64))
    back = layout.untile(layout.tile(tensor), tensor.shape, tensor.spec)
    np.testing.assert_array_equal(back.codes, tensor.codes)
    np.testing.assert_array_equal(back.scales, tensor.scales)


@each_layout
@each_spec
def test_blocks_keep_the_alignment(layout: Layout, spec: Spec) -> None:
    for cols in (128, 640, 1152):
        assert layout.block(cols, spec).itemsize % layout.alignment == 0


@each_layout
@each_spec
def test_real_shapes_are_stored_without_padding(layout: Layout, spec: Spec) -> None:
    assert layout.nbytes(2048, 640, spec) == spec.nbytes(2048, 640)


@each_layout
@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (8, -128)])
def test_codes_off_the_grid_are_refused(layout: Layout, bits: int, code: int) -> None:
    tensor = random_tensor((16, 128), Spec(bits, 64))
    tensor.codes[7, 100] = code
    with pytest.raises(ValueError, match="codes outside"):
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
    codes = (3 * r + c) % 16 - 8 if spec.bits == 4 else (16 * r + c) % 255 - 127
    r, g = np.indices((shape[0], shape[1] // spec.group))
    scales = (0x3C00 + 16 * r + g).astype(np.uint16).view(np.float16)
    return QuantTensor(codes.astype(np.int8), scales, spec)


def test_worked_examples_of_the_specification() -> None:
    line = r"\| `([\w-]+)` \| (\d) \| (\d+) \| (\d+) x (\d+) \| (\d+) \| `([0-9a-f ]+)` \|"
    examples = re.findall(line, README.read_text())
    assert {name for name, *_ in examples} == set(LAYOUTS)
    for name, bits, group, rows, cols, offset, expected in examples:
        tensor = example_tensor((int(rows), int(cols)), Spec(int(bits), int(group)))
        tiled = LAYOUTS[name].tile(tensor).tobytes()
        found = tiled[int(offset) :][: len(bytes.fromhex(expected))]
        assert found.hex(" ") == expected, (name, bits, offset)
