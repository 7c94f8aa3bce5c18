"""Decode and prefill rates of the Vulkan engine, on a bundle or on random weights of true shapes.

    python -m benchmarks.vulkan_speed 270m 1b 4b 27b e2b 26b-a4b 3n-e2b [--device NAME]
    python -m benchmarks.vulkan_speed BUNDLE

A shape is Gemma 3, 3n or 4 of that size with random codes: INT4 in groups of 32, the embedding
INT8, both with scales of 8 bits: 4.25 and 8.25 bits a weight. Q4_0 and Q8_0 have 4.5 and 8.5, and
so do these with `--scale-bits 16`. Inputs of linears have 16 bits, with `--activations int8` 8.

Prints JSON of each model: tokens a second (median and range of the repeats, after two that do not
count: passes grow, and large ones have kernels of their own), the time of a step's stages, the read
bandwidth of the device measured in the same run, how many tokens a second it allows for the bytes
that a token meets (of experts those that it chooses), and the share of that which decoding reaches.
`--layers N` cuts a shape down, for a trial.

Needs numpy, the package `vulkan` and the compiled shaders (python -m uq.kernels.vulkan.compile).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes import NAMES, text_config
from uq.formats.config import GemmaConfig, layer_tensor
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import gain_name
from uq.formats.row_scales import round_scales
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.numerics import ACTIVATIONS, Numerics
from uq.kernels.profile import by_label
from uq.kernels.session import Sampling
from uq.kernels.vulkan.bandwidth import read_bandwidth
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.session import VulkanSession
from uq.kernels.vulkan.sources import BundleSource
from uq.kernels.vulkan.weights import Kind, Source, Weight

PATTERN = 64  # rows that repeat
WARM_UPS = 2


class RandomWeights:
    """Random codes of a model's shapes; rows repeat, so that no time is lost in making them. Norms
    and other vectors are ones.
    """

    def __init__(self, config: GemmaConfig, scale_bits: int = 8) -> None:
        self._scale_bits = scale_bits
        self._tables, self._linears = config.table_shapes(), dict[str, tuple[int, int]]()
        self._arrays: dict[str, tuple[int, ...]] = dict(config.model_kept())
        self._arrays |= {gain_name(name): shape for name, shape in config.model_norms().items()}
        for layer in range(config.num_layers):
            named = partial(layer_tensor, layer)
            self._linears |= {named(x): y for x, y in config.linear_shapes(layer).items()}
            self._arrays |= {named(x): y for x, y in config.kept_shapes(layer).items()}
            norms = config.norm_shapes(layer)
            self._arrays |= {gain_name(named(x)): y for x, y in norms.items()}

    def weight(self, name: str) -> Weight:
        spec = Spec(4 if name in self._linears else 8, 32, scale_bits=self._scale_bits)
        shape = self._linears.get(name) or self._tables[name]
        return Weight(Kind.of(spec), shape, partial(random_tiles, shape, spec))

    def array(self, name: str) -> NDArray[np.float32]:
        shape = self._arrays[name]
        return np.ones(shape, np.float32) if len(shape) == 1 else random_kept(shape)


@cache
def random_kept(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Values that bfloat16 holds."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    values *= np.float32(shape[-1] ** -0.5)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


@cache
def random_tiles(shape: tuple[int, int], spec: Spec) -> NDArray[np.uint8]:
    rows, cols = shape
    rng = np.random.default_rng(rows + cols)
    codes = rng.integers(spec.qmin, spec.qmax + 1, (PATTERN, cols), np.int8)
    size = cols**-0.5 / spec.qmax
    scales = rng.uniform(0.5 * size, 2 * size, (PATTERN, cols // spec.group)).astype(np.float16)
    scales = round_scales(scales) if spec.row_step else scales
    pattern = LAYOUTS["igpu"].tile(QuantTensor(codes, scales, spec))
    return np.resize(pattern, (-(-rows // 16), pattern.shape[1]))


def open_model(
    name: str, layers: int | None = None, scale_bits: int = 8
) -> tuple[GemmaConfig, Source]:
    if name in NAMES:
        config = text_config(name, layers)
        return config, RandomWeights(config, scale_bits)
    from uq.formats.bundle import open_bundle

    bundle = open_bundle(name, verify="lazy")
    return bundle.config, BundleSource(bundle)


def timed_run(session: VulkanSession, prompt: list[int], generate: int) -> tuple[float, float]:
    """Tokens per second of a prefill and of decoding behind it."""
    session.reset()
    began = time.perf_counter()
    session.prefill(prompt)
    filled = time.perf_counter()
    count = sum(1 for _ in session.decode(generate, Sampling()))
    return len(prompt) / (filled - began), count / (time.perf_counter() - filled)


def spread(rates: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def measure(name: str, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    config, source = open_model(name, args.layers, args.scale_bits)
    began = time.perf_counter()
    session = VulkanSession(
        config,
        source,
        choose(args.device),
        pipeline_cache=args.cache,
        max_context=args.prompt + args.generate + 1,
        tune=args.tune,
        numerics=Numerics(ACTIVATIONS[args.activations]),
    )
    opened = time.perf_counter() - began
    prompt = [int(token) for token in np.arange(args.prompt) * 7919 % config.vocab_size]

    runs = [timed_run(session, prompt, args.generate) for _ in range(WARM_UPS + args.repeats)]
    runs = runs[WARM_UPS:]
    session.reset()
    session.prefill(prompt)
    stages = by_label(session.profile().kernels)
    prefill_rates, decode_rates = (spread(rates) for rates in zip(*runs, strict=True))
    return {
        "model": name,
        "device": session.device.name,
        "driver": session.device.driver,
        "features": session.device.features,
        "activations": args.activations,
        "open_seconds": opened,
        "prompt": args.prompt,
        "generated": args.generate,
        "prefill_tokens_per_second": prefill_rates,
        "decode_tokens_per_second": decode_rates,
        "bytes_per_token": session.bytes_per_token,
        "step": [asdict(stage) for stage in stages],
        "read_bandwidth_gb_s": bandwidth / 1e9,
        "ceiling_tokens_per_second": bandwidth / session.bytes_per_token,
        "share_of_bandwidth": decode_rates["median"] * session.bytes_per_token / bandwidth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"{', '.join(NAMES)}, a bundle")
    parser.add_argument("--device", default="", help="number or part of the name")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--scale-bits", type=int, choices=(8, 16), default=8, help="of a shape")
    parser.add_argument("--activations", choices=ACTIVATIONS, default="float")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="measure the shapes of products first")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uq-vulkan")
    args = parser.parse_args()
    bandwidth = read_bandwidth(choose(args.device), args.cache)
    for name in args.models:
        print(json.dumps(measure(name, args, bandwidth)), flush=True)


if __name__ == "__main__":
    main()
