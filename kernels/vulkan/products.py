"""Products of matrices as dispatches: GEMV for few columns, GEMM beyond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.model import COLUMNS, Model, Work
from uq.kernels.vulkan.pipelines import Pipelines
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.tuning import CHOOSE, GEGLU, STORE, Shape, Tuning
from uq.kernels.vulkan.weights import Matrix
from uq.kernels.vulkan.wide import Abilities, Wide


@dataclass(frozen=True)
class Products:
    """Records products of one model for passes of `columns` tokens.

    Attributes:
        alone: each column is of a sequence of its own.
    """

    config: GemmaConfig
    model: Model
    work: Work
    pipelines: Pipelines
    tuning: Tuning
    abilities: Abilities
    columns: int
    alone: bool = False

    @property
    def wide(self) -> Wide | None:
        """What records products and attention when the columns are too many for a GEMV."""
        if self.columns <= COLUMNS:
            return None
        return Wide(self.config, self.work, self.pipelines, self.abilities, self.columns)

    @property
    def tile(self) -> int:
        """Tokens of a sequence that a workgroup of attention takes at a time."""
        return self.wide.tile if self.wide else 1

    @property
    def float_x(self) -> bool:
        return self.model.table.kind.is_float

    def products(
        self,
        recorder: Recorder,
        x: Span,
        outputs: Sequence[tuple[Matrix, Span]],
        *,
        stride: int,
        like: int = STORE,
        cap: float = 0.0,
    ) -> None:
        """y = matrix x as float32 for each (matrix, y), `stride` values from column to column.

        Args:
            like: what follows the product of one column, whose bits these are up to `COLUMNS`.
            cap: of the results, up to `COLUMNS`.
        """
        if self.wide:
            kinds = [matrix.kind for matrix, _ in outputs]
            self.wide.halve(recorder, kinds, x, outputs[0][0].cols)
        for matrix, y in outputs:
            if self.wide:
                self.wide.product(recorder, matrix, x, y, stride=stride)
            else:
                self._product(recorder, matrix, x, y, stride, like, cap)

    def _product(
        self,
        recorder: Recorder,
        matrix: Matrix,
        x: Span,
        y: Span,
        stride: int,
        like: int,
        cap: float,
    ) -> None:
        shape = self.tuning.shape(matrix, self.columns, like)
        push = addresses(matrix.span, matrix.span, x, y, *[self.work.hidden] * 4)
        push += addresses(self.work.x, self.work.state)
        push += words(matrix.blocks, matrix.tiles, stride, matrix.rows, 0)
        self.gemv(recorder, matrix, shape, STORE, push, CAP=cap)

    def gemv(
        self,
        recorder: Recorder,
        matrix: Matrix,
        shape: Shape,
        epilogue: int,
        push: bytes,
        **constants: int | float,
    ) -> None:
        pipeline = self.pipelines.get(
            self.tuning.kernel(matrix.kind),
            LANES=shape.lanes,
            GROUP=matrix.kind.group,
            COLUMNS=1 if epilogue == CHOOSE else self.columns,
            BLOCKS=shape.blocks,
            EPILOGUE=epilogue,
            **constants,
        )
        step = shape.blocks // 2 if epilogue == GEGLU else shape.blocks
        self.run(recorder, pipeline, push, (-(-matrix.blocks // step), 1, 1))

    def run(
        self, recorder: Recorder, pipeline: object, push: bytes, groups: tuple[int, int, int]
    ) -> None:
        recorder.dispatch(pipeline, self.pipelines.layout, push, groups)
