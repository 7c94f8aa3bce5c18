"""Where things are kept that cost time to make and can be made again."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """`$UQ_CACHE`, else `$XDG_CACHE_HOME/uq`, else `~/.cache/uq`."""
    if own := os.environ.get("UQ_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "uq"
    return Path.home() / ".cache" / "uq"


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, from the cache's file `name` where an earlier call left it whole.

    The file begins with its content's SHA-256. A cache that cannot be written is done without.
    """
    path = cache_folder() / name
    with suppress(OSError):
        stored = path.read_bytes()
        if hashlib.sha256(stored[DIGEST:]).digest() == stored[:DIGEST]:
            return stored[DIGEST:]
    content = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            draft = Path(work) / path.name
            draft.write_bytes(hashlib.sha256(content).digest() + content)
            draft.replace(path)
    return content
