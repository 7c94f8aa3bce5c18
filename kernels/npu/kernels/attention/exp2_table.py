"""Writes `exp2_table.h`: powers of two for cores without an exponential (AIE2).

python -m uq.kernels.npu.kernels.attention.exp2_table > exp2_table.h
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ONE = 16384  # of the weights
RUN = 8  # values in 128 bits

HEAD = """\
// Tables of 2^-x in 1 / 16384, as aie::lut<4, int16> reads them: runs of eight values, each twice,
// in two copies for two memory banks. WHOLE[n] is 2^-n, 0 at 15; PART[f] is 2^(-f / 256).
// Written by exp2_table.py.
#pragma once
"""


def whole() -> NDArray[np.int64]:
    """(16,) 2^-n."""
    values = ONE >> np.arange(16)
    values[15] = 0
    return values


def part() -> NDArray[np.int64]:
    """(256,) 2^(-f / 256)."""
    return np.rint(ONE * 2.0 ** (-np.arange(256) / 256)).astype(np.int64)


def header() -> str:
    tables = {"WHOLE": whole(), "PART": part()}
    copies = [(name + end, v) for name, v in tables.items() for end in ("", "_COPY")]
    return "\n".join([HEAD, *(_table(name, values) for name, values in copies)])


def _table(name: str, values: NDArray[np.int64]) -> str:
    runs = [", ".join(map(str, run)) for run in values.reshape(-1, RUN)]
    body = ",\n".join(f"    {run}" for run in runs for _ in range(2))
    kind = "alignas(aie::vector_decl_align) static const int16"
    return f"{kind} {name}[{2 * len(values)}] = {{\n{body}}};\n"


if __name__ == "__main__":
    print(header(), end="")
