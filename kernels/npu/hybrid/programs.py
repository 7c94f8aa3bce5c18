"""The programs of a session: opened when they are first needed, and again after a timeout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from uq.kernels.npu.hybrid.designs import Designs
from uq.kernels.npu.kernels.attention.plan import Plan
from uq.kernels.npu.kernels.attention.variant import Form
from uq.kernels.npu.runtime.npu import Npu, Opened, Running


class Programs:
    """One program for each form of attention, and instructions for each plan."""

    def __init__(self, npu: Npu, designs: Designs) -> None:
        self._npu, self._designs = npu, designs
        self._opened: dict[Form, Opened] = {}
        self._instructions: dict[tuple[Form, int, int, int | None], bytes] = {}

    def start(self, plan: Plan, arrays: Sequence[NDArray[Any]]) -> Running:
        """Start a plan; the last array is filled when it is awaited.

        Raises:
            DeviceError: its program cannot be opened, or the run not be started.
            BundleError: the bundle does not have its design.
        """
        form = plan.variant.form
        if form not in self._opened or self._opened[form].closed:
            self._opened[form] = self._npu.open(self._designs.program(plan))
        key = form, plan.start, plan.length, plan.window
        if key not in self._instructions:
            self._instructions[key] = self._designs.instructions(plan)
        code = self._instructions[key]
        return self._opened[form].start(arrays, results=1, instructions=code)
