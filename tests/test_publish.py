"""Publishing to the loopback Hub through the real client; everything that must stop it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, snapshot_download

from tests.hub_server.server import HubServer
from tests.hub_server.store import Account
from tests.test_report import REPORT
from uq.cli import main
from uq.formats.bundle import open_bundle
from uq.publish.card import NOTICE
from uq.publish.contents import Upload
from uq.publish.preflight import file_problems
from uq.validate.files import save_report
from uq.validate.html import render_html
from uq.validate.plots import figures
from uq.validate.report import Report, Threshold

# httpx2 deprecates how huggingface_hub hands it the content of an upload.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO, BASE = "maker/gemma-tiny-int4", "google/gemma-tiny"
ARGUMENTS = ["--base-model", BASE]


@pytest.fixture(scope="module")
def original(tiny_bundle: Callable[..., Path]) -> Path:
    """A bundle with a report."""
    folder = tiny_bundle()
    save_report(report_of(folder), folder)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "gemma-tiny-int4"))


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal reports have equal figures; drawing them takes most of the time of a test."""
    monkeypatch.setattr("uq.publish.publish.figures", drawn)


drawn = cache(figures)


@pytest.fixture
def hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The base model, and a token of `maker` that may write."""
    hub.store.add(BASE, {"config.json": b"{}"}, gated=True)
    accepted = frozenset({BASE})
    hub.store.accounts["hf_write"] = Account("maker", organizations=("lab",), accepted=accepted)
    hub.store.accounts["hf_read"] = Account("maker", "read", accepted=accepted)
    hub.store.accounts["hf_refused"] = Account("maker")
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return hub


def report_of(folder: Path) -> Report:
    bundle = open_bundle(folder, verify="lazy")
    return replace(REPORT, bundle=replace(REPORT.bundle, name="tiny", sha256=bundle.sha256))


def publish(bundle: Path, repo: str = REPO, *options: str) -> int:
    return main(["publish", str(bundle), repo, *ARGUMENTS, *options])


def problems(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]


def remote_files(hub: HubServer, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    commit = hub.store.repositories[repo].find(revision)
    assert commit is not None
    return {name: f.content.read(0, f.content.size) for name, f in commit.files.items()}


def test_published_files_are_those_of_the_bundle(hub: HubServer, bundle: Path) -> None:
    assert publish(bundle) == 0
    files = remote_files(hub)
    listed = open_bundle(bundle).manifest.files
    for name in (*listed, "manifest.json", "manifest.sha256", "report.json", "report.html"):
        assert files[name] == (bundle / name).read_bytes()
    assert files["NOTICE"].decode() == f"{NOTICE}\n"
    assert [commit.message for commit in hub.store.repositories[REPO].history] == [
        "initial commit",
        "Publish a bundle made by uq",
    ]


def test_card_holds_what_the_hub_and_a_reader_need(hub: HubServer, bundle: Path) -> None:
    assert publish(bundle) == 0
    files = remote_files(hub)
    card = ModelCard(files["README.md"].decode())
    facts: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    assert facts["base_model"] == BASE
    assert facts["base_model_relation"] == "quantized"
    assert (facts["license"], facts["pipeline_tag"]) == ("gemma", "text-generation")
    assert facts["library_name"] and "quantized" in facts["tags"]
    metrics = {
        m["type"]: m["value"] for r in facts["model-index"][0]["results"] for m in r["metrics"]
    }
    assert metrics["kl_divergence"] == REPORT.kld.mean
    assert metrics["perplexity_ratio"] == REPORT.perplexity_ratio.value
    assert f"uq generate {REPO} -p" in card.text
    assert NOTICE in card.text
    assert "0.0480" in card.text and "some CPU" in card.text
    assert {name for name in files if name.startswith("plots/")} == {
        f"plots/{name}.svg" for name in ("kld", "perplexity", "errors", "sizes", "speed")
    }
    assert all(f"]({name})" in card.text for name in files if name.startswith("plots/"))


def test_plots_stand_for_themselves(hub: HubServer, bundle: Path) -> None:
    assert publish(bundle) == 0
    for name, data in remote_files(hub).items():
        if name.endswith(".svg"):
            assert data.startswith(b"<svg") and b"var(--" not in data


def test_published_bundle_opens_by_its_name(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(bundle) == 0
    opened = open_bundle(REPO)
    assert (opened.sha256, opened.name) == (open_bundle(bundle).sha256, "gemma-tiny-int4")
    capsys.readouterr()
    assert main(["generate", REPO, "-p", "the", "--max-tokens", "2"]) == 0
    ours = capsys.readouterr().out
    assert main(["generate", str(bundle), "-p", "the", "--max-tokens", "2"]) == 0
    assert ours == capsys.readouterr().out


def test_branch_can_be_published_and_opened(hub: HubServer, bundle: Path) -> None:
    assert publish(bundle, REPO, "--revision", "v2") == 0
    assert set(hub.store.repositories[REPO].branches) == {"main", "v2"}
    assert not remote_files(hub)
    assert open_bundle(f"{REPO}@v2").sha256 == open_bundle(bundle).sha256


def test_downloaded_damage_is_found(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(bundle) == 0
    shard = Path(snapshot_download(REPO)) / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.resolve().write_bytes(data)
    assert main(["generate", REPO, "-p", "the"]) == 1
    assert "its hash differs from manifest.json" in capsys.readouterr().err


def test_private_repository(hub: HubServer, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert publish(bundle, "lab/secret", "--private") == 0
    assert hub.store.repositories["lab/secret"].private
    assert open_bundle("lab/secret").sha256 == open_bundle(bundle).sha256


def test_dry_run_shows_card_and_files_and_sends_nothing(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(bundle, REPO, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "base_model_relation: quantized" in out and "model-00001-of-00003.safetensors" in out
    assert publish(bundle, REPO, "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    record = open_bundle(bundle).manifest.files["tokenizer.json"]
    assert facts["files"]["tokenizer.json"] == {"size": record.size, "sha256": record.sha256}
    assert facts["problems"] == [] and facts["commit"] is None
    assert REPO not in hub.store.repositories
    assert not hub.requests("POST", "") and not hub.requests("PUT", "")


def test_dry_run_reads_no_weights(
    hub: HubServer, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a file was hashed")

    monkeypatch.setattr("uq.formats.bundle.hash_files", refuse)
    assert publish(bundle, REPO, "--dry-run") == 0


def test_publishing_again_changes_the_report_alone(hub: HubServer, bundle: Path) -> None:
    assert publish(bundle) == 0
    again = replace(report_of(bundle), same_top_percent=93.0)
    save_report(again, bundle)
    sent = len(hub.requests("PUT", ""))
    assert publish(bundle) == 0
    assert remote_files(hub)["report.html"].decode() == render_html(again)
    assert len(hub.requests("PUT", "")) == sent


# Interrupted uploads


@pytest.mark.parametrize("part_size", [None, 10_000], ids=["whole", "in parts"])
def test_interrupted_upload_continues_without_sending_again(
    hub: HubServer,
    bundle: Path,
    pauses: list[float],
    capsys: pytest.CaptureFixture[str],
    part_size: int | None,
) -> None:
    hub.part_size = part_size
    lost = open_bundle(bundle).manifest.files["model-00003-of-00003.safetensors"].sha256
    hub.fail("PUT", f"/lfs/{lost}", cut=100, times=inf)
    assert publish(bundle) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "nothing was published, the same command continues with what is missing" in last
    assert not remote_files(hub)
    hub.faults.clear()
    before = len(hub.log)
    assert publish(bundle) == 0
    sent = [request.path for request in hub.log[before:] if request.method == "PUT"]
    assert sent and all(path.startswith(f"/lfs/{lost}") for path in sent)
    assert open_bundle(REPO).sha256 == open_bundle(bundle).sha256


def test_broken_transfer_is_tried_again(hub: HubServer, bundle: Path, pauses: list[float]) -> None:
    hub.fail("PUT", "/lfs/", cut=100, times=2)
    hub.fail("PUT", "/lfs/", status=503, times=1)
    assert publish(bundle) == 0
    assert len(pauses) == 3


def test_refused_commit_publishes_nothing(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST", "/commit/", status=500)
    assert publish(bundle) == 1
    assert "nothing was published" in capsys.readouterr().err
    assert not remote_files(hub)


def test_commit_of_somebody_else_in_between_is_not_overwritten(
    hub: HubServer, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.create(REPO)
    verify = "uq.formats.bundle.Bundle.verify"  # between looking and sending
    monkeypatch.setattr(verify, lambda _: hub.store.add(REPO, {"other.txt": b"hello"}))
    assert publish(bundle) == 1
    assert set(remote_files(hub)) == {"other.txt"}


# What must be right before anything is sent


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "no token: make one that may write at https://huggingface.co/settings/tokens"),
        ("hf_unknown", "the Hub does not know this token: make one that may write"),
        ("hf_read", "may not write to maker: make one that may write"),
        ("hf_refused", f"base model: {BASE}: the licence is not accepted for this token; accept"),
    ],
)
def test_token_and_licence(
    hub: HubServer,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    token: str | None,
    words: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert publish(bundle) == 1
    assert any(words in line for line in problems(capsys))
    assert REPO not in hub.store.repositories


def test_owner_must_be_the_tokens(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(bundle, "stranger/gemma") == 1
    assert problems(capsys) == ["the token is of maker, who is not a member of stranger"]


@pytest.mark.parametrize("repo", ["gemma", "maker/gem ma", "maker/a--b", "a/b/c"])
def test_name_that_the_hub_does_not_allow(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str], repo: str
) -> None:
    assert publish(bundle, repo) == 1
    assert all(line.startswith(f"{repo}: ") for line in problems(capsys))


def test_other_content_is_kept_unless_replaced(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.add(REPO, {"old.bin": b"old", ".gitattributes": b""})
    assert publish(bundle) == 1
    (line,) = problems(capsys)
    assert f"{REPO}: exists with other content (1 files: old.bin" in line
    assert publish(bundle, REPO, "--replace") == 0
    assert "old.bin" not in remote_files(hub) and ".gitattributes" in remote_files(hub)


def test_public_repository_does_not_become_private(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.create(REPO)
    assert publish(bundle, REPO, "--private") == 1
    assert problems(capsys) == [f"{REPO}: exists and is public; --private is for a new repository"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["NOTICE", "notice"], "notice: differs from NOTICE in upper and lower case only"),
        ([".git/config"], ".git/config: the Hub keeps this name for itself"),
        (["large"], "large: 60,000,000,000 bytes; the Hub takes 50,000,000,000"),
    ],
)
def test_file_that_the_hub_does_not_take(names: list[str], words: str) -> None:
    files = tuple(Upload(n, b"", 60 * 10**9 if n == "large" else 1, "0" * 64) for n in names)
    assert list(file_problems(files)) == [words]


def test_report_of_other_bytes(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_report(REPORT, bundle)
    assert publish(bundle) == 1
    assert any("belongs to other bytes (9f9f9f9f9f9f" in line for line in problems(capsys))


def test_missed_limit(hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missed = Threshold("max_kld", 0.01, 0.048, False)
    save_report(replace(report_of(bundle), thresholds=(missed,)), bundle)
    assert publish(bundle) == 1
    assert any("a limit was missed: tiny: --max-kld 0.01" in line for line in problems(capsys))


def test_unknown_base_model(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(bundle), REPO]) == 1
    assert problems(capsys) == [
        "model card: base_model is missing: the bundle does not name a model of the Hub; pass "
        "--base-model ORG/NAME"
    ]


def test_everything_wrong_is_listed_at_once(
    hub: HubServer,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (bundle / "report.json").unlink()
    hub.store.add(REPO, {"old.bin": b"old"})
    assert main(["publish", str(bundle), REPO, "--dry-run"]) == 1
    found = problems(capsys)
    assert len(found) == 5
    expected = ("report.json", "base_model", "eval_results", "no token", "other content")
    assert all(word in line for word, line in zip(expected, found, strict=True))


def test_damaged_bundle_is_not_published(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = bundle / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert publish(bundle) == 1
    assert "its hash differs from manifest.json" in capsys.readouterr().err
    assert REPO not in hub.store.repositories


def test_network_that_is_down(
    hub: HubServer, bundle: Path, capsys: pytest.CaptureFixture[str], pauses: list[float]
) -> None:
    hub.fail("GET", "/api/", status=503, times=inf)
    assert publish(bundle, REPO, "--dry-run") == 1
    out, err = capsys.readouterr()
    assert NOTICE in out and "README.md" in out  # what can be looked at all the same
    *_, problem, last = err.splitlines()
    assert problem.startswith(f"problem: {REPO}: the Hub answered 503")
    assert last == f"uq: {REPO}: 1 problem, see above"


def test_repository_without_a_bundle_says_what_to_do(
    hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", BASE, "-p", "the"]) == 1
    assert f"make a bundle of it with: uq quantize {BASE}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, " \n"])
def test_terms_that_are_none_are_refused(
    hub: HubServer,
    bundle: Path,
    tmp_path: Path,
    content: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    terms = tmp_path / "terms.md"
    if content is not None:
        terms.write_text(content)
    assert publish(bundle, REPO, "--terms", str(terms)) == 2
    assert capsys.readouterr().err.startswith(f"uq: --terms {terms}: ")
