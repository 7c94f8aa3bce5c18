"""Whether the source is still the one that the work was begun with: its content decides.

The hashes are of the bytes that the work read, taken as it read them and recorded with each shard:
a run that is not broken off reads its source once. One that continues hashes what the finished
shards were made from, and nothing else: the rest it will read itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from uq.errors import CheckpointError
from uq.formats.checkpoint import Checkpoint
from uq.formats.checkpoint.content import file_contents, read_contents
from uq.formats.manifest import SourceFile
from uq.formats.towers import with_rows
from uq.formats.writer import BundleWriter
from uq.quantize.shards import shard_sources

FILES = "source files"


class SourceWatch:
    """Knows what was read, and notices files that change under the work.

    Attributes:
        contents: tensor -> hash of what was read of it; filled in by those who read.
    """

    def __init__(self, checkpoint: Checkpoint, *, towers: bool = False) -> None:
        """`towers`: they are read, too."""
        self.contents: dict[str, str] = {}
        self._checkpoint = checkpoint
        carried = checkpoint.towers if towers else {}
        self._towers = {name: with_rows(info) for name, info in carried.items()}
        self._tensors = {**checkpoint.tensors, **self._towers}
        self._files = {info.file.name: info.file for info in self._tensors.values()}
        self._seen = self._state()

    def require_same(self, writer: BundleWriter, pool: ThreadPoolExecutor) -> None:
        """Compare with the source of the work that is to be continued, before it is.

        Reads what the finished shards were made from, but for files whose hash is stated.

        Raises:
            UsageError: it is another one; names the file or tensor.
            CheckpointError, DeviceError: it cannot be read, or was changed since it was opened.
        """
        sizes = {n: file.stated_sha256 or f"{file.size} bytes" for n, file in self._files.items()}
        writer.confirm(FILES, sizes)
        sources = writer.sources
        begun = {
            name: info
            for name, info in self._tensors.items()
            if name in sources and info.file.stated_sha256 is None
        }
        writer.require_sources(read_contents(begun, pool))
        self.require_unchanged()

    def of_shard(self, index: int) -> Mapping[str, str]:
        """Hashes of what a shard was made from, when it is clear that nothing else was read.

        Raises:
            CheckpointError: a file was changed while it was read.
        """
        self.require_unchanged()
        config = self._checkpoint.config
        text = index <= config.num_layers
        names = shard_sources(config, index) if text else list(self._towers)
        return {name: self.contents[name] for name in names}

    def files(self, writer: BundleWriter) -> dict[str, SourceFile]:
        """Every weight file of the text model, once all shards are committed."""
        contents = file_contents(self._checkpoint.tensors, writer.sources)
        return {
            name: SourceFile(file.size, contents[name], file.stated_sha256)
            for name, file in self._checkpoint.files().items()
        }

    def require_unchanged(self) -> None:
        """Raises CheckpointError: a file was changed since it was opened."""
        now = self._state()
        for name, before in self._seen.items():
            if now[name] != before:
                raise CheckpointError(
                    f"{name}: was changed while it was read; run the same command again: it goes "
                    "on if the content is as it was"
                )

    def _state(self) -> dict[str, str]:
        return {name: f"{file.size} {file.version}" for name, file in self._files.items()}
