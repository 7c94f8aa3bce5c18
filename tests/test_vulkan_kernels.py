"""Every Vulkan kernel of the decode path against its float64 twin."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.vulkan_lab import Floats, Lab, no_messages, product  # noqa: F401
from uq.formats.spec import SPECS, QuantTensor, Spec
from uq.kernels.vulkan.arithmetic import run
from uq.kernels.vulkan.push import addresses, floats, words
from uq.kernels.vulkan.state import CHOOSE_COUNTER, blank, views
from uq.kernels.vulkan.tuning import CHOOSE, GEGLU
from uq.kernels.vulkan.weights import Kind, tiles_of

Doubles = NDArray[np.float64]
FLOATS = ("f16", "bf16", "f32")
GRIDS = tuple(spec for i, spec in enumerate(SPECS) if i % 3 == i // 3 % 3)  # each with one group
ROWS, COLS = 37, 160  # neither fills its last tile


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"))
    yield lab
    lab.close()


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_tensor(rows: int, cols: int, spec: Spec) -> QuantTensor:
    rng = np.random.default_rng(1)
    codes = rng.integers(spec.qmin, spec.qmax + 1, (rows, cols), np.int8)
    groups = (rows, cols // spec.group)
    scales = rng.normal(0, 0.02, groups).astype(np.float16)
    zeros = None
    if spec.zero_point:
        steps = rng.integers(-8, 8, groups, np.int8)
        zeros = (steps * spec.zero_step).astype(np.int8)
    return QuantTensor(codes, scales, spec, zeros)


def input_error(x: Floats) -> Doubles:
    """What rounding to 16 bits, scaled for each 32 channels, may add to a channel."""
    peaks = np.abs(x.astype(np.float64)).reshape(len(x), -1, 32).max(axis=2)
    return np.repeat(peaks / 65024, 32, axis=1)


def assert_product(actual: Floats, weight: Floats, x: Floats, *, exact_x: bool) -> None:
    exact, w = x.astype(np.float64), weight.astype(np.float64)
    bound = 1e-6 * np.abs(exact) @ np.abs(w).T
    if not exact_x:
        bound += 1.01 * input_error(x) @ np.abs(w).T
    assert (np.abs(actual - exact @ w.T) <= bound).all()


@pytest.mark.parametrize(
    ("spec", "dotted"),
    [*((spec, "_dot") for spec in SPECS), *((spec, "") for spec in GRIDS)],
    ids=str,
)
def test_product_of_codes(lab: Lab, spec: Spec, dotted: str) -> None:
    cols = math.lcm(COLS, spec.group)
    tensor, kind = random_tensor(ROWS, cols, spec), Kind.of(spec)
    x = normal(2, cols)
    name = f"gemv_{kind.name}{dotted}"
    y = product(lab, name, lab.weight(tensor, kind), kind, tensor.shape, x)
    assert_product(y, tensor.dequantize(), x, exact_x=False)


@pytest.mark.parametrize("name", FLOATS)
def test_product_of_floats(lab: Lab, name: str) -> None:
    weight, x = normal(ROWS, COLS), normal(2, COLS, seed=1)
    if name == "bf16":
        weight = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)
    if name == "f16":
        weight = weight.astype(np.float16).astype(np.float32)
    kind = Kind(name)
    y = product(lab, f"gemv_{name}", lab.weight(weight, kind), kind, weight.shape, x)
    assert_product(y, weight, x, exact_x=True)


@pytest.mark.parametrize(
    ("columns", "lanes", "blocks"),
    [(1, 64, 1), (1, 64, 2), (1, 192, 4), (1, 512, 1), (3, 192, 2), (16, 128, 1)],
)
def test_product_however_it_is_cut(lab: Lab, columns: int, lanes: int, blocks: int) -> None:
    tensor, kind = random_tensor(ROWS, 640, Spec(4, 32)), Kind.of(Spec(4, 32))
    x = normal(columns, 640)
    span = lab.weight(tensor, kind)
    y = product(lab, "gemv_int4", span, kind, tensor.shape, x, LANES=lanes, BLOCKS=blocks)
    assert_product(y, tensor.dequantize(), x, exact_x=False)


def test_activations_are_exact_where_they_can_be(lab: Lab) -> None:
    """Whole multiples of the scale come back bit for bit, zeros and the greatest included."""
    x = np.zeros((1, 64), np.float32)
    x[0, :32] = np.arange(-32512, 32513, 2097.29).astype(np.int32)[:32]
    x[0, 0] = -32512
    tensor = QuantTensor(np.eye(64, dtype=np.int8), np.ones((64, 2), np.float16), Spec(8, 32))
    kind = Kind.of(tensor.spec)
    y = product(lab, "gemv_int8", lab.weight(tensor, kind), kind, (64, 64), x)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("spec", SPECS[::3], ids=str)
def test_embedding_rows(lab: Lab, spec: Spec) -> None:
    cols = 2 * math.lcm(96, spec.group)
    tensor, kind = random_tensor(53, cols, spec), Kind.of(spec)
    state = blank()
    views(state)["tokens"][:4] = tokens = [0, 17, 52, 17]
    hidden = lab.room(4 * cols)
    push = addresses(lab.weight(tensor, kind), hidden, lab.put(state))
    sizes = {**kind.constants, "SCALE": 2.0, "HIDDEN": cols}
    lab.run(f"embed_{kind.name}", push, 4, LANES=64, **sizes)
    expected = 2 * tensor.dequantize()[tokens]
    np.testing.assert_array_equal(lab.get(hidden, np.float32, 4, cols), expected)


def rms_norm(x: Doubles, gain: Floats) -> Doubles:
    out: Doubles = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * gain
    return out


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize(("size", "lanes"), [(96, 64), (640, 64), (1152, 256)])
def test_joining_the_residual_stream(lab: Lab, size: int, lanes: int, post: bool) -> None:
    branch, hidden, branch_gain, gain = (normal(2, size, seed=i) for i in range(4))
    given = [lab.put(values) for values in (branch, hidden)]
    gains = [lab.put(values[0]) for values in (branch_gain, gain)]
    sum_, normed, x = lab.room(2 * size), lab.room(2 * size), lab.room(2 * 72 * size)
    push = addresses(*given, sum_, *gains, normed, x, x, x) + floats(0.75)
    how = {"HAS_BRANCH": True, "KEEP_NORMED": True, "POST_NORM": post}
    lab.run("norm", push, 2, **how, **norm_sizes(size, lanes))
    joined = branch.astype(np.float64)
    joined = 0.75 * (hidden + (rms_norm(joined, branch_gain[0]) if post else joined))
    np.testing.assert_allclose(lab.get(sum_, np.float32, 2, size), joined, rtol=3e-6, atol=3e-6)
    expected = rms_norm(joined, gain[0])
    np.testing.assert_allclose(lab.get(normed, np.float32, 2, size), expected, rtol=1e-5, atol=1e-5)


def norm_in_float16(lab: Lab, hidden: Floats, gain: Floats) -> Doubles:
    """(3, 256) of hidden states (3, 160)."""
    joined, normed, x = (lab.room(3 * 256) for _ in range(3))
    half, units = lab.room(3 * 128), lab.room(3)
    given = [lab.put(hidden), lab.put(gain)]
    push = addresses(given[0], given[0], joined, given[1], given[1], normed, x, half, units)
    lab.run("norm", push, 3, HALF_OUT=True, **norm_sizes(160, 64))
    found: Doubles = lab.get(half, np.float16, 3, 256).astype(np.float64)
    found *= lab.get(units, np.float32, 3, 1)
    return found


def test_a_norm_in_float16(lab: Lab) -> None:
    hidden, gain = normal(3, 160), 1e4 * normal(160, seed=1)
    found, expected = norm_in_float16(lab, hidden, gain), rms_norm(hidden.astype(np.float64), gain)
    error = np.abs(found[:, :160] - expected)
    assert (error <= 2.0**-10 * np.abs(expected) + 2.0**-24 * np.abs(expected).max()).all()
    assert (found[:, 160:] == 0).all()


def norm_sizes(size: int, lanes: int) -> dict[str, int | float]:
    return {"LANES": lanes, "ITEMS": -(-size // (4 * lanes)), "HIDDEN": size, "EPS": 1e-6}


@pytest.mark.parametrize("kind", ["int8", "f32"])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize(("size", "lanes"), [(96, 64), (640, 256)])
def test_a_product_makes_the_same_norm(
    lab: Lab, size: int, lanes: int, branches: bool, kind: str
) -> None:
    """Bit for bit what a product of the norm's own output is, whatever the lanes; without branches
    there is no norm either."""
    weight = random_tensor(64, size, Spec(8, 32))
    is_float = kind == "f32"
    values = weight.dequantize() if is_float else weight
    tiles = lab.weight(values, Kind(kind) if is_float else Kind.of(weight.spec))
    branch, hidden, branch_gain, gain = (lab.put(normal(size, seed=i)) for i in range(4))
    joined, again, normed = (lab.room(size) for _ in range(3))
    x, y, fused = lab.room(128 * tiles_of(size)), lab.room(64), lab.room(64)
    how = {"HAS_BRANCH": branches, "POST_NORM": branches, "PLAIN": not branches}
    push = addresses(branch, hidden, joined, branch_gain, gain, normed, x, x, x) + floats(1.25)
    lab.run("norm", push, 1, FLOAT_X=is_float, **how, **norm_sizes(size, 64))
    shape = {"GROUP": 32, "BLOCKS": 2}
    push = addresses(tiles, tiles, x, y, *[y] * 6) + words(4, tiles_of(size), 64, 64, 0)
    lab.run(f"gemv_{kind}", push, 2, LANES=lanes, **shape)
    push = addresses(tiles, tiles, branch, fused, hidden, again, branch_gain, gain, y, y)
    push += words(4, tiles_of(size), 64, 64, 1) + floats(1.25)
    how |= {"NORMS": True}
    lab.run(f"gemv_{kind}", push, 2, **shape, **how, **norm_sizes(size, lanes))
    np.testing.assert_array_equal(lab.get(fused, np.float32, 64), lab.get(y, np.float32, 64))
    if branches:
        expected = lab.get(joined, np.float32, size)
        np.testing.assert_array_equal(lab.get(again, np.float32, size), expected)


def test_gate(lab: Lab) -> None:
    """GeGLU behind the product, then an identity product to read its activations back."""
    spec = Spec(8, 32)
    gate, up = random_tensor(96, 64, spec), random_tensor(96, 64, Spec(8, 32))
    up = QuantTensor(up.codes[::-1].copy(), up.scales, spec)
    kind, x = Kind.of(spec), normal(2, 64)
    gated, state = lab.room(2 * 72), lab.put(blank())
    unused = lab.room(4)
    push = addresses(lab.weight(gate, kind), lab.weight(up, kind), lab.activations(x))
    push += addresses(*[unused] * 5, gated, state) + words(6, 1, 0, 96, 0)
    shape = {"LANES": 64, "BLOCKS": 4, "COLUMNS": 2, "EPILOGUE": GEGLU}
    lab.run("gemv_int8", push, 3, GROUP=32, **shape)
    one = QuantTensor(np.eye(96, dtype=np.int8), np.ones((96, 3), np.float16), spec)
    y = lab.room(2 * 96)
    push = addresses(*[lab.weight(one, kind)] * 2, gated, y, *[y] * 6) + words(6, 1, 96, 96, 0)
    lab.run("gemv_int8", push, 6, GROUP=32, LANES=64, COLUMNS=2, BLOCKS=1)
    g, u = (x.astype(np.float64) @ w.dequantize().astype(np.float64).T for w in (gate, up))
    expected = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    actual = lab.get(y, np.float32, 2, 96)
    np.testing.assert_allclose(actual, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("rounds", "expected"), [(0, 112.0), (3, 70.0)])
def test_arithmetic_is_done_before_it_is_timed(lab: Lab, rounds: int, expected: float) -> None:
    """x -> x / 2 + 1, from 0 to 7, four at a time."""
    sums = lab.room(512)
    assert run(lab.gpu, lab.pipelines, "arithmetic", sums, rounds) > 0
    assert lab.get(sums, np.float32, 512).tolist() == [expected] * 512


def test_integer_arithmetic_is_done_before_it_is_timed(lab: Lab) -> None:
    """x -> x + its bytes, from 0 to 15: small numbers double."""
    sums = lab.room(256)
    run(lab.gpu, lab.pipelines, "arithmetic_dot", sums, 3)
    assert lab.get(sums, np.float32, 256).tolist() == [8 * 120.0] * 256


def test_the_likeliest_token_is_the_first_of_equals(lab: Lab) -> None:
    codes = np.zeros((700, 64), np.int8)
    codes[[130, 131, 640]] = 5
    tensor = QuantTensor(codes, np.ones((700, 2), np.float16), Spec(8, 32))
    kind = Kind.of(tensor.spec)
    x = lab.activations(np.ones((1, 64), np.float32))
    words_of_state = blank()
    fields = views(words_of_state)
    fields["count"][0], fields["positions"][0], fields["done"][0] = 1, 7, 0
    logits, best, state = lab.room(704), lab.room(200), lab.put(words_of_state)
    push = addresses(*[lab.weight(tensor, kind)] * 2, x, logits, *[logits] * 4, best, state)
    push += words(44, 1, 704, 700, CHOOSE_COUNTER)
    how = {"GROUP": 32, "LANES": 64, "BLOCKS": 2, "EPILOGUE": CHOOSE}
    for rounds in (1, 5):  # the second time shows that the counter began anew
        lab.run("gemv_int8", push, -(-22 // rounds), ROUNDS=rounds, **how)
    left = views(lab.get(state, np.uint32, words_of_state.size))
    assert (left["positions"][0], left["made"][0], left["choices"][0]) == (9, 2, 130)
