"""Quantizers of other Python packages, which take the linears alone.

Each runs as a script of `children`, in a Python that has the package. It writes dequantized
linears; the tied embedding, which these packages leave in float, is rounded to INT8 here, as in
uq's bundles, so that their rows can be compared with the others.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from benchmarks.quality.calibration import Draw
from benchmarks.quality.errors import NotRun
from benchmarks.quality.models import Model
from benchmarks.quality.results import Sizes
from benchmarks.quality.rows import Row
from benchmarks.quality.source import Reference
from benchmarks.quality.steps import OUT, Step
from uq.formats.checkpoint import Checkpoint
from uq.formats.config import GemmaConfig, layer_tensor
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.weights import WeightSource
from uq.quantize.scales import quantize_rtn

Array = NDArray[np.float32]
CHILDREN = Path(__file__).parents[1] / "children"
TABLE = Spec(8, 64)
FLOAT_BITS = 16
FARTHEST = 0.25  # relative error of a linear


@dataclass(frozen=True)
class Foreign:
    """One package.

    Attributes:
        package: its distribution; `script` is the child that calls it.
        python: interpreter that has the package.
        device: where it runs, for a package that can run elsewhere than on the CPU.
    """

    package: str
    script: str
    reference: Reference
    python: str
    device: str | None = None

    def missing(self, row: Row) -> str | None:
        if version(self.python, self.package) is None:
            return (
                f"package {self.package} is not installed in {self.python}; pip install "
                f"{self.package}, or give another interpreter with --peer-python"
            )
        return None

    def steps(self, row: Row, draw: Draw) -> tuple[Step, ...]:
        script = CHILDREN / self.script
        inputs = (str(draw.tokens),) if row.calibrated else ()
        command = (self.python, str(script), str(self.reference.folder), OUT)
        identity = {
            "package": version(self.python, self.package),
            "script": hashlib.sha256(script.read_bytes()).hexdigest(),
            "reference": self.reference.sha256,
            "arguments": row.arguments,
            "calibration": draw.sha256 if row.calibrated else None,
            "device": self.device,
        }
        words = (*command, *inputs, *row.arguments, *([self.device] if self.device else []))
        return (Step(row.name, words, identity, device=self.device),)

    def open(self, output: Path) -> Model:
        model = open_linears(output, self.reference.checkpoint)
        require_near(model, self.reference.checkpoint)
        return model


class WithLinears(WeightSource):
    """A checkpoint with other linears, and its embedding and head rounded to INT8."""

    def __init__(self, checkpoint: Checkpoint, file: Path) -> None:
        self.config: GemmaConfig = checkpoint.config
        self._checkpoint = checkpoint
        self._file = file

    def layer(self, index: int) -> dict[str, Array]:
        with safe_open(self._file, "np") as tensors:
            linears = {
                role: tensors.get_tensor(layer_tensor(index, role))
                for role in self.config.linear_shapes(0)
            }
        return linears | self._checkpoint.gains(index)

    def embedding(self, start: int, stop: int) -> Array:
        return rounded(self._checkpoint.embedding(start, stop)).dequantize()

    def head(self, start: int, stop: int) -> Array:
        return rounded(self._checkpoint.head(start, stop)).dequantize()

    def final_norm(self) -> Array:
        return self._checkpoint.final_norm()


def rounded(rows: Array) -> QuantTensor:
    """Rows of a table as uq rounds them: every group alone, so blocks of rows do not matter."""
    return quantize_rtn(rows, TABLE)


def open_linears(folder: Path, reference: Checkpoint) -> Model:
    """What a child wrote, with the embedding in INT8."""
    grid = json.loads((folder / "grid.json").read_text())
    config, file = reference.config, folder / "linears.safetensors"
    table = config.vocab_size * config.hidden_size * (1 if config.tied_head else 2)
    own = bits_of_all(config, grid["bits"], FLOAT_BITS, table)
    bits = bits_of_all(config, grid["bits"], TABLE.bits_per_weight, table)
    return Model(
        WithLinears(reference, file),
        hashlib.sha256(file.read_bytes()).hexdigest() + f" {TABLE}",
        Sizes(
            bits=bits,
            body_bits=grid["bits"],
            nbytes=round(bits * config.num_parameters() / 8),
            embedding=f"{TABLE}, rounded by uq; the package leaves it in float16: {own:.3f} "
            "bits over all",
            body=grid["grid"],
            computed=True,
        ),
    )


def require_near(model: Model, reference: Checkpoint) -> None:
    """Catch weights that were unpacked wrongly: four bits miss a matrix by 7 to 15 %.

    Raises:
        NotRun: a linear of the first layer is further away.
    """
    found = model.weights.layer(0)
    for role, weight in reference.layer(0).items():
        error = np.linalg.norm(found[role] - weight) / np.linalg.norm(weight)
        if error > FARTHEST:
            raise NotRun(f"{role} of layer 0 is {error:.0%} off the reference: not its weights")


def bits_of_all(config: GemmaConfig, body: float, table_bits: float, table: int) -> float:
    """Bits per weight of all tensors: linears, tables, norms in float32."""
    linears = config.num_layers * sum(a * b for a, b in config.linear_shapes(0).values())
    norms = config.num_parameters() - linears - table
    return (linears * body + table * table_bits + 32 * norms) / config.num_parameters()


@cache
def version(python: str, package: str) -> str | None:
    """Version of a distribution in another interpreter; None where there is none."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
