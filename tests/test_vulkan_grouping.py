"""Products of tokens in the order of the experts that they choose, against their float64 twin."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.test_vulkan_kernels import assert_product, normal, random_tensor
from tests.test_vulkan_prefill import (
    assert_half_product,
    emulated,  # noqa: F401
    halves,
    matrix_modules,
)
from tests.vulkan_lab import Floats, Lab, no_messages  # noqa: F401
from uq.formats.spec import Spec
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.state import blank, views
from uq.kernels.vulkan.weights import Kind

COUNT, ACTIVE, SIZE, TILES = 5, 3, 4, 20  # experts, chosen of them, items of a tile, room for tiles
LIVE = 7  # tokens; behind them is one that is none
ROWS, COLS = 48, 96
CHOSEN = np.array([np.random.default_rng(i).permutation(COUNT)[:ACTIVE] for i in range(LIVE + 1)])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("pipelines"))
    yield lab
    lab.close()


def grouped(lab: Lab, size: int = SIZE) -> tuple[Span, Span]:
    """Tiles, and items in their order."""
    state = blank()
    views(state)["count"][0] = LIVE
    tiles, items = lab.room(4 * TILES), lab.room(LIVE * ACTIVE)
    push = addresses(lab.put(CHOSEN.astype(np.uint32)), tiles, items, lab.put(state))
    how = {"COUNT": COUNT, "ACTIVE": ACTIVE, "SIZE": size, "TILES": TILES}
    lab.run("group", push, 1, LANES=64, **how)
    return tiles, items


def test_items_are_in_the_order_of_their_experts(lab: Lab) -> None:
    tiles, items = grouped(lab)
    order = lab.get(items, np.uint32, LIVE * ACTIVE)
    assert sorted(order.tolist()) == list(range(LIVE * ACTIVE))
    flat, place = CHOSEN.reshape(-1), 0
    for expert, first, count, _ in lab.get(tiles, np.uint32, TILES, 4).tolist():
        if count:
            assert first == place and count <= SIZE
            assert (flat[order[first : first + count]] == expert).all()
            place += count
    assert place == LIVE * ACTIVE


@pytest.mark.parametrize("choices", [1, ACTIVE])
@pytest.mark.parametrize("module", ["gemm_int4", "gemm_int4_dot", "gemm_int4_matrix"])
def test_a_product_of_items(lab: Lab, emulated: None, module: str, choices: int) -> None:  # noqa: F811
    """Of columns of their own, or of columns that the items of a token share."""
    stack, kind = random_tensor(COUNT * ROWS, COLS, Spec(4, 32)), Kind.of(Spec(4, 32))
    x = normal(LIVE * ACTIVE // choices, COLS)
    weights = stack.dequantize().reshape(COUNT, ROWS, COLS)
    is_matrix = module.endswith("_matrix")
    for name in matrix_modules(lab, module) if is_matrix else [module]:
        found = product(lab, name, lab.weight(stack, kind), kind, x, choices)
        for item, expert in enumerate(CHOSEN[:LIVE].reshape(-1)):
            own, y = x[item // choices][None], found[item][None]
            if is_matrix:
                assert_half_product(y, weights[expert], own)
            else:
                assert_product(y, weights[expert], own, exact_x=False)


def product(lab: Lab, name: str, weight: Span, kind: Kind, x: Floats, choices: int) -> Floats:
    y, is_matrix = lab.room(LIVE * ACTIVE * ROWS), "_dot" not in name and name != "gemm_int4"
    size = 16 if is_matrix else SIZE
    cut = {"BM": 16, "BN": 16, "SM": 16, "SN": 16} if is_matrix else {"BM": 4, "BN": 16}
    cut |= {} if is_matrix else {"TM": 2, "TN": 2}
    lanes = lab.gpu.physical.subgroup[0] if is_matrix else 16
    inputs = halves(lab, x, is_float=False) if is_matrix else (lab.activations(x),)
    push = addresses(weight, *inputs, y) + words(1, ROWS, ROWS, LIVE * ACTIVE)
    push += addresses(*grouped(lab, size)) + words(ROWS // 16)
    groups = ROWS // 16, TILES
    lab.run(name, push, *groups, LANES=lanes, **kind.constants, **cut, CHOICES=choices)
    found: Floats = lab.get(y, np.float32, LIVE * ACTIVE, ROWS)
    return found
