"""Which tensor is quantized how. Recipes are data; a plan is a recipe applied to one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from uq.errors import UsageError
from uq.formats.config import EMBEDDING, HEAD, GemmaConfig, layer_tensor
from uq.formats.spec import BITS, GROUPS, Spec

Method = Literal["rtn", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq")

LAYOUT_OF_TARGET = {
    "igpu": "igpu",
    "npu": "npu-aie2p",
    "npu-aie2p": "npu-aie2p",
    "npu-aie2": "npu-aie2",
    "cpu": "row",
}


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
    """

    damping: float = 0.05
    correction: float = 0.5
    residual: float = 0.5
    clip: float = 10.0
    equalize: float = 0.25
    descents: int = 2
    refit: bool = True

    @property
    def follows_exact(self) -> bool:
        """Calibration follows the floating-point path, too."""
        return self.correction > 0 or self.residual > 0


@dataclass(frozen=True)
class Recipe:
    """How the tensors of any model are quantized.

    Attributes:
        linear: spec of the linears of every layer.
        method: method of the linears when the user leaves the choice to the recipe.
        table: spec of the embedding and of an untied head; always rounded to nearest, because a
            token seen in no calibration text has no statistics.
        roles: role within a layer -> spec, where it differs from `linear`.
    """

    summary: str
    linear: Spec
    method: Method
    table: Spec = Spec(8, 64)
    roles: Mapping[str, Spec] = field(default_factory=dict)
    gptq: GptqOptions = GptqOptions()


# Group 32 costs 4.5 bits a weight, 64 costs 4.25, 128 costs 4.125. On text unlike the calibration's
# group 32 loses a quarter less than group 64. Values and keys come first where a bit more is to be
# spent: with one KV head they are 6 % of the linears' parameters.
RECIPES: Mapping[str, Recipe] = {
    "int4": Recipe("INT4 linears, group 32", Spec(4, 32), "gptq"),
    "int5": Recipe("INT5 linears, group 32", Spec(5, 32), "gptq"),
    "int6": Recipe("INT6 linears, group 32", Spec(6, 32), "gptq"),
    "int4-small": Recipe("INT4 linears, group 128", Spec(4, 128), "gptq"),
    "int4-kv8": Recipe(
        "INT4 linears, group 32, with INT8 keys and values",
        Spec(4, 32),
        "gptq",
        roles={"self_attn.k_proj": Spec(8, 32), "self_attn.v_proj": Spec(8, 32)},
    ),
    "int8": Recipe("INT8 everywhere, group 64", Spec(8, 64), "rtn"),
}
RECIPE_OF_BITS = {4: "int4", 5: "int5", 6: "int6", 8: "int8"}


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is quantized and stored."""

    spec: Spec
    method: Method
    layout: str


@dataclass(frozen=True)
class Plan:
    """Canonical tensor name -> treatment, for every quantized tensor of one model."""

    recipe: str
    tensors: Mapping[str, TensorPlan]
    gptq: GptqOptions
    weighted: bool = False  # rtn searches its scales for the inputs of a calibration text

    @property
    def uses_gptq(self) -> bool:
        return any(tensor.method == "gptq" for tensor in self.tensors.values())

    @property
    def calibrated(self) -> bool:
        return self.uses_gptq or self.weighted

    @property
    def corrected(self) -> bool:
        """Calibration follows the floating-point path, too."""
        return self.uses_gptq and self.gptq.follows_exact

    @property
    def clip(self) -> float:
        """Bound of the tokens' weights."""
        return self.gptq.clip if self.uses_gptq else 1.0


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
    method: str = "auto",
    targets: Sequence[str] = ("igpu",),
) -> Plan:
    """The recipe applied to a model.

    Args:
        group: replaces the recipe's group of every linear. The embedding keeps the recipe's, unless
            that does not divide the hidden size.
        method: `rtn`, `gptq`, or `auto` for the recipe's own.
        targets: devices that will run the bundle; the first one's layout is written, the others
            rearrange it when they load.

    Raises:
        UsageError: an unknown group, method or target, or a group that does not divide the columns
            of a tensor.
    """
    rules = _with_group(RECIPES[recipe], group, config.hidden_size)
    chosen = rules.method if method == "auto" else _checked_method(method)
    layout = _layout(targets)

    tensors = {EMBEDDING: TensorPlan(rules.table, "rtn", layout)}
    columns = {EMBEDDING: config.hidden_size}
    if not config.tied_head:
        tensors[HEAD] = TensorPlan(rules.table, "rtn", layout)
        columns[HEAD] = config.hidden_size
    for layer in range(config.num_layers):
        for role, (_, cols) in config.linear_shapes().items():
            name = layer_tensor(layer, role)
            spec = rules.roles.get(role, rules.linear)
            tensors[name] = TensorPlan(spec, chosen, layout)
            columns[name] = cols
    for name, tensor in tensors.items():
        _check_group(name, columns[name], tensor.spec.group)
    return Plan(recipe, tensors, rules.gptq)


def _with_group(rules: Recipe, group: int | None, hidden: int) -> Recipe:
    if group is None:
        return rules
    if group not in GROUPS:
        raise UsageError(f"--group {group} is not offered; use {_either(GROUPS)}")
    table = rules.table if hidden % rules.table.group == 0 else replace(rules.table, group=group)
    return replace(
        rules,
        linear=replace(rules.linear, group=group),
        table=table,
        roles={role: replace(spec, group=group) for role, spec in rules.roles.items()},
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
    for name in targets:
        if name not in LAYOUT_OF_TARGET:
            raise UsageError(f"target {name!r} is not known; use {_either(LAYOUT_OF_TARGET)}")
    return LAYOUT_OF_TARGET[targets[0]]


def _either(choices: Iterable[object]) -> str:
    """`a, b or c`."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
