"""Products of many tokens with the experts that they choose, in the order of the experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from uq.kernels.vulkan.beside import Mixture
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.model import ITEM_TILE, most_item_tiles
from uq.kernels.vulkan.prefill import Constants, MatrixCut, PlainCut
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.variants import VARIANTS
from uq.kernels.vulkan.weights import Matrix
from uq.kernels.vulkan.wide import Wide, slices

LANES = 512  # of the workgroup that groups them, of one that chooses for a token
ROUTER_LANES = 128
ROW_LANES = 256


@dataclass(frozen=True)
class Grouping:
    """Records what experts make of many tokens.

    Attributes:
        wide: of the tokens.
        is_float: activations are float32.
    """

    wide: Wide
    mixture: Mixture
    is_float: bool

    @property
    def _items(self) -> int:
        return self.wide.columns * self.mixture.active

    @property
    def _tiles(self) -> int:
        return most_item_tiles(self._items, self.mixture.router.rows)

    def choose(self, recorder: Recorder, stride: int) -> None:
        """Each token's experts, and their shares; `stride` from a token's scores to the next's."""
        work, experts = self.wide.work, self.mixture
        how = {"COUNT": experts.router.rows, "ACTIVE": experts.active}
        pipeline = self.wide.pipelines.get("route", LANES=ROUTER_LANES, **how)
        push = addresses(work.router_scores, experts.factors, work.chosen, work.shares)
        self._run(recorder, pipeline, push + words(stride), (self.wide.columns, 1, 1))

    def experts(self, recorder: Recorder) -> None:
        """expert_out = what each item's expert makes of its token's expert_x."""
        work, mixture = self.wide.work, self.mixture
        gate_up, down, (into, back) = mixture.gate_up, mixture.down, mixture.steps
        recorder.label = "experts' order"
        self._group(recorder)
        recorder.label = "experts' gate, up"
        self.wide.halve(recorder, [gate_up.kind], work.expert_x, gate_up.cols)
        recorder.barrier()
        y, choices = work.expert_wide, mixture.active
        self._product(recorder, gate_up, work.expert_x, y, step=into, choices=choices)
        recorder.barrier()
        self._gate(recorder)
        recorder.barrier()
        recorder.label = "experts' down"
        of_items = replace(self.wide, columns=self._items)
        of_items.halve(recorder, [down.kind], work.expert_gated, down.cols)
        self._product(recorder, down, work.expert_gated, work.expert_out, step=back, choices=1)
        recorder.barrier()

    def _group(self, recorder: Recorder) -> None:
        work, experts = self.wide.work, self.mixture
        pipeline = self.wide.pipelines.get(
            "group",
            LANES=LANES,
            COUNT=experts.router.rows,
            ACTIVE=experts.active,
            SIZE=ITEM_TILE,
            TILES=self._tiles,
        )
        push = addresses(work.chosen, work.item_tiles, work.items, work.state)
        self._run(recorder, pipeline, push, (1, 1, 1))

    def _product(
        self, recorder: Recorder, matrix: Matrix, x: Span, y: Span, *, step: int, choices: int
    ) -> None:
        """y = matrix x of each item's expert; `choices` items share a column of x.

        Args:
            step: row blocks from an expert to the next.
        """
        work, cut = self.wide.work, self._cut(matrix)
        halved = self.wide.takes_halves([matrix])
        inputs = (work.half, work.units) if halved else (x,)
        push = addresses(matrix.span, *inputs, y)
        push += words(matrix.tiles, matrix.rows, matrix.rows, self._items)
        push += addresses(work.item_tiles, work.items) + words(step)
        module = self.wide.abilities.module(matrix.kind)
        pipeline = self.wide.pipelines.get(module, CHOICES=choices, **cut)
        groups = -(-matrix.rows // int(cut["BN"])), self._tiles, 1
        self._run(recorder, pipeline, push, groups)

    def _cut(self, matrix: Matrix) -> Constants:
        abilities, kind = self.wide.abilities, matrix.kind
        module = abilities.module(kind)
        if not module.endswith("_matrix"):
            return PlainCut(ITEM_TILE).constants(kind)
        lanes = abilities.lanes(VARIANTS[module].subgroup)
        return MatrixCut(ITEM_TILE, 128, 32, 32).constants(kind, lanes)

    def _gate(self, recorder: Recorder) -> None:
        """expert_gated = gelu(gate) * up."""
        work, size = self.wide.work, self.mixture.gate.rows
        how = {"LANES": ROW_LANES, "FLOAT_X": self.is_float, "CHANNELS": size}
        pipeline = self.wide.pipelines.get("geglu", **how)
        up = work.expert_wide.part(4 * size, work.expert_wide.nbytes - 4 * size)
        push = addresses(work.expert_wide, up, work.expert_gated) + words(2 * size, 1)
        self._run(recorder, pipeline, push, (self._items, slices(size), 1))

    def _run(
        self, recorder: Recorder, pipeline: object, push: bytes, groups: tuple[int, int, int]
    ) -> None:
        recorder.dispatch(pipeline, self.wide.pipelines.layout, push, groups)
