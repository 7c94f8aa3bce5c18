"""Packages that are called by their own names: `uq.quantize(...)` beside `uq.quantize.plan`."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any


class Stage(ModuleType):
    """A package of `uq` whose call is the function of the same name in `uq.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        from uq import api

        return getattr(api, self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)
