"""Texts that have to change between two tools."""

from __future__ import annotations

import re
from collections.abc import Mapping

from uq.errors import DesignError
from uq.kernels.npu.target import Place

TILE = re.compile(r"(%[\w$.-]+) = aie\.tile\((\d+), (\d+)\)")
CORE = re.compile(r"aie\.core\((%[\w$.-]+)\)\s*\{")


def for_peano(ir: str) -> str:
    """LLVM IR in the words of Peano, which is older than the LLVM of mlir-aie.

    It does not know `nuw` behind getelementptr nor `nocreateundeforpoison`; alignments of the host
    are not those of a core.
    """
    ir = ir.replace("getelementptr inbounds nuw", "getelementptr inbounds")
    ir = ir.replace("nocreateundeforpoison ", "")
    return re.sub(r",\s*align\s+\d+", "", ir)


def with_elfs(mlir: str, elfs: Mapping[Place, str]) -> str:
    """A routed design in which every core is its ELF file instead of a program.

    Raises:
        DesignError: there is no ELF file for a core.
    """
    places = {name: Place(int(col), int(row)) for name, col, row in TILE.findall(mlir)}
    parts, position = [], 0
    while found := CORE.search(mlir, position):
        place = places.get(found[1])
        if place is None or place not in elfs:
            raise DesignError(f"core {place or found[1]} of the routed design was not compiled")
        end = _end_of_attributes(mlir, _closing(mlir, found.end()))
        parts += [mlir[position : found.end()], f'aie.end }} {{elf_file = "{elfs[place]}"}}']
        position = end
    return "".join(parts) + mlir[position:]


def _closing(text: str, start: int) -> int:
    """Behind the brace that closes the one before `start`."""
    depth = 1
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[{}]').finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    raise DesignError("the routed design ends inside of a core")


def _end_of_attributes(text: str, start: int) -> int:
    """Behind the attributes of a core, which may follow its body."""
    opening = re.compile(r"\s*\{").match(text, start)
    return _closing(text, opening.end()) if opening else start
