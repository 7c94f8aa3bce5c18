"""Raw kernel files of old NPU tools: recognized, not decoded.

Nothing but the first word is documented, so that inspection shows the words as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uq.formats.xdna.records import Window

MAGIC = 0x4E505541  # "NPUA", the last letter first in little-endian files
SHOWN_WORDS = 16


@dataclass(frozen=True)
class RawKernel:
    """The file's size, byte order (of the magic), and up to 16 words after the magic."""

    size: int
    byte_order: Literal["little", "big"]
    words: tuple[int, ...]


def is_raw_kernel(data: bytes) -> bool:
    return data[:4] in (MAGIC.to_bytes(4, "little"), MAGIC.to_bytes(4, "big"))


def parse_raw_kernel(data: bytes, name: str = "kernel") -> RawKernel:
    """Raises BundleError: the magic is missing."""
    window = Window.of(data, name)
    if not is_raw_kernel(data):
        window.refuse("magic", 0, f"expected {MAGIC:#x}, found {data[:4].hex()}")
    order: Literal["little", "big"] = "big" if data.startswith(b"NPUA") else "little"
    stop = min(len(data), 4 * (SHOWN_WORDS + 1)) - 3
    words = (int.from_bytes(data[i : i + 4], order) for i in range(4, stop, 4))
    return RawKernel(len(data), order, tuple(words))
