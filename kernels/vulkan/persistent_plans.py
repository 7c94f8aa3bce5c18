"""What the kernel of all layers is told of each stage of products: it computes none of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.persistent_cuts import shapes_of
from uq.kernels.vulkan.persistent_places import expert_sharing, expert_sizes, stage_places
from uq.kernels.vulkan.tuning import Cut
from uq.kernels.vulkan.weights import TILE_ROWS, tiles_of

WORDS = 12  # of all stages of a layer, at most


@dataclass(frozen=True)
class _Stage:
    """One of them.

    Attributes:
        team: slices that share the columns of a block.
        parts: of the columns.
        place: where its messages begin.
        depth: tiles of a slice in a chunk.
    """

    rows: int
    columns: int
    team: int
    place: int
    depth: int
    parts: int = 1

    def words(self) -> Iterator[tuple[int, int]]:
        """Tiles of a row and of a part, 16 bits each; chunks of a group; blocks, place."""
        tiles = tiles_of(self.columns)
        part = -(-tiles // self.parts)
        yield from self._words(tiles, part, -(-part // (self.team * self.depth)))

    def expert_words(self, active: int, sharing: int) -> Iterator[tuple[int, int]]:
        """The same of so many experts, columns behind columns: each has chunks of its own."""
        tiles = tiles_of(self.columns)
        chunks = -(-active // (self.team // sharing)) * -(-tiles // (sharing * self.depth))
        yield from self._words(tiles, active * tiles, chunks)

    def _words(self, tiles: int, part: int, chunks: int) -> Iterator[tuple[int, int]]:
        yield tiles | part << 16, chunks
        yield self.rows // TILE_ROWS, self.place


def stage_plans(config: GemmaConfig, cut: Cut, layer: int) -> list[tuple[int, int]]:
    """Words of 64 bits, low and high half, in the order of the stages."""
    active, _, size = expert_sizes(config)
    shapes, places, teams = shapes_of(config, layer), stage_places(config, cut), cut.teams

    def stage(which: int, parts: int = 1, depth: int = cut.depth) -> _Stage:
        return _Stage(*shapes[which], teams[which], places[which], depth, parts)

    stages = [stage(0), stage(1, cut.out_parts, cut.out_depth or cut.depth), stage(2)]
    stages += [stage(4)] if active else []
    stages.append(stage(3, parts=cut.down_parts))
    found = [word for each in stages for word in each.words()]
    if active:
        down = _Stage(config.hidden_size, size, teams[5], places[5], cut.depth)
        found += down.expert_words(active, expert_sharing(config, cut))
    return found
