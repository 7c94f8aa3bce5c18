"""Whether the source is still the one that the work was begun with: its content decides."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Thread

from uq.errors import CheckpointError
from uq.formats.checkpoint import Checkpoint
from uq.formats.writer import BundleWriter

Fingerprint = dict[str, dict[str, int | str]]
SOURCE, UNHASHED = "source", "source before it was hashed"


class SourceWatch:
    """Hashes the weight files beside the work, and notices when they change under it.

    Until the hashes are known, what the file system says of the files (size, times, inode) stands
    for them; from then on the content alone decides.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Begins to hash, in a thread that does not outlive the program."""
        self._files = checkpoint.files()
        self._seen = self._state()
        self._fingerprint: Future[Fingerprint] = Future()
        Thread(target=self._hash, args=(checkpoint,), daemon=True).start()

    def require_same(self, writer: BundleWriter) -> None:
        """Compare with the source of the work that is to be continued, before it is.

        Raises:
            UsageError: it is another one.
            CheckpointError: a file was changed since it was opened.
        """
        if SOURCE in writer.facts:
            self.hashed(writer)
        else:
            writer.confirm(UNHASHED, self._seen)

    def record(self, writer: BundleWriter) -> None:
        """Enter the hashes in the journal once they are known. Raises as `require_same`."""
        if SOURCE not in writer.facts and self._fingerprint.done():
            self.hashed(writer)

    def hashed(self, writer: BundleWriter) -> Fingerprint:
        """Size and sha256 of every weight file, when it is clear that nothing else was read.

        Raises:
            UsageError: an earlier run read another source.
            CheckpointError: a file was changed while it was read.
        """
        fingerprint = self._fingerprint.result()
        self.require_unchanged()
        writer.confirm(SOURCE, {name: file["sha256"] for name, file in fingerprint.items()})
        return fingerprint

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

    def _hash(self, checkpoint: Checkpoint) -> None:
        try:
            self._fingerprint.set_result(checkpoint.fingerprint())
        except BaseException as error:
            self._fingerprint.set_exception(error)
