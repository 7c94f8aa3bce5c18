"""What a compiled linear is fixed to, and the sizes that follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uq.errors import UsageError
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import Spec
from uq.kernels.npu.emulator.host import Kernels
from uq.kernels.npu.target import COLUMNS, DEFAULT_STACK, LIMITS, Kind

SOURCE = Path(__file__).with_name("linear.cc")
OBJECT = "linear.o"
LAYOUT = {"npu1": "npu-aie2", "npu2": "npu-aie2p"}
CORES = 4
TOKENS = 4  # rows of one multiply
STEP = 16  # inputs of one multiply
HEADER = 16  # words
SPARE = 2048  # bytes of a core for constants and indices
ROOM = LIMITS[Kind.CORE].memory - DEFAULT_STACK - SPARE


@dataclass(frozen=True)
class Linear:
    """One compiled kernel: a weight (outputs, inputs) and how many tokens a core holds.

    Where the inputs of the tokens fit into a core they stay there while weights stream by. Where
    they do not, inputs and weights come in slices, and the inputs come again for each four blocks.

    Raises:
        UsageError: no kernel for this grid, or the core's memory is too small.
    """

    device: str
    outputs: int
    inputs: int
    spec: Spec
    rows: int = TOKENS

    def __post_init__(self) -> None:
        if self.device not in LAYOUT:
            raise UsageError(f"no linear kernel for device {self.device}; there are npu1, npu2")
        spec = self.spec
        if spec.bits != 4 or spec.zero_point or spec.row_step or self.inputs % spec.group:
            raise UsageError(f"no NPU kernel for {self.inputs} inputs in {self.spec}; use INT4")
        if self.rows < TOKENS or self.rows % TOKENS:
            raise UsageError(f"{self.rows} tokens in a core; use a multiple of {TOKENS}")
        if self._bytes(1, 1) > ROOM:
            raise UsageError(
                f"{self.rows} tokens take {self._bytes(1, 1)} bytes of a core for one group of "
                f"inputs; it has {ROOM}: take fewer tokens"
            )

    @property
    def width(self) -> int:
        """Outputs of a block."""
        return LAYOUTS[LAYOUT[self.device]].row_block(self.spec)

    @property
    def quads(self) -> int:
        """Fours of blocks, one block for each core."""
        return -(-self.outputs // (self.width * CORES))

    @property
    def runs(self) -> list[range]:
        """The quads of each column."""
        columns = min(COLUMNS[self.device], self.quads)
        ends = [self.quads * column // columns for column in range(columns + 1)]
        return [range(*pair) for pair in zip(ends, ends[1:], strict=False)]

    @property
    def groups(self) -> int:
        return self.inputs // self.spec.group

    @property
    def resident(self) -> bool:
        """Whether a core holds the inputs while weights stream by."""
        return self._bytes(self.groups, 1) <= ROOM

    @property
    def slices(self) -> int:
        """Into how many slices inputs and weights are cut: as few as fit, two of each at once."""
        if self.resident:
            return 1
        fits = (n for n in range(2, self.groups) if self._bytes(-(-self.groups // n), 2) <= ROOM)
        return next(fits, self.groups)

    @property
    def sliced(self) -> int:
        """Inputs of a slice, whole groups; those behind the last input are zeros."""
        return -(-self.groups // self.slices) * self.spec.group

    @property
    def weight(self) -> np.dtype[np.void]:
        """One slice of a block of the bundle: `struct Weights` of linear.cc."""
        return LAYOUTS[LAYOUT[self.device]].block(self.sliced, self.spec)

    @property
    def input(self) -> np.dtype[np.void]:
        """One slice of the tokens: `struct Inputs` of linear.cc."""
        return self._input(self.sliced // self.spec.group)

    @property
    def output_bytes(self) -> int:
        return 4 * self.rows * self.width

    @property
    def depth(self) -> int:
        """Weights in a core: two where they fit, so that one streams meanwhile."""
        left = ROOM - self.input.itemsize - self.output_bytes
        return min(2, left // self.weight.itemsize)

    def kernels(self) -> dict[str, Kernels]:
        """What the cores link."""
        macros = {"ROWS": self.rows, "INPUTS": self.sliced, "GROUP": self.spec.group}
        return {OBJECT: Kernels(SOURCE, self.device, macros)}

    def _input(self, groups: int) -> np.dtype[np.void]:
        four = [
            ("scale", "<f4", (groups, TOKENS)),
            ("codes", "i1", (groups * self.spec.group // STEP, TOKENS, STEP)),
        ]
        unused = ("unused", "<i4", HEADER - 1)
        return np.dtype([("blocks", "<i4"), unused, ("tokens", four, self.rows // TOKENS)])

    def _bytes(self, groups: int, depth: int) -> int:
        """What a core needs for `depth` slices of inputs and of weights, and its outputs."""
        block = LAYOUTS[LAYOUT[self.device]].block(groups * self.spec.group, self.spec)
        return depth * (self._input(groups).itemsize + block.itemsize) + self.output_bytes
