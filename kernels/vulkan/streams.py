"""Stages between the layers of models with several residual streams, and of the product of low rank
beside attention.
"""

from __future__ import annotations

from dataclasses import replace

from uq.kernels.vulkan.beside import Told
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.extras import Extras
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.model import Layer
from uq.kernels.vulkan.products import Joining
from uq.kernels.vulkan.push import addresses
from uq.kernels.vulkan.residual import NORM_LANES
from uq.kernels.vulkan.updates import Laurel, Updates, Ways
from uq.kernels.vulkan.weights import TILE_COLS, tiles_of

ENTER, LEAVE, TELL_AND_ENTER, TELL, SPREAD, GATHER = range(6)  # as in shaders/altup.comp


class Streams(Extras):
    """Records what goes on between the layers of models with several streams."""

    def enter_streams(self, recorder: Recorder) -> None:
        """In front of the first layer, where there are several streams."""
        ways, updates = self.model.ways, self.model.layers[0].updates
        if ways and updates:
            self.spread(recorder, ways, updates)

    def leave_layer(self, recorder: Recorder, layer: Layer, joining: Joining) -> Joining:
        """Behind a layer whose MLP joins by `joining`, and behind the last one of all."""
        layers, ways = self.model.layers, self.model.ways
        last = layer.index + 1 == len(layers)
        following = None if last else layers[layer.index + 1].updates
        assert layer.updates and layer.told and ways
        updates = layer.updates, following
        joining = self.leave(recorder, layer.index, layer.told, updates, joining)
        if last:
            self.gather(recorder, ways, layer.updates)
        return joining

    def spread(self, recorder: Recorder, ways: Ways, updates: Updates) -> None:
        """The streams in front of the first layer, from the embedding in `hidden`."""
        recorder.label, work = "streams", self.work
        plain = self.plain(recorder, work.hidden)
        for number, matrix in enumerate(ways.into, 1):
            outputs = [(matrix, self._stream(work.streams, number))]
            self.products(recorder, plain, outputs, stride=self.config.hidden_size)
        recorder.barrier()
        self._streams(recorder, SPREAD, updates, updates.prediction)

    def add_laurel(
        self, recorder: Recorder, laurel: Laurel, joining: Joining, *, halved: bool
    ) -> None:
        """hidden, in front of attention, gets all that stands behind it but attention's output,
        whose gain holds its share; normed = norm(hidden), x the same as activations, with `halved`
        as float16.
        """
        recorder.label, work, rank = "low rank", self.work, laurel.left.rows
        self.norm(recorder, joining, keep=True, halved=halved)
        recorder.barrier()
        plain, stride = self.plain(recorder, work.normed), TILE_COLS * tiles_of(rank)
        self.products(recorder, plain, [(laurel.left, work.low_x)], stride=stride)
        recorder.barrier()
        outputs = [(laurel.right, work.laurel)]
        self.products(recorder, work.low_x, outputs, stride=self.config.hidden_size)
        recorder.barrier()
        pipeline = self.pipelines.get("laurel", **self._sizes())
        push = addresses(work.hidden, work.normed, work.laurel, laurel.gain)
        self.run(recorder, pipeline, push, (self.columns, 1, 1))
        recorder.barrier()

    def leave(
        self,
        recorder: Recorder,
        layer: int,
        told: Told,
        updates: tuple[Updates, Updates | None],
        joining: Joining,
    ) -> Joining:
        """The streams behind a layer, and in front of the next.

        Args:
            updates: of this layer and, but of the last, of the next.
            joining: of the MLP.
        """
        work, (own, following) = self.work, updates
        plain = replace(joining, gain=None)
        self.norm(recorder, plain, x=work.plain, is_float=True)
        recorder.barrier()
        recorder.label = "streams"
        self._streams(recorder, LEAVE, own, own.correction, hidden=joining.joined)
        self.tell(recorder, layer, told, None)
        recorder.label = "streams"
        parts = self.behind(plain, told.projection, told.gain, None).parts
        if following:
            how = following, following.prediction
            self._streams(recorder, TELL_AND_ENTER, *how, gain=told.gain, parts=parts)
        else:
            self._streams(recorder, TELL, own, own.prediction, gain=told.gain, parts=parts)
        return Joining(None, work.hidden, work.hidden, None, joining.gain)

    def gather(self, recorder: Recorder, ways: Ways, updates: Updates) -> None:
        """hidden = what the final norm takes."""
        recorder.label, work, hidden = "streams", self.work, self.config.hidden_size
        for number, matrix in enumerate(ways.out, 1):
            stream = self._stream(work.streams, number)
            self.convert(recorder, stream, work.plain, is_float=True)
            self.products(recorder, work.plain, [(matrix, stream)], stride=hidden)
            recorder.barrier()
        self._streams(recorder, GATHER, updates, updates.prediction)

    def _stream(self, streams: Span, number: int) -> Span:
        nbytes = 4 * self.columns * self.config.hidden_size
        return streams.part(number * nbytes, nbytes)

    def _streams(
        self,
        recorder: Recorder,
        mode: int,
        updates: Updates,
        coefficients: Span,
        *,
        hidden: Span | None = None,
        gain: Span | None = None,
        parts: int = 1,
    ) -> None:
        """
        Args:
            hidden: where the layer's output lies; usually what is made goes to `work.hidden`.
            gain: of the norm behind the branch, where one is added; it has so many `parts`.
        """
        work, altup = self.work, self.config.altup
        assert altup is not None
        streams = {"STREAMS": altup.streams, "ACTIVE": altup.active, "MODE": mode}
        pipeline = self.pipelines.get("altup", **self._sizes(), **streams, PARTS=parts)
        push = addresses(work.streams, hidden or work.hidden, work.branch, gain or updates.scale)
        push += addresses(updates.router_gain, updates.router, coefficients, updates.scale)
        push += addresses(work.plain)
        self.run(recorder, pipeline, push, (self.columns, 1, 1))
        recorder.barrier()

    def _sizes(self) -> dict[str, int | float]:
        hidden = self.config.hidden_size
        lanes, items = NORM_LANES, -(-hidden // (4 * NORM_LANES))
        eps = float(self.config.rms_norm_eps)
        return {"LANES": lanes, "ITEMS": items, "HIDDEN": hidden, "EPS": eps}
