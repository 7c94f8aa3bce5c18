"""Weights that already lie on a grid, and ordinary ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.spec import QuantTensor, Spec
from uq.progress import SilentProgress
from uq.quantize.job import recognised_plan
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.recover import recover

Array = NDArray[np.float32]
INT4, INT8 = Spec(4, 32), Spec(8, 32)
RNG = np.random.default_rng(7)


def normal(*shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.05).astype(np.float32)


def q4_0(weight: Array) -> Array:
    """As llama.cpp writes it, dequantized."""
    blocks = gguf.quants.quantize(weight, GGMLQuantizationType.Q4_0)
    found: Array = gguf.quants.dequantize(blocks, GGMLQuantizationType.Q4_0)
    return found


def stored(weight: Array, dtype: str) -> Array:
    """Rounded to the checkpoint's number format."""
    import torch

    kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    found: Array = torch.from_numpy(weight).to(kinds[dtype]).float().numpy()
    return found


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_codes_of_q4_0_are_found_again(dtype: str) -> None:
    weight = normal(40, 96)
    blocks = gguf.quants.quantize(weight, GGMLQuantizationType.Q4_0).reshape(-1, 18)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    tensor, fits = recover(stored(q4_0(weight), dtype), INT4, dtype)
    assert fits.all()
    np.testing.assert_array_equal(tensor.codes, nibbles.astype(np.int8).reshape(40, 96) - 8)
    scales = blocks[:, :2].copy().view(np.float16).reshape(40, 3).astype(np.float64)
    bound = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 0}[dtype]
    np.testing.assert_allclose(tensor.scales.astype(np.float64), scales, rtol=bound)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_scale_with_all_its_digits_costs_only_their_rounding(dtype: str) -> None:
    """Training in JAX keeps scales in bfloat16 or float32, and need not reach the code -8."""
    codes = RNG.integers(-7, 8, (16, 4, 32))
    codes[:, :, 0] = 7
    weight = (codes * (0.01 + np.abs(normal(16, 4, 1))) / 7).astype(np.float32).reshape(16, 128)
    tensor, fits = recover(stored(weight, dtype), INT4, dtype)
    assert fits.all()
    np.testing.assert_array_equal(tensor.codes, codes.reshape(16, 128))
    np.testing.assert_allclose(
        tensor.dequantize(), weight, rtol=2.0**-9 if dtype == "bf16" else 2.0**-11
    )


def test_codes_of_q8_0_are_found_again() -> None:
    blocks = gguf.quants.quantize(normal(8, 64), GGMLQuantizationType.Q8_0)
    weight = gguf.quants.dequantize(blocks, GGMLQuantizationType.Q8_0)
    tensor, fits = recover(weight, INT8, "q8_0")
    assert fits.all()
    np.testing.assert_array_equal(tensor.dequantize(), weight)


@pytest.mark.parametrize("spec", [INT4, Spec(5, 32), Spec(6, 32), INT8])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_ordinary_weights_have_no_grid(dtype: str, spec: Spec) -> None:
    weight = stored(np.concatenate([normal(200, 128), RNG.laplace(size=(50, 128))]), dtype)
    assert not recover(weight.astype(np.float32), spec, dtype)[1].any()


def test_another_group_or_fewer_bits_is_no_grid() -> None:
    weight = q4_0(normal(20, 128))
    assert not recover(weight, Spec(4, 64), "f32")[1].any()
    five = gguf.quants.quantize(normal(20, 128), GGMLQuantizationType.Q5_0)
    weight = gguf.quants.dequantize(five, GGMLQuantizationType.Q5_0)
    assert not recover(weight, INT4, "q5_0")[1].any()
    assert recover(weight, Spec(5, 32), "q5_0")[1].all()


def test_zeros_and_a_group_off_the_grid() -> None:
    weight = q4_0(normal(3, 64))
    weight[0] = 0
    weight[2, :32] = normal(32)
    tensor, fits = recover(weight, INT4, "f32")
    assert fits.tolist() == [[True, True], [True, True], [False, True]]
    error = np.abs(tensor.dequantize() - weight)
    assert error[:2].max() == error[2, 32:].max() == 0
    assert 0 < error[2, :32].max() < np.abs(weight[2, :32]).max() / 8


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Checkpoints whose linears lie on the grid of Q4_0, rounded to bfloat16."""

    def make(skip: str = "none", **options: Any) -> Path:
        plain = open_checkpoint(tiny_checkpoint(**options))
        weights: dict[str, Array] = {}
        for name, info in plain.tensors.items():
            weight = plain.rows(name, 0, info.shape[0])
            linear = name.endswith("_proj.weight") and skip not in name
            weights[name] = q4_0(weight) if linear else weight
        return tiny_checkpoint(extra=weights, **options)

    return make


def tensors(path: Path) -> dict[str, QuantTensor]:
    bundle = open_bundle(path)
    return {name: bundle.quant(name) for name in bundle.manifest.tensors}


def test_the_codes_of_a_trained_model_are_kept(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint, notes = open_checkpoint(trained()), Notes()
    path = quantize(checkpoint, tmp_path / "out", QuantizeOptions(), notes)
    bundle = open_bundle(path)
    assert notes.notes == ["14 of 15 tensors lie on their grid: codes kept"]
    assert bundle.manifest.calibration is None
    for name, tensor in tensors(path).items():
        record = bundle.manifest.tensors[name]
        if name.endswith("_proj.weight"):
            weight = checkpoint.rows(name, 0, tensor.shape[0])
            assert (record.method, record.fallback) == ("grid", None)
            np.testing.assert_allclose(tensor.dequantize(), weight, rtol=2.0**-7, atol=0)


def test_a_linear_off_the_grid_is_calibrated_beside_the_others(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(trained(skip="layers.1.mlp.up_proj"))
    text = tmp_path / "text.txt"
    text.write_text("the time of the world " * 300)
    options = QuantizeOptions(calibration=str(text), calibration_tokens=512)
    path = quantize(checkpoint, tmp_path / "out", options)
    bundle = open_bundle(path)
    methods = {name: record.method for name, record in bundle.manifest.tensors.items()}
    assert methods.pop("model.embed_tokens.weight") == "rtn"
    assert methods.pop("model.layers.1.mlp.up_proj.weight") == "gptq"
    assert set(methods.values()) == {"grid"}
    gate = "model.layers.1.mlp.gate_proj.weight"
    weight = checkpoint.rows(gate, 0, 256)
    np.testing.assert_allclose(bundle.quant(gate).dequantize(), weight, rtol=2.0**-7, atol=0)


def test_gptq_on_demand_moves_the_codes(trained: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(trained())
    plan = recognised_plan(checkpoint, QuantizeOptions(method="gptq"))
    assert plan.uses_gptq and all(tensor.method != "grid" for tensor in plan.tensors.values())


def test_an_ordinary_model_is_calibrated(tiny_checkpoint: Callable[..., Path]) -> None:
    plan = recognised_plan(open_checkpoint(tiny_checkpoint()), QuantizeOptions())
    assert {tensor.method for tensor in plan.tensors.values()} == {"rtn", "gptq"}


@pytest.mark.real
def test_the_demo_keeps_its_q5_0_tensors_in_five_bits(real_gguf: Path) -> None:
    checkpoint = open_checkpoint(real_gguf)
    plan = recognised_plan(checkpoint, QuantizeOptions(recipe="int5"))
    for name, tensor in plan.tensors.items():
        kept = checkpoint.tensors[name].dtype == "q5_0" and name.endswith("_proj.weight")
        assert (tensor.method == "grid") == kept, name
