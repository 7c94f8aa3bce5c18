"""Sizes of the prefill kernels: whatever the model and the GPU, the lanes come out even."""

from __future__ import annotations

import pytest

from uq.formats.spec import Spec
from uq.kernels.vulkan.prefill import (
    AttentionCut,
    Heads,
    MatrixAttentionCut,
    MatrixCut,
    PlainCut,
    gemm_constants,
    gemm_module,
)
from uq.kernels.vulkan.weights import Kind

INT4 = Kind.of(Spec(4, 32))


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("sharing", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("subgroup", [8, 32, 64])
def test_attention_comes_out_even(dim: int, sharing: int, subgroup: int) -> None:
    cut = AttentionCut.of(Heads(dim, sharing), subgroup, 48 << 10)
    assert cut and cut.shared_bytes(dim) <= 48 << 10
    assert cut.lanes % subgroup == cut.lanes % cut.keys == cut.lanes % (dim // 8) == 0
    assert cut.rows % (cut.lanes // cut.keys) == cut.rows % (8 * cut.lanes // dim) == 0
    assert cut.rows % sharing == 0 and cut.lanes <= 1024


def test_attention_shrinks_to_the_shared_memory() -> None:
    large, small = (AttentionCut.of(Heads(256, 4), 8, size << 10) for size in (64, 32))
    assert large and small and large.shared_bytes(256) > 32 << 10 >= small.shared_bytes(256)


@pytest.mark.parametrize("dim", [64, 128, 192, 256, 512])
@pytest.mark.parametrize("sharing", [1, 2, 3, 8])
def test_attention_in_blocks_comes_out_even(dim: int, sharing: int) -> None:
    """Either in blocks of scores, or in the channels of each."""
    cut = MatrixAttentionCut.of(Heads(dim, sharing), 32, 48 << 10)
    assert cut and cut.shared_bytes(dim) <= 48 << 10 and cut.split == (dim == 512)
    assert cut.split or cut.rows // 16 * (cut.keys // 16) % cut.subgroups == 0
    assert 32 * cut.subgroups % cut.rows == 0 and cut.rows >= sharing


@pytest.mark.parametrize(
    ("dim", "sharing", "subgroup", "kib"), [(96, 1, 32, 48), (128, 65, 32, 48), (256, 1, 32, 16)]
)
def test_attention_that_blocks_do_not_fit(dim: int, sharing: int, subgroup: int, kib: int) -> None:
    assert MatrixAttentionCut.of(Heads(dim, sharing), subgroup, kib << 10) is None


def test_attention_that_does_not_fit() -> None:
    assert AttentionCut.of(Heads(256, 1), 64, 4096) is None


@pytest.mark.parametrize(
    ("kind", "matrix", "integer_dot", "module"),
    [
        (INT4, True, True, "gemm_int4_matrix"),
        (INT4, False, True, "gemm_int4_dot"),
        (INT4, False, False, "gemm_int4"),
        (Kind("bf16"), True, True, "gemm_bf16"),
        (Kind("f16"), True, True, "gemm_f16_matrix"),
        (Kind("f16"), False, True, "gemm_f16"),
    ],
)
def test_the_best_module_of_a_device(
    kind: Kind, matrix: bool, integer_dot: bool, module: str
) -> None:
    assert gemm_module(kind, matrix=matrix, integer_dot=integer_dot) == module


def test_lanes_follow_from_the_cut() -> None:
    assert MatrixCut(128, 64, 32, 32).constants(INT4, 64)["LANES"] == 8 * 64
    assert PlainCut(64, 32, 4, 2).constants(INT4)["LANES"] == 16 * 16
    small, large = (
        gemm_constants("gemm_int4_matrix", INT4, 32, 48 << 10, 512, large_blocks=large)
        for large in (False, True)
    )
    assert (small["LANES"], large["LANES"]) == (256, 128)


def test_a_small_cut_where_shared_memory_is_small() -> None:
    large, small = (
        gemm_constants("gemm_int4_matrix", INT4, 32, kib << 10, 512) for kib in (48, 32)
    )
    assert (large["BM"], small["BM"]) == (128, 64)


@pytest.mark.parametrize(("columns", "tokens"), [(9, 32), (32, 32), (33, 64), (64, 64), (65, 128)])
def test_few_tokens_get_a_tile_of_their_own(columns: int, tokens: int) -> None:
    cut = gemm_constants("gemm_int4_matrix", INT4, 32, 48 << 10, columns)
    assert cut["BM"] == tokens
