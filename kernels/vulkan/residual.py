"""The residual stream between products: what joins it, and the norms behind that."""

from __future__ import annotations

from uq.kernels.vulkan.beside import Mixture
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.products import Joining, Products
from uq.kernels.vulkan.push import addresses, floats
from uq.kernels.vulkan.tuning import BRANCH
from uq.kernels.vulkan.weights import TILE_COLS, Matrix

ROW_LANES = 256  # of a workgroup that holds a token
NORM_LANES = 512  # of one that makes its norm


class Residual(Products):
    """Records what stands between the products of a layer."""

    def branch(self, recorder: Recorder, matrix: Matrix, x: Span) -> None:
        """branch = matrix x, in parts."""
        outputs, stride = [(matrix, self.work.branch)], self.config.hidden_size
        parts = self.wide.parts([matrix]) if self.wide else 1
        self.products(recorder, x, outputs, stride=stride, like=BRANCH, parts=parts)
        recorder.barrier()

    def behind(
        self, before: Joining, matrix: Matrix, branch_gain: Span | None, gain: Span | None
    ) -> Joining:
        """The next joining: each leaves the residual stream where the one before did not."""
        hidden = before.joined
        other = self.work.joined if hidden == self.work.hidden else self.work.hidden
        shape = self.tuning.shape(matrix, self.columns, BRANCH)
        parts = self.wide.parts([matrix]) if self.wide else shape.parts
        return Joining(self.work.branch, hidden, other, branch_gain, gain, parts)

    def norm(
        self,
        recorder: Recorder,
        joining: Joining,
        *,
        x: Span | None = None,
        is_float: bool | None = None,
        keep: bool = False,
        halved: bool = False,
        mixture: Mixture | None = None,
    ) -> None:
        """joined = scale (hidden + norm(branch)); x = norm(joined), with `keep` also as float32.

        Args:
            x: where to; usually `work.x`.
            is_float: x is float32, whatever the model's linears take.
            halved: x is float16, in `work.half`.
            mixture: whose experts and router are given norms of their own.
        """
        before, recorder.label = recorder.label, "norm"
        work = self.work
        constants = self.norm_constants(NORM_LANES, joining)
        is_float = self.float_x if is_float is None else is_float
        constants |= {"LANES": NORM_LANES, "FLOAT_X": is_float}
        push = addresses(*joining.spans, work.normed, x or work.x, work.half, work.units)
        module, experts = "norm", joining.experts
        if mixture:
            module = "norm_before_experts"
            push += addresses(mixture.input_gain, mixture.router_gain, work.expert_x, work.plain)
        elif experts:
            module, constants["EXPERTS"] = "norm_behind_experts", experts.count
            push += addresses(experts.values, experts.shares, experts.mlp_gain, experts.gain)
        push += floats(joining.scale)
        pipeline = self.pipelines.get(module, KEEP_NORMED=keep, HALF_OUT=halved, **constants)
        self.run(recorder, pipeline, push, (self.columns, 1, 1))
        recorder.label = before

    def norm_inside(
        self,
        recorder: Recorder,
        joining: Joining,
        *,
        halved: bool = False,
        x: Span | None = None,
        is_float: bool | None = None,
    ) -> Joining | None:
        """What the products behind it have to do themselves; None: it is done.

        Args: as of `norm`.
        """
        inside = self.columns == 1 and self.tuning.makes_norm(self.config.hidden_size)
        if inside and not joining.experts:
            return joining
        self.norm(recorder, joining, x=x, is_float=is_float, halved=halved)
        recorder.barrier()
        return None

    def convert(
        self, recorder: Recorder, values: Span, x: Span, *, is_float: bool | None = None
    ) -> None:
        """x = activations of float32 hidden states; `is_float` as of `norm`."""
        is_float = self.float_x if is_float is None else is_float
        how = {"LANES": ROW_LANES, "FLOAT_X": is_float, "CHANNELS": self.config.hidden_size}
        pipeline = self.pipelines.get("quantize", **how)
        self.run(recorder, pipeline, addresses(values, x), (self.columns, 1, 1))
        recorder.barrier()

    def plain(self, recorder: Recorder, values: Span) -> Span:
        """Float32 hidden states as an input of linears of floating point: what they are, where no
        channels are missing at their end."""
        if self.config.hidden_size % TILE_COLS == 0:
            return values
        self.convert(recorder, values, self.work.plain, is_float=True)
        return self.work.plain
