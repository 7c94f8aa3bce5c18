"""Frozen dataclasses from the JSON that `dataclasses.asdict` made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from uq.errors import BundleError

T = TypeVar("T")


def decode_record(kind: type[T], data: Any, where: str) -> T:
    """Build the dataclass `kind` from parsed JSON; unknown keys are left aside.

    Args:
        where: the file, then the path of the field, for messages.

    Raises:
        BundleError: a field is missing or of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise BundleError(f"{where}: expected an object, found {type(data).__name__}")
    hints = get_type_hints(kind)
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in data:
            path = f"{where}.{field.name}"
            values[field.name] = _decode(hints[field.name], data[field.name], path)
        elif _required(field):
            raise BundleError(f"{where}.{field.name}: missing; write the report again")
    return kind(**values)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _decode(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is UnionType:
        if value is None and NoneType in get_args(hint):
            return None
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where}: expected a list, found {type(value).__name__}")
        item = get_args(hint)[0]
        return tuple(_decode(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if is_dataclass(hint):
        return decode_record(hint, value, where)  # type: ignore[arg-type]
    # JSON writes 1.0 as 1 in some writers, and bool is an int in Python
    accepted = {float: (float, int)}.get(hint, (hint,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise BundleError(f"{where}: expected {hint.__name__}, found {value!r:.40}")
    return float(value) if hint is float else value
