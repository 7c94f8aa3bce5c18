"""INT4-weight linears on the bundle's layouts: accepted, bit-exact with the twin, and correct."""

from __future__ import annotations

import numpy as np
import pytest

from uq.errors import UsageError
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.npu.emulator import run
from uq.kernels.npu.kernels.linear import twin
from uq.kernels.npu.kernels.linear.design import design
from uq.kernels.npu.kernels.linear.pack import pack_inputs, pack_weight, unpack_outputs
from uq.kernels.npu.kernels.linear.variant import Linear
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.verify import verify


def weight(outputs: int, inputs: int, group: int) -> QuantTensor:
    """Random codes; scales of both signs, some of them subnormal in float16."""
    rng = np.random.default_rng(outputs)
    codes = rng.integers(-8, 8, (outputs, inputs), dtype=np.int8)
    scales = (
        rng.normal(size=(outputs, inputs // group)) * 2.0 ** rng.integers(-18, 0, outputs)[:, None]
    )
    return QuantTensor(codes, scales.astype(np.float16), Spec(4, group))


@pytest.mark.parametrize("device", ["npu1", "npu2"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "rows", "tokens"),
    [
        (640, 640, 64, 4, 1),  # GEMV
        (200, 2048, 32, 4, 3),  # padded outputs
        (1024, 640, 128, 16, 90),  # GEMM in six passes: more than a queue holds
        (40, 640, 64, 4, 4),  # fewer blocks than cores
        (40, 7104, 64, 4, 2),  # slices, the last one padded
        (70, 10240, 32, 16, 20),  # the width of Gemma 3 4B, two passes
        (16, 15360, 32, 4, 3),  # that of 12B
        (33, 21504, 128, 4, 1),  # that of 27B
    ],
)
def test_bit_exact(
    device: str, outputs: int, inputs: int, group: int, rows: int, tokens: int
) -> None:
    tensor = weight(outputs, inputs, group)
    linear = Linear(device, outputs, inputs, tensor.spec, rows)
    passes = -(-tokens // rows)
    module = design(linear, passes)
    (report,) = verify(parse_design(print_design(module), "linear"))
    assert [finding.message for finding in report.findings] == []

    x = np.random.default_rng(1).normal(size=(tokens, inputs)).astype(np.float32)
    codes, scale = twin.quantize_inputs(x, group)
    y = np.zeros(passes * linear.quads * linear.output_bytes, np.float32)  # four blocks a quad
    run(
        module,
        [pack_inputs(linear, codes, scale), pack_weight(linear, tensor), y],
        linear.kernels(),
    )
    result = unpack_outputs(linear, y, tokens)
    np.testing.assert_array_equal(result, twin.linear(codes, scale, tensor))

    dense = tensor.codes * tensor.scales.astype(np.float64).repeat(group, axis=1)
    exact = (codes * scale.astype(np.float64).repeat(group, axis=1)) @ dense.T
    bound = np.abs(codes * scale.repeat(group, axis=1)) @ np.abs(dense).T
    assert (np.abs(result - exact) <= 1e-6 * bound).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("npu3", 64, 64, Spec(4, 64)), "no linear kernel for device npu3"),
        (("npu1", 64, 64, Spec(8, 64)), "no NPU kernel for 64 inputs in "),
        (("npu1", 64, 96, Spec(4, 64)), "no NPU kernel for 96 inputs in "),
        (("npu1", 64, 64, Spec(4, 64), 6), "6 tokens in a core; use a multiple of 4"),
        (("npu2", 64, 640, Spec(4, 64), 512), "512 tokens take .* of a core for one group"),
    ],
)
def test_weights_without_a_kernel_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Linear(*arguments)  # type: ignore[arg-type]


def test_inputs_of_many_quads_are_repeated_in_several_tasks() -> None:
    """A task repeats 64 times; 70 quads of a column take two, and both are awaited."""
    linear = Linear("npu1", 4 * 8 * 4 * 70, 10240, Spec(4, 128))
    assert linear.slices > 1 and [len(run) for run in linear.runs] == [70] * 4
    (report,) = verify(parse_design(print_design(design(linear, passes=3)), "linear"))
    assert [finding.message for finding in report.findings] == []


@pytest.mark.parametrize("device", ["npu1", "npu2"])
@pytest.mark.parametrize("inputs", [6912, 10240, 15360, 21504])
def test_slices_of_the_widths_of_gemma_fit(device: str, inputs: int) -> None:
    for group in (32, 64, 128):
        linear = Linear(device, 64, inputs, Spec(4, group))
        pair = linear.input.itemsize + linear.weight.itemsize
        assert (1 if linear.resident else 2) * pair + linear.output_bytes <= 62464
        assert 0 <= linear.sliced * linear.slices - inputs < linear.sliced
