"""Which tensor is quantized how. Recipes are data; a plan is a recipe applied to one model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from uq.errors import UsageError
from uq.formats.config import LAYERS, GemmaConfig, layer_tensor
from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import expected_tensors
from uq.formats.spec import BITS, GROUPS, Spec
from uq.quantize.candidates import candidates

Method = Literal["rtn", "gptq", "grid"]
METHODS: tuple[Method, ...] = ("rtn", "gptq")  # those that the user may ask for

LAYOUT_OF_TARGET = {
    "igpu": "igpu",
    "npu": "npu-aie2p",
    "npu-aie2p": "npu-aie2p",
    "npu-aie2": "npu-aie2",
    "cpu": "row",
}


CURVATURE_DAMPING = 1.0  # `GptqOptions.outputs`, where the curvature is measured


@dataclass(frozen=True)
class WorkSizes:
    """How much of a calibrated layer is in work at once.

    Sums are taken in another order with other sizes, so their last bits differ, hence the codes,
    which are as good: the sizes are recorded with what else fixes the bytes.

    Attributes:
        batch_tokens: calibration tokens that go through a stage together, in whole sequences.
        row_numbers: weights whose rows GPTQ quantizes at once.
        double_width: inputs of so many channels or fewer have float64 moments, wider ones float32.
    """

    batch_tokens: int = 4096
    row_numbers: int = 1 << 24
    double_width: int = 8192

    def __str__(self) -> str:
        moments = f"float64 up to {self.double_width} channels" if self.double_width else "float32"
        return (
            f"{self.batch_tokens} tokens at a time, {self.row_numbers >> 20} Mi weights at a time, "
            f"moments in {moments}"
        )


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ runs.

    Attributes:
        damping: added to the Hessian's diagonal, in units of the diagonal's mean.
        correction: strength of the correction towards the floating-point path's outputs.
        residual: strength of the correction of what the residual stream has lost so far; both at 0
            leave the floating-point path out.
        clip: a token counts at most so many times as much as the median token, and at least so
            many times less; 1 weighs all tokens alike.
        equalize: power of an input channel's root mean square that moves from the norm's gain into
            the weights behind it; 0 moves nothing.
        descents: rounds of coordinate descent on the codes.
        refit: the scales are fitted once more whenever the codes have changed.
        outputs: added to the diagonal of the curvature of the outputs, in units of its mean; None
            leaves it out, and rows are rounded each for itself.
        work: how much of it is done at once.
    """

    damping: float = 0.2
    correction: float = 0.5
    residual: float = 0.5
    clip: float = 10.0
    equalize: float = 0.25
    descents: int = 2
    refit: bool = True
    outputs: float | None = None
    work: WorkSizes = WorkSizes()

    @property
    def follows_exact(self) -> bool:
        """Calibration follows the floating-point path, too."""
        return self.correction > 0 or self.residual > 0


@dataclass(frozen=True)
class Recipe:
    """How the tensors of any model are quantized.

    Attributes:
        linear: spec of the linears of every layer, or what they may take together.
        method: method of the linears when the user leaves the choice to the recipe.
        mixed: every linear gets a grid of its own, by what it costs the model; together they take
            no more bytes than on `linear`.
        table: spec of the embedding and of an untied head; always rounded to nearest, because a
            token seen in no calibration text has no statistics.
    """

    summary: str
    linear: Spec
    method: Method
    mixed: bool = False
    table: Spec = Spec(8, 64)
    gptq: GptqOptions = GptqOptions(outputs=CURVATURE_DAMPING)


# What INT8 has to give is all spent at group 32, so it is not mixed, and rounded row by row.
RECIPES: Mapping[str, Recipe] = {
    "int4": Recipe("4.5 bits per linear weight, mixed", Spec(4, 32), "gptq", mixed=True),
    "int4-small": Recipe("4.25 bits per linear weight, mixed", Spec(4, 64), "gptq", mixed=True),
    "int5": Recipe("5.5 bits per linear weight, mixed", Spec(5, 32), "gptq", mixed=True),
    "int6": Recipe("6.5 bits per linear weight, mixed", Spec(6, 32), "gptq", mixed=True),
    "int8": Recipe(
        "INT8 everywhere, group 32", Spec(8, 32), "gptq", table=Spec(8, 32), gptq=GptqOptions()
    ),
}
RECIPE_OF_BITS = {4: "int4", 5: "int5", 6: "int6", 8: "int8"}


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is quantized and stored."""

    spec: Spec
    method: Method
    layout: str


@dataclass(frozen=True)
class Budget:
    """Bytes on the disk that some tensors may take together, padding of the layout included.

    Attributes:
        tables: the embedding and an untied head are among them; the linears always are.
    """

    nbytes: int
    tables: bool


@dataclass(frozen=True)
class Plan:
    """Canonical tensor name -> treatment, for every quantized tensor of one model.

    Attributes:
        budget: the specs of its tensors are still to be chosen; None when they are final.
        weighted: rtn searches its scales for the inputs of a calibration text.
        sensitive: what plain 4 bits in a tensor alone would cost, in nats per token, of the few
            where that does harm; where it was measured.
    """

    recipe: str
    tensors: Mapping[str, TensorPlan]
    gptq: GptqOptions
    budget: Budget | None = None
    weighted: bool = False
    sensitive: Mapping[str, float] = field(default_factory=dict)

    def with_grids(self, found: Mapping[str, TensorPlan]) -> Plan:
        """The plan with other treatments of some tensors; uncalibrated if no linear needs it.

        Nothing is left to choose then, either, but the tables keep the grid that they have.
        """
        tensors = {**self.tensors, **found}
        linears = (plan for name, plan in tensors.items() if LAYERS in name)
        needed = any(plan.method != "grid" for plan in linears)
        if needed:
            return replace(self, tensors=tensors)
        return replace(self, tensors=tensors, weighted=False, budget=None)

    @property
    def uses_gptq(self) -> bool:
        return any(tensor.method == "gptq" for tensor in self.tensors.values())

    @property
    def bends(self) -> bool:
        """The curvature of the outputs is measured."""
        return self.uses_gptq and self.gptq.outputs is not None

    @property
    def calibrated(self) -> bool:
        return self.uses_gptq or self.weighted

    @property
    def corrected(self) -> bool:
        """Calibration follows the floating-point path, too."""
        return self.uses_gptq and self.gptq.follows_exact


def choose_recipe(name: str | None, bits: int | None) -> str:
    """Name of the recipe that `--recipe` or `--bits` asks for; `int4` when neither does.

    Raises:
        UsageError: an unknown name or number of bits, or both at once.
    """
    if name is not None and bits is not None:
        raise UsageError("--recipe and --bits exclude each other; give one of them")
    if bits is not None:
        if bits not in RECIPE_OF_BITS:
            raise UsageError(f"--bits {bits} is not offered; use {_either(BITS)}")
        return RECIPE_OF_BITS[bits]
    name = "int4" if name is None else name
    if name not in RECIPES:
        raise UsageError(f"recipe {name!r} is not known; use {_either(RECIPES)}")
    return name


def make_plan(
    config: GemmaConfig,
    recipe: str = "int4",
    *,
    group: int | None = None,
    bpw: float | None = None,
    method: str = "auto",
    targets: Sequence[str] = ("igpu",),
) -> Plan:
    """The recipe applied to a model.

    Args:
        group: every linear gets the recipe's bits with this group, none is mixed. The embedding
            keeps the recipe's, unless that does not divide its columns.
        bpw: bits per weight of the whole model, norms included, spent where they matter.
        method: `rtn`, `gptq`, or `auto` for the recipe's own.
        targets: devices that will run the bundle; the first one's layout is written, the others
            rearrange it when they load.

    Raises:
        UsageError: an unknown group, method or target, a group that does not divide the columns of
            a tensor, or a number of bits that needs a method with calibration.
    """
    if recipe not in RECIPES:
        raise UsageError(f"recipe {recipe!r} is not known; use {_either(RECIPES)}")
    tables = config.table_shapes()
    rules = _with_group(RECIPES[recipe], group, math.gcd(*(cols for _, cols in tables.values())))
    chosen = rules.method if method == "auto" else _checked_method(method)
    layout = _layout(targets)

    tensors = {name: TensorPlan(rules.table, "rtn", layout) for name in tables}
    columns = {name: cols for name, (_, cols) in tables.items()}
    for layer in range(config.num_layers):
        for role, (_, cols) in config.linear_shapes(layer).items():
            name = layer_tensor(layer, role)
            tensors[name] = TensorPlan(rules.linear, chosen, layout)
            columns[name] = cols
    for name, tensor in tensors.items():
        _check_group(name, columns[name], tensor.spec.group)
    plan = Plan(recipe, tensors, rules.gptq)
    if bpw is not None and group is not None:
        raise UsageError("--bpw chooses the groups, too; leave --group out")
    if bpw is not None:
        return _within(config, plan, bpw)
    if rules.mixed and group is None and chosen == "gptq":
        return replace(
            plan, budget=Budget(_linear_bytes(config, rules.linear, layout), tables=False)
        )
    return plan


def _within(config: GemmaConfig, plan: Plan, bpw: float) -> Plan:
    if not plan.uses_gptq:
        raise UsageError("--bpw measures on calibration text; it does not go with --method rtn")
    if not math.isfinite(bpw):
        raise UsageError(f"--bpw {bpw:g}: expected a number")
    shapes, arrays = expected_tensors(config)
    floats, weights = 4 * sum(map(math.prod, arrays.values())), config.num_parameters()
    nbytes = int(bpw * weights / 8) - floats
    least = sum(_least_bytes(*shapes[name], tensor.layout) for name, tensor in plan.tensors.items())
    most = sum(_most_bytes(*shapes[name], tensor.layout) for name, tensor in plan.tensors.items())
    if nbytes < least:
        needed = math.ceil(800 * (least + floats) / weights) / 100
        raise UsageError(f"--bpw {bpw:g}: the smallest grids take {needed:g}; use that or more")
    if nbytes > most:
        needed = math.ceil(800 * (most + floats) / weights) / 100
        raise UsageError(f"--bpw {bpw:g}: the largest grids take {needed:g}; use that or less")
    return replace(plan, recipe=f"bpw{bpw:g}", budget=Budget(nbytes, tables=True))


def _least_bytes(rows: int, cols: int, layout: str) -> int:
    """Of a tensor on the smallest grid that fits it."""
    groups = (group for group in GROUPS if cols % group == 0)
    return min(LAYOUTS[layout].nbytes(rows, cols, Spec(4, g, scale_bits=8)) for g in groups)


def _most_bytes(rows: int, cols: int, layout: str) -> int:
    """Of a tensor on the largest grid that fits it."""
    return max(LAYOUTS[layout].nbytes(rows, cols, spec) for spec in candidates(cols))


def _linear_bytes(config: GemmaConfig, spec: Spec, layout: str) -> int:
    return sum(
        LAYOUTS[layout].nbytes(rows, cols, spec)
        for layer in range(config.num_layers)
        for rows, cols in config.linear_shapes(layer).values()
    )


def _with_group(rules: Recipe, group: int | None, columns: int) -> Recipe:
    """`columns`: of the tables, what divides them all."""
    if group is None:
        return rules
    if group not in GROUPS:
        raise UsageError(f"--group {group} is not offered; use {_either(GROUPS)}")
    table = rules.table if columns % rules.table.group == 0 else replace(rules.table, group=group)
    return replace(
        rules,
        linear=replace(rules.linear, group=group),
        table=table,
    )


def _check_group(name: str, columns: int, group: int) -> None:
    if columns % group == 0:
        return
    fitting = [g for g in GROUPS if columns % g == 0]
    remedy = f"use --group {_either(fitting)}" if fitting else "no offered group divides them"
    raise UsageError(f"{name}: {columns} columns do not divide by group {group}; {remedy}")


def _checked_method(method: str) -> Method:
    for known in METHODS:
        if method == known:
            return known
    raise UsageError(f"method {method!r} is not known; use {_either(('auto', *METHODS))}")


def _layout(targets: Sequence[str]) -> str:
    if not targets:
        raise UsageError(f"no target; use {_either(LAYOUT_OF_TARGET)}")
    for name in targets:
        if name not in LAYOUT_OF_TARGET:
            raise UsageError(f"target {name!r} is not known; use {_either(LAYOUT_OF_TARGET)}")
    return LAYOUT_OF_TARGET[targets[0]]


def _either(choices: Iterable[object]) -> str:
    """`a, b or c`."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
