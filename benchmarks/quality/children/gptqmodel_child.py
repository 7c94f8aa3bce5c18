"""GPTQ by GPTQModel: `gptqmodel_child.py REFERENCE OUT TOKENS.npy GROUP DEVICE`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default fails on two cores

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from shared import is_linear, write

BITS = 4


def main() -> None:
    reference, out, tokens = map(Path, sys.argv[1:4])
    group, device = int(sys.argv[4]), sys.argv[5]
    windows = torch.from_numpy(np.load(tokens)).long()
    calibration = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows
    ]
    config = QuantizeConfig(
        bits=BITS,
        group_size=group,
        sym=True,
        format="gptq_v2",  # version 1 keeps its zero-points one too small, and dequantizes them so
        device=device,
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(reference), config, dtype=torch.float32)
    model.quantize(calibration, batch_size=1, backend=BACKEND.TORCH)
    weights = {}
    for name, module in model.model.named_modules():
        if is_linear(f"{name}.weight"):
            weights[f"{name}.weight"] = module.dequantize_weight().T.float()
    # float16 scales, and the zero points that the format keeps for symmetric grids, too
    write(out, weights, BITS + (16 + BITS) / group, f"int4 g{group}")


if __name__ == "__main__":
    main()
