"""What each workgroup of one dispatch multiplies: lists of groups of blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.persistent_cuts import GROUP_TILES, SLICE, groups_of, shapes_of
from uq.kernels.vulkan.tuning import Cut
from uq.kernels.vulkan.weights import TILE_COLS, TILE_ROWS, tiles_of

HELD = 6  # tiles of a part's activations that take as long as a tile of weights: a guess
DENSE, WITH_EXPERTS = (0, 1, 2, 3), (0, 1, 2, 4, 3, 5)  # products in their order in a layer
GATES, DOWN = (2, 4), 3
NEXT_LAYER = 8  # from a step to the same one of the next layer
SOURCES = (0, 0, 1, 2, 1, 3)  # which stage of the layer makes a product's input


@dataclass(frozen=True)
class Stage:
    """A product of a layer, cut.

    Attributes:
        groups: of blocks of rows, of each part of the columns.
        tiles: that take as long as a group.
        hold: that take as long as the activations of a part.
        source: the stage that makes these.
        needs: how many of its groups each part waits for.
    """

    groups: int
    tiles: int
    hold: int
    source: int
    needs: tuple[int, ...]


Item = tuple[int, int, int]  # stage, part, group


def layer_stages(config: GemmaConfig, cut: Cut, layer: int) -> list[Stage]:
    """In their order."""
    found = list[Stage]()
    for product in WITH_EXPERTS if config.experts else DENSE:
        found.append(_stage(config, cut, layer, product, found))
    return found


def _stage(
    config: GemmaConfig, cut: Cut, layer: int, product: int, before: Sequence[Stage]
) -> Stage:
    rows, columns = shapes_of(config, layer)[product]
    parts = (1, cut.out_parts, 1, cut.down_parts, 1, 1)[product]
    part, team, slices = -(-tiles_of(columns) // parts), cut.teams[product], cut.lanes // SLICE
    groups = groups_of(rows, slices * cut.width, team * (2 if product in GATES else 1))
    needs = (before[SOURCES[product]].groups if before else 0,) * parts
    if product == DOWN:
        at_once = TILE_ROWS * slices * cut.width // (2 * cut.teams[2])
        needs = tuple(
            min(-(-(index + 1) * part * TILE_COLS // at_once), most)
            for index, most in enumerate(needs)
        )
    tiles = cut.width * -(-part // team) + GROUP_TILES
    return Stage(groups, tiles, part // HELD if product % 2 else 0, SOURCES[product], needs)


def layer_shares(stages: Sequence[Stage], workgroups: int) -> list[list[Item]]:
    """Each workgroup's items in a layer.

    A group is for whoever is done with it first: who had fewer groups of the gate has more of down,
    and begins with parts whose activations are there.
    """
    lists: list[list[Item]] = [[] for _ in range(workgroups)]
    free, ends = np.zeros(workgroups), list[list[float]]()
    for number, stage in enumerate(stages):
        held = np.full(workgroups, -1)
        ends.append([])
        for part, needs in enumerate(stage.needs):
            ready = max(ends[stage.source][:needs], default=0.0)
            for group in range(stage.groups):
                done = np.maximum(free, ready) + stage.tiles + stage.hold * (held != part)
                who = int(done.argmin())
                free[who], held[who] = done[who], part
                lists[who].append((number, part, group))
                ends[-1].append(float(done[who]))
    return lists


def shares(config: GemmaConfig, cut: Cut) -> NDArray[np.uint32]:
    """(workgroups, items), as shaders/persistent_work.glsl reads them.

    Behind the last layer's items are the next one's: the first is asked for and not used.
    """
    of_layer = cache(lambda *stages: layer_shares(stages, cut.workgroups))
    lists: list[list[int]] = [[] for _ in range(cut.workgroups)]
    for layer in range(config.num_layers + 1):
        stages = layer_stages(config, cut, min(layer, config.num_layers - 1))
        for own, items in zip(lists, of_layer(*stages), strict=True):
            own += _words(items, NEXT_LAYER * layer)
    most = max(map(len, lists)) + 1
    return np.array([own + own[-1:] * (most - len(own)) for own in lists], np.uint32)


def _words(items: Sequence[Item], first: int) -> Iterator[int]:
    """Step, part and group."""
    return (first + stage << 20 | part << 16 | group for stage, part, group in items)
