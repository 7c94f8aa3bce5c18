"""Where the designs of a session come from: a bundle that has them compiled, or the emulator."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from tempfile import mkdtemp
from typing import Protocol

from uq.errors import BundleError, DeviceError
from uq.formats.config import GemmaConfig
from uq.formats.xdna.txn import Transaction, parse_txn
from uq.kernels.npu.kernels.attention.design import attention
from uq.kernels.npu.kernels.attention.plan import Plan
from uq.kernels.npu.lowering import lower
from uq.kernels.npu.runtime.emulated import Emulator
from uq.kernels.npu.runtime.program import Program, read_program
from uq.kernels.npu.toolchain.carried import (
    COMPILED,
    FOLDER,
    attention_job,
    attention_name,
    attention_plans,
    read_carried,
    states,
)
from uq.kernels.npu.toolchain.job import Job


class Designs(Protocol):
    """Attention of one kind of head; the program of a form serves every length."""

    def program(self, plan: Plan) -> Program:
        """The program for the plan's variant."""
        ...

    def instructions(self, plan: Plan) -> bytes:
        """The instructions of the plan for that program."""
        ...


class EmulatedDesigns:
    """Made as they are needed."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._jobs: dict[str, Job] = {}
        self._folder = Path(mkdtemp(prefix="uq-npu-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def program(self, plan: Plan) -> Program:
        name = attention_name(plan.variant)
        self._jobs[name] = attention_job(plan, name)
        return self._emulator.program(self._jobs[name], self._folder / name)

    def instructions(self, plan: Plan) -> bytes:
        return self._emulator.learn(self._jobs[attention_name(plan.variant)], attention(plan))


class CarriedDesigns:
    """Those that `uq npu build` compiled into a bundle.

    One length is compiled. The instructions of others are made here, after those of the compiled
    length have come out as the compiler wrote them.
    """

    def __init__(self, bundle: Path, config: GemmaConfig, device: str) -> None:
        """
        Raises:
            BundleError: the bundle carries no designs, or they are broken.
            DeviceError: they are not compiled.
        """
        self._bundle, self._device = bundle, device
        self._states = states(bundle)
        self._plans = dict(attention_plans(config, device))
        self._compiled: dict[str, Transaction] = {}
        waiting = [name for name, state in self._states.items() if state != COMPILED]
        if waiting:
            raise DeviceError(
                f"{bundle}: its NPU designs are not compiled ({', '.join(waiting)}); where "
                f"mlir-aie and Peano are installed, run: uq npu build {bundle}"
            )

    def program(self, plan: Plan) -> Program:
        """
        Raises:
            BundleError: there is no such design, or another version of uq or of mlir-aie made it.
        """
        name = attention_name(plan.variant)
        again = f"run: uq npu build {self._bundle} --device {self._device}"
        expected = attention_job(self._plans[name], name)
        known = name in self._states
        if not known or read_carried(self._bundle, name).text != expected.text:
            raise BundleError(f"{self._bundle}: its {name} is not the design of this uq; {again}")
        program = read_program(self._bundle / FOLDER / name)
        compiled = parse_txn(program.instructions, f"{name}/insts.bin")
        if lower(attention(self._plans[name]), compiled) != compiled:
            why = "mlir-aie wrote other instructions than uq for the same sequence"
            raise BundleError(f"{program.xclbin.parent}: {why}; use the version that uq names")
        self._compiled[name] = compiled
        return program

    def instructions(self, plan: Plan) -> bytes:
        return lower(attention(plan), self._compiled[attention_name(plan.variant)]).to_bytes()
