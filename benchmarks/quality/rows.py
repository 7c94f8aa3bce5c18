"""The rows of the table, as data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from uq.cli import Parser
from uq.commands import quantize as command
from uq.errors import UsageError
from uq.formats.config import GemmaConfig
from uq.kernels.numerics import ACTIVATIONS, FLOAT, KV, Numerics
from uq.quantize.job import plan_of
from uq.quantize.plan import RECIPES

UQ, LLAMA, AUTO_ROUND, HQQ, GPTQ = "uq", "llama.cpp", "AutoRound", "HQQ", "GPTQModel"
AUTO_ROUND_ITERATIONS = 200  # its default; hours on two cores


@dataclass(frozen=True)
class Row:
    """One way of quantizing.

    Attributes:
        peer: which quantizer of `peers` makes it.
        arguments: for that quantizer.
        calibrated: it is repeated for every calibration draw.
        numerics: what is not float32 when its model runs.
        model: the row in front whose model this one runs; its own where empty.
        shared: the next row runs the same model.
        engine: llama.cpp itself runs the model, not uq's reference.
    """

    name: str
    peer: str
    arguments: tuple[str, ...]
    calibrated: bool = False
    numerics: Numerics = FLOAT
    model: str = ""
    shared: bool = False
    engine: bool = False

    @property
    def made_for(self) -> str:
        """The row that its model is made for."""
        return self.model or self.name


def llama_row(grid: str, calibrated: bool) -> Row:
    name = f"llama.cpp {grid}" + (" + imatrix" if calibrated else "")
    return Row(name, LLAMA, (grid,), calibrated)


def engine_row(grid: str) -> Row:
    name = f"llama.cpp {grid}"
    return Row(f"{name}, run by llama.cpp", LLAMA, (grid,), model=name, engine=True)


LLAMA_ROWS = (
    *(llama_row(grid, matrix) for grid in ("Q4_0", "IQ4_NL", "Q4_1") for matrix in (False, True)),
    *(llama_row("Q4_K_M", matrix) for matrix in (False, True)),
    *(llama_row(grid, False) for grid in ("Q5_0", "Q6_K")),
    replace(llama_row("Q8_0", False), shared=True),
    engine_row("Q8_0"),
    engine_row("F16"),
)


PACKAGE_ROWS = (
    *(
        Row(
            f"AutoRound g{group}",
            AUTO_ROUND,
            (str(group), str(AUTO_ROUND_ITERATIONS)),
            calibrated=True,
        )
        for group in (32, 64, 128)
    ),
    *(Row(f"HQQ g{group}", HQQ, (str(group),)) for group in (32, 64, 128)),
    *(
        Row(f"GPTQ (GPTQModel) g{group}", GPTQ, (str(group),), calibrated=True)
        for group in (32, 64, 128)
    ),
)


# A recipe's model once more, as a device runs it that computes or stores in integers.
INTEGERS = (
    ("int4", "INT8 activations", Numerics(ACTIVATIONS["int8"])),
    ("int4", "INT8 KV", Numerics(kv=KV["int8"])),
    ("int4", "INT4 KV", Numerics(kv=KV["int4"])),
    ("int4", "INT8 activations and KV", Numerics(ACTIVATIONS["int8"], KV["int8"])),
    ("int8", "INT8 activations", Numerics(ACTIVATIONS["int8"])),
)


# Of all tensors of the 270M; its files then take 241 MB, as llama.cpp's Q4_0, and 200.
BUDGETS = ("6.9", "5.65")


def uq_rows(config: GemmaConfig) -> tuple[Row, ...]:
    """Rounding to nearest, every recipe that uq has now, and budgets for all tensors."""
    arguments: dict[str, tuple[str, ...]] = {"uq rtn": ("--method", "rtn")}
    arguments |= {f"uq {name}": ("--recipe", name) for name in RECIPES}
    arguments["uq int4 --no-curvature"] = ("--recipe", "int4", "--no-curvature")
    arguments |= {f"uq --bpw {bits}": ("--bpw", bits) for bits in BUDGETS}
    rows = [uq_row(name, words, config) for name, words in arguments.items()]
    return tuple(found for row in rows for found in with_integers(row))


def with_integers(row: Row) -> list[Row]:
    """The row, and those that run its model in other numerics."""
    others = [
        replace(row, name=f"{row.name}, {words}", numerics=numerics, model=row.name)
        for recipe, words, numerics in INTEGERS
        if row.name == f"uq {recipe}"
    ]
    *front, last = (row, *others)
    return [*(replace(found, shared=True) for found in front), last]


def uq_row(name: str, arguments: Sequence[str], config: GemmaConfig) -> Row:
    """A row from arguments of `uq quantize`.

    Raises:
        UsageError: uq refuses the arguments, or they do not fit the model.
    """
    parser = Parser(prog=f"row {name!r}", allow_abbrev=False)
    command.configure(parser)
    options = command.read_options(parser.parse_args(["MODEL", *arguments]))
    return Row(name, UQ, tuple(arguments), plan_of(config, options).calibrated)


def extra_row(text: str, config: GemmaConfig) -> Row:
    """`NAME=ARGUMENTS of uq quantize`.

    Raises:
        UsageError: there is no name, or uq refuses the arguments.
    """
    name, equals, arguments = text.partition("=")
    if not name or not equals:
        raise UsageError(f"--row {text!r}: expected NAME=ARGUMENTS, such as 'g64=--group 64'")
    return uq_row(name, shlex.split(arguments), config)


def all_rows(config: GemmaConfig, extra: Sequence[str]) -> tuple[Row, ...]:
    """Every row, the user's last.

    Raises:
        UsageError: two rows have one name, or one of the user's is refused.
    """
    own = (extra_row(text, config) for text in extra)
    rows = (*uq_rows(config), *LLAMA_ROWS, *PACKAGE_ROWS, *own)
    names = [row.name for row in rows]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--row: there is already a row {twice!r}; give it another name")
    return rows
