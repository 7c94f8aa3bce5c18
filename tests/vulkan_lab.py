"""A Vulkan device for tests of single kernels, and the Khronos validation layer's messages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from uq.formats.layouts import LAYOUTS
from uq.formats.spec import QuantTensor
from uq.kernels.vulkan import pipelines
from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.compile import compile_variant
from uq.kernels.vulkan.device import Gpu, choose
from uq.kernels.vulkan.memory import Arena, Span, Transfers
from uq.kernels.vulkan.pipelines import Constants, Pipelines
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.sources import float_tiles
from uq.kernels.vulkan.spirv import load
from uq.kernels.vulkan.variants import VARIANTS
from uq.kernels.vulkan.weights import Kind, padded_rows, tiles_of
from uq.kernels.vulkan.wide import Abilities

Floats = NDArray[np.float32]
SETTINGS = """khronos_validation.debug_action = VK_DBG_LAYER_ACTION_LOG_MSG
khronos_validation.report_flags = error,warn,perf
khronos_validation.log_filename = {log}
"""


def assert_same_numbers(
    found: Sequence[Mapping[str, NDArray[Any]]], expected: Sequence[Mapping[str, NDArray[Any]]]
) -> None:
    """Bit for bit, by names."""
    for here, there in zip(found, expected, strict=True):
        assert here.keys() == there.keys()
        for name, matrix in here.items():
            np.testing.assert_array_equal(matrix, there[name], err_msg=name)


def watch_validation(folder: Path) -> Path:
    """Switch the validation layer on for this process; the file that its messages go to."""
    log = folder / "messages.txt"
    (folder / "vk_layer_settings.txt").write_text(SETTINGS.format(log=log))
    os.environ["VK_INSTANCE_LAYERS"] = "VK_LAYER_KHRONOS_validation"
    os.environ["VK_LAYER_SETTINGS_PATH"] = str(folder)
    return log


@pytest.fixture(autouse=True)
def no_messages(vulkan_messages: Path) -> Iterator[None]:
    """Every test of a module that imports this fails when the validation layer objects."""
    before = vulkan_messages.read_text() if vulkan_messages.exists() else ""
    yield
    after = vulkan_messages.read_text() if vulkan_messages.exists() else ""
    assert after[len(before) :] == ""


def give_matrices(patch: pytest.MonkeyPatch) -> None:
    """Sessions multiply by matrix instructions; plain arithmetic is in their place where the device
    has none."""
    if not choose().has_matrix_blocks:
        of = Abilities.of
        patch.setattr(Abilities, "of", lambda gpu: replace(of(gpu), matrix=True))
        patch.setattr(pipelines, "load", emulated)


def emulated(name: str) -> bytes:
    row = VARIANTS[name]
    if row.source not in ("gemm_matrix.comp", "attention_matrix.comp"):
        return load(name)
    macros = {**row.macros, "EMULATED": 1}
    features = tuple(name for name in row.features if name != "coopmat")
    return compile_variant(replace(row, macros=macros, features=features))


class Lab:
    """One device; every array that is put there stays until it is closed."""

    def __init__(self, cache: Path, common: Constants = MappingProxyType({})) -> None:
        """`common`: as of `Pipelines`."""
        self.gpu = Gpu(choose())
        self.arena, self.transfers = Arena(self.gpu, 4 << 20), Transfers(self.gpu)
        self.pipelines = Pipelines(self.gpu, cache, common)

    def put(self, values: NDArray[Any]) -> Span:
        span = self.arena.take(values.nbytes)
        self.transfers.write(span, values)
        return span

    def room(self, count: int) -> Span:
        """Zeros: `count` words of 32 bits."""
        return self.put(np.zeros(count, np.uint32))

    def get(self, span: Span, kind: DTypeLike, *shape: int) -> NDArray[Any]:
        return self.transfers.read(span).view(kind)[: int(np.prod(shape))].reshape(shape)

    def run(self, name: str, push: bytes, *groups: int, **constants: int | float) -> None:
        recorder = Recorder(self.gpu)
        pipeline = self.pipelines.get(name, **constants)
        x, y, z = (*groups, 1, 1)[:3]
        recorder.dispatch(pipeline, self.pipelines.layout, push, (x, y, z))
        recorder.end()
        submission = Submission(self.gpu, [recorder.commands])
        submission.run()
        submission.close()
        recorder.close()

    def activations(self, x: Floats, *, is_float: bool = False) -> Span:
        """x (columns, channels) as the kernels' activations."""
        columns, channels = x.shape
        span = self.room(columns * tiles_of(channels) * (128 if is_float else 72))
        push = addresses(self.put(x), span)
        self.run("quantize", push, columns, LANES=64, FLOAT_X=is_float, CHANNELS=channels)
        return span

    def weight(self, weight: QuantTensor | Floats, kind: Kind) -> Span:
        if isinstance(weight, QuantTensor):
            return self.put(LAYOUTS["igpu"].tile(weight))
        return self.put(float_tiles(weight, kind.name))

    def close(self) -> None:
        for part in (self.pipelines, self.transfers, self.arena, self.gpu):
            part.close()


def product(
    lab: Lab, name: str, weight: Span, kind: Kind, shape: tuple[int, int], x: Floats, **how: int
) -> Floats:
    """W x for each column, (columns, rows), by the kernel `name`."""
    rows, cols = shape
    blocks = padded_rows(rows) // 16
    y = lab.room(len(x) * rows)
    constants = {"LANES": 128, "BLOCKS": 1, **how}
    push = addresses(weight, weight, lab.activations(x, is_float=kind.is_float), y, *[y] * 6)
    push += words(blocks, tiles_of(cols), rows, rows, 0)
    groups = -(-blocks // (constants["BLOCKS"] * constants.get("ROUNDS", 1)))
    lab.run(name, push, groups, **kind.constants, COLUMNS=len(x), **constants)
    return lab.get(y, np.float32, len(x), rows)
