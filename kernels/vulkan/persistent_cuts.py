"""Ways to share the layers of a token among the workgroups of one dispatch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import gcd

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.model import Layer, Model
from uq.kernels.vulkan.persistent_places import (
    SPLIT_STEP,
    expert_sharing,
    expert_sizes,
    head_sizes,
    most_splits,
)
from uq.kernels.vulkan.stages import ATTENTION_LANES, shared_queries
from uq.kernels.vulkan.tuning import (
    ADD,
    ATTENTION,
    BRANCH,
    GEGLU,
    STORE,
    TELL,
    Cut,
    Shape,
    product_key,
)
from uq.kernels.vulkan.weights import TILE_COLS, TILE_ROWS, Matrix, tiles_of

# Lanes, the most tiles on their way, and blocks of a slice, of cuts to measure: twice the lanes
# have half the registers each. Much on its way is for memory that is fast and far.
SIZES = (256, 2, 1), (256, 4, 1), (512, 2, 1), (512, 4, 1)
LARGE_SIZES = (256, 4, 1), (256, 4, 2), (256, 6, 2)
LARGE = 64  # multiprocessors
SLICE = 64  # lanes that multiply a block of rows together: whole subgroups
OCTETS = 2  # of the residual stream in a lane, at most, where AMD's compiler spills no registers
DOWN_PARTS = 1, 2, 3
EXPERTS_OUT_PARTS = 3  # which leave no workgroup of a large GPU without any
TEAMS = 1, 2, 3, 4, 6, 8
GROUP_TILES = 2  # so many tiles take as long as what follows a group of blocks does; a guess
FEW_RUNS = 32  # of keys, for which there are workgroups enough: each then serves one head
MOST_SHARED = 256  # channels of heads of which a workgroup may serve more: the registers are few
MOST_STRAIGHT = 7  # tiles of a chunk that has code of its own: the registers are few
READS = 8  # of 64 bytes by each lane, ahead of a group of blocks
MOST_JOINED = 8  # heads up to which workgroups may join for themselves those they need
X_BYTES, FLOAT_BYTES = 288, 512  # of 128 channels of activations
MOST_LANES = 1024  # of a dispatch with the sums of the kernel's finest product


def cuts(config: GemmaConfig, multiprocessors: int, most_shared: int) -> list[Cut]:
    """Ways to share the layers that are worth measuring.

    Every workgroup has outputs of the gate: by these the others know how far it is, and messages
    that it has not read yet are not overwritten.
    """
    workgroups = min(multiprocessors, min(_gates(config)) // TILE_ROWS)
    heads = head_sizes(config)
    queries = shared_queries(gcd(*(config.num_heads // kv_heads for _, kv_heads in heads)))
    if config.num_heads * FEW_RUNS <= workgroups or max(heads)[0] > MOST_SHARED:
        queries = 1
    ways = [(True, 1)]  # who joins the splits, and parts of attention's output
    if config.experts:
        ways.append((True, EXPERTS_OUT_PARTS))
    if config.num_heads <= MOST_JOINED and config.num_heads % 2 == 0:
        ways.append((False, config.num_heads // 2))
    sizes, splits = _sizes(config, multiprocessors), _even_splits(config, workgroups, queries)
    all_parts = DOWN_PARTS[:1] if config.experts else DOWN_PARTS
    found: dict[Cut, None] = {}  # each once, in their order
    for (lanes, most, width), down_parts, (joins, out_parts) in product(sizes, all_parts, ways):
        teams = best_teams(config, workgroups, lanes // SLICE, out_parts, down_parts, width)
        depth = even_depth(-(-tiles_of(config.hidden_size) // teams[2]), most)
        cut = Cut(
            workgroups, queries, teams, out_parts, down_parts, depth, lanes, joins, width, splits
        )
        if _leaves_none_empty(config, cut) and shared_bytes(config, cut) <= most_shared:
            cuts_ = [*_busier(config, cut), *_deeper(cut, most, multiprocessors)]
            found |= dict.fromkeys(way for each in cuts_ for way in _straighter(config, each))
    return list(found)


def _even_splits(config: GemmaConfig, workgroups: int, queries: int) -> int:
    """`Cut.splits` with which no workgroup has two runs of keys; 0 where that takes many."""
    splits = max(1, workgroups // (config.num_heads // queries))
    return splits if splits <= SPLIT_STEP else 0


def _busier(config: GemmaConfig, cut: Cut) -> Iterator[Cut]:
    """The cut, and one with larger teams where two blocks of attention's output leave workgroups
    idle."""
    yield cut
    slices, (qkv, out, *others) = cut.lanes // SLICE, cut.teams
    larger = [team for team in TEAMS if team > out and slices % team == 0]
    idle = groups_of(config.hidden_size, slices * cut.width, out) < cut.workgroups
    if cut.width == 2 and cut.joins and idle and larger:
        yield replace(cut, teams=(qkv, larger[0], *others))


def _deeper(cut: Cut, most: int, multiprocessors: int) -> Iterator[Cut]:
    """With all the tiles that may be on their way: for the 270m with fewer, NVIDIA's compiler takes
    half of the registers and spills what does not fit."""
    if multiprocessors >= LARGE and cut.width == 1:
        yield replace(cut, depth=most)


def _straighter(config: GemmaConfig, cut: Cut) -> Iterator[Cut]:
    """The cut, and one with teams of one size, whose chunks of a hidden size are all full."""
    yield cut
    team, tiles = cut.teams[0], tiles_of(config.hidden_size)
    depth = even_depth(-(-tiles // team), MOST_STRAIGHT)
    groups = groups_of(min(_gates(config)), cut.lanes // SLICE * cut.width, 2 * team)
    is_full = tiles % (team * depth) == 0 and groups >= cut.workgroups
    if is_full and cut.width == 2 and cut.joins and not config.experts:
        yield replace(cut, teams=(team,) * 4, depth=depth, straight=True, reads=READS)


def _gates(config: GemmaConfig) -> list[int]:
    """Rows of every gate: a layer's own, and of the experts that a token meets."""
    rows = [config.layer_intermediate_size(layer) for layer in range(config.num_layers)]
    active, _, size = expert_sizes(config)
    return rows + [active * size] * (active > 0)


def _sizes(config: GemmaConfig, multiprocessors: int) -> list[tuple[int, int, int]]:
    if multiprocessors >= LARGE:
        return list(LARGE_SIZES)
    return [size for size in SIZES if config.hidden_size <= 8 * OCTETS * size[0]]


def even_depth(tiles: int, most: int) -> int:
    """`Cut.depth` for a slice's tiles of the largest product: its last chunk is full, too."""
    return -(-tiles // -(-tiles // most))


def best_teams(
    config: GemmaConfig,
    workgroups: int,
    slices: int,
    out_parts: int,
    down_parts: int,
    width: int = 1,
) -> tuple[int, ...]:
    """`Cut.teams` with which none of a workgroup's slices has much more to do than another."""
    products = [shapes_of(config, layer) for layer in range(config.num_layers)]
    work = partial(_tiles_of_slice, workgroups, slices, width)
    teams = [team for team in TEAMS if slices % team == 0]

    def pairs(stage: int) -> list[int]:
        """Of which every workgroup has some: or it could fall behind by a layer."""
        rows = [each[stage][0] for each in products]
        return [
            team
            for team in teams
            if all(groups_of(n, slices * width, 2 * team) >= workgroups for n in rows)
        ]

    def best(stage: int, among: Sequence[int], **how: int) -> int:
        found = {team: sum(work(*each[stage], team, **how) for each in products) for team in among}
        return min(found, key=found.__getitem__)

    found = (best(0, teams), best(1, teams, parts=out_parts), best(2, pairs(2), matrices=2))
    if config.experts is None:
        return (*found, best(3, teams, parts=down_parts))
    gate, down = best(4, pairs(4), matrices=2), best(5, teams)
    rows, at_once = config.hidden_size, slices * width
    idle = workgroups - groups_of(rows, at_once, down)
    beside = [team for team in teams if down_parts * groups_of(rows, at_once, team) <= idle]
    return (*found, best(3, beside or teams, parts=down_parts), gate, down)


def shapes_of(config: GemmaConfig, layer: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of q, k and v together, attention's output, the gate, and down; of the gate
    and of down of all experts that a token meets."""
    shapes, hidden = config.linear_shapes(layer), config.hidden_size
    qkv = sum(shapes[role][0] for x in "qkv" if (role := f"self_attn.{x}_proj") in shapes)
    q, mlp = config.layer_q_size(layer), config.layer_intermediate_size(layer)
    dense = (qkv, hidden), (hidden, q), (mlp, hidden), (hidden, mlp)
    if config.experts is None:
        return dense
    active, size = config.experts.active, config.experts.intermediate_size
    return (*dense, (active * size, hidden), (hidden, active * tiles_of(size) * TILE_COLS))


def groups_of(rows: int, at_once: int, team: int) -> int:
    """Of blocks of rows that a workgroup takes at a time, each with a team; 0 where none fits."""
    blocks = -(-rows // TILE_ROWS)
    return -(-blocks * team // at_once) if at_once % team == 0 else 0


def _tiles_of_slice(
    workgroups: int,
    slices: int,
    width: int,
    rows: int,
    columns: int,
    team: int,
    *,
    parts: int = 1,
    matrices: int = 1,
) -> int:
    """That the one with the most work multiplies one after the other."""
    groups = groups_of(rows, slices * width, team * matrices)
    rounds = -(-groups // max(1, workgroups // parts))
    return rounds * (width * -(-tiles_of(columns) // (parts * team)) + GROUP_TILES)


def _leaves_none_empty(config: GemmaConfig, cut: Cut) -> bool:
    """Whether each part of the down projection has columns."""
    sizes = map(config.layer_intermediate_size, range(config.num_layers))
    parts = cut.down_parts
    return all((parts - 1) * -(-tiles // parts) < tiles for tiles in map(tiles_of, sizes))


def shapes(model: Model, cut: Cut) -> dict[str, Shape]:
    """Of products that are dispatches: with these a token has the same bits there."""
    found = {
        product_key(matrix, epilogue): Shape(64 * team, 4 if epilogue == GEGLU else 1, parts=parts)
        for layer in model.layers
        for matrix, epilogue, parts, team in _products_of(layer, cut)
    }
    if cut.splits:
        found[ATTENTION] = Shape(ATTENTION_LANES, 1, parts=cut.splits)
    return found


def _products_of(layer: Layer, cut: Cut) -> Iterator[tuple[Matrix, int, int, int]]:
    """Matrix, what follows its product, parts of its columns, and its teams' slices."""
    qkv, out, gate, down, *experts = cut.teams
    yield layer.qkv[0][0], STORE, 1, qkv
    yield layer.out, BRANCH, cut.out_parts, out
    yield layer.gate, GEGLU, 1, gate
    yield layer.down, BRANCH, cut.down_parts, down
    if layer.told:
        told = layer.told
        yield told.gate, TELL, 1, _slices(cut, told.gate, _kept_rows(cut))
        yield told.projection, BRANCH, 1, _slices(cut, told.projection, TILE_ROWS)
    if layer.mixture:
        router = layer.mixture.router
        yield router, STORE, 1, _slices(cut, router, _kept_rows(cut))
        yield layer.mixture.gate, GEGLU, 1, experts[0]
        columns = layer.mixture.down
        sharing = expert_sharing(cut, layer.mixture.active, columns.cols)
        yield columns, ADD, sharing, experts[1]


def _kept_rows(cut: Cut) -> int:
    """At a time, of weights that are not quantized, as in shaders/persistent_kept.glsl."""
    return 8 if cut.lanes > 256 else 4


def _slices(cut: Cut, matrix: Matrix, rows: int) -> int:
    """That share the columns of a matrix, so many rows of which a workgroup takes at a time."""
    return min(matrix.tiles, cut.lanes // (4 * rows))


def held_tiles(config: GemmaConfig, cut: Cut) -> int:
    """Tiles of 128 channels that a stage's input has at most."""
    layers = range(config.num_layers)
    out = tiles_of(max(map(config.layer_q_size, layers)))
    down = tiles_of(max(map(config.layer_intermediate_size, layers)))
    active, _, size = expert_sizes(config)
    parts = (-(-out // cut.out_parts), -(-down // cut.down_parts), active * tiles_of(size))
    inputs = 2 if active else 1  # of the MLP, and of the experts
    return max(inputs * tiles_of(config.hidden_size), *parts)


def shared_bytes(config: GemmaConfig, cut: Cut) -> int:
    """Of a workgroup, at most: activations, attention's sums, and what is small."""
    dim, splits = max(dim for dim, _ in head_sizes(config)), most_splits(config, cut)
    sums = 4 * cut.queries * ATTENTION_LANES * 8 + 4 * dim * (cut.queries + 4)
    heads = 1 if cut.joins else config.num_heads // cut.out_parts
    weights = 4 * splits * (cut.queries + heads) + 4 * cut.lanes
    held = X_BYTES * held_tiles(config, cut)
    if config.per_layer or config.experts:
        held = max(held, FLOAT_BYTES * tiles_of(config.hidden_size))
    return held + sums + weights + 4 * config.hidden_size // 16 + 2048
