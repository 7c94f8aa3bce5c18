"""Products of matrices as dispatches: GEMV for few columns, GEMM beyond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.beside import ExpertOutputs
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.model import COLUMNS, Model, Work
from uq.kernels.vulkan.pipelines import Pipelines
from uq.kernels.vulkan.push import addresses, floats, words
from uq.kernels.vulkan.tuning import BRANCH, CHOOSE, GEGLU, STORE, Shape, Tuning
from uq.kernels.vulkan.weights import Matrix
from uq.kernels.vulkan.wide import Abilities, Wide

FEW_ALONE = 4  # sequences up to which a GEMV is faster than matrix instructions


@dataclass(frozen=True)
class Joining:
    """What stands in front of a product: joined = scale (hidden + norm(branch)), x = norm(joined).

    Attributes:
        branch: None where nothing joins: x = norm(hidden).
        parts: whose sum the branch is.
        branch_gain: None where the branch has no norm of its own.
        gain: None where x is joined itself.
        experts: joins the branch before its norm.
    """

    branch: Span | None
    hidden: Span
    joined: Span
    branch_gain: Span | None
    gain: Span | None
    parts: int = 1
    scale: float = 1.0
    experts: ExpertOutputs | None = None

    @property
    def spans(self) -> tuple[Span, Span, Span, Span, Span]:
        """Branch, hidden, joined, both gains; what there is none of is anything."""
        gain = self.gain or self.hidden
        return (
            self.branch or self.hidden,
            self.hidden,
            self.joined,
            self.branch_gain or gain,
            gain,
        )


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
        few = FEW_ALONE if self.alone and self.abilities.matrix else COLUMNS
        if self.columns <= few:
            return None
        halves = self.abilities.module(self.model.layers[0].out.kind).endswith("_matrix")
        config, work, columns = self.config, self.work, self.columns
        return Wide(config, work, self.pipelines, self.abilities, columns, halves)

    def halves(self, *matrices: Matrix) -> bool:
        """Whether products of these take activations that are float16 from the start."""
        return self.wide is not None and self.wide.takes_halves(matrices)

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
        norm: Joining | None = None,
        parts: int = 1,
        halved: bool = False,
    ) -> None:
        """y = matrix x as float32 for each (matrix, y), `stride` values from column to column.

        Args:
            like: what follows the product of one column, whose bits these are up to `COLUMNS`.
            parts: of the channels, of more columns: y is (part, column, stride).
            halved: x is float16 already, in `work.half`.
            cap: of the results, up to `COLUMNS`.
            norm: makes x, in the products themselves; of one column.
        """
        if self.wide and not halved:
            kinds = [matrix.kind for matrix, _ in outputs]
            self.wide.halve(recorder, kinds, x, outputs[0][0].cols)
        for i, (matrix, y) in enumerate(outputs):
            if self.wide:
                self.wide.product(recorder, matrix, x, y, stride=stride, parts=parts)
            else:
                stores = norm is not None and i == 0
                self._product(recorder, matrix, x, y, stride, like, cap, norm, stores)

    def _product(
        self,
        recorder: Recorder,
        matrix: Matrix,
        x: Span,
        y: Span,
        stride: int,
        like: int,
        cap: float,
        norm: Joining | None,
        stores: bool,
    ) -> None:
        shape = self.tuning.shape(matrix, self.columns, like)
        push = addresses(matrix.span, matrix.span) + self.input_addresses(x, y, norm)
        push += addresses(self.work.x, self.work.state)
        push += words(matrix.blocks, matrix.tiles, stride, matrix.rows, int(stores))
        push += floats(norm.scale if norm else 1.0)
        self.gemv(recorder, matrix, shape, BRANCH if like == BRANCH else STORE, push, norm, CAP=cap)

    def input_addresses(self, x: Span, y: Span, norm: Joining | None) -> bytes:
        if norm is None:
            return addresses(x, y, *[self.work.hidden] * 4)
        branch, *others = norm.spans
        return addresses(branch, y, *others)

    def gemv(
        self,
        recorder: Recorder,
        matrix: Matrix,
        shape: Shape,
        epilogue: int,
        push: bytes,
        norm: Joining | None = None,
        *,
        products: int = 1,
        **constants: int | float,
    ) -> None:
        """One column has all rounds of `shape`; the head's is the last one.

        Args:
            products: with experts, each of another column or expert.
        """
        columns = 1 if epilogue == CHOOSE else self.columns
        if norm:
            constants |= {"NORMS": True, **self.norm_constants(shape.lanes, norm)}
        pipeline = self.pipelines.get(
            self.tuning.kernel(matrix.kind),
            LANES=shape.lanes,
            COLUMNS=columns,
            BLOCKS=shape.blocks,
            EPILOGUE=epilogue,
            ROUNDS=shape.rounds,
            **matrix.kind.constants,
            **constants,
        )
        step = shape.blocks // 2 if epilogue == GEGLU else shape.blocks
        groups = -(-matrix.blocks // (step * shape.rounds))
        self.run(recorder, pipeline, push, (groups, shape.parts, products))

    def norm_constants(self, lanes: int, norm: Joining) -> dict[str, int | float]:
        hidden = self.config.hidden_size
        return {
            "ITEMS": -(-hidden // (4 * lanes)),
            "HIDDEN": hidden,
            "EPS": float(self.config.rms_norm_eps),
            "HAS_BRANCH": norm.branch is not None,
            "POST_NORM": norm.branch_gain is not None,
            "PARTS": norm.parts,
            "PLAIN": norm.gain is None,
        }

    def run(
        self, recorder: Recorder, pipeline: object, push: bytes, groups: tuple[int, int, int]
    ) -> None:
        recorder.dispatch(pipeline, self.pipelines.layout, push, groups)
