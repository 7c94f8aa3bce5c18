"""Calibration of dense Gemma 4 on a GPU beside calibration in main memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_vulkan_calibration import Array, on_host
from tests.vulkan_lab import assert_same_numbers, no_messages  # noqa: F401
from uq.errors import DeviceError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.config import EMBEDDING
from uq.formats.spec import Spec
from uq.kernels.vulkan.device import choose
from uq.kernels.weights import LayerWeights
from uq.progress import SilentProgress
from uq.quantize.calibrate import NumpyEngine
from uq.quantize.calibration_engine import CalibrationEngine, StageStatistics, Weights
from uq.quantize.devices import open_engine
from uq.quantize.job import plan_of
from uq.quantize.layers import options_of
from uq.quantize.options import QuantizeOptions
from uq.quantize.plan import TensorPlan
from uq.quantize.token_rows import token_rows
from uq.quantize.vulkan_engine import VulkanEngine

TOKENS = np.random.default_rng(0).integers(6, 512, (5, 24)).astype(np.int32)
SLIDING, FULL = "sliding_attention", "full_attention"
SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL] * 2,
    "global_head_dim": 512,
    "sliding_window": 8,
}
ONE_KEY = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "hidden_size": 96}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "as E2B": ("small", SHARING),
    "as 31B": ("large", ONE_KEY),
}
Numbers = list[dict[str, Array]]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tiny_gemma4: Callable[..., Path]) -> Checkpoint:
    variant, text = MODELS[request.param]
    return open_checkpoint(tiny_gemma4(variant, text=text))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VulkanEngine]:
    made = VulkanEngine(choose(), tmp_path_factory.mktemp("pipelines"))
    yield made
    made.close()


def numbers(checkpoint: Checkpoint, engine: CalibrationEngine) -> Numbers:
    """Statistics of the last layer's stages, behind layers that lose nothing but the embeddings."""
    plan = plan_of(checkpoint.config, QuantizeOptions(group=32))
    coarse = TensorPlan(Spec(4, 32), "rtn", "row")
    plan = replace(plan, tensors={**plan.tensors, EMBEDDING: coarse})
    rows, last = token_rows(checkpoint, plan, TOKENS), checkpoint.config.num_layers - 1
    run, found = engine.begin(checkpoint.config, rows, options_of(plan)), Numbers()
    for layer in range(last):
        run.pass_layer(layer, *(LayerWeights(checkpoint, layer, resident=False) for _ in range(2)))
    weights = checkpoint.layer(last)

    def look(roles: Sequence[str], statistics: StageStatistics) -> Weights:
        found.append(on_host(statistics))
        return {role: weights[role] for role in roles}

    run.quantize_layer(last, dict(weights), look)
    return found


def test_statistics_are_those_of_main_memory(checkpoint: Checkpoint, engine: VulkanEngine) -> None:
    """Behind layers whose inputs are rounded to float16, as a layer's own are."""
    pairs = zip(numbers(checkpoint, engine), numbers(checkpoint, NumpyEngine()), strict=True)
    for found, expected in pairs:
        assert found.keys() == expected.keys()
        for name, matrix in expected.items():
            bound = (2e-3 if name == "hessian" else 2e-2) * np.abs(matrix).max()
            np.testing.assert_allclose(found[name], matrix, rtol=0, atol=bound, err_msg=name)


def test_shared_keys_come_back_from_the_disk_bit_for_bit(
    checkpoint: Checkpoint, engine: VulkanEngine, tmp_path: Path
) -> None:
    spilling = VulkanEngine(choose(), tmp_path / "pipelines", spill=tmp_path)
    try:
        found = numbers(checkpoint, spilling)
    finally:
        spilling.close()
    assert_same_numbers(found, numbers(checkpoint, engine))


def test_experts_are_not_calibrated_there(tiny_gemma4: Callable[..., Path], tmp_path: Path) -> None:
    config = open_checkpoint(tiny_gemma4("experts")).config
    with pytest.raises(DeviceError, match="GPU does not compute mixture of experts .gemma4.; use"):
        open_engine("vulkan", config, 8, 128, SilentProgress(), spill=tmp_path)
