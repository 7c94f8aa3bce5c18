"""Strict reading of JSON into frozen dataclasses: nothing missing, nothing unknown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from uq.errors import BundleError, UqError

T = TypeVar("T")

MAX_JSON = 4 << 20  # bytes; the manifest of a 27B has 0.2 MiB
MAX_VALUES = 1 << 17  # a value may take 100 times the bytes that it is written with
OPTIONAL = {"optional": True}  # metadata of a dataclass field that may be missing in JSON
SCALARS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}


def parse_json(data: bytes, where: str, kind: type[UqError] = BundleError) -> Any:
    """JSON without repeated keys, NaN and Infinity, and too small to fill the memory.

    Raises:
        kind: anything else, or nesting too deep to be read.
    """
    if len(data) > MAX_JSON or data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise kind(
            f"{where}: {len(data)} bytes of JSON: longer than {MAX_JSON}, or more than "
            f"{MAX_VALUES} values"
        )
    try:
        return json.loads(
            data, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise kind(f"{where}: not valid JSON: {error}") from error


def decode(kind: type[T], value: object, where: str) -> T:
    """`value`, as parsed from JSON, as a `kind`.

    Args:
        kind: a dataclass whose fields are int, float, str, bool, object (any JSON), `X | None`,
            `tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]` or dataclasses of these. A field with
            metadata `OPTIONAL` may be missing and has its default then.
        where: what the message begins with, e.g. the name of the file.

    Raises:
        BundleError: names the field, what was expected and what was found.
    """
    result: T = _decode(kind, value, f"{where}: ")
    return result


def printable(name: str) -> str:
    """A name out of a file, fit for a message of one line."""
    return name if name.isprintable() and len(name) <= 100 else ascii(name[:100])


def shown(value: object) -> str:
    """A value out of a file, short enough for a message of one line."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (Union, UnionType):  # X | None
        return None if value is None else _decode(arguments[0], value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is Mapping:
        items = _expect(dict, "an object", value, where)
        return {key: _decode(arguments[1], item, _inner(where, key)) for key, item in items.items()}
    return value if kind is object else _scalar(kind, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    items = _expect(dict, "an object", value, where)
    hints = _hints(kind)
    if missing := [name for name in _required(kind) if name not in items]:
        raise BundleError(f"{where}field {missing[0]!r} is missing")
    if unknown := [name for name in items if name not in hints]:
        raise BundleError(f"{where}field '{printable(unknown[0])}' is not known")
    return kind(**{k: _decode(hints[k], item, _inner(where, k)) for k, item in items.items()})


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _expect(list, "an array", value, where)
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(items)
    if len(items) != len(arguments):
        raise BundleError(f"{where}expected {len(arguments)} items, found {len(items)}")
    kinds = zip(arguments, items, strict=True)
    return tuple(_decode(kind, item, _inner(where, str(i))) for i, (kind, item) in enumerate(kinds))


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        _refuse(SCALARS[kind], value, where)
    return value


def _expect(kind: type[T], description: str, value: Any, where: str) -> T:
    if not isinstance(value, kind):
        _refuse(description, value, where)
    return value


def _refuse(expected: str, value: Any, where: str) -> NoReturn:
    try:
        found = json.dumps(value)
    except RecursionError:  # it could just be read
        found = "something nested deeply"
    found = found if len(found) <= 40 else found[:37] + "..."
    raise BundleError(f"{where}expected {expected}, found {found}")


def _inner(where: str, key: str) -> str:
    """`file: a.b: ` and `c` -> `file: a.b.c: `."""
    file, _, path = where.removesuffix(": ").partition(": ")
    key = printable(key)
    return f"{file}: {path}.{key}: " if path else f"{file}: {key}: "


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _required(kind: Any) -> list[str]:
    return [field.name for field in fields(kind) if "optional" not in field.metadata]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field '{printable(max(names, key=names.count))}' appears twice")
    return items


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    """1e999 is valid JSON, but no float."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the range of a float")
    return value
