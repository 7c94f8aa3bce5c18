"""Scales of 8 bits as the kernels read them: what is computed has the bits of the same scales as
float16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.test_vulkan_kernels import COLS, ROWS, normal, random_tensor
from tests.test_vulkan_prefill import emulated, gemm, gemm_matrix, matrix_modules  # noqa: F401
from tests.vulkan_lab import Floats, Lab, no_messages, product  # noqa: F401
from uq.formats.row_scales import round_scales
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.state import blank, views
from uq.kernels.vulkan.weights import Kind

SPECS = (
    Spec(4, 32, scale_bits=8),
    Spec(5, 64, zero_point=True, scale_bits=8),
    Spec(8, 128, scale_bits=8),
)
Kernel = Callable[[Span, Kind], Floats]  # a weight on the device -> what it gives


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"))
    yield lab
    lab.close()


@pytest.fixture(params=SPECS, ids=str)
def tensor(request: pytest.FixtureRequest) -> QuantTensor:
    found = random_tensor(ROWS, math.lcm(COLS, request.param.group), request.param)
    return replace(found, scales=round_scales(found.scales))


def assert_same(lab: Lab, tensor: QuantTensor, run: Kernel) -> None:
    """`run` gives the same bits for either way to store the scales."""
    stored, expanded = (
        run(lab.weight(each, Kind.of(each.spec)), Kind.of(each.spec))
        for each in (tensor, tensor.expanded())
    )
    assert np.abs(stored).max() > 0
    np.testing.assert_array_equal(stored, expanded)


@pytest.mark.parametrize(
    ("dotted", "columns", "cut"),
    [
        ("_dot", 1, {"LANES": 128, "BLOCKS": 2}),
        ("_dot", 1, {"LANES": 64, "ROUNDS": 2}),
        ("", 3, {"LANES": 128}),
    ],
)
def test_products_of_few_columns(
    lab: Lab, tensor: QuantTensor, dotted: str, columns: int, cut: dict[str, int]
) -> None:
    def run(weight: Span, kind: Kind) -> Floats:
        return product(lab, f"gemv_{kind.name}{dotted}", weight, kind, tensor.shape, x, **cut)

    x = normal(columns, tensor.shape[1])
    assert_same(lab, tensor, run)


@pytest.mark.parametrize("dotted", ["", "_dot"])
def test_products_of_many_columns(lab: Lab, tensor: QuantTensor, dotted: str) -> None:
    def run(weight: Span, kind: Kind) -> Floats:
        return gemm(lab, f"gemm_{kind.name}{dotted}", weight, kind, tensor.shape, x)

    x = normal(19, tensor.shape[1])
    assert_same(lab, tensor, run)


def test_products_with_matrix_instructions(lab: Lab, emulated: None, tensor: QuantTensor) -> None:  # noqa: F811
    x = normal(19, tensor.shape[1])
    for name in matrix_modules(lab, f"gemm_{Kind.of(tensor.spec).name}_matrix"):
        run = partial(gemm_matrix, lab, name, shape=tensor.shape, x=x)
        assert_same(lab, tensor, run)


def test_embedding_rows(lab: Lab, tensor: QuantTensor) -> None:
    state, cols = blank(), tensor.shape[1]
    views(state)["tokens"][:3] = tokens = [0, 17, 36]
    hidden = lab.room(3 * cols)
    weight, kind = lab.weight(tensor, Kind.of(tensor.spec)), Kind.of(tensor.spec)
    push = addresses(weight, hidden, lab.put(state))
    sizes = {**kind.constants, "SCALE": 2.0, "HIDDEN": cols}
    lab.run(f"embed_{kind.name}", push, 3, LANES=64, **sizes)
    found = lab.get(hidden, np.float32, 3, cols)
    np.testing.assert_array_equal(found, 2 * tensor.dequantize()[tokens])


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_the_plainest_reader(lab: Lab, bits: int, group: int, scale_bits: int) -> None:
    spec = Spec(bits, group, scale_bits=scale_bits)
    found = random_tensor(ROWS, 320, spec)
    tensor = replace(found, scales=round_scales(found.scales))
    kind, out = Kind.of(spec), lab.room(ROWS * 320)
    push = addresses(lab.weight(tensor, kind), out) + words(ROWS, 320)
    lab.run(f"dequantize_{kind.name}", push, ROWS * 5, **kind.constants)
    np.testing.assert_array_equal(lab.get(out, np.float32, ROWS, 320), tensor.dequantize())
