"""What the kernel of all layers is told of each stage of products: it computes none of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.persistent_cuts import SLICE, shapes_of
from uq.kernels.vulkan.persistent_places import (
    expert_chunks,
    expert_sharing,
    expert_sizes,
    stage_places,
)
from uq.kernels.vulkan.tuning import Cut
from uq.kernels.vulkan.weights import TILE_ROWS, Matrix, tiles_of

WORDS = 4  # of a stage
STAGES = 6  # of a layer, at most
GATES = (2, 4)


@dataclass(frozen=True)
class _Stage:
    """One of them.

    Attributes:
        tiles, part: of a row, and of a part of it.
        chunks: of a group.
        team: slices that share the columns of a block.
        apart: from a tile of one of them to its next one.
        matrices: that are multiplied together.
        blocks: of rows, of a matrix.
        place: where its messages begin.
    """

    tiles: int
    part: int
    chunks: int
    team: int
    apart: int
    matrices: int
    blocks: int
    place: int

    def words(self, sums: int) -> list[tuple[int, int]]:
        """Two words of 64 bits, low and high half; so many sums of blocks are made at a time."""
        at_once = sums // (self.team * self.matrices)
        teams = self.team << 16 | self.apart << 20 | at_once << 24 | (self.matrices == 2) << 31
        return [(self.tiles | self.part << 16, self.chunks | teams), (self.blocks, self.place)]


def stage_plans(
    config: GemmaConfig, cut: Cut, layer: int, matrices: Sequence[tuple[Matrix, Matrix]]
) -> list[int]:
    """Words of the stages in their order, each with the addresses of its matrices: of a gate's and
    up's, of another one twice."""
    sums, stages = cut.lanes // SLICE * cut.width, _stages(config, cut, layer)
    found = list[int]()
    for stage, (first, last) in zip(stages, matrices, strict=True):
        found += [low | high << 32 for low, high in stage.words(sums)]
        found += [first.span.address, last.span.address]
    return found + [0] * (WORDS * STAGES - len(found))


def _stages(config: GemmaConfig, cut: Cut, layer: int) -> list[_Stage]:
    products = [0, 1, 2, 4, 3] if config.experts else [0, 1, 2, 3]
    stages = [_product(config, cut, layer, which) for which in products]
    return [*stages, _experts_down(config, cut)] if config.experts else stages


def _product(config: GemmaConfig, cut: Cut, layer: int, which: int) -> _Stage:
    rows, columns = shapes_of(config, layer)[which]
    tiles, team, place = tiles_of(columns), cut.teams[which], stage_places(config, cut)[which]
    part = -(-tiles // (1, cut.out_parts, 1, cut.down_parts, 1)[which])
    chunks, matrices = -(-part // (team * cut.depth)), 2 if which in GATES else 1
    return _Stage(tiles, part, chunks, team, team, matrices, rows // TILE_ROWS, place)


def _experts_down(config: GemmaConfig, cut: Cut) -> _Stage:
    """Of all that were chosen, columns behind columns: each has chunks of its own."""
    active, _, size = expert_sizes(config)
    tiles, team, sharing = tiles_of(size), cut.teams[5], expert_sharing(cut, active, size)
    chunks = expert_chunks(cut, active, size, sharing)
    blocks, place = config.hidden_size // TILE_ROWS, stage_places(config, cut)[5]
    return _Stage(tiles, active * tiles, chunks, team, sharing, 1, blocks, place)
