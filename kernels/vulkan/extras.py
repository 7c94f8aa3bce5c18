"""Stages of what layers do beside attention and MLP: experts, the per-layer embedding."""

from __future__ import annotations

from dataclasses import replace

from uq.kernels.vulkan.beside import Mixture, PerLayerTable, Told
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.products import Joining
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.residual import NORM_LANES, ROW_LANES, Residual
from uq.kernels.vulkan.tuning import BRANCH, GEGLU
from uq.kernels.vulkan.weights import Matrix, padded_rows

TOLD_LANES = 64  # of a workgroup that makes a token's input of a layer
ROUTER_LANES = 128


class Extras(Residual):
    """Records what some layers do besides."""

    def per_layer_inputs(self, recorder: Recorder, table: PerLayerTable) -> None:
        """told = every layer's inputs, (layer, column, size), from the embedding in `hidden`."""
        recorder.label, work, config = "per-layer inputs", self.work, self.config
        assert config.per_layer is not None
        self.convert(recorder, work.hidden, work.plain, is_float=True)
        channels = table.projection.rows
        outputs = [(table.projection, work.projected)]
        self.products(recorder, work.plain, outputs, stride=channels)
        recorder.barrier()
        pipeline = self.pipelines.get(
            f"per_layer_{table.table.kind.name}",
            LANES=TOLD_LANES,
            SIZE=config.per_layer.size,
            ROWS=config.per_layer.vocab_size,
            EPS=float(config.rms_norm_eps),
            SCALE=config.hidden_size**-0.5,
            **table.table.kind.constants,
        )
        push = addresses(table.table.span, work.projected, table.gain, work.told, work.state)
        self.run(recorder, pipeline, push, (config.num_layers, self.columns, 1))
        recorder.barrier()

    def join_told(self, recorder: Recorder, layer: int, told: Told, joining: Joining) -> Joining:
        """`tell` of the residual stream behind `joining`.

        Returns:
            How that joins; the norm behind it is the one of `joining`.
        """
        plain = replace(joining, gain=None)
        norm = self.norm_inside(recorder, plain, x=self.work.plain, is_float=True)
        self.tell(recorder, layer, told, norm)
        return self.behind(plain, told.projection, told.gain, joining.gain)

    def tell(self, recorder: Recorder, layer: int, told: Told, norm: Joining | None) -> None:
        """branch = projection (gelu(gate plain) * told); `norm` makes `plain`, where that is not
        done."""
        recorder.label, work, size = "per-layer gate", self.work, told.gate.rows
        outputs = [(told.gate, work.told_gate)]
        self.products(recorder, work.plain, outputs, stride=size, norm=norm)
        recorder.barrier()
        pipeline = self.pipelines.get("geglu", LANES=ROW_LANES, FLOAT_X=True, CHANNELS=size)
        layer_bytes = 4 * self.columns * size
        inputs = work.told.part(layer * layer_bytes, layer_bytes)
        push = addresses(work.told_gate, inputs, work.told_x) + words(size, 1)
        self.run(recorder, pipeline, push, (self.columns, 1, 1))
        recorder.barrier()
        recorder.label = "per-layer projection"
        self.branch(recorder, told.projection, work.told_x)

    def expert_inputs(self, recorder: Recorder, mixture: Mixture, joining: Joining) -> None:
        """What the experts and their router are given, beside the MLP's own norm."""
        work = self.work
        again = replace(joining, joined=work.normed)  # made once more: nobody reads this one
        self.norm(recorder, replace(again, gain=mixture.input_gain), x=work.expert_x)
        router = replace(again, gain=mixture.router_gain)
        self.norm(recorder, router, x=work.plain, is_float=True)

    def router_scores(self, recorder: Recorder, mixture: Mixture) -> None:
        outputs = [(mixture.router, self.work.router_scores)]
        stride = padded_rows(mixture.router.rows)
        self.products(recorder, self.work.plain, outputs, stride=stride)

    def route(self, recorder: Recorder, mixture: Mixture) -> None:
        """Each column's experts, and their shares."""
        work, count = self.work, mixture.router.rows
        pipeline = self.pipelines.get(
            "route", LANES=ROUTER_LANES, COUNT=count, ACTIVE=mixture.active
        )
        push = addresses(work.router_scores, mixture.factors, work.chosen, work.shares)
        push += words(padded_rows(count))
        self.run(recorder, pipeline, push, (self.columns, 1, 1))

    def experts(self, recorder: Recorder, mixture: Mixture) -> None:
        """expert_out = what each column's experts make of expert_x."""
        work, (into, back) = self.work, mixture.steps
        recorder.label = "experts' gate, up"
        x, out = work.expert_x, work.expert_gated
        self._expert_product(recorder, mixture, mixture.gate, mixture.up, GEGLU, into, x, out)
        recorder.barrier()
        recorder.label = "experts' down"
        x, out, down = work.expert_gated, work.expert_out, mixture.down
        self._expert_product(recorder, mixture, down, down, BRANCH, back, x, out)
        recorder.barrier()

    def _expert_product(
        self,
        recorder: Recorder,
        mixture: Mixture,
        matrix: Matrix,
        second: Matrix,
        epilogue: int,
        step: int,
        x: Span,
        out: Span,
    ) -> None:
        """A product of one column for each column and expert that it chose.

        Args:
            step: row blocks from an expert to the next.
        """
        work = self.work
        shape = replace(self.tuning.shape(matrix, 1, epilogue), parts=1)
        push = addresses(matrix.span, second.span, x, out, work.chosen, *[out] * 4, work.state)
        push += words(matrix.blocks, matrix.tiles, matrix.rows, matrix.rows, step)
        groups = self.columns * mixture.active
        alone = replace(self, columns=1)
        alone.gemv(recorder, matrix, shape, epilogue, push, ACTIVE=mixture.active, products=groups)

    def mix(self, recorder: Recorder, mixture: Mixture, joining: Joining) -> Joining:
        """mixed = norm(MLP) + norm(experts), instead of the MLP that `joining` has.

        Returns:
            How that joins.
        """
        recorder.label, work = "experts' sum", self.work
        pipeline = self.pipelines.get(
            "mixture",
            LANES=NORM_LANES,
            ACTIVE=mixture.active,
            ITEMS=-(-self.config.hidden_size // (4 * NORM_LANES)),
            HIDDEN=self.config.hidden_size,
            EPS=float(self.config.rms_norm_eps),
            PARTS=joining.parts,
        )
        gains = mixture.mlp_gain, mixture.output_gain
        push = addresses(work.branch, work.expert_out, work.shares, *gains, work.mixed)
        self.run(recorder, pipeline, push, (self.columns, 1, 1))
        recorder.barrier()
        return replace(joining, branch=work.mixed, parts=1)
