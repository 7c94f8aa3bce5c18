"""All layers of one token in one dispatch: what `persistent.comp` is given, and when it may run.

Between two dispatches a GPU stands still for two microseconds, five times a layer or more. Here a
workgroup on each multiprocessor stays, and waits for what it needs of the others' results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import PhysicalGpu
from uq.kernels.vulkan.memory import Arena, Span, Transfers, aligned
from uq.kernels.vulkan.model import Layer, Model, least_tiles, split_count
from uq.kernels.vulkan.push import addresses
from uq.kernels.vulkan.stages import ATTENTION_LANES, Stages, shared_queries
from uq.kernels.vulkan.tuning import BRANCH, GEGLU, STORE, Cut, Measured, Shape, product_key
from uq.kernels.vulkan.variants import VARIANTS
from uq.kernels.vulkan.weights import TILE_COLS, TILE_ROWS, tiles_of

EMPTY = 0xFFFFFFFF  # what is no message
PATIENCE = 1 << 16  # looks at a message, somewhat less than a microsecond each
MOST_CHANNELS = 5376  # of the residual stream: it stays in registers
# Lanes, the most tiles on their way, and blocks of a slice, of cuts to measure: twice the lanes
# have half the registers each. Much on its way is for memory that is fast and far.
SIZES = (256, 2, 1), (256, 4, 1), (512, 2, 1), (512, 4, 1)
LARGE_SIZES = (256, 2, 1), (256, 4, 1), (256, 4, 2), (256, 6, 2), (256, 8, 2)
LARGE = 64  # multiprocessors
SLICE = 64  # lanes that multiply a block of rows together: whole subgroups
OCTETS = 2  # of the residual stream in a lane, at most, where AMD's compiler spills no registers
DOWN_PARTS = 1, 2, 3
TEAMS = 1, 2, 3, 4, 6, 8
GROUP_TILES = 2  # so many tiles take as long as what follows a group of blocks does; a guess
FEW_RUNS = 32  # of keys, for which there are workgroups enough: each then serves one head
MOST_JOINED = 8  # heads up to which workgroups may join for themselves those they need
COPIES, LEDGER_BYTES = 8, 16  # of the places for messages
ENTRY = 17  # words of 64 bits of a layer, as in shaders/persistent.comp
X_BYTES = 288  # of 128 channels of activations


@dataclass(frozen=True)
class Persistent:
    """Records the layers of one token over one KV cache.

    Attributes:
        entries: addresses of each layer's weights, gains, keys and values.
        messages: what workgroups tell each other.
    """

    stages: Stages
    cache: Cache
    cut: Cut
    entries: Span
    ledger: Span
    messages: Span

    @classmethod
    def make(
        cls, stages: Stages, cache: Cache, cut: Cut, arena: Arena, transfers: Transfers
    ) -> Persistent:
        layers = range(stages.config.num_layers + 1)
        words = np.array([_entry(stages.model, cache, layer) for layer in layers], np.uint64)
        entries = arena.take(words.nbytes)
        transfers.write(entries, words)
        ledger = arena.take(LEDGER_BYTES)
        transfers.fill(ledger)
        messages = arena.take(message_bytes(stages.config, cut))
        transfers.write(messages, np.full(messages.nbytes // 4, EMPTY, np.uint32))
        return cls(stages, cache, cut, entries, ledger, messages)

    def record(self, recorder: Recorder) -> None:
        """From the embedding to the final norm's output."""
        recorder.label = "layers"
        stages, work = self.stages, self.stages.work
        push = addresses(self.entries, work.state, self.ledger, self.messages)
        push += addresses(work.hidden, work.normed, work.x)
        name = module(stages.model, self.cache.suffix)
        pipeline = stages.pipelines.get(name, **_constants(stages, self.cut))
        stages.run(recorder, pipeline, push, (self.cut.workgroups, 1, 1))
        recorder.barrier()


def module(model: Model, suffix: str) -> str:
    """Of the table of variants, if it is there; `suffix` is the cache's."""
    return f"persistent{suffix}_{model.layers[0].out.kind.name}_dot"


def suits(stages: Stages, suffix: str, physical: PhysicalGpu) -> bool:
    """Whether the kernel knows such a model, and such a device."""
    narrow = physical.subgroup[0] <= SLICE
    return physical.multiprocessors > 0 and narrow and knows(stages, suffix)


def knows(stages: Stages, suffix: str) -> bool:
    config, model = stages.config, stages.model
    kinds = {matrix.kind for layer in model.layers for matrix in layer.matrices}
    return (
        stages.tuning.integer_dot
        and not (model.per_layer or model.ways or config.value_norm)
        and len(kinds) == 1
        and module(model, suffix) in VARIANTS
        and all(_is_plain(layer, config) for layer in model.layers)
        and config.hidden_size <= MOST_CHANNELS
        and config.head_dim % TILE_COLS == 0
    )


def _is_plain(layer: Layer, config: GemmaConfig) -> bool:
    """As Gemma 1 to 3 have it."""
    extras = (layer.told, layer.mixture, layer.laurel, layer.updates, layer.quantile)
    return (
        not any(extras)
        and layer.owns_keys
        and layer.scale == 1
        and len(layer.qkv) == 1
        and (layer.head_dim, layer.kv_heads) == (config.head_dim, config.num_kv_heads)
        and layer.gate.rows == config.intermediate_size
    )


def tuned(stages: Stages, known: Measured, suffix: str, physical: PhysicalGpu) -> Stages:
    """With what was measured for its products and layers."""
    cut = known.layers.get(model_key(stages.config))
    if cut is None or not suits(stages, suffix, physical):
        tuning = replace(stages.tuning, measured=known.products, cut=None)
    else:
        measured = {**known.products, **shapes(stages.model, cut)}
        tuning = replace(stages.tuning, measured=measured, cut=cut)
    return replace(stages, tuning=tuning)


def cuts(config: GemmaConfig, multiprocessors: int, most_shared: int) -> list[Cut]:
    """Ways to share the layers that are worth measuring.

    Every workgroup has outputs of the gate: by these the others know how far it is, and messages
    that it has not read yet are not overwritten.
    """
    workgroups = min(multiprocessors, config.intermediate_size // TILE_ROWS)
    queries = shared_queries(config.num_heads // config.num_kv_heads)
    if config.num_heads * FEW_RUNS <= workgroups:
        queries = 1
    ways = [(True, 1)]  # who joins the splits, and parts of attention's output
    if config.num_heads <= MOST_JOINED and config.num_heads % 2 == 0:
        ways.append((False, config.num_heads // 2))
    sizes = _sizes(config, multiprocessors)
    found: dict[Cut, None] = {}  # each once, in their order
    for (lanes, most, width), down_parts, (joins, out_parts) in product(sizes, DOWN_PARTS, ways):
        teams = best_teams(config, workgroups, lanes // SLICE, out_parts, down_parts, width)
        depth = even_depth(-(-tiles_of(config.hidden_size) // teams[2]), most)
        cut = Cut(workgroups, queries, teams, out_parts, down_parts, depth, lanes, joins, width)
        if _leaves_none_empty(config, cut) and shared_bytes(config, cut) <= most_shared:
            found[cut] = None
    return list(found)


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
) -> tuple[int, int, int, int]:
    """`Cut.teams` with which none of a workgroup's slices has much more to do than another."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    qkv = config.q_size + 2 * config.kv_size
    work = partial(_tiles_of_slice, workgroups, slices, width)
    teams = [team for team in TEAMS if slices % team == 0]
    pairs = [team for team in teams if _groups(mlp, slices * width, 2 * team) >= workgroups]
    return (
        min(teams, key=lambda team: work(qkv, hidden, team)),
        min(teams, key=lambda team: work(hidden, config.q_size, team, parts=out_parts)),
        min(pairs, key=lambda team: work(mlp, hidden, team, matrices=2)),
        min(teams, key=lambda team: work(hidden, mlp, team, parts=down_parts)),
    )


def _groups(rows: int, at_once: int, team: int) -> int:
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
    groups = _groups(rows, slices * width, team * matrices)
    rounds = -(-groups // max(1, workgroups // parts))
    return rounds * (width * -(-tiles_of(columns) // (parts * team)) + GROUP_TILES)


def _leaves_none_empty(config: GemmaConfig, cut: Cut) -> bool:
    """Whether each part of the down projection has columns."""
    tiles = tiles_of(config.intermediate_size)
    return (cut.down_parts - 1) * -(-tiles // cut.down_parts) < tiles


def shapes(model: Model, cut: Cut) -> dict[str, Shape]:
    """Of products that are dispatches: with these a token has the same bits there."""
    layer = model.layers[0]
    products = (
        (layer.qkv[0][0], STORE, 1),
        (layer.out, BRANCH, cut.out_parts),
        (layer.gate, GEGLU, 1),
        (layer.down, BRANCH, cut.down_parts),
    )
    return {
        product_key(matrix, epilogue): Shape(64 * team, 4 if epilogue == GEGLU else 1, parts=parts)
        for (matrix, epilogue, parts), team in zip(products, cut.teams, strict=True)
    }


def model_key(config: GemmaConfig) -> str:
    """Of `Measured.layers`."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    heads = (config.num_heads, config.num_kv_heads, config.num_layers)
    return "x".join(map(str, (*sizes, *heads)))


def copy_words(config: GemmaConfig, cut: Cut) -> int:
    """Places for the messages of a layer, as shaders/persistent.comp counts them."""
    splits = split_count(config.num_kv_heads)
    places = [
        config.q_size + 2 * config.kv_size,
        config.q_size,
        *[config.hidden_size] * cut.out_parts,
        config.intermediate_size,
        *[config.hidden_size] * cut.down_parts,
        2 * splits * config.num_heads,
    ]
    return splits * config.q_size + sum(TILE_COLS * tiles_of(count) for count in places)


def message_bytes(config: GemmaConfig, cut: Cut) -> int:
    return 4 * COPIES * copy_words(config, cut)


def arena_bytes(config: GemmaConfig, cut: Cut) -> int:
    entries = 8 * ENTRY * (config.num_layers + 1)
    return sum(map(aligned, (entries, LEDGER_BYTES, message_bytes(config, cut))))


def held_tiles(config: GemmaConfig, cut: Cut) -> int:
    """Tiles of 128 channels that a stage's input has at most."""
    out, down = tiles_of(config.q_size), tiles_of(config.intermediate_size)
    parts = (-(-out // cut.out_parts), -(-down // cut.down_parts))
    return max(tiles_of(config.hidden_size), *parts)


def shared_bytes(config: GemmaConfig, cut: Cut) -> int:
    """Of a workgroup, at most: activations, attention's sums, and what is small."""
    dim, splits = config.head_dim, split_count(config.num_kv_heads)
    sums = 4 * cut.queries * ATTENTION_LANES * 8 + 4 * dim * (cut.queries + 4)
    heads = 1 if cut.joins else config.num_heads // cut.out_parts
    weights = 4 * splits * (cut.queries + heads) + 4 * cut.lanes
    return X_BYTES * held_tiles(config, cut) + sums + weights + 4 * config.hidden_size // 16 + 2048


def _constants(stages: Stages, cut: Cut) -> dict[str, int | float]:
    config = stages.config
    return {
        "LANES": cut.lanes,
        "ATTENDING": ATTENTION_LANES,  # as attention has alone: the same bits
        **stages.model.layers[0].out.kind.constants,
        "DEPTH": cut.depth,
        "PATIENCE": PATIENCE,
        "HIDDEN": config.hidden_size,
        "EPS": float(config.rms_norm_eps),
        "POST_NORM": config.post_norms,
        "DIM": config.head_dim,
        "HEADS": config.num_heads,
        "KV_HEADS": config.num_kv_heads,
        "QUERIES": cut.queries,
        "SPLITS": split_count(config.num_kv_heads),
        "QK_NORM": config.qk_norm,
        "SCALE": float(config.attention_scale),
        "CAP": float(config.attn_softcap or 0.0),
        "INTERMEDIATE": config.intermediate_size,
        "LAYERS": config.num_layers,
        "DOWN_PARTS": cut.down_parts,
        "TEAMS": sum(team << 4 * i for i, team in enumerate(cut.teams)),
        "HELD_TILES": held_tiles(config, cut),
        "OUT_PARTS": cut.out_parts,
        "JOINS": cut.joins,
        "WIDTH": cut.width,
        "RUN": ATTENTION_LANES // 8 * least_tiles(config.num_kv_heads),
    }


def _entry(model: Model, cache: Cache, index: int) -> list[int]:
    """Of a layer, or of what stands behind the last one: addresses, and two sizes.

    Behind the last one are weights, too: some are asked for and not used.
    """
    layers, config = model.layers, cache.size.config
    before = layers[index - 1] if index else None
    gain = before.next_gain if before else model.first_gain
    joined = (before.branch_gain if before else None) or gain
    layer = layers[min(index, len(layers) - 1)]
    turns = cache.turns[config.is_sliding(layer.index)]
    matrices = (layer.qkv[0][0], layer.out, layer.gate, layer.up, layer.down)
    spans = [matrix.span for matrix in matrices]
    spans += [layer.q_gain or turns, layer.k_gain or turns, *cache.spans(layer.index), turns]
    sizes = layer.window | cache.size.slots[layer.index] << 32
    gains = (gain, joined, layer.attention_gain or gain, layer.mlp_gain)
    return [*(span.address for span in spans), sizes, *(span.address for span in gains)]
