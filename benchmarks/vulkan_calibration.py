"""Seconds of a layer that is calibrated on a GPU, by phase; beside it BLAS on a smaller model.

    python -m benchmarks.vulkan_calibration 27b --layers 8 [--sequences 128] [--length 1024]
                                            [--device NAME] [--peer 270m]

A shape is Gemma 3 of that size with random weights, made in memory: reading a checkpoint and
writing a bundle are not in the times. A layer is what `uq quantize` does with it between the two:
both paths through the layer, second moments, equalization, GPTQ with its descents and refits, codes
and weights back on the host. The phases are measured in a run of their own, because the host waits
at each of their borders.

The peer is the same work by `NumpyEngine` and by the GPU on a smaller shape.

Prints one JSON object. Layers that were not run are extrapolated from the mean of those that were;
the object says how many.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes import SHAPES, shape_config
from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.dense.workshop import Workshop
from uq.kernels.vulkan.device import choose
from uq.progress import SilentProgress
from uq.quantize.background import Writing
from uq.quantize.calibrate import NumpyEngine
from uq.quantize.calibration_engine import CalibrationEngine
from uq.quantize.layers import CalibratedLayers
from uq.quantize.plan import make_plan
from uq.quantize.vulkan_engine import VulkanEngine

Array = NDArray[np.float32]
SPREAD = 0.02  # of weights
ROWS = 64  # of the embedding that repeat


class RandomCheckpoint:
    """A model of random weights; every layer has the same ones."""

    tensors: Mapping[str, Any] = {}

    def __init__(self, config: GemmaConfig) -> None:
        self.config = config
        rng = np.random.default_rng(0)
        largest = max(rows * cols for rows, cols in config.linear_shapes(0).values())
        noise = rng.standard_normal(largest, np.float32) * np.float32(SPREAD)
        self._weights: dict[str, Array] = {
            role: noise[: rows * cols].reshape(rows, cols)
            for role, (rows, cols) in config.linear_shapes(0).items()
        }
        for role, (size,) in config.norm_shapes(0).items():
            self._weights[role] = rng.uniform(0.5, 2.0, size).astype(np.float32)
        self._rows = rng.standard_normal((ROWS, config.hidden_size), np.float32) * SPREAD

    def layer(self, index: int) -> Mapping[str, Array]:
        return self._weights

    def embedding(self, start: int, stop: int) -> Array:
        found: Array = self._rows[np.arange(start, stop) % ROWS]
        return found

    def final_norm(self) -> Array:
        return np.ones(self.config.hidden_size, np.float32)


def run(
    config: GemmaConfig, layers: int, tokens: NDArray[np.int32], engine: CalibrationEngine
) -> tuple[float, list[float]]:
    """Seconds until the tokens stand in front of layer 0, and of each layer."""
    began = time.perf_counter()
    calibrated = begun(config, tokens, engine)
    start, seconds = time.perf_counter() - began, []
    for layer in range(layers):
        began = time.perf_counter()
        calibrated.quantize(layer)
        seconds.append(time.perf_counter() - began)
    return start, seconds


def begun(
    config: GemmaConfig, tokens: NDArray[np.int32], engine: CalibrationEngine
) -> CalibratedLayers:
    checkpoint: Any = RandomCheckpoint(config)
    plan, idle = make_plan(config), Writing().idle
    return CalibratedLayers(checkpoint, plan, tokens, engine, SilentProgress(), {}, idle)


def on_gpu(
    config: GemmaConfig, layers: int, tokens: NDArray[np.int32], wish: str
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        engine = VulkanEngine(choose(wish), Path(folder))
        start, seconds = run(config, layers, tokens, engine)
        nbytes = opened(engine).arena.nbytes
        engine.close()
    return {
        "start": round(start, 2),
        "layers": [round(value, 3) for value in seconds],
        "device_gib": round(nbytes / 2**30, 1),
    }


def opened(engine: VulkanEngine) -> Workshop:
    assert engine.workshop is not None
    return engine.workshop


def phases(config: GemmaConfig, tokens: NDArray[np.int32], wish: str) -> dict[str, float]:
    """Seconds of each phase of the second layer; the first one makes the pipelines."""
    with tempfile.TemporaryDirectory() as folder:
        engine = VulkanEngine(choose(wish), Path(folder), timed=True)
        calibrated = begun(config, tokens, engine)
        calibrated.quantize(0)
        phase_seconds = opened(engine).stream.seconds
        phase_seconds.clear()
        began = time.perf_counter()
        calibrated.quantize(1)
        whole = time.perf_counter() - began
        found = {label: round(value, 3) for label, value in phase_seconds.items()}
        engine.close()
    return found | {"between the phases": round(whole - sum(found.values()), 3)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config = shape_config(arguments.shape)
    shape = (arguments.sequences, arguments.length)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, shape).astype(np.int32)
    found = on_gpu(config, arguments.layers, tokens, arguments.device)
    counted = found["layers"][1:] or found["layers"]  # the first one makes the pipelines, too
    mean = sum(counted) / len(counted)
    total = found["start"] + found["layers"][0] + mean * (config.num_layers - 1)
    return {
        "shape": arguments.shape,
        "tokens": list(shape),
        "device": choose(arguments.device).name,
        "measured_layers": arguments.layers,
        "seconds_a_layer": round(mean, 3),
        "extrapolated_layers": config.num_layers - arguments.layers,
        "seconds_of_all": round(total, 1),
        **found,
        "phases": phases(config, tokens, arguments.device),
        "recipe": asdict(make_plan(config).gptq),
    }


def peer(name: str, wish: str) -> dict[str, Any]:
    """BLAS and the GPU on the same small work."""
    config = replace(shape_config(name), num_layers=2)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (16, 512)).astype(np.int32)
    main = run(config, 2, tokens, NumpyEngine())[1]
    return {
        "shape": name,
        "tokens": list(tokens.shape),
        "blas": [round(value, 2) for value in main],
        "gpu": on_gpu(config, 2, tokens, wish)["layers"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of calibration on a GPU.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="")
    parser.add_argument("--peer", choices=SHAPES)
    arguments = parser.parse_args()
    found = measure(arguments)
    if arguments.peer:
        found["peer"] = peer(arguments.peer, arguments.device)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
