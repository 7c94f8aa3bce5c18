"""Reading the reference and writing a result, for scripts that run beside a peer.

They may run in another Python than the benchmark's, one that has the peer but not uq.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


def reference_linears(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and (out, in) weight of every linear of the layers."""
    index = folder / INDEX
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    for file in sorted(files):
        with safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if is_linear(name):
                    yield name, tensors.get_tensor(name)


def is_linear(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


def write(out: Path, weights: dict[str, torch.Tensor], bits: float, grid: str) -> None:
    """The dequantized linears, and the bits per weight that their packed form takes."""
    out.mkdir()
    contiguous = {name: weight.float().cpu().contiguous() for name, weight in weights.items()}
    save_file(contiguous, out / "linears.safetensors")
    (out / "grid.json").write_text(json.dumps({"bits": bits, "grid": grid}))
