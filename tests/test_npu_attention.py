"""NPU attention: designs accepted, emulated bit for bit as the twin, close to float64 softmax."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.kernels.npu.kernels.attention import attend, exp2_table, twin
from uq.kernels.npu.kernels.attention.attend import Inputs
from uq.kernels.npu.kernels.attention.design import attention
from uq.kernels.npu.kernels.attention.plan import Plan, plan
from uq.kernels.npu.kernels.attention.variant import SOURCE, Form, Variant
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.verify import verify

Array = NDArray[np.float32]
EXP_TABLES = 4352  # bytes of exp2_table.h: two tables, each value four times
# Of the error against softmax in float64: what the kernel adds, on the keys and values as stored,
# and with what storing costs, on queries, keys and values as they were. Independent normal numbers
# lose 6 % at least in any 4 bits (their rate-distortion bound), 10.7 % in evenly spaced codes.
OWN, WITH_STORAGE = {8: 0.01, 4: 0.03}, {8: 0.01, 4: 0.15}


def gemma_like(seed: int, made: Plan) -> tuple[Array, Array, Array]:
    """Normed queries and keys, some channels of the keys large and steady, a sink at position 0."""
    rng = np.random.default_rng(seed)
    dim = made.variant.head_dim
    q = rng.normal(size=(made.length, made.heads, dim))
    k = rng.normal(size=(made.keys, made.kv_heads, dim))
    k[..., rng.integers(dim, size=4)] += 8
    q, k = (x / np.sqrt((x * x).mean(axis=-1, keepdims=True)) for x in (q, k))
    k[0] += q.mean(axis=(0, 1))
    v = rng.normal(size=k.shape)
    v[0] *= 0.1
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def check(made: Plan, seed: int = 0, softcap: float | None = None) -> None:
    """The verifier finds nothing, the emulator gives the twin's bytes, and both are attention."""
    (report,) = verify(
        parse_design(print_design(attention(made)), "attention"), reserved=EXP_TABLES
    )
    assert [finding.message for finding in report.findings] == []
    q, k, v = gemma_like(seed, made)
    bits, factor = made.variant.kv_bits, made.variant.head_dim**-0.5
    inputs = Inputs.quantized(q, k, v, bits, factor, softcap)
    emulated = attend.emulate(made, inputs)
    assert emulated.tobytes() == attend.compute(made, inputs).tobytes()
    rows = attend.rows(made, inputs, emulated)
    exact = partial(
        twin.softmax_attention,
        q,
        factor=factor,
        start=made.start,
        window=made.window,
        softcap=softcap,
    )
    assert nrmse(rows, exact(*inputs.stored())) < OWN[bits]
    assert nrmse(rows, exact(k, v)) < WITH_STORAGE[bits]


def nrmse(x: Array, exact: NDArray[np.floating]) -> float:
    return float(np.sqrt(((x - exact) ** 2).sum() / (exact**2).sum()))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("device", ["npu1", "npu2"])
def test_prefill(device: str, kv_bits: int, head_dim: int) -> None:
    check(plan(Variant(device, head_dim, kv_bits), heads=4, kv_heads=1, length=256))


@pytest.mark.parametrize("device", ["npu1", "npu2"])
def test_prefill_of_512(device: str) -> None:
    """`python -m benchmarks.npu_attention` runs every variant, up to 2048."""
    check(plan(Variant(device, 256, 8), heads=4, kv_heads=1, length=512))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("device", ["npu1", "npu2"])
def test_decode(device: str, kv_bits: int, head_dim: int) -> None:
    variant = Variant(device, head_dim, kv_bits, "decode")
    check(plan(variant, heads=4, kv_heads=1, length=1, start=700, window=512))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "start", "length", "window"),
    [
        (4, 1, 0, 37, None),  # padded
        (4, 1, 0, 600, 512),  # the window leaves the first block
        (8, 4, 0, 150, 64),  # two heads of a group: two blocks of queries side by side
        (3, 3, 0, 90, None),  # no sharing
        (6, 2, 0, 70, None),  # groups of three: jobs hold heads of two blocks
        (8, 1, 333, 40, None),  # eight heads; a chunk behind earlier keys
    ],
)
def test_prefill_shapes(
    heads: int, kv_heads: int, start: int, length: int, window: int | None
) -> None:
    variant = Variant("npu1", 256, 8)
    check(plan(variant, heads, kv_heads, length, start=start, window=window))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "start", "window"),
    [(8, 4, 1033, None), (16, 1, 100, None), (3, 3, 0, None), (4, 1, 2047, 1024)],
)
def test_decode_shapes(heads: int, kv_heads: int, start: int, window: int | None) -> None:
    variant = Variant("npu2", 256, 8, "decode")
    check(plan(variant, heads, kv_heads, 1, start=start, window=window))


@pytest.mark.parametrize("softcap", [50.0, 4.0])  # Gemma 2's, and one that most scores reach
@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("device", ["npu1", "npu2"])
def test_capped_scores(device: str, kv_bits: int, softcap: float) -> None:
    prefill, decode = (Variant(device, 256, kv_bits, form) for form in ("prefill", "decode"))
    check(plan(prefill, 4, 1, 48), softcap=softcap)
    check(plan(decode, 4, 1, 1, start=100), softcap=softcap)


def test_the_cap_is_a_hyperbolic_tangent() -> None:
    t = np.linspace(-600, 600, 4801, dtype=np.float32)
    cap = np.float32(50 * math.log2(math.e))
    error = np.abs(twin.capped(t, cap) - float(cap) * np.tanh(t / float(cap)))
    assert error.max() < 0.01 and error[np.abs(t) < 2 * cap].max() < 1e-4
    np.testing.assert_array_equal(twin.capped(t, np.float32(0)), t)


def test_a_cap_that_is_not_above_zero_is_refused() -> None:
    made = plan(Variant("npu1", 256, 8), 4, 1, 16)
    inputs = Inputs.quantized(*gemma_like(0, made), 8, 1.0, -1.0)
    with pytest.raises(UsageError, match="a softcap of -1; it is above 0"):
        attend.packed(made, inputs)


@pytest.mark.parametrize(("form", "start", "length"), [("prefill", 0, 640), ("decode", 2200, 1)])
def test_equal_scores_average_and_do_not_overflow(form: Form, start: int, length: int) -> None:
    """Every weight is the largest: sums of weights pass 2^23 and are halved."""
    made = plan(Variant("npu1", 256, 8, form), 4, 1, length, start=start, columns=1)
    _, k, _ = gemma_like(1, made)
    v = np.full(k.shape, 127, np.float32)
    v[1::2] = -127
    v[-1] = 127
    inputs = Inputs.quantized(np.zeros((length, 4, 256), np.float32), k, v, 8, 1.0)
    emulated = attend.emulate(made, inputs)
    assert emulated.tobytes() == attend.compute(made, inputs).tobytes()
    last = attend.rows(made, inputs, emulated)[-1]
    np.testing.assert_allclose(last, v.mean(axis=0).repeat(4, axis=0), atol=0.02)


def test_one_program_serves_every_length() -> None:
    variant = Variant("npu2", 128, 4)
    short, long = (
        print_design(attention(plan(variant, 4, 1, length))).split("aie.runtime_sequence")[0]
        for length in (512, 2048)
    )
    assert short == long


def test_tables_are_those_of_their_script() -> None:
    assert SOURCE.with_name("exp2_table.h").read_text() == exp2_table.header()
    np.testing.assert_array_equal(twin.powers("npu1")[[0, 256, 15 * 256]], [16384, 8192, 0])
    exact = 16384 * 2.0 ** (-np.arange(15 * 256 + 1) / 256)
    assert np.abs(twin.powers("npu1") - exact).max() < 1
    assert (np.abs(twin.powers("npu2") / exact - 1)[:1024] < 2**-8).all()  # bfloat16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("npu3", 256, 8, "prefill"), "device npu3; there are npu1, npu2"),
        (("npu1", 64, 8, "prefill"), "head size 64; there are 128, 256"),
        (("npu1", 256, 6, "prefill"), "KV bits 6; there are 4, 8"),
    ],
)
def test_variants_without_a_kernel_are_refused(
    values: tuple[str, int, int, Form], message: str
) -> None:
    with pytest.raises(UsageError, match=f"no attention kernel for {message}"):
        Variant(*values)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "message"),
    [
        (4, 3, 1, "4 query heads do not share 3 KV heads evenly"),
        (4, 1, 0, "attention of 0 tokens from 0 on"),
        (4, 1, 2, "decode takes one token, not 2; use the prefill form"),
    ],
)
def test_plans_that_make_no_sense_are_refused(
    heads: int, kv_heads: int, length: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(Variant("npu1", 256, 8, "decode"), heads, kv_heads, length)
