"""Typed look-ups in config.json; every message names the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uq.errors import CheckpointError
from uq.formats.config import MAX_COUNT
from uq.formats.decode import shown

JSON = Mapping[str, Any]
MAX_NUMBER = 1e30


@dataclass(frozen=True)
class Keys:
    """Typed look-ups in a JSON object; messages name the file and the key."""

    file: str
    data: JSON

    def refuse(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {key} is {shown(self.data[key])}; expected {expected}"
        )

    def integer(self, key: str, default: int, most: int = MAX_COUNT) -> int:
        value = self.data.get(key, default)
        if type(value) is not int or not 0 < value <= most:
            raise self.refuse(key, f"a positive integer, at most {most}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.data.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= MAX_NUMBER:
            raise self.refuse(key, "a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def optional(self, key: str, default: float | None) -> float | None:
        if self.data.get(key, default) is None:
            return None
        return self.number(key, 0.0 if default is None else default)

    def token(self, key: str, default: int) -> int:
        value = self.data.get(key)
        if value is None:
            return default
        if type(value) is not int or not 0 <= value <= MAX_COUNT:
            raise self.refuse(key, "a token id")
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """An id, a list of ids or null."""
        value = self.data.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or not 0 <= token <= MAX_COUNT for token in ids):
            raise self.refuse(key, "a token id or a list of them")
        return tuple(ids)

    def object(self, key: str) -> JSON:
        value = self.data.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return value
