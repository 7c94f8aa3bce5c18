"""Stages for many tokens at a time: products through matrix instructions, attention by tiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import PhysicalGpu
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.model import MOST_PARTS, MOST_SPLIT, Layer, Work
from uq.kernels.vulkan.pipelines import Pipelines
from uq.kernels.vulkan.prefill import AttentionCut, attention_constants, gemm_constants, gemm_module
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.variants import VARIANTS
from uq.kernels.vulkan.weights import Kind, Matrix, tiles_of

HALF_LANES = 256
SPLIT_ROWS = 64
ENOUGH_GROUPS = 512  # workgroups that keep a large GPU busy


@dataclass(frozen=True)
class Abilities:
    """What a device offers to the kernels of many tokens.

    Attributes:
        matrix: 16 x 16 x 16 products of float16 into float32 are one instruction.
        subgroup: invocations of a subgroup: the usual number, the least, the most.
        shared_bytes: that a workgroup may have.
    """

    integer_dot: bool
    matrix: bool
    subgroup: tuple[int, int, int]
    shared_bytes: int

    @classmethod
    def of(cls, physical: PhysicalGpu) -> Abilities:
        dot = physical.has("shaderIntegerDotProduct")
        return cls(dot, physical.has_matrix_blocks, physical.subgroup, physical.shared_bytes)

    def lanes(self, wish: int | None) -> int:
        """Invocations of a subgroup of a kernel that wishes for so many."""
        usual, least, most = self.subgroup
        return wish if wish and least <= wish <= most else usual

    def module(self, kind: Kind) -> str:
        """Of the product of a weight of this kind."""
        return gemm_module(kind, matrix=self.matrix, integer_dot=self.integer_dot)


def fits_tiles(config: GemmaConfig) -> bool:
    """Whether the heads that share a key head are whole runs of the 32 channels with one scale."""
    return config.q_size // config.num_kv_heads % 32 == 0


@dataclass(frozen=True)
class Wide:
    """Records stages of `columns` tokens."""

    config: GemmaConfig
    work: Work
    pipelines: Pipelines
    abilities: Abilities
    columns: int

    def halve(self, recorder: Recorder, kinds: Iterable[Kind], x: Span, channels: int) -> None:
        """Make activations float16, where the product of a weight of these kinds takes them so."""
        if not any(self._takes_halves(kind) for kind in kinds):
            return
        is_float = any(kind.is_float for kind in kinds)
        pipeline = self.pipelines.get("gemm_half", LANES=HALF_LANES, FLOAT_X=is_float)
        push = addresses(x, self.work.half, self.work.units) + words(tiles_of(channels))
        recorder.dispatch(pipeline, self.pipelines.layout, push, (self.columns, 1, 1))
        recorder.barrier()

    def parts(self, matrix: Matrix) -> int:
        """Of the channels, each another workgroup's, of a product whose reader sums them."""
        if self.columns > MOST_SPLIT or not self._takes_halves(matrix.kind):
            return 1
        groups, steps = -(-matrix.rows // SPLIT_ROWS), 2 * matrix.tiles
        wanted = max(1, min(MOST_PARTS, ENOUGH_GROUPS // groups, matrix.tiles // 2))
        return -(-steps // -(-steps // wanted))  # none of them empty

    def product(
        self,
        recorder: Recorder,
        matrix: Matrix,
        x: Span,
        y: Span,
        *,
        stride: int,
        parts: int = 1,
    ) -> None:
        """y = matrix x as float32, `stride` values from one column to the next.

        x was given to `halve` before. `parts` of the sum are (part, column) of y.
        """
        module = self.abilities.module(matrix.kind)
        lanes = self.abilities.lanes(VARIANTS[module].subgroup)
        shared = self.abilities.shared_bytes
        constants = gemm_constants(module, matrix.kind, lanes, shared, self.columns)
        inputs = (self.work.half, self.work.units) if self._takes_halves(matrix.kind) else (x,)
        push = addresses(matrix.span, *inputs, y)
        push += words(matrix.tiles, stride, matrix.rows, self.columns)
        groups = -(-matrix.rows // int(constants["BN"])), -(-self.columns // int(constants["BM"]))
        pipeline = self.pipelines.get(module, **constants)
        recorder.dispatch(pipeline, self.pipelines.layout, push, (*groups, parts))

    def attention(self, recorder: Recorder, layer: Layer, cache: Cache, *, is_float: bool) -> None:
        """context = softmax(Q K^T) V; queries behind their norm and RoPE, keys in the cache."""
        index, work = layer.index, self.work
        constants = attention_constants(
            self.config,
            index,
            cache.size.slots[index],
            self.abilities.subgroup[2],
            self.abilities.shared_bytes,
        )
        constants["FLOAT_X"] = is_float
        push = addresses(work.qkv, *cache.spans(index), work.context, work.state)
        push += words(layer.columns[-1])
        whole = -(-self.columns // int(constants["TOKENS"]))
        groups = min(self.columns, whole + cache.size.sequences - 1), self.config.num_kv_heads
        pipeline = self.pipelines.get(f"attention_prefill{cache.suffix}", **constants)
        recorder.dispatch(pipeline, self.pipelines.layout, push, (*groups, 1))

    @property
    def tile(self) -> int:
        """Tokens that a workgroup of attention takes at a time."""
        sharing = self.config.num_heads // self.config.num_kv_heads
        abilities = self.abilities
        cut = AttentionCut.of(
            self.config.head_dim, sharing, abilities.subgroup[2], abilities.shared_bytes
        )
        return cut.rows // sharing

    def _takes_halves(self, kind: Kind) -> bool:
        return self.abilities.module(kind).endswith("_matrix")
