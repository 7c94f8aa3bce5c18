"""Prints the subgroup size of Mesa's software device and hashes of what a bundle computes there:

python -m tests.vulkan_bits BUNDLE CACHE
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.formats.bundle import open_bundle
from uq.kernels.vulkan.device import choose
from uq.kernels.vulkan.engine import Engine
from uq.kernels.vulkan.mailbox import Run, Writer
from uq.kernels.vulkan.sources import BundleSource
from uq.kernels.vulkan.weights import padded_rows

TOKENS = list(range(7, 27))
FEW = 6  # of them, in steps and then together


def main(folder: str, cache: str) -> None:
    bundle, gpu = open_bundle(folder), choose("llvmpipe")
    config = bundle.config
    engine = Engine(config, BundleSource(bundle), gpu, Path(cache), 64, widest=32)
    many, alone, together = (engine.runs(64) for _ in range(3))
    many.tokens([Run(0, 0, TOKENS)])
    prompt = engine.read_floats(engine.work.normed, len(TOKENS), config.hidden_size)
    steps = []
    for position, token in enumerate(TOKENS[:FEW]):
        alone.steps(1, [Writer(0, position, token)], ())
        steps.append(engine.read_floats(engine.work.logits, 1, config.vocab_size))
    together.choices(Run(0, 0, TOKENS[:FEW]))
    rows = engine.read_floats(engine.work.logits, FEW, padded_rows(config.vocab_size))
    found = (prompt, np.concatenate(steps), rows[:, : config.vocab_size])
    print(gpu.subgroup[0], *map(digest, found))
    engine.close()


def digest(values: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
