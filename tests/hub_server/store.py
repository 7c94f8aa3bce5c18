"""What the loopback Hub keeps: accounts, repositories with their commits, large objects."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf")
LARGE = 10 << 20  # bytes from which any file is kept as a large object


class Content(Protocol):
    """The bytes of a file, wherever they are."""

    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def read(self, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        return self.data[start:stop]


@dataclass(frozen=True)
class OnDisk:
    """A file that is sent from where it lies, by the kernel: for benchmarks."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass(frozen=True)
class File:
    """One file of a repository: kept as a large object, or in git itself."""

    content: Content
    large: bool

    @property
    def oid(self) -> str:
        """Git's name of the blob; of a large object, of the pointer that git keeps."""
        data = self.pointer if self.large else self.content.read(0, self.content.size)
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.content.sha256 if self.large else self.oid

    @property
    def pointer(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.content.sha256}")
        return "\n".join([*lines, f"size {self.content.size}", ""]).encode()


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: Mapping[str, File]


@dataclass
class Repository:
    """A model repository; `gated` needs an accepted licence for its files, not for its listing."""

    id: str
    private: bool = False
    gated: bool = False
    licence: str | None = None
    history: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision, revision)
        return next((commit for commit in self.history if commit.sha == sha), None)

    @property
    def head(self) -> Commit:
        found = self.find("main")
        assert found is not None
        return found

    def commit(self, branch: str, files: Mapping[str, File], message: str) -> Commit:
        label = f"{self.id} {len(self.history)} {message}"
        commit = Commit(hashlib.sha1(label.encode()).hexdigest(), message, dict(files))
        self.history.append(commit)
        self.branches[branch] = commit.sha
        return commit


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, what it may do, and the gated repositories it may read."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()
    accepted: frozenset[str] = frozenset()

    def may_write(self, repo_id: str) -> bool:
        owner = repo_id.partition("/")[0]
        return self.role == "write" and owner in (self.name, *self.organizations)


@dataclass
class Store:
    accounts: dict[str, Account] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, Content] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Content],
        *,
        gated: bool = False,
        private: bool = False,
        licence: str | None = None,
    ) -> Commit:
        """Commit `files`, which replace all others, to the branch main of a repository."""
        repository = self.create(repo_id, private)
        repository.gated, repository.licence = gated, licence
        contents = {
            name: Bytes(data) if isinstance(data, bytes) else data for name, data in files.items()
        }
        return repository.commit("main", {n: self.file(n, c) for n, c in contents.items()}, "add")

    def add_folder(self, repo_id: str, folder: Path, **options: Any) -> Commit:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.add(repo_id, files, **options)

    def create(self, repo_id: str, private: bool = False) -> Repository:
        if repo_id not in self.repositories:
            repository = Repository(repo_id, private)
            repository.commit("main", {}, "initial commit")
            self.repositories[repo_id] = repository
        return self.repositories[repo_id]

    def file(self, name: str, content: Content) -> File:
        large = is_large(name, content.size)
        if large:
            self.objects[content.sha256] = content
        return File(content, large)


def is_large(name: str, size: int) -> bool:
    return name.endswith(LARGE_SUFFIXES) or size > LARGE
