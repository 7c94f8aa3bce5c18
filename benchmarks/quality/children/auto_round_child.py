"""AutoRound: `auto_round_child.py REFERENCE OUT TOKENS.npy GROUP ITERATIONS DEVICE`."""

import sys
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from shared import is_linear, write
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS = 4


def main() -> None:
    reference, out, tokens = map(Path, sys.argv[1:4])
    group, iterations, device = int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
    windows = torch.from_numpy(np.load(tokens)).long()
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(reference),
        scheme="W4A16",
        group_size=group,
        sym=True,
        iters=iterations,
        dataset=[row[None] for row in windows],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map=device,
        enable_torch_compile=False,
    )
    model, _ = rounding.quantize()
    weights = {name: value for name, value in model.state_dict().items() if is_linear(name)}
    # float16 scales, and the zero points that the format keeps for symmetric grids, too
    write(out, weights, BITS + (16 + BITS) / group, f"int4 g{group}")


if __name__ == "__main__":
    main()
