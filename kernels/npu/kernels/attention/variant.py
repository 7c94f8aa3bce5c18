"""What a compiled attention kernel is fixed to, and the sizes that follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from uq.errors import UsageError
from uq.kernels.npu.emulator.host import Kernels

SOURCE = Path(__file__).with_name("attention.cc")
OBJECT = "attention.o"
DEVICES = ("npu1", "npu2")
HEAD_DIMS = (128, 256)
BLOCK = 4096  # codes in a block of keys, and of queries in prefill
DECODE_ROWS = 8  # heads of one token
HEADER = 16  # words in front of the queries of a block

Form = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Tiles:
    """Blocks (M, K, N) of the multiplies, as attention.cc has them."""

    score: tuple[int, int, int]
    mix: tuple[int, int, int]


TILES = {
    ("npu1", 8): Tiles((4, 8, 8), (4, 4, 8)),
    ("npu1", 4): Tiles((4, 16, 8), (4, 4, 8)),
    ("npu2", 8): Tiles((8, 8, 8), (8, 4, 8)),
    ("npu2", 4): Tiles((4, 16, 16), (8, 4, 8)),
}


@dataclass(frozen=True)
class Variant:
    """One compiled kernel; lengths, windows and heads are given at run time.

    Raises:
        UsageError: there is no kernel for these values.
    """

    device: str
    head_dim: int
    kv_bits: int
    form: Form = "prefill"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("device", self.device, DEVICES),
            ("head size", self.head_dim, HEAD_DIMS),
            ("KV bits", self.kv_bits, (4, 8)),
            ("form", self.form, ("prefill", "decode")),
        ):
            if value not in known:
                names = ", ".join(map(str, known))
                raise UsageError(f"no attention kernel for {name} {value}; there are {names}")

    @property
    def tiles(self) -> Tiles:
        return TILES[self.device, self.kv_bits]

    @property
    def keys(self) -> int:
        """Keys of a block."""
        return BLOCK // self.head_dim

    @property
    def rows(self) -> int:
        """Query rows of a block."""
        return BLOCK // self.head_dim if self.form == "prefill" else DECODE_ROWS

    @property
    def queries(self) -> np.dtype[np.void]:
        """One block of queries: `struct Queries` of attention.cc."""
        words = ("blocks", "first", "position", "step", "window")
        floats = ("cap", "inverse")
        return np.dtype(
            [
                *((name, "<i4") for name in words),
                *((name, "<f4") for name in floats),
                ("unused", "<i4", HEADER - len(words) - len(floats)),
                ("scale", "<f4", self.rows),
                ("high", "i1", self.rows * self.head_dim),
                ("low", "i1", self.rows * self.head_dim),
            ]
        )

    @property
    def block(self) -> np.dtype[np.void]:
        """One block of keys and values: `struct Keys` of attention.cc."""
        codes = BLOCK * self.kv_bits // 8
        return np.dtype(
            [
                ("keys", "u1", codes),
                ("values", "u1", codes),
                ("scale", "<f4", self.keys),
                ("weight", "<i2", self.keys),
            ]
        )

    @property
    def output(self) -> np.dtype[np.void]:
        """Rows in bfloat16; then of each row the exponent m and the sum of weights."""
        return np.dtype(
            [
                ("rows", "<u2", (self.rows, self.head_dim)),
                ("maximum", "<i4", self.rows),
                ("weights", "<i4", self.rows),
            ]
        )

    def kernels(self) -> dict[str, Kernels]:
        """What the cores link."""
        macros = {"ROWS": self.rows, "KEYS": self.keys}
        macros |= {"DIM": self.head_dim, "KV_BITS": self.kv_bits}
        return {OBJECT: Kernels(SOURCE, self.device, macros)}
