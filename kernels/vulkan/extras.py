"""Stages of what layers do beside attention and MLP: experts, the per-layer embedding."""

from __future__ import annotations

from dataclasses import replace

from uq.kernels.vulkan.beside import ExpertOutputs, Mixture, PerLayerTable, Told
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.grouping import Grouping
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.products import Joining
from uq.kernels.vulkan.push import addresses, floats, words
from uq.kernels.vulkan.residual import ROW_LANES, Residual
from uq.kernels.vulkan.tuning import ADD, GEGLU, TELL
from uq.kernels.vulkan.weights import Matrix, padded_rows

TOLD_LANES = 64  # of a workgroup that makes a token's input of a layer
EXPERT_DEPTH = 3  # tiles of the down projections that a lane has on their way


class Extras(Residual):
    """Records what some layers do besides."""

    def per_layer_inputs(self, recorder: Recorder, table: PerLayerTable) -> None:
        """told = every layer's inputs, (layer, column, size), from the embedding in `hidden`."""
        recorder.label, work, config = "per-layer inputs", self.work, self.config
        assert config.per_layer is not None
        plain, channels = self.plain(recorder, work.hidden), table.projection.rows
        self.products(recorder, plain, [(table.projection, work.projected)], stride=channels)
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
        recorder.label, work = "per-layer gate", self.work
        layer_bytes = 4 * self.columns * told.gate.rows
        inputs = work.told.part(layer * layer_bytes, layer_bytes)
        if self.wide:
            self._wide_tell(recorder, told.gate, inputs)
        else:
            self._tell(recorder, told.gate, inputs, norm)
        recorder.barrier()
        recorder.label = "per-layer projection"
        self.branch(recorder, told.projection, work.told_x)

    def _tell(self, recorder: Recorder, gate: Matrix, inputs: Span, norm: Joining | None) -> None:
        work = self.work
        shape = self.tuning.shape(gate, self.columns, TELL)
        push = addresses(gate.span, gate.span) + self.input_addresses(work.plain, inputs, norm)
        push += addresses(work.told_x, work.state)
        push += words(gate.blocks, gate.tiles, gate.rows, gate.rows, int(norm is not None))
        push += floats(norm.scale if norm else 1.0)
        self.gemv(recorder, gate, shape, TELL, push, norm)

    def _wide_tell(self, recorder: Recorder, gate: Matrix, inputs: Span) -> None:
        work, size = self.work, gate.rows
        self.products(recorder, work.plain, [(gate, work.told_gate)], stride=size)
        recorder.barrier()
        pipeline = self.pipelines.get("geglu", LANES=ROW_LANES, FLOAT_X=True, CHANNELS=size)
        push = addresses(work.told_gate, inputs, work.told_x) + words(size, 1)
        self.run(recorder, pipeline, push, (self.columns, 1, 1))

    def router_scores(self, recorder: Recorder, mixture: Mixture) -> None:
        outputs = [(mixture.router, self.work.router_scores)]
        stride = padded_rows(mixture.router.rows)
        self.products(recorder, self.work.plain, outputs, stride=stride)

    def begin_experts(self, recorder: Recorder, mixture: Mixture) -> None:
        """Each column's experts and their shares; of few columns also expert_gated."""
        if grouping := self._grouping(mixture):
            grouping.choose(recorder, padded_rows(mixture.router.rows))
        else:
            self._gate_experts(recorder, mixture)

    def end_experts(self, recorder: Recorder, mixture: Mixture) -> ExpertOutputs:
        """expert_out = what the experts make of expert_x."""
        grouping, work = self._grouping(mixture), self.work
        if grouping:
            grouping.experts(recorder)
        else:
            self._add_experts(recorder, mixture)
        gains = mixture.mlp_gain, mixture.output_gain
        count = mixture.active if grouping else 1
        return ExpertOutputs(work.expert_out, work.shares, *gains, count)

    def _grouping(self, mixture: Mixture) -> Grouping | None:
        """Where several columns meet an expert, on average."""
        if self.wide and self.columns * mixture.active > mixture.router.rows:
            return Grouping(self.wide, mixture, self.float_x)
        return None

    def _gate_experts(self, recorder: Recorder, mixture: Mixture) -> None:
        work, gate = self.work, mixture.gate
        shape = self.tuning.shape(gate, 1, GEGLU)
        push = addresses(gate.span, mixture.up.span, work.expert_x, work.expert_gated)
        push += addresses(work.router_scores, mixture.factors, work.chosen, work.shares)
        push += addresses(work.expert_gated, work.state)
        stride = padded_rows(mixture.router.rows)
        push += words(gate.blocks, gate.tiles, stride, gate.rows, mixture.steps[0])
        groups = self.columns * mixture.active
        replace(self, columns=1).gemv(
            recorder,
            gate,
            shape,
            GEGLU,
            push,
            products=groups,
            ACTIVE=mixture.active,
            COUNT=mixture.router.rows,
        )

    def _add_experts(self, recorder: Recorder, mixture: Mixture) -> None:
        """expert_out = the sum of what each column's experts make of expert_gated."""
        recorder.label, work, down = "experts' down", self.work, mixture.down
        shape = self.tuning.shape(down, 1, ADD)
        pipeline = self.pipelines.get(
            self.tuning.kernel(down.kind).replace("gemv", "experts"),
            LANES=shape.lanes,
            ACTIVE=mixture.active,
            DEPTH=EXPERT_DEPTH,
            SHARING=shape.parts,
            **down.kind.constants,
        )
        push = addresses(down.span, work.expert_gated, work.expert_out, work.chosen, work.shares)
        push += addresses(work.state) + words(down.tiles, down.rows, mixture.steps[1])
        self.run(recorder, pipeline, push, (down.blocks, self.columns, 1))
        recorder.barrier()
