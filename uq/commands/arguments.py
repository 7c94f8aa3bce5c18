"""Argument types: a value that is out of range is refused with the allowed values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path

from uq.formats.hub_name import is_hub_id, split_revision
from uq.kernels.backends import DEVICES, is_device

DEVICE_HELP = "auto (default), vulkan, vulkan:NUMBER, vulkan:NAME, npu, npu-emulator or cpu"

SCHEDULER_HELP = "tcp://HOST:PORT of a Dask scheduler, whose workers help; default: this machine"


def whole(minimum: int, maximum: float = math.inf) -> Callable[[str], int]:
    """A whole number in `minimum..maximum`."""
    allowed = f"{minimum}..{maximum}" if math.isfinite(maximum) else f"{minimum} or more"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected a whole number, {allowed}, not '{text}'")
        return value

    return parse


def whole_or_all(text: str) -> int | None:
    """A whole number above 0, or None for `all`."""
    return None if text == "all" else whole(1)(text)


def real(
    minimum: float, maximum: float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
    """A finite number in `minimum..maximum`; with `above`, `minimum` itself is refused."""
    allowed = f"above {minimum:g}" if above else f"{minimum:g} or more"
    if math.isfinite(maximum):
        allowed += f", at most {maximum:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = minimum < value if above else minimum <= value
        if not (math.isfinite(value) and inside and value <= maximum):
            raise argparse.ArgumentTypeError(f"expected a number {allowed}, not '{text}'")
        return value

    return parse


def nbytes(text: str) -> int:
    """Bytes: `10G`, `1.5G`, `512M`, in units of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MG])(?:i?B)?", text, re.ASCII | re.IGNORECASE)
    if not found or (value := float(found[1])) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 10G or 512M, not '{text}'")
    return int(value * (1 << 30 if found[2] in "Gg" else 1 << 20))


def names(allowed: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated list of distinct `allowed` names, in the order given."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"'{name}' is not one of {', '.join(allowed)}")
        return chosen

    return parse


def device(text: str) -> str:
    """A device to run on; whether it is there is found out by opening it."""
    if not is_device(text):
        allowed = ", ".join(DEVICES)
        raise argparse.ArgumentTypeError(f"invalid choice: '{text}' (choose from {allowed})")
    return text


def calibration_device(text: str) -> str:
    """A device that calibrates; whether it is there is found out by opening it."""
    kind, _, wish = text.partition(":")
    if text not in ("auto", "cpu", "vulkan") and not (kind == "vulkan" and wish):
        allowed = "auto, cpu, vulkan, vulkan:NUMBER, vulkan:NAME"
        raise argparse.ArgumentTypeError(f"invalid choice: '{text}' (choose from {allowed})")
    return text


def scheduler(text: str) -> str:
    """An address of Dask; whether a scheduler answers there, connecting finds out."""
    if not re.fullmatch(r"(tcp|tls)://.+:\d+", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not an address such as tcp://10.0.0.1:8786 or tls://host:8786"
        )
    return text


def bundle(text: str) -> Path:
    """A folder that looks like a bundle, or a Hub id; whether it is good, opening finds out."""
    path = Path(text)
    on_hub = not path.exists() and is_hub_id(split_revision(text)[0])
    if not on_hub and not (path / "manifest.json").is_file():
        why = "is not a bundle: it has no manifest.json" if path.exists() else "is not there"
        raise argparse.ArgumentTypeError(
            f"{text} {why}; make a bundle of a model with: uq quantize MODEL"
        )
    return path
