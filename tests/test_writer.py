"""The bundle writer: committed work survives, nothing half-done is ever seen."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from uq.errors import BundleError, DeviceError, UsageError
from uq.formats.bundle import open_bundle
from uq.formats.disk import require_free
from uq.formats.spec import QuantTensor, Spec
from uq.formats.writer import ArrayEntry, BundleWriter, Entry, QuantEntry

SPEC = Spec(4, 32)
SMALL: dict[str, Any] = {"hidden": 96, "heads": 3, "kv_heads": 1, "ffn": 160, "vocab": 401}


def weight(rows: int = 48, cols: int = 64) -> QuantTensor:
    rng = np.random.default_rng(rows + cols)
    codes = rng.integers(-8, 8, (rows, cols), dtype=np.int8)
    return QuantTensor(codes, np.ones((rows, cols // 32), np.float16), SPEC)


def quant_entry(name: str, *blocks: QuantTensor) -> QuantEntry:
    rows = sum(block.shape[0] for block in blocks)
    return QuantEntry(name, (rows, blocks[0].shape[1]), SPEC, "igpu", "rtn", blocks)


def layer_entries(layer: int) -> list[Entry]:
    name = f"model.layers.{layer}"
    gain = np.full(7, layer, np.float32)
    return [
        ArrayEntry(f"{name}.input_layernorm.gain", gain),
        quant_entry(f"{name}.mlp.up_proj.weight", weight()),
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_all(out: Path, parts: Any, start: int = 0) -> Path:
    with BundleWriter(out, len(parts.shards), {"x": 1}) as writer:
        assert writer.committed == start
        for index in range(start, len(parts.shards)):
            writer.write_shard(index, parts.shards[index])
        return writer.finish(parts.manifest, parts.assets)


def test_a_finished_bundle_opens_and_leaves_nothing_else(
    tmp_path: Path, bundle_parts: Callable[..., Any]
) -> None:
    out = write_all(tmp_path / "out", bundle_parts(**SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    listed = open_bundle(out).manifest.files
    assert set(files_of(out)) == {*listed, "manifest.json", "manifest.sha256"}


def test_two_runs_write_the_same_bytes(tmp_path: Path, bundle_parts: Callable[..., Any]) -> None:
    first = write_all(tmp_path / "a", bundle_parts(**SMALL))
    second = write_all(tmp_path / "b", bundle_parts(**SMALL))
    assert files_of(first) == files_of(second)


def test_a_broken_off_run_continues_and_ends_with_the_same_bytes(
    tmp_path: Path, bundle_parts: Callable[..., Any]
) -> None:
    parts = bundle_parts(**SMALL)
    unbroken = write_all(tmp_path / "unbroken", parts)
    with (
        pytest.raises(KeyboardInterrupt),
        BundleWriter(tmp_path / "out", len(parts.shards), {"x": 1}) as writer,
    ):
        writer.write_shard(0, parts.shards[0])
        writer.write_shard(1, parts.shards[1])
        raise KeyboardInterrupt
    assert files_of(write_all(tmp_path / "out", parts, start=2)) == files_of(unbroken)


def test_a_killed_process_loses_only_the_shard_in_work(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_writer import BundleWriter, layer_entries, quant_entry, weight
def endless():
    yield weight()
    os.kill(os.getpid(), 9)
with BundleWriter(Path(sys.argv[1]), 3, {"x": 1}) as writer:
    writer.write_shard(0, layer_entries(0))
    assert writer.committed == 1
    entry = quant_entry("w", weight(), weight())
    object.__setattr__(entry, "blocks", endless())
    writer.write_shard(1, [entry])
"""
    out = tmp_path / "out"
    tests = str(Path(__file__).parent)
    killed = subprocess.run([sys.executable, "-c", script, str(out), tests], check=False)
    assert killed.returncode == -9
    with BundleWriter(out, 3, {"x": 1}) as writer:
        assert writer.committed == 1
        assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 1


def test_a_committed_layer_can_be_read_back(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out", 2, {}) as writer:
        writer.write_shard(0, layer_entries(9))
        writer.write_shard(1, layer_entries(0))
        layer = writer.read_layer(0)
    up, gain = layer["mlp.up_proj"], layer["input_layernorm"]
    assert isinstance(up, QuantTensor)
    np.testing.assert_array_equal(up.codes, weight().codes)
    np.testing.assert_array_equal(gain, np.zeros(7, np.float32))


def test_a_damaged_shard_and_what_follows_is_written_again(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out", 4, {}) as writer:
        for index in range(3):
            writer.write_shard(index, layer_entries(index))
    shard = tmp_path / "out.partial" / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with BundleWriter(tmp_path / "out", 4, {}) as writer:
        assert writer.committed == 1
        assert not shard.exists()


def test_the_error_is_asked_for_behind_the_last_block(
    tmp_path: Path, bundle_parts: Callable[..., Any]
) -> None:
    parts = bundle_parts(**SMALL)
    seen: list[int] = []
    entry = parts.shards[0][0]

    def blocks() -> Iterator[QuantTensor]:
        for block in entry.blocks:
            assert isinstance(block, QuantTensor)
            seen.append(block.shape[0])
            yield block

    streamed = QuantEntry(
        entry.name, entry.shape, entry.spec, "row", "rtn", blocks(), lambda: sum(seen) / 1000
    )
    parts.shards[0][0] = streamed
    bundle = open_bundle(write_all(tmp_path / "out", parts))
    assert bundle.manifest.tensors[entry.name].relative_error == 0.401


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"group": 64}, {"group": 32}, "begun with group 64, now 32;"),
        ({"plan": {"a": "int4"}}, {"plan": {"a": "int8"}}, "begun with plan.a int4, now int8;"),
        ({}, {"calibration": "x.txt"}, "begun with calibration nothing, now x.txt;"),
    ],
)
def test_other_work_is_not_continued(
    tmp_path: Path, before: dict[str, object], now: dict[str, object], message: str
) -> None:
    with BundleWriter(tmp_path / "out", 2, before) as writer:
        writer.write_shard(0, layer_entries(0))
    with pytest.raises(UsageError, match=message + ".*--restart"):
        BundleWriter(tmp_path / "out", 2, now)
    with BundleWriter(tmp_path / "out", 2, before) as writer:
        assert writer.committed == 1


def test_restart_begins_anew(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out", 2, {"group": 64}) as writer:
        writer.write_shard(0, layer_entries(0))
    with BundleWriter(tmp_path / "out", 2, {"group": 32}, resume="restart") as writer:
        assert writer.committed == 0
        assert not list((tmp_path / "out.partial").glob("*.safetensors"))


def test_a_required_continuation_needs_something_to_continue(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no unfinished work"):
        BundleWriter(tmp_path / "out", 2, {}, resume="require")
    assert not list(tmp_path.iterdir())


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out", 2, {}) as writer:
        writer.write_shard(0, layer_entries(0))
    (tmp_path / "out.partial" / "journal.json").write_text("{")
    with pytest.raises(BundleError, match="is damaged.*--restart"):
        BundleWriter(tmp_path / "out", 2, {})


def test_two_runs_on_one_output_refuse_each_other(tmp_path: Path) -> None:
    with (
        BundleWriter(tmp_path / "out", 2, {}) as first,
        pytest.raises(UsageError, match="another run .* is writing it"),
    ):
        first.write_shard(0, layer_entries(0))
        BundleWriter(tmp_path / "out", 2, {})
    with BundleWriter(tmp_path / "out", 2, {}) as again:
        assert again.committed == 1


def test_the_lock_lasts_as_long_as_the_thread_that_writes(tmp_path: Path) -> None:
    """As behind a second Ctrl-C, which does not wait for it."""
    begun, go_on = Event(), Event()

    def blocks() -> Iterator[QuantTensor]:
        begun.set()
        assert go_on.wait(60)
        yield weight()

    name, shape = "model.layers.0.mlp.up_proj.weight", weight().shape
    slow = QuantEntry(name, shape, SPEC, "igpu", "rtn", blocks())
    with ThreadPoolExecutor(1) as pool:
        with BundleWriter(tmp_path / "out", 3, {"x": 1}) as writer:
            writer.write_shard(0, layer_entries(0))
            pool.submit(writer.write_shard, 1, [slow])
            assert begun.wait(60)
        with pytest.raises(UsageError, match="another run .* is writing it"):
            BundleWriter(tmp_path / "out", 3, {"x": 1})
        go_on.set()
    with BundleWriter(tmp_path / "out", 3, {"x": 1}) as writer:
        assert writer.committed == 1


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out: exists"):
        BundleWriter(tmp_path / "out", 2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resume", ["auto", "restart"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, resume: str) -> None:
    foreign = tmp_path / "out.partial" / "thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    with pytest.raises(UsageError, match="is no work folder of uq"):
        BundleWriter(tmp_path / "out", 2, {}, resume=resume)
    assert foreign.read_text() == "mine"


def test_a_failure_before_the_first_commit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "out", 2, {}):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_shards_come_in_order(tmp_path: Path) -> None:
    with (
        BundleWriter(tmp_path / "out", 2, {}) as writer,
        pytest.raises(ValueError, match="shard 1 is not the next one, 0"),
    ):
        writer.write_shard(1, layer_entries(0))


def test_finishing_needs_all_shards(tmp_path: Path, bundle_parts: Callable[..., Any]) -> None:
    parts = bundle_parts(**SMALL)
    with (
        BundleWriter(tmp_path / "out", 2, {}) as writer,
        pytest.raises(ValueError, match="0 of 2 shards"),
    ):
        writer.finish(parts.manifest, {})


@pytest.mark.parametrize("rows", [(16, 16), (16, 48), (8, 24)])
def test_pieces_must_add_up(tmp_path: Path, rows: tuple[int, int]) -> None:
    entry = quant_entry("w", weight(16), weight(24))
    object.__setattr__(entry, "blocks", [weight(n) for n in rows])
    with BundleWriter(tmp_path / "out", 1, {}) as writer:
        with pytest.raises(ValueError, match="w: "):
            writer.write_shard(0, [entry])
        assert not list((tmp_path / "out.partial").glob("*.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "a//b",
        "manifest.json",
        "report.html",
        "journal.json",
        "a.safetensors",
    ],
)
def test_assets_stay_inside_and_leave_the_manifest_alone(
    tmp_path: Path, bundle_parts: Callable[..., Any], name: str
) -> None:
    parts = bundle_parts(**SMALL)
    parts.assets[name] = b"x"
    with pytest.raises(BundleError, match=name):
        write_all(tmp_path / "out", parts)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()


def test_a_full_disk_says_what_is_needed_and_keeps_committed_shards(tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    with BundleWriter(tmp_path / "out", 2, {}) as writer:
        writer.write_shard(0, layer_entries(0))
        full = tmp_path / "out.partial" / "model-00002-of-00002.safetensors"
        full.symlink_to("/dev/full")
        pattern = r"No space left on device: [\d,]+ bytes needed, [\d,]+ free; make room and"
        with pytest.raises(DeviceError, match=pattern):
            writer.write_shard(1, layer_entries(1))
        assert not os.path.lexists(full)
        assert writer.committed == 1


def test_a_limit_on_file_sizes_removes_the_shard_in_work(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with BundleWriter(tmp_path / "out", 1, {}) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(DeviceError, match="File too large: [0-9,]+ bytes needed"):
                writer.write_shard(0, [quant_entry("w", weight(4096), weight(4096))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list((tmp_path / "out.partial").glob("*.safetensors"))
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_noticed_before_the_work(tmp_path: Path) -> None:
    require_free(tmp_path / "a" / "b", 1)
    with pytest.raises(DeviceError, match="1,000,000,000,000,000,000 bytes needed"):
        require_free(tmp_path / "a" / "b", 10**18)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="out.partial: Not a directory"):
        BundleWriter(tmp_path / "file" / "out", 1, {})


def test_the_journal_is_a_line_of_json_and_its_hash(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out", 2, {"source": "tiny"}) as writer:
        writer.write_shard(0, layer_entries(0))
        assert writer.committed == 1
        line, digest = (tmp_path / "out.partial" / "journal.json").read_bytes().splitlines()
    journal = json.loads(line)
    assert digest.decode() == hashlib.sha256(line).hexdigest()
    assert journal["identity"]["source"] == "tiny"
    assert [shard["file"] for shard in journal["shards"]] == ["model-00001-of-00002.safetensors"]
