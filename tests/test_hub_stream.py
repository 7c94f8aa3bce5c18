"""A checkpoint on the loopback Hub, read by byte ranges through the real client."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
from numpy.testing import assert_array_equal

from tests.hub_server.server import HubServer
from tests.hub_server.store import Account
from uq.cli import main
from uq.errors import CheckpointError, HubError, UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import Checkpoint, open_checkpoint, read_ahead
from uq.formats.journal import CommittedShard
from uq.formats.writer import BundleWriter
from uq.progress import SilentProgress
from uq.quantize.pipeline import QuantizeOptions, quantize

REPO = "google/gemma-tiny"
RTN = QuantizeOptions(method="rtn")
WEIGHTS = r"\.safetensors$|/cdn/"
Tiny = Callable[..., Path]


def streamed(revision: str | None = None) -> Checkpoint:
    return open_checkpoint(REPO, revision=revision, stream=True)


def weight_bytes(hub: HubServer) -> int:
    return sum(request.sent for request in hub.requests("GET", WEIGHTS))


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest and its checksum, which name the source."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: data for name, data in files.items() if not name.startswith("manifest.")}


@pytest.mark.parametrize("shards", [1, 3])
def test_streamed_weights_are_those_of_the_folder(
    hub: HubServer, tiny_checkpoint: Tiny, shards: int
) -> None:
    folder = tiny_checkpoint(shards=shards, prefix="language_model.model.")
    commit = hub.store.add_folder(REPO, folder)
    remote, local = streamed(), open_checkpoint(folder)
    assert remote.source.revision == commit.sha
    assert_array_equal(remote.embedding(100, 300), local.embedding(100, 300))
    assert_array_equal(remote.final_norm(), local.final_norm())
    for layer in range(2):
        for role, weight in local.layer(layer).items():
            assert_array_equal(remote.layer(layer)[role], weight)


def test_hashes_come_from_the_hub(hub: HubServer, tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(shards=2)
    hub.store.add_folder(REPO, folder)
    remote = streamed()
    before = weight_bytes(hub)
    assert remote.fingerprint() == open_checkpoint(folder).fingerprint()
    assert weight_bytes(hub) == before


def test_opening_fetches_headers_only(hub: HubServer, tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(shards=2)
    hub.store.add_folder(REPO, folder)
    streamed()
    headers = [
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("model-*")
    ]
    assert weight_bytes(hub) == sum(headers) + 2  # one byte of each, to learn where it lies


def test_layer_is_fetched_by_itself(
    hub: HubServer, tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "BLOCK", 1 << 16)
    hub.store.add_folder(REPO, tiny_checkpoint(layers=4))
    remote = streamed()
    sizes = [info.nbytes for name, info in remote.tensors.items() if ".layers.2." in name]
    before = weight_bytes(hub)
    remote.rows("model.layers.2.mlp.down_proj.weight", 0, 1)
    assert 0 < weight_bytes(hub) - before <= sum(sizes)


def test_token_is_not_sent_to_the_store_of_large_files(
    hub: HubServer, tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint(), gated=True)
    hub.store.accounts["hf_reader"] = Account("reader", "read", accepted=frozenset({REPO}))
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    streamed().layer(0)
    asked, fetched = hub.requests("GET", r"/resolve/.*safetensors"), hub.requests("GET", "/cdn/")
    assert {request.token for request in asked} == {"hf_reader"}
    assert {request.token for request in fetched} == {None}


@pytest.mark.parametrize(
    "options", [["--method", "gptq"], ["--method", "rtn", "--keep"]], ids=["streamed", "kept"]
)
def test_quantized_bytes_are_those_of_the_folder(
    hub: HubServer, tiny_checkpoint: Tiny, tmp_path: Path, options: list[str]
) -> None:
    folder = tiny_checkpoint(shards=2)
    commit = hub.store.add_folder(REPO, folder)
    options = [*options, "--calibration-tokens", "400"]
    assert main(["quantize", REPO, "-o", str(tmp_path / "hub"), *options]) == 0
    assert main(["quantize", str(folder), "-o", str(tmp_path / "local"), *options]) == 0
    assert content(tmp_path / "hub") == content(tmp_path / "local")
    made = open_bundle(tmp_path / "hub").manifest.provenance
    assert (made.kind, made.id, made.revision) == ("hub", REPO, commit.sha)
    for name, file in made.files.items():
        stated = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert file.sha256 == (None if "--keep" in options else stated)
    local = open_bundle(tmp_path / "local").manifest.provenance.files
    assert {n: f.content for n, f in made.files.items()} == {n: f.content for n, f in local.items()}


@pytest.mark.parametrize("options", [[], ["--keep"]], ids=["streamed", "kept"])
def test_weights_are_on_the_disk_only_if_kept(
    hub: HubServer, tiny_checkpoint: Tiny, tmp_path: Path, options: list[str]
) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint())
    out = tmp_path / "out"
    assert main(["quantize", REPO, "--method", "rtn", "-o", str(out), *options]) == 0
    assert bool(list((tmp_path / "hub-cache").rglob("*.safetensors"))) == bool(options)


@pytest.mark.parametrize("options", [[], ["--keep"]], ids=["streamed", "kept"])
def test_reference_is_read_like_the_checkpoint(
    hub: HubServer,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    folder, out, text = tiny_checkpoint(vocab=2048), tmp_path / "out", tmp_path / "text"
    hub.store.add_folder(REPO, folder)
    text.write_text("the time of a world and its city in which no one " * 40)
    assert main(["quantize", REPO, "--method", "rtn", "-o", str(out)]) == 0
    scored = ["--text", str(text), "--context", "32", "--chunks", "4", "--no-speed", "--no-save"]
    capsys.readouterr()
    assert main(["validate", str(out), *scored, "--json", *options]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert bool(list((tmp_path / "hub-cache").rglob("*.safetensors"))) == bool(options)
    assert main(["validate", str(out), "--reference", str(folder), *scored, "--json"]) == 0
    theirs = json.loads(capsys.readouterr().out)
    for figure in ("kld", "perplexity", "layers"):
        assert ours[figure] == theirs[figure]


def test_kept_weights_are_not_fetched_again(hub: HubServer, tiny_checkpoint: Tiny) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint())
    open_checkpoint(REPO)
    before = weight_bytes(hub)
    streamed().layer(0)
    assert weight_bytes(hub) == before


def test_inspecting_fetches_no_weights(
    hub: HubServer, tiny_checkpoint: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint()
    hub.store.add_folder(REPO, folder)
    assert main(["inspect", REPO, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["provenance"]["files"]
    size = (folder / "model.safetensors").stat().st_size
    assert files == {"model.safetensors": size}
    assert weight_bytes(hub) < size / 10


def test_revision_is_pinned_when_opened(hub: HubServer, tiny_checkpoint: Tiny) -> None:
    first = tiny_checkpoint(seed=1)
    hub.store.add_folder(REPO, first)
    remote = streamed("main")
    hub.store.add_folder(REPO, tiny_checkpoint(seed=2))
    assert_array_equal(remote.embedding(0, 64), open_checkpoint(first).embedding(0, 64))


# A network that fails


def test_too_many_requests_are_waited_out(
    hub: HubServer, tiny_checkpoint: Tiny, pauses: list[float]
) -> None:
    folder = tiny_checkpoint()
    hub.store.add_folder(REPO, folder)
    remote = streamed()
    hub.fail("GET", WEIGHTS, status=429, headers={"Retry-After": "7"}, times=2)
    assert_array_equal(remote.embedding(0, 64), open_checkpoint(folder).embedding(0, 64))
    assert pauses == [7, 7]


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": 100}], ids=["status", "cut"])
def test_broken_transfer_is_tried_again(
    hub: HubServer, tiny_checkpoint: Tiny, pauses: list[float], fault: dict[str, int]
) -> None:
    folder = tiny_checkpoint()
    hub.store.add_folder(REPO, folder)
    remote = streamed()
    hub.fail("GET", "/cdn/", times=3, **fault)
    assert_array_equal(remote.embedding(0, 64), open_checkpoint(folder).embedding(0, 64))
    assert pauses == [1, 2]  # the first attempt after a failure comes at once


def test_where_a_file_lies_is_asked_once(hub: HubServer, tiny_checkpoint: Tiny) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint(shards=2))
    remote = streamed()
    remote.embedding(0, 64)
    remote.layer(0)
    assert len(hub.requests("GET", r"/resolve/.*\.safetensors$")) == 2


def test_address_that_has_expired_is_asked_for_anew(
    hub: HubServer, tiny_checkpoint: Tiny, pauses: list[float]
) -> None:
    folder = tiny_checkpoint()
    hub.store.add_folder(REPO, folder)
    remote = streamed()
    hub.signature = "of the next hour"
    assert_array_equal(remote.embedding(0, 64), open_checkpoint(folder).embedding(0, 64))
    assert [entry.status for entry in hub.requests("GET", "/cdn/")][-2:] == [206, 206]
    assert 403 in [entry.status for entry in hub.requests("GET", "/cdn/")]
    assert pauses == []


def test_store_that_keeps_refusing(hub: HubServer, tiny_checkpoint: Tiny) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint())
    remote = streamed()
    hub.fail("GET", "/cdn/", status=403, times=inf)
    with pytest.raises(HubError, match="the Hub answered 403"):
        remote.embedding(0, 64)


def test_file_of_xet_storage_is_read_over_its_bridge(
    hub: HubServer, tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    hub.store.accounts["hf_reader"] = Account("reader", "read")
    folder = tiny_checkpoint()
    hub.store.add_folder(REPO, folder)
    hub.xet = True
    assert_array_equal(streamed().embedding(0, 64), open_checkpoint(folder).embedding(0, 64))
    bridge = hub.requests("GET", "/cdn/")
    assert bridge and {entry.token for entry in bridge} == {None}
    assert hub.requests("GET", "xet-read-token") == []


def test_proxy_is_used(
    hub: HubServer, tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint())
    remote = streamed()
    monkeypatch.setenv("http_proxy", "http://user:word@127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("urllib3.util.retry.time.sleep", lambda seconds: None)
    with pytest.raises(HubError, match="the transfer broke off .*proxy"):
        remote.embedding(0, 64)


def test_lost_network_stops_and_the_same_command_continues(
    hub: HubServer,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(read_ahead, "BLOCK", 1 << 14)
    monkeypatch.setattr("uq.formats.checkpoint.opening.BLOCK", 1 << 14)
    folder, out = tiny_checkpoint(layers=6, seed=1), tmp_path / "out"
    hub.store.add_folder(REPO, folder)
    command = ["quantize", REPO, "--method", "rtn", "-o", str(out)]
    commit = BundleWriter._commit

    def commit_and_lose(writer: BundleWriter, shard: CommittedShard) -> None:
        commit(writer, shard)
        hub.fail("GET", "/cdn/", cut=10, times=inf)

    with monkeypatch.context() as patch:
        patch.setattr(BundleWriter, "_commit", commit_and_lose)
        assert main(command) == 1
    *_, note, message = capsys.readouterr().err.splitlines()
    found = re.search(r"keeps (\d+) finished parts; the same command continues", note)
    assert found and re.match(f"uq: {REPO}: .*https://huggingface.co/{REPO}", message)
    finished = sorted((tmp_path / "out.partial").glob("*.safetensors"))[: int(found[1])]
    kept = {path.name: path.stat().st_ino for path in finished}
    hub.faults.clear()
    hub.store.add_folder(REPO, tiny_checkpoint(layers=6, seed=2))  # the branch moves on
    assert main(command) == 0
    assert kept == {name: (out / name).stat().st_ino for name in kept}  # not written again
    expected = quantize(open_checkpoint(folder), tmp_path / "local", RTN)
    assert content(out) == content(expected)


def test_other_revision_does_not_continue(
    hub: HubServer, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint(seed=1))
    begun = quantize_partly(streamed(), tmp_path / "out")
    hub.store.add_folder(REPO, tiny_checkpoint(seed=2))
    with pytest.raises(UsageError, match=f"was begun with revision {begun.source.revision}, now"):
        quantize(streamed(), tmp_path / "out", RTN)


def quantize_partly(checkpoint: Checkpoint, out: Path) -> Checkpoint:
    """Leave the first shard of a bundle in its work folder."""
    progress = StopAfter(1)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, out, RTN, progress)
    return checkpoint


class StopAfter(SilentProgress):
    def __init__(self, steps: int) -> None:
        self._left = steps

    def advance(self, step: str, **figures: float) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_offline_without_a_copy_of_the_weights(
    hub: HubServer, tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint())
    streamed()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        streamed()


def test_repository_without_a_shard_of_its_index(hub: HubServer, tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.store.add_folder(REPO, folder)
    with pytest.raises(CheckpointError, match=f"{REPO}: has no model-00002-of-00002"):
        streamed()


@pytest.mark.parametrize("token", [None, "hf_reader"])
def test_licence_that_is_not_accepted(
    hub: HubServer, tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint(), gated=True)
    hub.store.accounts["hf_reader"] = Account("reader", "read")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    words = "licence is not accepted for this token" if token else "accepted licence and a token"
    with pytest.raises(HubError, match=words):
        streamed()


def test_command_in_a_process_of_its_own(
    hub: HubServer, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    hub.store.add_folder(REPO, tiny_checkpoint())
    command = [sys.executable, "-m", "uq", "quantize", REPO, "--method", "rtn", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "internal error" in done.stderr) == (0, False), done.stderr
    assert open_bundle(tmp_path / "out").manifest.provenance.id == REPO
