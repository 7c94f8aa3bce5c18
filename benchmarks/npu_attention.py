"""Every variant of NPU attention in the emulator: bytes against the twin, error against float64.

    python -m benchmarks.npu_attention [--lengths 256 512 1024 2048]
    python -m benchmarks.npu_attention --model MODEL     # the error on a model's own layers

Rates are those of the emulator on one core of this machine. They say nothing about an NPU.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from tests.test_npu_attention import gemma_like, nrmse
from uq.formats.checkpoint.opening import open_checkpoint
from uq.formats.config import GemmaConfig
from uq.kernels.attention import attend as attention_of_model
from uq.kernels.npu.kernels.attention import attend, twin
from uq.kernels.npu.kernels.attention.attend import Inputs
from uq.kernels.npu.kernels.attention.design import attention
from uq.kernels.npu.kernels.attention.plan import Plan, plan
from uq.kernels.npu.kernels.attention.variant import DEVICES, HEAD_DIMS, Variant
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.verify import verify
from uq.kernels.reference import ReferenceSession

HEADS, KV_HEADS = 4, 1


def macs(made: Plan) -> int:
    """Multiply-accumulates of the blocks that the cores compute, masked ones included: two
    limbs of the queries by the keys, and weights by the values."""
    variant = made.variant
    blocks = sum(job.blocks * len(job.lanes) for jobs in made.jobs for job in jobs)
    return blocks * 3 * variant.rows * variant.keys * variant.head_dim


def measure(variant: Variant, length: int) -> str:
    """One line of the table."""
    made = plan(variant, HEADS, KV_HEADS, length)
    source = parse_design(print_design(attention(made)), "attention")
    accepted = all(report.accepted for report in verify(source))
    q, k, v = gemma_like(length, made)
    factor = variant.head_dim**-0.5
    inputs = Inputs.quantized(q, k, v, variant.kv_bits, factor)
    first, rest = slice(variant.rows), (variant.kv_bits, factor)
    short = Inputs.quantized(q[first], k[first], v[first], *rest)  # compiles the kernel
    attend.emulate(plan(variant, HEADS, KV_HEADS, variant.rows), short)
    start = time.perf_counter()
    emulated = attend.emulate(made, inputs)
    seconds = time.perf_counter() - start
    exact = emulated.tobytes() == attend.compute(made, inputs).tobytes()
    rows = attend.rows(made, inputs, emulated)
    stored = twin.softmax_attention(q, *inputs.stored(), factor=factor)
    floats = twin.softmax_attention(q, k, v, factor=factor)
    return (
        f"| {variant.device} | INT8 x INT{variant.kv_bits} | {variant.head_dim} | {length} "
        f"| {'yes' if accepted else 'NO'} | {'yes' if exact else 'NO'} "
        f"| {nrmse(rows, stored):.2%} | {nrmse(rows, floats):.2%} "
        f"| {macs(made) / seconds / 1e6:.0f} |"
    )


def measure_layers(model: str, length: int) -> Iterator[str]:
    """The error of each layer of a checkpoint on the first tokens of benchmarks/texts."""
    seen: list[tuple[NDArray[np.float32], ...]] = []

    def spy(config: GemmaConfig, layer: int, *qkv: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(tuple(x[0].copy() for x in qkv))
        return attention_of_model(config, layer, *qkv)

    checkpoint = open_checkpoint(model)
    text = (Path(__file__).parent / "texts" / "english.txt").read_text(encoding="utf-8")
    tokens = checkpoint.tokenizer().encode(text[: 8 * length])[:length]
    with mock.patch("uq.kernels.reference.attend", spy):
        ReferenceSession(checkpoint).score(np.array([tokens], np.int32))
    config = checkpoint.config
    factor = float(config.attention_scale)
    for layer, (q, k, v) in enumerate(seen):
        cells = [f"| {layer}"]
        for bits in (8, 4):
            variant = Variant("npu1", config.head_dim, bits)
            window = config.window(layer)
            made = plan(variant, q.shape[1], k.shape[1], len(q), window=window)
            inputs = Inputs.quantized(q, k, v, bits, factor)
            rows = attend.rows(made, inputs, attend.emulate(made, inputs))
            for keys, values in (inputs.stored(), (k, v)):
                exact = twin.softmax_attention(q, keys, values, factor=factor, window=window)
                cells.append(f"{nrmse(rows, exact):.2%}")
        yield " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint; measures its layers instead")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    arguments = parser.parse_args()
    if arguments.model:
        print("| layer | INT8 | with storage | INT4 | with storage |\n|---|---|---|---|---|")
        for line in measure_layers(arguments.model, 512):
            print(line, flush=True)
        return
    print(
        "| device | type | head size | length | verified | bit-exact | error | with storage "
        "| M MAC/s |\n|---|---|---|---|---|---|---|---|---|"
    )
    for length in arguments.lengths:
        for device in DEVICES:
            for bits in (8, 4):
                for head_dim in HEAD_DIMS:
                    print(measure(Variant(device, head_dim, bits), length), flush=True)
    print(f"\nnumpy {np.__version__}, emulated on one core; nothing ran on an NPU")


if __name__ == "__main__":
    main()
