"""Products and attention of many tokens at a time against their float64 twins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_vulkan_kernels import GRIDS, assert_product, input_error, normal, random_tensor
from tests.vulkan_lab import Floats, Lab, no_messages  # noqa: F401
from uq.formats.spec import Spec
from uq.kernels.vulkan import pipelines
from uq.kernels.vulkan.compile import compile_variant
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.spirv import load
from uq.kernels.vulkan.state import blank, views
from uq.kernels.vulkan.variants import VARIANTS, Variant
from uq.kernels.vulkan.weights import Kind, tiles_of

Doubles = NDArray[np.float64]
ROWS, COLS, TOKENS = 37, 160, 19  # none fills its last tile


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"))
    yield lab
    lab.close()


def gemm(
    lab: Lab, name: str, weight: Span, kind: Kind, shape: tuple[int, int], x: Floats, **how: int
) -> Floats:
    """W x for each token, (tokens, rows), by the kernel `name`."""
    rows, cols = shape
    y = lab.room(len(x) * (rows + 3))
    sizes = {"BM": 16, "BN": 16, "TM": 2, "TN": 2, **how}
    lanes = sizes["BM"] * sizes["BN"] // (sizes["TM"] * sizes["TN"])
    push = addresses(weight, lab.activations(x, is_float=kind.is_float), y)
    push += words(tiles_of(cols), rows + 3, rows, len(x))
    groups = -(-rows // sizes["BN"]), -(-len(x) // sizes["BM"])
    lab.run(name, push, *groups, LANES=lanes, **kind.constants, **sizes)
    return lab.get(y, np.float32, len(x), rows + 3)[:, :rows]


@pytest.mark.parametrize("dotted", ["", "_dot"])
@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_gemm_of_codes(lab: Lab, spec: Spec, dotted: str) -> None:
    cols = math.lcm(COLS, spec.group)
    tensor, kind = random_tensor(ROWS, cols, spec), Kind.of(spec)
    x = normal(TOKENS, cols)
    y = gemm(lab, f"gemm_{kind.name}{dotted}", lab.weight(tensor, kind), kind, tensor.shape, x)
    assert_product(y, tensor.dequantize(), x, exact_x=False)


@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
def test_gemm_of_floats(lab: Lab, name: str) -> None:
    weight, x = normal(ROWS, COLS), normal(TOKENS, COLS, seed=1)
    weight = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)
    if name == "f16":
        weight = weight.astype(np.float16).astype(np.float32)
    kind = Kind(name)
    y = gemm(lab, f"gemm_{name}", lab.weight(weight, kind), kind, weight.shape, x)
    assert_product(y, weight, x, exact_x=True)


@pytest.mark.parametrize("sizes", [(32, 16, 4, 2), (16, 64, 4, 4), (64, 32, 8, 4)])
def test_gemm_however_it_is_cut(lab: Lab, sizes: tuple[int, int, int, int]) -> None:
    tensor, kind = random_tensor(ROWS, COLS, Spec(4, 32)), Kind.of(Spec(4, 32))
    x, cut = normal(TOKENS, COLS), dict(zip(("BM", "BN", "TM", "TN"), sizes, strict=True))
    weight = lab.weight(tensor, kind)
    y = gemm(lab, "gemm_int4_dot", weight, kind, tensor.shape, x, **cut)
    assert_product(y, tensor.dequantize(), x, exact_x=False)


def halves(lab: Lab, x: Floats, *, is_float: bool = False) -> tuple[Span, Span]:
    """x as float16 rows and what they were divided by."""
    tiles = tiles_of(x.shape[1])
    rows, units = lab.room(len(x) * tiles * 64), lab.room(len(x))
    push = addresses(lab.activations(x, is_float=is_float), rows, units) + words(tiles)
    lab.run("gemm_half", push, len(x), LANES=64, FLOAT_X=is_float)
    return rows, units


@pytest.mark.parametrize("is_float", [False, True])
def test_activations_of_any_size_fit_float16(lab: Lab, is_float: bool) -> None:
    x = normal(4, COLS) * np.array([[1e-9], [1], [3e5], [1e20]], np.float32)
    x[:, 7] *= 1000
    x[1] = 0
    rows, units = halves(lab, x, is_float=is_float)
    found = lab.get(rows, np.float16, 4, 256).astype(np.float64)
    found *= lab.get(units, np.float32, 4)[:, None]
    rounding = np.abs(x) * 2.0**-11 + np.abs(x).max(1, keepdims=True) * 2.0**-35
    error = rounding if is_float else rounding + 1.01 * input_error(x)
    assert (np.abs(found[:, :COLS] - x) <= error).all()
    assert (found[:, COLS:] == 0).all()


@pytest.fixture(scope="module")
def emulated(lab: Lab) -> Iterator[None]:
    """The modules `*_matrix*` with plain arithmetic in place of the matrix instructions."""
    with pytest.MonkeyPatch.context() as patch:
        rows = {
            name.replace("_matrix", "_emulated"): replace(
                row, macros={**row.macros, "EMULATED": 1}, features=emulated_features(row)
            )
            for name, row in VARIANTS.items()
            if row.source in ("gemm_matrix.comp", "attention_matrix.comp")
        }
        patch.setattr(pipelines, "VARIANTS", {**VARIANTS, **rows})
        compiled = lambda name: compile_variant(rows[name]) if name in rows else load(name)  # noqa: E731
        patch.setattr(pipelines, "load", compiled)
        yield


def emulated_features(row: Variant) -> tuple[str, ...]:
    """Of a module without its matrix instructions: weights of float16 are only copied."""
    lost = ("coopmat", *["fp16"] * (row.name == "gemm_f16_matrix"))
    return tuple(name for name in row.features if name not in lost)


def matrix_modules(lab: Lab, name: str) -> list[str]:
    """Of a module `name` the emulated one, and the true one where the device can run it."""
    able = lab.gpu.physical.has("cooperativeMatrix")
    return [name.replace("_matrix", "_emulated")] + [name] * able


def gemm_matrix(
    lab: Lab,
    name: str,
    weight: Span,
    kind: Kind,
    shape: tuple[int, int],
    x: Floats,
    parts: int = 1,
    **how: int,
) -> Floats:
    rows, cols = shape
    y = lab.room(parts * len(x) * rows)
    sizes = {"BM": 32, "BN": 32, "SM": 16, "SN": 32, **how}
    subgroups = sizes["BM"] // sizes["SM"] * (sizes["BN"] // sizes["SN"])
    lanes = subgroups * lab.gpu.physical.subgroup[0]
    push = addresses(weight, *halves(lab, x, is_float=kind.is_float), y)
    push += words(tiles_of(cols), rows, rows, len(x))
    groups = -(-rows // sizes["BN"]), -(-len(x) // sizes["BM"])
    lab.run(name, push, *groups, parts, LANES=lanes, **kind.constants, **sizes)
    found: Floats = lab.get(y, np.float32, parts, len(x), rows).sum(axis=0)
    return found


def assert_half_product(y: Floats, weight: Floats, x: Floats) -> None:
    """x and the weight are rounded to float16, and x to its 16 bits before."""
    w, exact = np.abs(weight.astype(np.float64)), x.astype(np.float64)
    bound = (2.0**-10 + 1e-6) * np.abs(exact) @ w.T + 1.01 * input_error(x) @ w.T
    assert (np.abs(y - exact @ weight.astype(np.float64).T) <= bound).all()


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_gemm_with_matrix_instructions(lab: Lab, emulated: None, spec: Spec) -> None:
    cols = math.lcm(COLS, spec.group)
    tensor, kind = random_tensor(ROWS, cols, spec), Kind.of(spec)
    x, weight = normal(TOKENS, cols), lab.weight(tensor, kind)
    for name in matrix_modules(lab, f"gemm_{kind.name}_matrix"):
        y = gemm_matrix(lab, name, weight, kind, tensor.shape, x)
        assert_half_product(y, tensor.dequantize(), x)


@pytest.mark.parametrize(
    "sizes", [(16, 32, 16, 16, 64), (128, 16, 16, 16, 64), (16, 64, 16, 16, 128)]
)
def test_matrix_gemm_however_it_is_cut(
    lab: Lab, emulated: None, sizes: tuple[int, int, int, int, int]
) -> None:
    weight = normal(ROWS, COLS).astype(np.float16).astype(np.float32)
    kind, x = Kind("f16"), normal(40, COLS, seed=1)
    cut = dict(zip(("BM", "BN", "SM", "SN", "STEP"), sizes, strict=True))
    for name in matrix_modules(lab, f"gemm_{kind.name}_matrix"):
        y = gemm_matrix(lab, name, lab.weight(weight, kind), kind, weight.shape, x, **cut)
        assert_half_product(y, weight, x)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_the_channels_add_up(lab: Lab, emulated: None, parts: int) -> None:
    weight = normal(ROWS, COLS).astype(np.float16).astype(np.float32)
    kind, x = Kind("f16"), normal(TOKENS, COLS, seed=1)
    for name in matrix_modules(lab, f"gemm_{kind.name}_matrix"):
        put = lab.weight(weight, kind)
        y = gemm_matrix(lab, name, put, kind, weight.shape, x, parts)
        assert_half_product(y, weight, x)


def test_gate_and_up_in_parts(lab: Lab) -> None:
    gate, up = normal(2, TOKENS, COLS), normal(2, TOKENS, COLS, seed=1)
    width = tiles_of(COLS) * 128
    x = lab.room(TOKENS * width)
    push = addresses(lab.put(gate), lab.put(up), x) + words(COLS, 2)
    lab.run("geglu", push, TOKENS, 2, LANES=8, FLOAT_X=True, CHANNELS=COLS)
    g, u = (part.astype(np.float64).sum(axis=0) for part in (gate, up))
    expected = g / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3))) * u
    found = lab.get(x, np.float32, TOKENS, width)[:, :COLS]
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


@dataclass(frozen=True)
class Case:
    """`position` tokens lie in the cache in front of the `tokens` of the pass."""

    position: int
    tokens: int
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    window: int = 0
    slots: int = 64
    cap: float = 0.0
    cut: tuple[int, int, int] = (64, 4, 16)  # lanes, tokens of a workgroup, keys of a step
    split: bool = False  # as heads of 512 are, for which this device has too little memory


CASES = {
    "empty cache": Case(0, 19),
    "one token": Case(7, 1),
    "behind others": Case(30, 9),
    "window": Case(0, 40, window=16),
    "window of one": Case(5, 10, window=1),
    "ring wraps": Case(77, 12, window=40),
    "soft-capped": Case(20, 9, cap=2.0),
    "one key head": Case(20, 9, heads=8, kv_heads=1),
    "a key head each": Case(20, 9, heads=3, kv_heads=3, cut=(32, 4, 16)),
    "head of 96": Case(20, 9, dim=96, cut=(96, 12, 8)),
    "head of 128": Case(20, 9, dim=128),
    "head of 256": Case(20, 9, kv_heads=1, dim=256, cut=(128, 2, 16)),
    "head of 512": Case(45, 9, heads=8, kv_heads=1, dim=512, window=40, cut=(64, 1, 8)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_of_many_tokens(lab: Lab, case: Case) -> None:
    rng = np.random.default_rng(case.position)
    queries = rng.standard_normal((case.tokens, case.heads, case.dim)).astype(np.float32)
    shape = (case.kv_heads, case.slots, case.dim)
    keys, values = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    cache = [lab.put(keys), lab.put(values)] * 2
    actual = attend(lab, case, queries, "attention_prefill", cache)
    expected = attention_twin(case, queries, keys.astype(np.float64), values.astype(np.float64))
    assert np.abs(actual - expected).max() <= 2e-6 * np.abs(expected).max()


BLOCK_CASES = {
    name: CASES[name]
    for name in ("window", "ring wraps", "soft-capped", "one key head", "head of 256")
}
BLOCK_CASES["shares of each head"] = Case(45, 9, heads=8, kv_heads=1, split=True)


@pytest.mark.parametrize("case", BLOCK_CASES.values(), ids=BLOCK_CASES)
def test_attention_with_matrix_instructions(lab: Lab, emulated: None, case: Case) -> None:
    """Queries and weights are rounded to float16."""
    rng = np.random.default_rng(case.position)
    queries = rng.standard_normal((case.tokens, case.heads, case.dim)).astype(np.float32)
    shape = (case.kv_heads, case.slots, case.dim)
    keys, values = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    cache = [lab.put(keys), lab.put(values)] * 2
    expected = attention_twin(case, queries, keys.astype(np.float64), values.astype(np.float64))
    for module in matrix_modules(lab, "attention_matrix"):
        actual = attend_by_blocks(lab, case, queries, module, cache)
        assert np.abs(actual - expected).max() <= 2e-3 * np.abs(expected).max()


def attend_by_blocks(
    lab: Lab, case: Case, queries: Floats, module: str, cache: list[Span]
) -> Floats:
    rows, subgroups = (16, 2) if case.dim == 256 else (16, 4) if case.split else (32, 4)
    tokens = rows // (case.heads // case.kv_heads)
    lanes = subgroups * lab.gpu.physical.subgroup[0]
    cut = {"LANES": lanes, "ROWS": rows, "SUBGROUPS": subgroups, "SPLIT": case.split}
    cut["KEYS"] = 16 if case.split else 32
    return attend_in_runs(lab, case, queries, module, cache, tokens, **cut)


def attend(lab: Lab, case: Case, queries: Floats, module: str, cache: list[Span]) -> Floats:
    """`cache`: keys, values and their scales."""
    lanes, tokens, step = case.cut
    cut = {"LANES": lanes, "TOKENS": tokens, "KEYS": step}
    return attend_in_runs(lab, case, queries, module, cache, tokens, **cut)


def attend_in_runs(
    lab: Lab,
    case: Case,
    queries: Floats,
    module: str,
    cache: list[Span],
    tokens: int,
    **cut: int,
) -> Floats:
    """Workgroups take up to `tokens` each."""
    size = case.heads * case.dim
    state = blank()
    fields, starts = views(state), range(0, case.tokens, tokens)
    fields["positions"][: case.tokens] = np.arange(case.tokens) + case.position
    fields["run_count"][0] = len(starts)
    fields["run_columns"][: len(starts)] = starts
    fields["run_tokens"][: len(starts)] = [min(tokens, case.tokens - start) for start in starts]
    x = lab.room(case.tokens * tiles_of(size) * 128)
    rows = np.zeros((case.tokens, size + 8), np.float32)  # others' columns follow the queries
    rows[:, :size] = queries.reshape(case.tokens, size)
    push = addresses(lab.put(rows), *cache, x, lab.put(state))
    lab.run(
        module,
        push + words(size + 8),
        *(-(-case.tokens // tokens), case.kv_heads),
        FLOAT_X=True,
        DIM=case.dim,
        HEADS=case.heads,
        KV_HEADS=case.kv_heads,
        WINDOW=case.window,
        SLOTS=case.slots,
        SCALE=case.dim**-0.5,
        CAP=case.cap,
        **cut,
    )
    return lab.get(x, np.float32, case.tokens, tiles_of(size) * 128)[:, :size]


def attention_twin(case: Case, queries: Floats, keys: Doubles, values: Doubles) -> Doubles:
    """softmax(Q K^T) V, a token and a head at a time."""
    out = np.empty(queries.shape)
    for token, head in np.ndindex(case.tokens, case.heads):
        position = case.position + token
        first = max(0, position + 1 - case.window) if case.window else 0
        slots = np.arange(first, position + 1) % case.slots
        group = head * case.kv_heads // case.heads
        scores = keys[group, slots] @ queries[token, head].astype(np.float64) * case.dim**-0.5
        if case.cap:
            scores = case.cap * np.tanh(scores / case.cap)
        weights = np.exp(scores - scores.max())
        out[token, head] = weights / weights.sum() @ values[group, slots]
    return out.reshape(case.tokens, -1)
