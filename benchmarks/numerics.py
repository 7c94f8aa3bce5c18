"""What INT8 activations and a quantized KV cache lose by themselves, and what each measure gains.

    python -m benchmarks.numerics [MODEL] [--windows N]

The weights stay those of the checkpoint. Windows of 512 tokens of the text of `uq validate`; the
result is a table in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import open_checkpoint
from uq.kernels.kv_format import KVFormat
from uq.kernels.numerics import KV, Int8Activations, Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.weights import WeightSource
from uq.progress import SilentProgress
from uq.validate.scores import Scores
from uq.validate.scoring import compare, final_states
from uq.validate.text import DEFAULT_TEXT, chunks, targets

CONTEXT = 512
SILENT = SilentProgress()
INT4 = KVFormat(4)
ROWS: Mapping[str, Numerics] = {
    "INT8 activations, without the head's": Numerics(Int8Activations(head=False)),
    "**INT8 activations**": Numerics(Int8Activations()),
    "INT8 activations, groups of 64": Numerics(Int8Activations(group=64)),
    "**INT8 KV**": Numerics(kv=KV["int8"]),
    "INT4 KV, plain": Numerics(kv=INT4),
    "balanced": Numerics(kv=KVFormat(4, balanced=True)),
    "rotated": Numerics(kv=KVFormat(4, rotated=True)),
    "balanced, rotated": Numerics(kv=KVFormat(4, balanced=True, rotated=True)),
    "rotated, pages": Numerics(kv=KVFormat(4, rotated=True, page=64)),
    "balanced, pages": Numerics(kv=KVFormat(4, balanced=True, page=64)),
    "**INT4 KV**: balanced, rotated, pages": Numerics(kv=KV["int4"]),
    "INT8 activations, INT4 KV": Numerics(Int8Activations(), KV["int4"]),
}


@dataclass(frozen=True)
class Bench:
    """A model, the tokens that it is scored on, and what it makes of them in float32."""

    weights: WeightSource
    truth: ReferenceSession
    tokens: NDArray[np.int32]
    states: NDArray[np.float32]

    def scores(self, numerics: Numerics) -> Scores:
        session = ReferenceSession(self.weights, numerics=numerics)
        states = final_states(session, self.tokens, SILENT, "model")
        target = targets(self.tokens)
        return compare(session, states, self.truth, self.states, target, SILENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo:gemma-3-270m")
    parser.add_argument("--windows", type=int, default=8, help="default: %(default)s")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    text = DEFAULT_TEXT.read_text("utf-8")
    tokens = chunks(checkpoint.tokenizer(), text, CONTEXT, args.windows)
    truth = ReferenceSession(checkpoint)
    bench = Bench(checkpoint, truth, tokens, final_states(truth, tokens, SILENT, "reference"))
    print("| in integers | mean KL | 99.9 % KL | same top token | perplexity ratio |")
    print("|---|---|---|---|---|")
    for name, numerics in ROWS.items():
        found = bench.scores(numerics)
        kld = found.kld_facts
        print(
            f"| {name} | {kld.mean:.5f} ± {kld.stderr:.5f} | {kld.p99_9:.3f} "
            f"| {found.same_top_percent.value:.2f} % | {found.perplexity_ratio.value:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
