"""HQQ of the linears: `hqq_child.py REFERENCE OUT GROUP`."""

import sys
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from shared import reference_linears, write

BITS = 4


def dequantized(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Through HQQ's grid, with its float16 scale and zero-point."""
    codes, meta = Quantizer.quantize(
        weight.float(), nbits=BITS, group_size=group, axis=1, device="cpu", bitpack=False
    )
    meta |= {name: meta[name].half().float() for name in ("scale", "zero")}
    meta["compute_dtype"] = torch.float32
    return Quantizer.dequantize(codes, meta)


def main() -> None:
    reference, out, group = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    weights = {name: dequantized(weight, group) for name, weight in reference_linears(reference)}
    write(out, weights, BITS + 32 / group, f"int4z g{group}, float zero points")


if __name__ == "__main__":
    main()
