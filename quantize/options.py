"""What the user of the quantizer may choose."""

from __future__ import annotations

from dataclasses import dataclass

from uq.errors import UsageError
from uq.formats.chat import Render

RESUMES = ("auto", "restart", "require")
IN_ORDER, INDEPENDENTLY = CALIBRATE_LAYERS = ("in-order", "independently")


@dataclass(frozen=True)
class QuantizeOptions:
    """What the user may choose.

    Attributes:
        recipe: name in `RECIPES`.
        group, bpw, method, targets: as in `make_plan`.
        calibration: as in `read_text`; None for the default text. `rtn` is data-free without one
            and searches its scales for the text's activations with one.
        calibration_tokens: about so many, in sequences of `calibration_length`.
        calibration_seed: as in `token_sequences`; None spreads the sequences evenly over the text.
        calibrate_layers: `in-order`, each on what the quantized layers before it make of the text,
            or `independently`, each on what the floating-point layers make of it.
        curvature: the rows of a linear are rounded together, by the gradients of the model's loss
            at its outputs; None for what the recipe does, as far as the run can.
        max_memory: bytes that the run may take; None for what is free. A calibration that must
            take smaller steps to fit (`WorkSizes`) gives other codes, as good ones.
        threads: one per core when None.
        resume: `auto`, `restart` or `require`, as in `BundleWriter`.
        towers: what becomes of vision and audio towers: `keep`, `int8` or `drop`.
        render: the model's chat template, for a model that was trained on chats.
    """

    recipe: str = "int4"
    group: int | None = None
    bpw: float | None = None
    method: str = "auto"
    targets: tuple[str, ...] = ("igpu",)
    calibration: str | None = None
    calibration_tokens: int = 45056
    calibration_length: int = 512
    calibration_seed: int | None = None
    calibrate_layers: str = IN_ORDER
    curvature: bool | None = None
    max_memory: int | None = None
    threads: int | None = None
    resume: str = "auto"
    towers: str = "keep"
    render: Render | None = None

    def __post_init__(self) -> None:
        """Raises UsageError: a value that the work cannot be done with."""
        if self.calibration_tokens < 1 or self.calibration_length < 2:
            raise UsageError(
                f"{self.calibration_tokens} calibration tokens in sequences of "
                f"{self.calibration_length}; use 1 or more, in sequences of 2 or more"
            )
        for name, least in (("threads", 1), ("calibration_seed", 0), ("max_memory", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} {value}; use {least} or more")
        if self.resume not in RESUMES:
            raise UsageError(f"resume {self.resume!r} is not known; use {', '.join(RESUMES)}")

    @property
    def independent(self) -> bool:
        return self.calibrate_layers == INDEPENDENTLY

    @property
    def calibration_format(self) -> str:
        """How the text is put to the model: `chat` by its template, or `plain`."""
        return "plain" if self.render is None else "chat"


DEFAULTS = QuantizeOptions()
