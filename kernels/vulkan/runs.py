"""What is recorded over one KV cache, each thing once: passes of tokens, and decode steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from uq.kernels.profile import KernelTime, StepTimes
from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.mailbox import Mailbox
from uq.kernels.vulkan.model import COLUMNS, Cache
from uq.kernels.vulkan.profile import TimedRecorder
from uq.kernels.vulkan.stages import Stages

WIDTHS = (1, 4, COLUMNS)  # of passes of few tokens; each has kernels of its own
STEP = 64  # between the widths of passes of many tokens, which share their kernels


class Runs:
    """Recordings by what they do; made when first needed."""

    def __init__(
        self, gpu: Gpu, stages: Stages, cache: Cache, mailbox: Mailbox, widest: int
    ) -> None:
        """`widest`: tokens that a pass may have."""
        self._widest = widest
        self._gpu, self._stages, self.cache, self._mailbox = gpu, stages, cache, mailbox
        self._recorders: dict[object, Recorder] = {}
        self._submissions: dict[object, Submission] = {}

    def tokens(self, tokens: Sequence[int], position: int, *, head: bool) -> None:
        """Run tokens through the layers; with `head` also the logits of the last.

        The tokens' keys and values are those of `position` and the following.
        """
        width = fitting(len(tokens), self._widest)
        self._mailbox.post(position, tokens=tokens)
        parts = [("pass", width)] + [("head", 1)] * head
        self._submission(parts).run()

    def steps(self, count: int, position: int, choice: int) -> list[int]:
        """Append the likeliest token `count` times, first of all `choice`; the tokens."""
        self._mailbox.post(position, choice=choice)
        self._submission([("step", 1)] * count).run()
        return self._mailbox.generated(count)

    def profile(self, position: int) -> StepTimes:
        """Time the kernels of a decode step behind `position` tokens; its token is forgotten."""
        recorder = TimedRecorder(self._gpu)
        self._record_step(recorder, 1)
        recorder.end()
        whole = [self._mailbox.begin, recorder.commands, self._mailbox.end]
        submission = Submission(self._gpu, whole)
        for _ in range(2):  # the first time does not count
            began = time.perf_counter()
            self._mailbox.post(position)
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

    def _submission(self, parts: list[tuple[str, int]]) -> Submission:
        key = tuple(parts)
        if key not in self._submissions:
            middle = [self._recorded(*part) for part in parts]
            whole = [self._mailbox.begin, *middle, self._mailbox.end]
            self._submissions[key] = Submission(self._gpu, whole)
        return self._submissions[key]

    def _recorded(self, kind: str, number: int) -> Any:
        if (kind, number) not in self._recorders:
            recorder = self._recorders[kind, number] = Recorder(self._gpu)
            record: dict[str, Callable[[Recorder, int], None]] = {
                "pass": self._record_pass,
                "head": self._record_head,
                "step": self._record_step,
            }
            record[kind](recorder, number)
            recorder.end()
        return self._recorders[kind, number].commands

    def _record_pass(self, recorder: Recorder, width: int) -> None:
        stages = replace(self._stages, columns=width)
        stages.embed(recorder, decode=False)
        stages.layers(recorder, self.cache)

    def _record_head(self, recorder: Recorder, number: int) -> None:
        replace(self._stages, columns=1).head(recorder)

    def _record_step(self, recorder: Recorder, number: int) -> None:
        stages = replace(self._stages, columns=1)
        stages.embed(recorder, decode=True)
        stages.layers(recorder, self.cache)
        stages.head(recorder)


def fitting(count: int, widest: int) -> int:
    """The least width that holds `count` tokens, of which there are at most `widest`."""
    few = next((width for width in WIDTHS if width >= count), None)
    return few or min(-(-count // STEP) * STEP, widest)
