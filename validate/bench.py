"""How fast a bundle runs on a device, and where the time of a decode step goes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from uq.errors import UsageError
from uq.kernels.backends import open_batch, open_session
from uq.kernels.numerics import FLOAT, Numerics
from uq.kernels.profile import StageTime, StepTimes, by_label
from uq.kernels.session import require_context
from uq.progress import Progress, SilentProgress
from uq.text import size, table
from uq.validate.bandwidth import Ceiling
from uq.validate.batch_speed import BatchRates, measure_batch
from uq.validate.integers import Answers, IntegerLoss
from uq.validate.report import Speed, Spread
from uq.validate.speed import fixed_prompt, measure_speed

if TYPE_CHECKING:
    from uq.formats.bundle import Bundle
    from uq.kernels.session import Device, Session


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; every field is an option of `uq bench`.

    Attributes:
        prompt, generate: tokens of each prefill, and of each decoding behind it.
        kernels: whether the kernels of a decode step are timed, too.
        batch: sequences that are then run together; 1: none.
        numerics: what the device keeps in integers beside the weights.
    """

    device: str = "auto"
    threads: int | None = None
    prompt: int = 512
    generate: int = 64
    repeats: int = 5
    kernels: bool = False
    batch: int = 1
    numerics: Numerics = FLOAT

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.generate


@dataclass(frozen=True)
class PromptCeiling:
    """What bounds prefill: the arithmetic of a device, measured.

    Attributes:
        kind: what its products of many tokens are made of; `rate`: operations a second of these.
        operations: of the linears for a token.
        tps: tokens per second, if nothing else took time.
    """

    kind: str
    rate: float
    operations: int
    tps: float

    @classmethod
    def of(cls, session: Session) -> PromptCeiling | None:
        if session.probe is None:
            return None
        found, operations = session.probe.arithmetic(), session.probe.operations_per_token
        return cls(found.kind, found.rate, operations, found.rate / operations)

    def sentence(self, prefill_tps: float) -> str:
        return (
            f"Prefill's is the measured arithmetic, {self.rate / 1e12:.3g} Tops/s by {self.kind}, "
            f"over {self.operations / 1e9:.3g} G operations of linears a token: {self.tps:.1f} "
            f"tokens/s; prefill reaches {prefill_tps / self.tps:.0%} of it."
        )


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        step: of one decode step behind the prompt; None when it was not asked for.
        batch: of several sequences together; None when it was not asked for.
        integer_loss: of the integers beside the weights; None when there are none.
        prompts: what bounds prefill on a GPU; None on the processor, where it is not measured.
    """

    bundle: str
    device: Device
    speed: Speed
    step: StepTimes | None = None
    batch: BatchRates | None = None
    integer_loss: IntegerLoss | None = None
    prompts: PromptCeiling | None = None

    @property
    def stages(self) -> list[StageTime]:
        return [] if self.step is None else by_label(self.step.kernels)

    @property
    def share_of_ceiling(self) -> float:
        """Decode speed over what reading the weights alone allows."""
        return self.speed.decode_tps.median / self.speed.decode_ceiling_tps

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "device": asdict(self.device),
            "speed": asdict(self.speed),
            "share_of_ceiling": self.share_of_ceiling,
            "stages": [asdict(stage) for stage in self.stages],
            "batch": None if self.batch is None else asdict(self.batch),
            "prefill_ceiling": None if self.prompts is None else asdict(self.prompts),
            "integer_loss": None if self.integer_loss is None else asdict(self.integer_loss),
        }

    def __str__(self) -> str:
        speed = self.speed
        per_token, bandwidth = size(speed.bytes_per_token), f"{speed.bandwidth_gb_s:.1f} GB/s"
        rows = [
            ("prefill", *_rates(speed.prefill_tps), f"{speed.context} tokens"),
            ("decode", *_rates(speed.decode_tps), f"{speed.generated} behind {speed.context}"),
            ("ceiling", f"{speed.decode_ceiling_tps:.1f} tokens/s", "", ""),
        ]
        if self.batch is not None:
            several = f"{self.batch.sequences} sequences together"
            rows += [
                ("batch prefill", *_rates(self.batch.prefill_tps), several),
                ("batch decode", *_rates(self.batch.decode_tps), several),
            ]
        lines = [
            f"{self.bundle} on {self.device.name} ({self.device.driver}), one sequence"
            + (", then several" if self.batch else ""),
            *([f"With {', '.join(self.device.features)}."] if self.device.features else []),
            table(rows),
            f"The ceiling is the measured read bandwidth, {bandwidth}, over {per_token} of weights "
            f"a token; decode reaches {self.share_of_ceiling:.0%} of it.",
            *map(str, self.device.attention),
        ]
        if self.prompts is not None:
            lines.append(self.prompts.sentence(speed.prefill_tps.median))
        if self.integer_loss is not None:
            lines.append(str(self.integer_loss))
        if not self.device.has_clock:
            lines.append("Rates of the emulator on this machine: they say nothing about an NPU.")
        if self.step is not None:
            stages = [
                (stage.label, f"{stage.microseconds:.1f}", f"{stage.share:.1%}", stage.dispatches)
                for stage in self.stages
            ]
            lines += ["", table(stages, head=("of a decode step", "µs", "share", "kernels"))]
        return "\n".join(lines)


def bench(
    bundle: Bundle, options: BenchOptions | None = None, progress: Progress | None = None
) -> Bench:
    """Measure a bundle on a device.

    Raises:
        DeviceError: the device is not available, or fails.
        UsageError: it has no clock for the kernels that are to be timed, or the model no context
            for so many tokens.
    """
    options, progress = options or BenchOptions(), progress or SilentProgress()
    require_context("--prompt and --generate", options.context, bundle.config)
    alone, answers = _bench_one(bundle, options, progress)
    if answers:
        # an NPU has no floating point: the CPU beside it does
        device = "cpu" if alone.device.attention else options.device
        exact = _open(bundle, replace(options, numerics=FLOAT, device=device))
        alone = replace(alone, integer_loss=answers.loss(exact))
        del exact  # its memory is the batch's
    if options.batch == 1:
        return alone
    return replace(alone, batch=_bench_batch(bundle, options, progress))


def _open(bundle: Bundle, options: BenchOptions) -> Session:
    return open_session(
        bundle,
        options.device,
        max_context=options.context,
        threads=options.threads,
        numerics=options.numerics,
    )


def _bench_one(
    bundle: Bundle, options: BenchOptions, progress: Progress
) -> tuple[Bench, Answers | None]:
    """Rates of a sequence, and where there are integers, what the model answers with them."""
    session = _open(bundle, options)
    if options.kernels and session.probe is None:
        raise UsageError(f"{session.device.name} has no clock for its kernels; use --device vulkan")
    rates = measure_speed(
        session,
        prompt=options.prompt,
        generate=options.generate,
        repeats=options.repeats,
        progress=progress,
    )
    step = _step(session, options.prompt) if options.kernels else None
    answers = Answers.of(session, bundle) if options.numerics != FLOAT else None
    speed, prompts = rates.beside(Ceiling.of(session)), PromptCeiling.of(session)
    return Bench(bundle.name, session.device, speed, step, prompts=prompts), answers


def _bench_batch(bundle: Bundle, options: BenchOptions, progress: Progress) -> BatchRates:
    session = open_batch(
        bundle,
        options.device,
        slots=options.batch,
        max_context=options.context,
        threads=options.threads,
        numerics=options.numerics,
    )
    return measure_batch(
        session,
        prompt=options.prompt,
        generate=options.generate,
        repeats=options.repeats,
        progress=progress,
    )


def _step(session: Session, prompt: int) -> StepTimes:
    assert session.probe is not None
    session.reset()
    session.prefill(fixed_prompt(prompt, session.config))
    times = session.probe.profile()
    session.reset()
    return times


def _rates(rates: Spread) -> tuple[str, str]:
    return f"{rates.median:.1f} tokens/s", f"{rates.min:.1f} to {rates.max:.1f}"
