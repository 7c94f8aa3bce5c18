"""Every SPIR-V module that uq ships: which GLSL file, compiled with which macros, needing what.

Types and switches are macros (a module each); sizes are specialization constants, fixed when a
pipeline is created. A module's name is the name of its row here and of its `.spv`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from uq.formats.spec import SPECS

# What a device must be able to do, by the SPIR-V capabilities that stand for it. Numbers: SPIR-V
# specification, section 3.2.31.
FEATURES: Mapping[str, frozenset[int]] = MappingProxyType(
    {
        "fp16": frozenset({9, 4433, 4434}),  # Float16, 16-bit storage
        "int8": frozenset({39, 4448, 4449}),  # Int8, 8-bit storage
        "int16": frozenset({22}),
        "int64": frozenset({11}),
        "subgroup": frozenset({61, 62, 63, 64, 65, 66}),  # basic, vote, arithmetic, shuffles
        "int8dot": frozenset({6018, 6019}),  # dot product of four packed 8-bit integers
        "coopmat": frozenset({6022}),  # KHR cooperative matrix
        "bfloat16": frozenset({5116, 5118}),
    }
)
# Shader, the Vulkan memory model and buffer device addresses: every device that uq runs on.
BASE_CAPABILITIES = frozenset({1, 5345, 5346, 5347})


@dataclass(frozen=True)
class Variant:
    """One module.

    Attributes:
        name: of the module; letters, digits and `_`.
        source: file in `shaders/`.
        macros: `#define`s put behind the source's `#version` line.
        features: keys of `FEATURES`, all that the module needs and nothing else.
        spec_constants: names of the specialization constants; the position is the `constant_id`.
        target: `vulkan1.2` (SPIR-V 1.5), or `vulkan1.3` (1.6) for a workgroup whose size is a
            specialization constant: `LocalSizeId` is not allowed before.
        subgroup: invocations of a subgroup, where the device lets one choose so many.
    """

    name: str
    source: str
    macros: Mapping[str, str | int] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    spec_constants: tuple[str, ...] = ()
    target: str = "vulkan1.2"
    subgroup: int | None = None


def _table(*rows: Variant) -> Mapping[str, Variant]:
    table = {row.name: row for row in rows}
    if len(table) != len(rows):
        raise ValueError("two variants of one name")
    for row in rows:
        names = [name for name in row.spec_constants if name != "-"]
        if len(names) != len(set(names)):
            raise ValueError(f"{row.name}: two constants of one name")
    return MappingProxyType(table)


_NORM = ("ITEMS", "HIDDEN", "EPS", "POST_NORM", "HAS_BRANCH", "PARTS")
_PLAIN_PLACE = 18  # constant_id of PLAIN (shaders/norm.glsl)
_FLOATS = ("f16", "bf16", "f32")
# constant_id of what all weights share (shaders/weights.glsl), and all inputs of linears
# (shaders/activations.glsl)
_SCALE_PLACE, _X_PLACE = 19, 20
_OF_WEIGHTS = (
    "gemv.comp",
    "experts.comp",
    "persistent.comp",
    "embed.comp",
    "per_layer.comp",
    "gemm.comp",
    "gemm_matrix.comp",
)
_WITH_NORM = ("gemv.comp", "persistent.comp", "norm.comp", "altup.comp", "laurel.comp")
# They have no inputs of linears.
_WITHOUT_X = (
    *("read.comp", "arithmetic.comp", "peaks.comp", "sample.comp"),
    *("route.comp", "group.comp", "altup.comp", "laurel.comp"),
)


def _decode_kernels() -> Iterator[Variant]:
    """Of the decode path; no constant is called "-"."""
    what = ("NORMS", "EPILOGUE", "CAP", "ROUNDS", "-", "-", "ACTIVE", "COUNT")
    gemv = ("LANES", "GROUP", "COLUMNS", "BLOCKS", *_NORM, *what)
    embed = ("LANES", "GROUP", "DECODE", "SCALE", "HIDDEN")
    per_layer = ("LANES", "GROUP", "SIZE", "ROWS", "EPS", "SCALE")
    experts = ("LANES", "GROUP", "ACTIVE", "DEPTH", "SHARING")
    for kind, macros in _weights().items():
        yield _kernel(f"gemv_{kind}", "gemv.comp", macros, constants=gemv)
        yield _kernel(f"experts_{kind}", "experts.comp", macros, constants=experts)
        yield _kernel(f"embed_{kind}", "embed.comp", macros, constants=embed)
        yield _kernel(f"per_layer_{kind}", "per_layer.comp", macros, constants=per_layer)
        if kind not in _FLOATS:
            dotted: dict[str, str | int] = {**macros, "INTEGER_DOT": 1}
            yield _kernel(f"gemv_{kind}_dot", "gemv.comp", dotted, ("int8dot",), gemv)
            yield _kernel(f"experts_{kind}_dot", "experts.comp", dotted, ("int8dot",), experts)
    yield from _persistent_kernels()
    norm = ("LANES", "FLOAT_X", "KEEP_NORMED", "HALF_OUT", *_NORM, "EXPERTS")
    yield _kernel("norm", "norm.comp", constants=norm)
    for place in ("before", "behind"):
        macros = {f"{place.upper()}_EXPERTS": 1}
        yield _kernel(f"norm_{place}_experts", "norm.comp", macros, constants=norm)
    yield _kernel("route", "route.comp", constants=("LANES", "COUNT", "ACTIVE"))
    group = ("LANES", "COUNT", "ACTIVE", "SIZE", "TILES")
    yield _kernel("group", "group.comp", constants=group)
    streams = ("LANES", "STREAMS", "ACTIVE", "MODE", *_NORM)
    yield _kernel("altup", "altup.comp", constants=streams)
    yield _kernel("laurel", "laurel.comp", constants=("LANES", "-", "-", "-", *_NORM))
    channels = ("LANES", "FLOAT_X", "CHANNELS")
    yield _kernel("quantize", "quantize.comp", constants=channels)
    yield _kernel("geglu", "geglu.comp", constants=(*channels, "SPARSE", "QUANTILE"))
    for name in ("peaks", "sample"):
        yield _kernel(name, f"{name}.comp", constants=("LANES", "CAP"))
    shape = ("DIM", "HEADS", "KV_HEADS", "QUERIES", "WINDOW", "SLOTS", "SPLITS")
    scores, keys = ("QK_NORM", "EPS", "SCALE", "CAP"), ("VALUE_NORM", "OWNS_KEYS")
    attention = ("LANES", "FLOAT_X", "MODE", *shape, *scores, "PARTS", "RUN", *keys, "MOST_SPLITS")
    for name, macros in _caches("attention"):
        yield _kernel(name, "attention.comp", macros, constants=attention)


def _persistent_kernels() -> Iterator[Variant]:
    """All layers of a token, of weights of one kind."""
    heads = ("HEAD_DIM", "HEADS", "KEY_HEADS", "QUERIES", "SPLITS", "QK_NORM", "SCALE", "CAP")
    common = ("LANES", "GROUP", "DEPTH", "PATIENCE", *_NORM, *heads)
    sizes = ("INTERMEDIATE", "LAYERS", "DOWN_PARTS", "TEAMS", "HELD_TILES", "OUT_PARTS")
    cut = (*sizes, "ATTENDING", "JOINS", "WIDTH", "RUN", "FULL_DIM", "QKV_COLUMNS", "KEPT_COLUMNS")
    extras = ("VALUE_NORM", "TOLD", "ACTIVE", "COUNT", "EXPERT_ROWS", "SHARING", "MOST_SPLITS")
    lists = ("LIST", "STRAIGHT", "-", "-", "READS")
    for cache, macros in _caches("persistent"):
        dotted = {**macros, "WEIGHT": "INT4", "INTEGER_DOT": 1}
        row = _kernel(f"{cache}_int4_dot", "persistent.comp", dotted, ("int8dot",), common)
        yield replace(row, spec_constants=(*row.spec_constants, *cut, *extras, *lists))


def _caches(name: str) -> Iterator[tuple[str, dict[str, str | int]]]:
    """Modules of attention, by what the KV cache holds, and their macros."""
    yield name, {"KV_INT8": 0}
    yield f"{name}_int8", {"KV_INT8": 1}


def _weights() -> dict[str, dict[str, str | int]]:
    """Name of a kind of weight -> its macros."""
    kinds: dict[str, dict[str, str | int]] = {name: {"WEIGHT": name.upper()} for name in _FLOATS}
    for spec in SPECS:
        name = f"int{spec.bits}{'z' * spec.zero_point}"
        kinds[name] = {"WEIGHT": f"INT{spec.bits}", "ZERO_POINT": int(spec.zero_point)}
    return kinds


def _kernel(
    name: str,
    source: str,
    macros: Mapping[str, str | int] = MappingProxyType({}),
    features: tuple[str, ...] = (),
    constants: tuple[str, ...] = (),
) -> Variant:
    if source in _WITH_NORM:
        constants = (*constants, *["-"] * (_PLAIN_PLACE - len(constants)), "PLAIN")
    if source not in _WITHOUT_X:
        scales = "SCALE_BITS" if source in _OF_WEIGHTS else "-"
        constants = (*constants, *["-"] * (_SCALE_PLACE - len(constants)), scales, "INT8_X")
    features = ("subgroup", *["int64"] * (source in _OF_WEIGHTS), *features)
    return Variant(name, source, macros, features, constants, "vulkan1.3")


def _prefill_kernels() -> Iterator[Variant]:
    """Of many tokens at a time."""
    tile = ("LANES", "GROUP", "BM", "BN")
    gemm = (*tile, "TM", "TN", "-", "-", "CHOICES")
    matrix = (*tile, "SM", "SN", "PAD", "STEP", "CHOICES")
    for kind, macros in _weights().items():
        yield _kernel(f"gemm_{kind}", "gemm.comp", macros, constants=gemm)
        if kind not in _FLOATS:
            dotted: dict[str, str | int] = {**macros, "INTEGER_DOT": 1}
            yield _kernel(f"gemm_{kind}_dot", "gemm.comp", dotted, ("int8dot",), gemm)
        if kind not in ("bf16", "f32"):
            needs = ("fp16", "coopmat")
            row = _kernel(f"gemm_{kind}_matrix", "gemm_matrix.comp", macros, needs, matrix)
            yield replace(row, subgroup=32)
    yield _kernel("gemm_half", "gemm_half.comp", constants=("LANES", "FLOAT_X"))
    shape = ("DIM", "HEADS", "KV_HEADS", "TOKENS", "KEYS", "WINDOW", "SLOTS", "SCALE", "CAP")
    attention = ("LANES", "FLOAT_X", *shape, "-", "PIECES")
    for name, macros in _caches("attention_prefill"):
        yield _kernel(name, "attention_prefill.comp", macros, constants=attention)
    sizes = ("DIM", "HEADS", "KV_HEADS", "ROWS", "KEYS", "WINDOW", "SLOTS", "SCALE", "CAP")
    blocks = ("LANES", "FLOAT_X", *sizes, "SUBGROUPS", "PIECES", "SPLIT")
    for name, macros in _caches("attention_matrix"):
        needs = ("fp16", "coopmat")
        row = _kernel(name, "attention_matrix.comp", macros, needs, blocks)
        yield replace(row, subgroup=32)


def _ceilings() -> Iterator[Variant]:
    """What measures a device."""
    lanes = ("LANES",)
    yield _kernel("read", "read.comp", constants=lanes)
    yield _kernel("arithmetic", "arithmetic.comp", constants=lanes)
    for name, macro, features in (
        ("arithmetic_dot", "INTEGER_DOT", ("int8dot",)),
        ("arithmetic_matrix", "MATRIX", ("fp16", "coopmat")),
    ):
        row = _kernel(name, "arithmetic.comp", {macro: 1}, features, lanes)
        yield replace(row, subgroup=32 if macro == "MATRIX" else None)


def _dense_kernels() -> Iterator[Variant]:
    """Of calibration: matrices of float32 and float16 (kernels/vulkan/dense)."""
    cut = ("LANES", "BM", "BN", "SM", "SN", "STEP", "PAD", "A_BY_K", "B_BY_K", "ADD")
    operands: dict[str, dict[str, str | int]] = {
        "half": {},
        "float": {"A_FLOAT": 1, "B_FLOAT": 1},
        "systems": {"B_FLOAT": 1, "SYSTEMS": 1},
    }
    for name, macros in operands.items():
        constants = (*cut, *["GROUP"] * (name == "systems"))
        yield _dense(f"dense_{name}", "dense_gemm.comp", macros, (), constants)
        needs, macros = ("fp16", "coopmat"), {**macros, "MATRIX": 1}
        row = _dense(f"dense_{name}_matrix", "dense_gemm.comp", macros, needs, constants)
        yield replace(row, subgroup=32)
    others: dict[str, tuple[str, ...]] = {
        "invert": (),
        "round": ("GROUP",),
        "descend": ("GROUP",),
        "search": ("GROUP", "KIND"),
        "solve": ("GROUP", "GROUPS", "ROUNDS"),
        "cells": ("OP", "HALF_OUT", "BY_ROW", "BY_COL", "GROUP"),
        "rows": ("OP", "HAS_GAIN"),
        "heads": ("DIM", "DIM_OUT", "NORM", "ROPE"),
        "softmax": ("WINDOW", "CAP"),
        "context": ("DIM",),
    }
    for name, sizes in others.items():
        yield _dense(f"dense_{name}", f"dense_{name}.comp", {}, (), ("LANES", *sizes))


def _dense(
    name: str,
    source: str,
    macros: Mapping[str, str | int],
    features: tuple[str, ...],
    constants: tuple[str, ...],
) -> Variant:
    return Variant(name, source, macros, ("subgroup", *features), constants, "vulkan1.3")


VARIANTS: Mapping[str, Variant] = _table(
    *_decode_kernels(),
    *_prefill_kernels(),
    *_dense_kernels(),
    *_ceilings(),
    *(
        Variant(
            f"dequantize_int{bits}", "dequantize.comp", {"BITS": bits}, (), ("GROUP", "SCALE_BITS")
        )
        for bits in (4, 8)
    ),
)
