"""uq: quantize, package and validate Gemma for AMD Ryzen AI machines.

The functions and classes below are loaded when they are first used: `import uq` takes no time.
`quantize`, `validate` and `export` are packages, too; called, they are functions of `uq.api`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from uq.errors import UqError

if TYPE_CHECKING:
    from uq.api import (
        Bundle,
        Checkpoint,
        Exported,
        ExportOptions,
        Generated,
        QuantizeOptions,
        Report,
        Sampling,
        ValidateOptions,
        export,
        generate,
        open_checkpoint,
        quantize,
        validate,
    )

__all__ = [
    "Bundle",
    "Checkpoint",
    "ExportOptions",
    "Exported",
    "Generated",
    "QuantizeOptions",
    "Report",
    "Sampling",
    "UqError",
    "ValidateOptions",
    "export",
    "generate",
    "open_checkpoint",
    "quantize",
    "validate",
]
__version__ = "0.1.0"
PACKAGES = ("export", "quantize", "validate")


if not TYPE_CHECKING:  # it would let every name pass

    def __getattr__(name: str) -> Any:
        if name in PACKAGES:
            return import_module(f"uq.{name}")
        if name in __all__:
            return getattr(import_module("uq.api"), name)
        raise AttributeError(f"module 'uq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
