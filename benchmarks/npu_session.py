"""What attention on the NPU changes: a bundle in the emulator against the same bundle on the CPU.

    python -m benchmarks.npu_session BUNDLE [--windows 2] [--context 256] [--kv int4]

KL(CPU || NPU) for each token of the second half of each window of benchmarks/texts/english.txt. No
NPU takes part unless `--device npu` is given on a machine that has one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from uq.formats.bundle import open_bundle
from uq.kernels.backends import open_session
from uq.kernels.numerics import KV, Numerics
from uq.progress import SilentProgress
from uq.validate.scoring import score
from uq.validate.text import read_text, windows

TEXT = Path(__file__).parent / "texts" / "english.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--device", default="npu-emulator:npu1")
    parser.add_argument("--kv", choices=("int8", "int4"), default="int8")
    arguments = parser.parse_args()
    bundle, context = open_bundle(arguments.bundle), arguments.context
    tokens = windows(bundle.tokenizer(), read_text(TEXT), context, arguments.windows, None)
    exact = open_session(bundle, "cpu", max_context=context)
    numerics = Numerics(kv=KV[arguments.kv])
    ours = open_session(bundle, arguments.device, max_context=context, numerics=numerics)
    scores = score(ours, exact, tokens, SilentProgress())
    hidden = [session.score(tokens) for session in (exact, ours)]
    difference = np.linalg.norm(hidden[1] - hidden[0]) / np.linalg.norm(hidden[0])
    facts = scores.kld_facts
    print(f"{ours.device.name}; keys and values {arguments.kv}")
    print("\n".join(map(str, ours.device.attention)))
    print(
        f"KL(CPU || NPU) over {scores.kld.size} tokens: mean {facts.mean:.5f} ± {facts.stderr:.5f}"
    )
    print(f"nats, median {facts.median:.5f}, 99 % {facts.p99:.4f}, largest {facts.max:.3f}")
    print(
        f"same top token {scores.same_top_percent.value:.2f} %, perplexity ratio "
        f"{scores.perplexity_ratio.value:.4f}, final hidden states {difference:.2%} apart"
    )


if __name__ == "__main__":
    main()
