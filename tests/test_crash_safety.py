"""What a run that was broken off leaves behind: who may go on with it, and what refuses."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uq.cli import main
from uq.errors import BundleError, CheckpointError, DeviceError, UqError, UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.weight_file import LocalFile
from uq.formats.config import layer_tensor
from uq.formats.journal import JOURNAL, Journal
from uq.formats.writer import ArrayEntry, BundleWriter
from uq.progress import SilentProgress
from uq.quantize.job import recognised_plan
from uq.quantize.pipeline import QuantizeOptions, quantize

Tiny = Callable[..., Path]
RTN = QuantizeOptions(method="rtn")
WEIGHTS = "model.safetensors"


class Stop(Exception):
    pass


class At(SilentProgress):
    """Does something when the second layer is in work: by then two shards are committed."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def work(self, what: str) -> None:
        if what == layer_tensor(1, "mlp.up_proj"):
            self._act()


def stop() -> None:
    raise Stop


def broken_off(folder: Path, out: Path) -> None:
    with pytest.raises(Stop):
        quantize(open_checkpoint(folder), out, RTN, At(stop))
    assert len(list(out.with_name(out.name + ".partial").glob("*.safetensors"))) == 2


def continued(folder: Path, out: Path) -> dict[str, bytes]:
    quantize(open_checkpoint(folder), out, RTN)
    open_bundle(out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def change(path: Path, name: str = layer_tensor(0, "mlp.up_proj")) -> None:
    """One weight, in the middle of a tensor; size and time of the last change stay."""
    before, tensor = path.stat(), open_checkpoint(path.parent).tensors[name]
    with path.open("r+b") as file:
        file.seek(tensor.offset + tensor.nbytes // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_source_that_was_changed_behind_the_clock_is_refused(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    broken_off(folder, tmp_path / "b")
    change(folder / WEIGHTS)
    with pytest.raises(UsageError, match=r"begun with source\.model\.layers\.0\.mlp\.up_proj.*--r"):
        quantize(open_checkpoint(folder), tmp_path / "b", RTN)
    change(folder / WEIGHTS)  # back again
    assert continued(folder, tmp_path / "b") == continued(folder, tmp_path / "whole")


def test_a_change_of_what_was_not_yet_read_is_in_the_bundle(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    """The work goes on, and the bundle is that of the changed source."""
    folder = tiny_checkpoint()
    broken_off(folder, tmp_path / "b")
    change(folder / WEIGHTS, layer_tensor(1, "mlp.down_proj"))
    assert continued(folder, tmp_path / "b") == continued(folder, tmp_path / "whole")


def test_other_weight_files_are_not_continued(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    broken_off(folder, tmp_path / "b")
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UsageError, match=r"begun with source files\.model\.safetensors \d+ bytes"):
        quantize(open_checkpoint(folder), tmp_path / "b", RTN)


def test_an_unbroken_run_reads_its_weights_once(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a sample of rows by which weights on a grid are recognised."""
    checkpoint = open_checkpoint(tiny_checkpoint(hidden=256, ffn=1024))
    asked: list[int] = []
    read = LocalFile.read

    def counted(file: LocalFile, offset: int, nbytes: int) -> Any:
        asked.append(nbytes)
        return read(file, offset, nbytes)

    monkeypatch.setattr(LocalFile, "read", counted)
    recognised_plan(checkpoint, RTN)
    samples, asked[:] = sum(asked), []
    quantize(checkpoint, tmp_path / "b", RTN)
    assert sum(asked) == samples + sum(info.nbytes for info in checkpoint.tensors.values())


def test_the_clock_does_not_decide(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Set back to 1980, the source was last changed in the future, and every file is new."""
    folder = tiny_checkpoint()
    broken_off(folder, tmp_path / "b")
    for path in (folder / WEIGHTS, *(tmp_path / "b.partial").iterdir()):
        os.utime(path, (4e9, 4e9))
    (folder / WEIGHTS).rename(folder / "moved")
    (folder / WEIGHTS).write_bytes((folder / "moved").read_bytes())
    os.utime(folder / WEIGHTS, (3e8, 3e8))
    assert continued(folder, tmp_path / "b") == continued(folder, tmp_path / "whole")


def test_a_source_that_changes_while_it_is_read_stops_the_run(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(layers=3)
    progress = At(lambda: change(folder / WEIGHTS))
    with pytest.raises(CheckpointError, match="model.safetensors: was changed while it was read"):
        quantize(open_checkpoint(folder), tmp_path / "b", RTN, progress)
    shards = Journal.load(tmp_path / "b.partial").shards
    assert len(shards) == 2  # not the layer that was read when it happened


def test_another_configuration_is_not_continued(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    broken_off(folder, tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(UsageError, match="begun with model.rms_norm_eps 1e-06, now 1e-05"):
        quantize(open_checkpoint(folder), tmp_path / "b", RTN)


def test_another_tokenizer_is_not_continued(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    broken_off(folder, tmp_path / "b")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UsageError, match="begun with asset.chat_template.jinja nothing"):
        quantize(open_checkpoint(folder), tmp_path / "b", RTN)


def entries(value: int) -> list[ArrayEntry]:
    return [ArrayEntry("gain", np.full(3, value, np.float32))]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A work folder with one of two shards; the bundle would be `out`."""
    with BundleWriter(tmp_path / "out", 2, {}) as writer:
        writer.write_shard(0, entries(0))
    return tmp_path / "out.partial"


def test_any_damaged_byte_of_the_journal_is_noticed(begun: Path, tmp_path: Path) -> None:
    journal = begun / JOURNAL
    whole = journal.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        journal.write_bytes(damaged)
        with pytest.raises(BundleError, match="journal.json: is damaged.*--restart"):
            Journal.load(begun)
    with pytest.raises(BundleError, match="is damaged"):
        BundleWriter(tmp_path / "out", 2, {})
    journal.write_bytes(whole)
    with BundleWriter(tmp_path / "out", 2, {}) as writer:
        assert writer.committed == 1


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_journal_that_was_cut_is_noticed(begun: Path, tmp_path: Path, length: int) -> None:
    journal = begun / JOURNAL
    journal.write_bytes(journal.read_bytes()[:length])
    with pytest.raises(BundleError, match="is damaged"):
        BundleWriter(tmp_path / "out", 2, {})


def test_the_journal_of_another_version_says_which(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uq.formats.journal.__version__", "9.9.9")
    with pytest.raises(UsageError, match=r"begun by uq \d.*, this is 9\.9\.9: .*--restart"):
        BundleWriter(tmp_path / "out", 2, {})


def test_a_lock_names_the_process_that_holds_it(begun: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from uq.formats.writer import BundleWriter\n"
        "with BundleWriter(Path(sys.argv[1]), 2, {}): print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=rf"another run \(process {holder.pid}\) is writing"):
            BundleWriter(tmp_path / "out", 2, {})
        holder.kill()
        holder.wait()
        assert (begun / "lock").read_text() == str(holder.pid)
        with BundleWriter(tmp_path / "out", 2, {}) as writer:  # the lock of a dead process
            assert writer.committed == 1


def test_a_run_that_was_killed_behind_its_last_step_left_a_whole_bundle(
    tiny_bundle: Callable[..., Path],
) -> None:
    out = tiny_bundle()
    names = sorted(path.name for path in out.iterdir())
    for left in ("journal.json", "lock"):
        (out / left).write_text("")
    with pytest.raises(UsageError, match="is whole"):
        BundleWriter(out, 2, {})
    assert sorted(path.name for path in out.iterdir()) == names


def test_a_work_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to("elsewhere")
    with pytest.raises(UsageError, match="is no work folder of uq"):
        BundleWriter(tmp_path / "out", 2, {})
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_rename_that_fails_keeps_the_work(
    tmp_path: Path, bundle_parts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the work folder was put on another file system than its parent."""

    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    parts = bundle_parts()
    with BundleWriter(tmp_path / "out", len(parts.shards), {}) as writer:
        for index, shard in enumerate(parts.shards):
            writer.write_shard(index, shard)
        with monkeypatch.context() as patch, pytest.raises(DeviceError, match="cross-device"):
            patch.setattr(Path, "rename", other_disk)
            writer.finish(parts.manifest, parts.assets)
    with BundleWriter(tmp_path / "out", len(parts.shards), {}) as writer:
        assert writer.committed == len(parts.shards)
        open_bundle(writer.finish(parts.manifest, parts.assets))


def test_an_output_that_cannot_be_written_is_refused_at_once(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the system's answer is given by hand."""

    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    checkpoint = open_checkpoint(tiny_checkpoint())
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(DeviceError, match="b.partial: Read-only file system"):
        quantize(checkpoint, tmp_path / "b", RTN)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_read_is_one_line(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(layers=6)
    read = os.preadv

    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(DeviceError, match=r"cannot read \d+ bytes at \d+: Input/output error"):
        quantize(
            open_checkpoint(folder), tmp_path / "b", RTN,
            At(lambda: monkeypatch.setattr(os, "preadv", broken)),
        )  # fmt: skip
    monkeypatch.setattr(os, "preadv", read)
    assert continued(folder, tmp_path / "b") == continued(folder, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_two_lines_and_the_run_can_go_on(
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    argv = ["quantize", str(tiny_checkpoint()), "--method", "rtn", "-o", str(tmp_path / "b")]
    notes: list[str] = []
    progress = At(lambda: os.kill(os.getpid(), number))
    monkeypatch.setattr(progress, "note", notes.append)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr("uq.progress.terminal_progress", lambda: progress)
        assert main(argv) == 130
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "uq: interrupted\n"
    assert notes[-1].startswith(f"{tmp_path}/b.partial keeps 2 finished parts; the same command")
    assert main(argv) == 0


def test_a_second_interrupt_while_the_first_is_explained_loses_nothing(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tiny_checkpoint()
    progress = At(interrupt)
    monkeypatch.setattr(progress, "note", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(open_checkpoint(folder), tmp_path / "b", RTN, progress)
    assert continued(folder, tmp_path / "b") == continued(folder, tmp_path / "whole")


def test_a_second_interrupt_while_the_last_commit_is_waited_for_frees_the_lock(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "out", 2, {}) as writer:
        monkeypatch.setattr(writer._committer, "shutdown", interrupt)
    with BundleWriter(tmp_path / "out", 2, {}) as writer:
        assert writer.committed == 1


def test_a_journal_cannot_name_files_elsewhere(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    journal = begun / JOURNAL
    line = journal.read_bytes().partition(b"\n")[0]
    forged = Journal.load(begun)
    forged_line = line.replace(forged.shards[0].file.encode(), b"../secret")
    journal.write_bytes(forged_line + b"\n")
    with pytest.raises(UqError):
        BundleWriter(tmp_path / "out", 2, {})
    assert (tmp_path / "secret").read_text() == "x"
