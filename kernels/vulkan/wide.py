"""Stages for many tokens at a time: products through matrix instructions, attention by tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import PhysicalGpu
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.model import MANY_PARTS, MOST_PARTS, MOST_SPLIT, Layer, Work
from uq.kernels.vulkan.pipelines import Pipelines
from uq.kernels.vulkan.prefill import (
    AttentionCut,
    Constants,
    Heads,
    MatrixAttentionCut,
    attention_constants,
    gemm_constants,
    gemm_module,
    head_shapes,
)
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.variants import VARIANTS
from uq.kernels.vulkan.weights import Kind, Matrix, tiles_of

HALF_LANES = 256
SLICE = 4 * HALF_LANES  # quads of a column that a workgroup converts
BUSY = {"discrete": 512}  # workgroups that keep a device busy
USUAL_BUSY = 64


@dataclass(frozen=True)
class Abilities:
    """What a device offers to the kernels of many tokens.

    Attributes:
        matrix: 16 x 16 x 16 products of float16 into float32 are one instruction.
        subgroup: invocations of a subgroup: the usual number, the least, the most.
        shared_bytes: that a workgroup may have.
        busy: workgroups that keep it busy, about.
    """

    integer_dot: bool
    matrix: bool
    subgroup: tuple[int, int, int]
    shared_bytes: int
    busy: int = USUAL_BUSY

    @classmethod
    def of(cls, physical: PhysicalGpu) -> Abilities:
        dot = physical.has("shaderIntegerDotProduct")
        return cls(
            dot,
            physical.has_matrix_blocks,
            physical.subgroup,
            physical.shared_bytes,
            BUSY.get(physical.kind, USUAL_BUSY),
        )

    @property
    def large_blocks(self) -> bool:
        """Whether the registers of a subgroup hold 64 x 64 sums: AMD's compiler, whose devices have
        subgroups of 64, spills some."""
        return self.subgroup[2] == 32

    def lanes(self, wish: int | None) -> int:
        """Invocations of a subgroup of a kernel that wishes for so many."""
        usual, least, most = self.subgroup
        return wish if wish and least <= wish <= most else usual

    def module(self, kind: Kind) -> str:
        """Of the product of a weight of this kind."""
        return gemm_module(kind, matrix=self.matrix, integer_dot=self.integer_dot)


def slices(channels: int) -> int:
    """Workgroups that convert a token's activations."""
    return -(-channels // (4 * SLICE))


def fits_tiles(config: GemmaConfig, abilities: Abilities) -> bool:
    """Whether attention of many tokens fits: the heads that share a key head are whole runs of the
    32 channels with one scale, and a workgroup has room for them."""
    for heads in head_shapes(config):
        if heads.dim * heads.sharing % 32:
            return False
        if AttentionCut.of(heads, abilities.subgroup[2], abilities.shared_bytes) is None:
            return False
    return True


@dataclass(frozen=True)
class Wide:
    """Records stages of `columns` tokens.

    Attributes:
        halves: attention may round to float16 as products do.
    """

    config: GemmaConfig
    work: Work
    pipelines: Pipelines
    abilities: Abilities
    columns: int
    halves: bool = True

    def takes_halves(self, matrices: Iterable[Matrix]) -> bool:
        """Whether products of all of these take activations as float16, and nothing else."""
        return all(self._takes_halves(matrix.kind) for matrix in matrices)

    def halve(self, recorder: Recorder, kinds: Iterable[Kind], x: Span, channels: int) -> None:
        """Make activations float16, where the product of a weight of these kinds takes them so."""
        if not any(self._takes_halves(kind) for kind in kinds):
            return
        is_float = any(kind.is_float for kind in kinds)
        pipeline = self.pipelines.get("gemm_half", LANES=HALF_LANES, FLOAT_X=is_float)
        push = addresses(x, self.work.half, self.work.units) + words(tiles_of(channels))
        groups = self.columns, slices(channels), 1
        recorder.dispatch(pipeline, self.pipelines.layout, push, groups)
        recorder.barrier()

    def parts(self, matrices: Sequence[Matrix]) -> int:
        """Of the channels, each another workgroup's, of products whose reader sums them.

        Args:
            matrices: of one kind, that meet the same activations.
        """
        if not self.takes_halves(matrices):
            return 1
        groups = sum(math.prod(self._groups(matrix)) for matrix in matrices)
        steps = matrices[0].tiles
        most = MOST_PARTS if self.columns <= MOST_SPLIT else MANY_PARTS
        wanted = max(1, min(most, self.abilities.busy // groups, steps // 2))
        return -(-steps // -(-steps // wanted))  # none of them empty

    def few_parts(self, matrices: Sequence[Matrix]) -> int:
        """The same where only few tokens have room for parts."""
        return self.parts(matrices) if self.columns <= MOST_SPLIT else 1

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
        inputs = (self.work.half, self.work.units) if self._takes_halves(matrix.kind) else (x,)
        push = addresses(matrix.span, *inputs, y)
        push += words(matrix.tiles, stride, matrix.rows, self.columns)
        pipeline = self.pipelines.get(self.abilities.module(matrix.kind), **self._cut(matrix))
        recorder.dispatch(pipeline, self.pipelines.layout, push, (*self._groups(matrix), parts))

    def attention(self, recorder: Recorder, layer: Layer, cache: Cache, *, is_float: bool) -> None:
        """context = softmax(Q K^T) V; queries behind their norm and RoPE, keys in the cache."""
        index, work = layer.index, self.work
        module, constants, pieces = self._attention(index, cache.size.slots[index])
        push = addresses(work.qkv, *cache.spans(index), work.context, work.state)
        push += words(layer.columns[-1])
        whole = -(-self.columns // self.tile)
        runs = min(self.columns, whole + cache.size.sequences - 1)
        groups = runs * pieces, layer.kv_heads, 1
        constants = {**constants, "FLOAT_X": is_float, "PIECES": pieces}
        pipeline = self.pipelines.get(f"{module}{cache.suffix}", **constants)
        recorder.dispatch(pipeline, self.pipelines.layout, push, groups)

    def _attention(self, layer: int, slots: int) -> tuple[str, Constants, int]:
        """Module, sizes, workgroups of a run; a layer's cache has `slots` tokens of a sequence."""
        heads = Heads.of(self.config, layer)
        own, cut = attention_constants(self.config, layer, slots), self._attention_cut(heads)
        if isinstance(cut, MatrixAttentionCut):
            module, own = "attention_matrix", own | cut.constants(self._block_lanes)
        else:
            module, own = "attention_prefill", own | cut.constants(heads)
        return module, own, -(-self.tile // (cut.rows // heads.sharing))

    @property
    def tile(self) -> int:
        """Tokens of a run: the most that a workgroup of attention takes, in any layer."""
        shapes = head_shapes(self.config)
        return max(self._attention_cut(heads).rows // heads.sharing for heads in shapes)

    def _attention_cut(self, heads: Heads) -> AttentionCut | MatrixAttentionCut:
        """By matrix instructions, where they make it."""
        abilities, cut = self.abilities, None
        if self.halves and abilities.matrix:
            cut = MatrixAttentionCut.of(heads, self._block_lanes, abilities.shared_bytes)
        found = cut or AttentionCut.of(heads, abilities.subgroup[2], abilities.shared_bytes)
        assert found is not None  # by `fits_tiles`
        return found

    @property
    def _block_lanes(self) -> int:
        return self.abilities.lanes(VARIANTS["attention_matrix"].subgroup)

    def _cut(self, matrix: Matrix) -> Constants:
        """Sizes of the product of a matrix."""
        module = self.abilities.module(matrix.kind)
        lanes = self.abilities.lanes(VARIANTS[module].subgroup)
        shared = self.abilities.shared_bytes
        large = self.abilities.large_blocks
        return gemm_constants(module, matrix.kind, lanes, shared, self.columns, large_blocks=large)

    def _groups(self, matrix: Matrix) -> tuple[int, int]:
        """Workgroups of its product: along the rows, along the tokens."""
        cut = self._cut(matrix)
        return -(-matrix.rows // int(cut["BN"])), -(-self.columns // int(cut["BM"]))

    def _takes_halves(self, kind: Kind) -> bool:
        return self.abilities.module(kind).endswith("_matrix")
