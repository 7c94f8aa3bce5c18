"""Weights read where the bundle's files are mapped, and what happens where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.vulkan_lab import no_messages  # noqa: F401
from uq.errors import DeviceError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import Spec
from uq.kernels.backends import open_session
from uq.kernels.vulkan import imports
from uq.kernels.vulkan.device import Gpu, choose
from uq.kernels.vulkan.engine import Engine
from uq.kernels.vulkan.imports import Imports, Mapping, open_imports
from uq.kernels.vulkan.mailbox import Run
from uq.kernels.vulkan.memory import LEAST_SLAB
from uq.kernels.vulkan.model import weight_names
from uq.kernels.vulkan.sources import BundleSource

pytestmark = pytest.mark.mesa  # other drivers need not take the pages

TOKENS = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return large_bundle(tiny_bundle, 8)


def large_bundle(tiny_bundle: Callable[..., Path], scale_bits: int) -> Bundle:
    """Its weights are more than the least slab."""
    specs = [Spec(4, 32, scale_bits=scale_bits), Spec(8, 32, scale_bits=scale_bits)]
    return open_bundle(tiny_bundle(hidden=256, ffn=2048, vocab=2048, specs=specs))


@pytest.fixture
def shared() -> Iterator[Imports]:
    gpu = Gpu(choose("llvmpipe"))
    found = open_imports(gpu)
    assert found is not None
    yield found
    found.close()
    gpu.close()


def answer(engine: Engine) -> NDArray[np.float32]:
    runs = engine.runs(64)
    runs.tokens([Run(0, 0, TOKENS)])
    return engine.read_floats(engine.work.normed, len(TOKENS), engine.config.hidden_size)


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_weights_in_place_give_the_same_bits_and_take_no_memory(
    scale_bits: int, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = large_bundle(tiny_bundle, scale_bits)
    model = bundle.config, BundleSource(bundle), choose("llvmpipe"), tmp_path, 64
    stored = sum(bundle.raw(name)[0].nbytes for name in weight_names(bundle.config))
    copied, in_place = (Engine(*model, 32, in_place=in_place) for in_place in (False, True))
    np.testing.assert_array_equal(answer(in_place), answer(copied))
    assert (copied.placement.in_place, in_place.placement.in_place) == (0, stored)
    assert in_place.placement.copied == LEAST_SLAB < stored <= copied.placement.copied
    assert str(in_place.placement) == "weights read in place, 1.0 MiB copied"
    for engine in (copied, in_place):
        engine.close()


@pytest.mark.parametrize("layout", ["igpu", "row"])
def test_only_weights_of_another_layout_are_permuted(
    layout: str, tiny_bundle: Callable[..., Path]
) -> None:
    spec = Spec(5, 32, zero_point=True, scale_bits=8)
    bundle = open_bundle(tiny_bundle(specs=[spec], layout=layout))
    name = weight_names(bundle.config)[0]
    weight, tensor = BundleSource(bundle).weight(name), bundle.quant(name)
    assert (weight.mapped is None) == (layout == "row")
    assert weight.kind.spec == spec
    np.testing.assert_array_equal(weight.read(), LAYOUTS["igpu"].tile(tensor))


def test_what_the_driver_refuses_is_copied(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise DeviceError("no file is taken here")

    monkeypatch.setattr(imports, "_allocate", refuse)
    session = open_session(bundle, "vulkan", max_context=32)
    assert session.device.features[-1] == "weights copied (no file is taken here)"
    assert np.isfinite(session.score(np.array([TOKENS], np.int32))).all()


def test_neighbours_are_one_piece(bundle: Bundle, shared: Imports) -> None:
    q, k, v, down = (
        bundle.raw(f"model.layers.0.{role}_proj.weight")[0]
        for role in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")
    )
    one = shared.span([q, k, v])
    assert one is not None and one.nbytes == q.nbytes + k.nbytes + v.nbytes
    assert one.address % 16 == 0
    assert shared.span([q, v]) is None and shared.span([q, down]) is None
    assert shared.span([q, None]) is None


def test_only_pages_of_a_file_are_taken(bundle: Bundle, shared: Imports) -> None:
    raw, _ = bundle.raw(weight_names(bundle.config)[0])
    assert shared.holds(raw) and not shared.holds(np.array(raw)) and not shared.holds(None)
    mapping = Mapping.of(raw, 4096)
    assert mapping is not None and mapping.address % 4096 == mapping.nbytes % 4096 == 0
    assert mapping.address <= raw.ctypes.data < mapping.address + mapping.nbytes
    assert Mapping.of(raw, 1 << 40) is None


def test_a_gpu_with_a_memory_of_its_own_gets_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "SHARING", ("integrated",))
    gpu = Gpu(choose("llvmpipe"))
    assert open_imports(gpu) is None
    gpu.close()
