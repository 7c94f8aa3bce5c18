"""The stages of a forward pass as dispatches. Between two stages lies one barrier.

A decode step has five stages a layer: q, k and v; attention; its output joined to the residual
stream; the MLP's gate; its output joined to the residual stream. Norms, RoPE, the gate and the
conversion of activations are done by whoever produces their input. `persistent.py` has all of them
in one dispatch.
"""

from __future__ import annotations

from dataclasses import replace

from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.model import PEAK_LOGITS, Layer, least_tiles, split_count
from uq.kernels.vulkan.products import Joining
from uq.kernels.vulkan.push import addresses, floats, words
from uq.kernels.vulkan.residual import ROW_LANES
from uq.kernels.vulkan.state import ATTENTION_COUNTER, CHOOSE_COUNTER
from uq.kernels.vulkan.streams import Streams
from uq.kernels.vulkan.tuning import ATTENTION, CHOOSE, GEGLU, QUERIES
from uq.kernels.vulkan.weights import Matrix, padded_rows
from uq.kernels.vulkan.wide import slices

WHOLE, PREPARE, ATTEND = range(3)  # parts of attention, as in shaders/attention.comp
ATTENTION_LANES = 256
MOST_HEAD_DIM = 2 * ATTENTION_LANES  # a lane has eight channels, of four rows
SAMPLE_LANES = 512
MANY_BLOCKS = 64  # of heads, that keep a large GPU busy without splits of the context


class Stages(Streams):
    """Records stages of one model for passes of `columns` tokens."""

    @property
    def _cap(self) -> float:
        return float(self.config.final_softcap or 0.0)

    def layers(self, recorder: Recorder, cache: Cache) -> None:
        """From the embedding to the final norm's output."""
        work = self.work
        if self.model.per_layer:
            self.per_layer_inputs(recorder, self.model.per_layer)
        joining = Joining(None, work.hidden, work.hidden, None, self.model.first_gain)
        self.enter_streams(recorder)
        for layer in self.model.layers:
            if layer.laurel:
                self.add_laurel(recorder, layer.laurel, joining, halved=self._halves_qkv(layer))
            recorder.label = "q, k, v"
            self.qkv(recorder, layer, joining)
            recorder.label = "attention"
            self.attention(recorder, layer, cache)
            recorder.label = "attention output"
            self.branch(recorder, layer.out, work.context)
            joining = self.behind(joining, layer.out, layer.attention_gain, layer.mlp_gain)
            joining = self.mlp(recorder, layer, joining)
            if layer.updates:
                joining = self.leave_layer(recorder, layer, joining)
            elif layer.told:
                joining = self.join_told(recorder, layer.index, layer.told, joining)
            joining = replace(joining, scale=layer.scale)
        self.norm(recorder, joining, keep=True)
        recorder.barrier()

    def mlp(self, recorder: Recorder, layer: Layer, joining: Joining) -> Joining:
        """branch = the MLP; what experts add to it is a part of how that joins."""
        mixture, halved = layer.mixture, self.halves(layer.gate, layer.up)
        recorder.label = "gate, up"
        norm = None
        if mixture:
            self.norm(recorder, joining, halved=halved, mixture=mixture)
            recorder.barrier()
            self.router_scores(recorder, mixture)
        else:
            norm = self.norm_inside(recorder, joining, halved=halved)
        self.gate(recorder, layer, norm)
        recorder.label = "down"
        if mixture:
            recorder.label = "down, experts' gate"
            self.begin_experts(recorder, mixture)
        self.branch(recorder, layer.down, self.work.gated)
        joining = self.behind(joining, layer.down, layer.branch_gain, layer.next_gain)
        if mixture:
            joining = replace(joining, experts=self.end_experts(recorder, mixture))
        return joining

    def embed(self, recorder: Recorder, *, decode: bool) -> None:
        recorder.label = "embedding"
        table, work = self.model.table, self.work
        pipeline = self.pipelines.get(
            f"embed_{table.kind.name}",
            LANES=ROW_LANES,
            DECODE=decode,
            SCALE=float(self.config.embed_scale),
            HIDDEN=self.config.hidden_size,
            **table.kind.constants,
        )
        push = addresses(table.span, work.hidden, work.state)
        self.run(recorder, pipeline, push, (self.columns, 1, 1))
        recorder.barrier()

    def qkv(self, recorder: Recorder, layer: Layer, joining: Joining) -> None:
        halved = self._halves_qkv(layer)
        norm = None if layer.laurel else self.norm_inside(recorder, joining, halved=halved)
        qkv, stride = self.work.qkv, layer.columns[-1]
        outputs = [(matrix, qkv.part(4 * row, qkv.nbytes - 4 * row)) for matrix, row in layer.qkv]
        self.products(
            recorder,
            self.work.x,
            outputs,
            stride=stride,
            norm=norm,
            parts=self._qkv_parts(layer),
            halved=halved,
        )
        recorder.barrier()

    def _halves_qkv(self, layer: Layer) -> bool:
        return self.halves(*(matrix for matrix, _ in layer.qkv))

    def _qkv_parts(self, layer: Layer) -> int:
        return self.wide.few_parts([matrix for matrix, _ in layer.qkv]) if self.wide else 1

    def attention(self, recorder: Recorder, layer: Layer, cache: Cache) -> None:
        if self.columns == 1 or self.alone:
            self._attention(recorder, layer, cache, WHOLE)
        else:
            self._attention(recorder, layer, cache, PREPARE)
            recorder.barrier()
            if self.wide:
                self.wide.attention(recorder, layer, cache, is_float=self.float_x)
            else:
                self._attention(recorder, layer, cache, ATTEND)
        recorder.barrier()

    def gate(self, recorder: Recorder, layer: Layer, norm: Joining | None) -> None:
        """gated = gelu(gate x) * (up x); `norm` makes x, where that is not done."""
        work, gate, up = self.work, layer.gate, layer.up
        if gate.kind == up.kind and not self.wide and layer.quantile is None:
            shape = self.tuning.shape(gate, self.columns, GEGLU)
            push = addresses(gate.span, up.span)
            push += self.input_addresses(work.x, work.wide, norm)
            push += addresses(work.gated, work.state)
            push += words(gate.blocks, gate.tiles, 0, gate.rows, 1)
            push += floats(norm.scale if norm else 1.0)
            self.gemv(recorder, gate, shape, GEGLU, push, norm)
        else:
            self._wide_gate(recorder, gate, up, norm, layer.quantile)
        recorder.barrier()

    def head(self, recorder: Recorder) -> None:
        """Logits of the last of the columns that are tokens, and the likeliest token."""
        recorder.label = "head"
        head, work = self.model.head, self.work
        shape = self.tuning.shape(head, 1, CHOOSE)
        push = addresses(head.span, head.span, work.x, work.logits, *[work.hidden] * 4)
        push += addresses(work.candidates, work.state)
        push += words(head.blocks, head.tiles, head.rows, self.config.vocab_size, CHOOSE_COUNTER)
        self.gemv(recorder, head, shape, CHOOSE, push, CAP=self._cap)
        recorder.barrier()

    def heads(self, recorder: Recorder) -> None:
        """Logits of every column, those of a GEMM not soft-capped yet."""
        recorder.label = "head"
        outputs = [(self.model.head, self.work.logits)]
        stride, cap = padded_rows(self.config.vocab_size), self._cap
        self.products(recorder, self.work.x, outputs, stride=stride, like=CHOOSE, cap=cap)
        recorder.barrier()

    def choose(self, recorder: Recorder, *, advances: bool) -> None:
        """The token that follows each column's, by its sequence's own sampling.

        Args:
            advances: the sequences go on to it.
        """
        recorder.label = "sampling"
        work, vocabulary = self.work, self.config.vocab_size
        cap = self._cap if self.wide else 0.0
        groups = -(-vocabulary // PEAK_LOGITS)
        push = addresses(work.logits, work.peaks, work.state)
        push += words(padded_rows(vocabulary), vocabulary, groups, int(advances))
        pipeline = self.pipelines.get("peaks", LANES=ROW_LANES, CAP=cap)
        parts = -(-groups * 8 // ROW_LANES)
        self.run(recorder, pipeline, push, (parts, self.columns, 1))
        recorder.barrier()
        pipeline = self.pipelines.get("sample", LANES=SAMPLE_LANES, CAP=cap)
        self.run(recorder, pipeline, push, (self.columns, 1, 1))
        recorder.barrier()

    def scores(self, recorder: Recorder, rows: Matrix) -> None:
        """Logits of some rows of the head for all columns of `normed`, not soft-capped."""
        self.convert(recorder, self.work.normed, self.work.x)
        outputs = [(rows, self.work.scores)]
        self.products(recorder, self.work.x, outputs, stride=padded_rows(rows.rows))

    def _wide_gate(
        self,
        recorder: Recorder,
        gate: Matrix,
        up: Matrix,
        norm: Joining | None,
        quantile: float | None,
    ) -> None:
        work, stride = self.work, padded_rows(gate.rows)
        half = work.wide.nbytes // 2
        halves = work.wide.part(0, half), work.wide.part(half, half)
        outputs = list(zip((gate, up), halves, strict=True))
        parts = self.wide.few_parts([gate, up]) if self.wide else 1
        self.products(
            recorder,
            work.x,
            outputs,
            stride=stride,
            norm=norm,
            parts=parts,
            halved=self.halves(gate, up),
        )
        recorder.barrier()
        pipeline = self.pipelines.get(
            "geglu",
            LANES=ROW_LANES,
            FLOAT_X=self.float_x,
            CHANNELS=gate.rows,
            SPARSE=quantile is not None,
            QUANTILE=quantile or 0.0,
        )
        push = addresses(*halves, work.gated) + words(stride, parts)
        self.run(recorder, pipeline, push, (self.columns, slices(gate.rows), 1))

    def _attention(self, recorder: Recorder, layer: Layer, cache: Cache, mode: int) -> None:
        config, work, index = self.config, self.work, layer.index
        queries = shared_queries(config.num_heads // layer.kv_heads, self.tuning.queries)
        blocks = config.num_heads // queries
        run, most = self._least_run(layer.kv_heads, blocks), self._most_splits(layer.kv_heads)
        pipeline = self.pipelines.get(
            f"attention{cache.suffix}",
            LANES=ATTENTION_LANES,
            FLOAT_X=self.float_x,
            MODE=mode,
            DIM=layer.head_dim,
            HEADS=config.num_heads,
            KV_HEADS=layer.kv_heads,
            QUERIES=queries,
            WINDOW=layer.window,
            SLOTS=cache.size.slots[index],
            SPLITS=split_count(layer.kv_heads),
            QK_NORM=config.qk_norm,
            VALUE_NORM=config.value_norm,
            OWNS_KEYS=layer.owns_keys,
            EPS=float(config.rms_norm_eps),
            SCALE=float(config.attention_scale),
            CAP=float(config.attn_softcap or 0.0),
            PARTS=1 if mode == ATTEND else self._qkv_parts(layer),
            RUN=run,
            MOST_SPLITS=most,
        )
        turns = cache.turns[config.is_sliding(index)]
        gains = (layer.q_gain or turns, layer.k_gain or turns)
        spans = (*cache.spans(index), turns, work.partials, work.split_stats)
        push = addresses(work.qkv, *gains, *spans, work.context, work.state)
        _, k, v, stride = layer.columns
        push += words(stride, k, v, ATTENTION_COUNTER)
        capacity = cache.size.capacity
        seen = min(layer.window or capacity, capacity)
        splits = 1 if mode == PREPARE else min(most, -(-seen // run))
        self.run(recorder, pipeline, push, (splits, blocks, self.columns))

    def _most_splits(self, kv_heads: int) -> int:
        measured = self.tuning.measured.get(ATTENTION)
        return measured.parts if measured else split_count(kv_heads)

    def _least_run(self, kv_heads: int, blocks: int) -> int:
        """Keys of a split at least: many columns are enough workgroups as they are."""
        tiles = blocks * self.columns // MANY_BLOCKS if self.wide else 1
        return ATTENTION_LANES // 8 * max(least_tiles(kv_heads), tiles)


def with_queries(stages: Stages, count: int) -> Stages:
    return replace(stages, tuning=replace(stages.tuning, queries=count))


def shared_queries(sharing: int, most: int = QUERIES) -> int:
    """Query heads that one workgroup of attention serves, of those that share a key head."""
    return max(count for count in range(1, most + 1) if sharing % count == 0)
