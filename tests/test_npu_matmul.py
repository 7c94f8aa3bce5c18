"""The INT8 matmul: every design accepted, and C++ kernels bit-exact with the twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from uq.errors import DesignError, ToolMissing, UsageError
from uq.kernels.npu.emulator import Kernels, run
from uq.kernels.npu.emulator.host import compiled
from uq.kernels.npu.kernels.matmul import twin
from uq.kernels.npu.kernels.matmul.design import SOURCE, Shape, kernels, matmul
from uq.kernels.npu.kernels.matmul.pack import padded
from uq.kernels.npu.runtime.emulated import emulated_npu
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.toolchain.job import Object, prepare
from uq.kernels.npu.verify import verify

SHAPES = [Shape(64, 64, 256), Shape(320, 128, 512), Shape(64, 64, 1280)]


@pytest.mark.parametrize("device", ["npu1", "npu2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_exact(device: str, shape: Shape) -> None:
    """One stripe, more row blocks than a queue holds, and more stripes than npu1 has columns."""
    module = matmul(device, shape)
    (report,) = verify(parse_design(print_design(module), "matmul"))
    assert [finding.message for finding in report.findings] == []
    rng = np.random.default_rng(shape.n)
    a = rng.integers(-128, 128, (shape.m, shape.k), dtype=np.int8)
    b = rng.integers(-128, 128, (shape.k, shape.n), dtype=np.int8)
    c = np.zeros((shape.m, shape.n), np.int32)
    run(module, [a, b, c], kernels(device))
    np.testing.assert_array_equal(c, twin.matmul(a, b))


@pytest.mark.parametrize("device", ["npu1", "npu2"])
@pytest.mark.parametrize("sizes", [(37, 100, 300), (65, 129, 257)], ids=str)
def test_any_sizes_run_through_the_runtime(
    device: str, sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    """Over pyxrt's double, as on an NPU: twice with the same program, and the padding is zero."""
    m, k, n = sizes
    shape, *_ = padded(np.zeros((m, k), np.int8), np.zeros((k, n), np.int8))
    source = parse_design(print_design(matmul(device, shape)))
    objects = [Object(name, o.source, o.defines) for name, o in kernels(device).items()]
    job = prepare(source, name="matmul", sources=SOURCE.parent, objects=tuple(objects))
    npu, emulator = emulated_npu(device)
    rng = np.random.default_rng(sum(sizes))
    with npu.open(emulator.program(job, tmp_path)) as opened:
        for _ in range(2):
            a = rng.integers(-128, 128, (m, k), dtype=np.int8)
            b = rng.integers(-128, 128, (k, n), dtype=np.int8)
            c = np.full((shape.m, shape.n), -1, np.int32)
            opened.run([*padded(a, b)[1:], c])
            np.testing.assert_array_equal(c[:m, :n], twin.matmul(a, b))
            assert not c[m:].any() and not c[:, n:].any()


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"A \(3, 4\) and B \(5, 6\) do not fit"):
        padded(np.zeros((3, 4), np.int8), np.zeros((5, 6), np.int8))
    with pytest.raises(UsageError, match="matmul: k = 0 is no multiple of 64"):
        padded(np.zeros((3, 0), np.int8), np.zeros((0, 6), np.int8))


def test_the_largest_sums_are_exact() -> None:
    shape = Shape(64, 512, 256)
    a, b = np.full((64, 512), -128, np.int8), np.full((512, 256), -128, np.int8)
    c = np.zeros((64, 256), np.int32)
    run(matmul("npu1", shape), [a, b, c], kernels("npu1"))
    np.testing.assert_array_equal(c, np.full((64, 256), 512 * 128 * 128))


@pytest.mark.parametrize("sizes", [(63, 64, 256), (64, 0, 256), (64, 64, 128), (8192, 64, 256)])
def test_shapes_without_a_design_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="matmul: [mkn] = "):
        Shape(*sizes)


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled.cache_clear()
    with pytest.raises(ToolMissing, match="compiles kernels with g\\+\\+: apt-get install g\\+\\+"):
        Kernels(SOURCE, "npu1", {}).function("matmul_zero", [])


def test_kernels_that_do_not_compile_say_why(tmp_path: Path) -> None:
    source = tmp_path / "broken.cc"
    source.write_text('#include <aie_api/aie.hpp>\nextern "C" void f() { no_such(); }\n')
    with pytest.raises(DesignError, match="does not compile for the emulator: .*no_such"):
        Kernels(source, "npu1").function("f", [])
    with pytest.raises(DesignError, match="there is no function matmul_nothing in it"):
        kernels("npu1")["matmul.o"].function("matmul_nothing", [])
