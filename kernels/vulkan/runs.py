"""What is recorded over a KV cache, each thing once: passes of tokens, and steps of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from uq.kernels.profile import KernelTime, StepTimes
from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.mailbox import Mailbox, Run, Writer
from uq.kernels.vulkan.model import COLUMNS
from uq.kernels.vulkan.persistent import Persistent
from uq.kernels.vulkan.profile import TimedRecorder
from uq.kernels.vulkan.stages import Stages

WIDTHS = (1, 4, COLUMNS, 32)  # of passes of few tokens; each has kernels of its own
STEP = 64  # between the widths of passes of many tokens, which share their kernels


@dataclass(frozen=True)
class Part:
    """One command buffer: what it does, for how many columns."""

    kind: str
    columns: int = 1


class Runs:
    """Recordings by what they do; made when first needed.

    Attributes:
        seconds: that the last submit took, without the making of its kernels.
    """

    seconds = 0.0

    def __init__(
        self,
        gpu: Gpu,
        stages: Stages,
        cache: Cache,
        mailbox: Mailbox,
        widest: int,
        persistent: Persistent | None = None,
    ) -> None:
        """
        Args:
            widest: tokens that a pass may have.
            persistent: records the layers of a step of one token as one dispatch.
        """
        self._widest, self._persistent = widest, persistent
        self._gpu, self._stages, self.cache, self._mailbox = gpu, stages, cache, mailbox
        self._tile = replace(stages, columns=widest).tile
        self._recorders: dict[Part, Recorder] = {}
        self._submissions: dict[tuple[Part, ...], Submission] = {}

    def tokens(self, runs: Sequence[Run], *, head: bool = False) -> None:
        """Run tokens of different sequences through the layers.

        Args:
            head: also compute the logits of the last one, and the likeliest token behind it.
        """
        count = sum(len(run.tokens) for run in runs)
        kind = "pass of each" if count == len(runs) > 1 else "pass"
        self._mailbox.post_runs(runs, self._tile)
        self._run([Part(kind, fitting(count, self._widest))] + [Part("head")] * head)

    def choices(self, run: Run) -> list[int]:
        """Run tokens of one sequence, up to `COLUMNS`; the likeliest token behind each."""
        width = fitting(len(run.tokens), COLUMNS)
        self._mailbox.post_runs([run], self._tile)
        self._run([Part("pass", width), Part("choices", width)])
        return self._mailbox.choices(len(run.tokens))

    def draw(self, writer: Writer) -> int:
        """Choose the token that follows, from the logits that the last pass or step has left."""
        self._mailbox.post_writers([writer], 1, (), frozen=True)
        self._run([Part("draw")])
        return self._mailbox.choices(1)[0]

    def choose_rows(self, writers: Sequence[Writer]) -> list[int]:
        """Choose the token that follows each writer's, from rows of `normed`."""
        self._mailbox.post_writers(writers, 1, (), frozen=True)
        self._run([Part("rows", fitting(len(writers), self._widest))])
        return self._mailbox.choices(len(writers))

    def steps(
        self, count: int, writers: Sequence[Writer], stops: Sequence[int]
    ) -> tuple[list[list[int]], list[int]]:
        """Continue sequences by up to `count` tokens, each until it has one of `stops`.

        Returns:
            For each sequence the tokens that were appended, its writer's token first, and the one
            that follows them.
        """
        greedy = len(writers) == 1 and writers[0].sampling.temperature == 0
        width = len(writers) if len(writers) <= COLUMNS else fitting(len(writers), self._widest)
        part = Part("greedy step") if greedy else Part("step", width)
        self._mailbox.post_writers(writers, count, stops)
        self._run([part] * count)
        return self._mailbox.generated(len(writers)), self._mailbox.choices(len(writers))

    def profile(self, writer: Writer) -> StepTimes:
        """Time the kernels of a decode step; its token is forgotten."""
        recorder = TimedRecorder(self._gpu)
        self._record_greedy_step(recorder, 1)
        recorder.end()
        whole = [self._mailbox.begin, recorder.commands, self._mailbox.end]
        submission = Submission(self._gpu, whole)
        for _ in range(2):  # the first time does not count
            began = time.perf_counter()
            self._mailbox.post_writers([writer], 1, ())
            submission.start()
            submitted = time.perf_counter()
            submission.finish()
            ended = time.perf_counter()
        submit, wait = 1e6 * (submitted - began), 1e6 * (ended - submitted)
        host = [KernelTime("submit", 0, submit), KernelTime("wait", submit, wait)]
        times = StepTimes(recorder.times(), host)
        submission.close()
        recorder.close()
        return times

    def close(self) -> None:
        for submission in self._submissions.values():
            submission.close()
        for recorder in self._recorders.values():
            recorder.close()
        self._submissions.clear()
        self._recorders.clear()

    def _run(self, parts: Sequence[Part]) -> None:
        key = tuple(parts)
        if key not in self._submissions:
            middle = [self._recorded(part) for part in parts]
            whole = [self._mailbox.begin, *middle, self._mailbox.end]
            self._submissions[key] = Submission(self._gpu, whole)
        began = time.perf_counter()
        self._submissions[key].run()
        self.seconds = time.perf_counter() - began
        if self._persistent and self._mailbox.failed:  # the driver runs fewer workgroups at a time
            self._persistent = None
            self.close()
            self._run(parts)

    def _recorded(self, part: Part) -> Any:
        if part not in self._recorders:
            recorder = self._recorders[part] = Recorder(self._gpu)
            record: dict[str, Callable[[Recorder, int], None]] = {
                "pass": self._record_pass,
                "pass of each": self._record_pass_of_each,
                "head": self._record_head,
                "choices": self._record_choices,
                "draw": self._record_draw,
                "rows": self._record_rows,
                "greedy step": self._record_greedy_step,
                "step": self._record_step,
            }
            record[part.kind](recorder, part.columns)
            recorder.end()
        return self._recorders[part].commands

    def _step_layers(self, recorder: Recorder, stages: Stages) -> None:
        if self._persistent and stages.columns == 1:
            self._persistent.record(recorder)
        else:
            stages.layers(recorder, self.cache)

    def _record_pass(self, recorder: Recorder, columns: int) -> None:
        stages = replace(self._stages, columns=columns)
        stages.embed(recorder, decode=False)
        stages.layers(recorder, self.cache)

    def _record_pass_of_each(self, recorder: Recorder, columns: int) -> None:
        """A token of each sequence."""
        stages = replace(self._stages, columns=columns, alone=True)
        stages.embed(recorder, decode=False)
        stages.layers(recorder, self.cache)

    def _record_head(self, recorder: Recorder, columns: int) -> None:
        replace(self._stages, columns=columns).head(recorder)

    def _record_choices(self, recorder: Recorder, columns: int) -> None:
        stages = replace(self._stages, columns=columns)
        stages.heads(recorder)
        stages.choose(recorder, advances=False)

    def _record_draw(self, recorder: Recorder, columns: int) -> None:
        replace(self._stages, columns=columns).choose(recorder, advances=False)

    def _record_rows(self, recorder: Recorder, columns: int) -> None:
        stages = replace(self._stages, columns=columns)
        stages.convert(recorder, stages.work.normed, stages.work.x)
        stages.heads(recorder)
        stages.choose(recorder, advances=False)

    def _record_greedy_step(self, recorder: Recorder, columns: int) -> None:
        """The head finds the likeliest token by itself."""
        stages = replace(self._stages, columns=columns)
        stages.embed(recorder, decode=True)
        self._step_layers(recorder, stages)
        stages.head(recorder)

    def _record_step(self, recorder: Recorder, columns: int) -> None:
        stages = replace(self._stages, columns=columns, alone=True)
        stages.embed(recorder, decode=True)
        self._step_layers(recorder, stages)
        stages.heads(recorder)
        stages.choose(recorder, advances=True)


def fitting(count: int, widest: int) -> int:
    """The least width that holds `count` tokens, of which there are at most `widest`."""
    few = next((width for width in WIDTHS if width >= count), None)
    return min(few or -(-count // STEP) * STEP, widest)
