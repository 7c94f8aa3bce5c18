"""The Hub, answered at the HTTP boundary of huggingface_hub; offline mode for real."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory
from numpy.testing import assert_array_equal

from uq.errors import CheckpointError, HubError
from uq.formats.checkpoint import open_checkpoint
from uq.formats.hub_name import is_hub_id

# The HTTP client that this version of huggingface_hub uses: httpx or httpx2.
httpx: Any = import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "google/gemma-3-1b-it"
PAGE = f"https://huggingface.co/{REPO}"
Respond = Callable[[Any], Any]


class FakeHub:
    """Serves one folder as the repository `REPO` and remembers which files were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: set[str] = set()
        self.tokens: set[str] = set()

    def __call__(self, request: Any) -> Any:
        path = request.url.path
        self.tokens.add(request.headers.get("authorization", ""))
        if path.startswith(f"/api/models/{REPO}/revision/"):
            return httpx.Response(200, json={"id": REPO, "sha": COMMIT})
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            return httpx.Response(200, json=[self.entry(file) for file in self.folder.iterdir()])
        if path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            return self.file(request, path.rpartition("/")[2])
        return httpx.Response(404)

    def entry(self, file: Path) -> dict[str, Any]:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def file(self, request: Any, name: str) -> Any:
        data = (self.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if request.method == "HEAD":
            return httpx.Response(200, headers=headers | {"Content-Length": str(len(data))})
        self.fetched.add(name)
        return httpx.Response(200, headers=headers, content=data)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Respond], None]]:
    """Replaces the network: every request goes to the given function."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")

    def install(respond: Respond) -> None:
        transport = httpx.MockTransport(respond)
        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=transport))

    yield install
    huggingface_hub.set_client_factory(default_client_factory)


def refuse(status: int, **headers: str) -> Respond:
    named = {f"X-Error-{key.capitalize()}": value for key, value in headers.items()}
    return lambda request: httpx.Response(status, headers=named, request=request)


def hub_error(repo: str = REPO, **options: Any) -> str:
    with pytest.raises(HubError) as caught:
        open_checkpoint(repo, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_repository_is_read_like_its_folder(
    answer: Callable[[Respond], None], tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(shards=2)
    (folder / "LICENSE").write_text("terms")
    (folder / "pytorch_model.bin").write_text("not wanted")
    (folder / "gemma.gguf").write_text("not wanted")
    hub = FakeHub(folder)
    answer(hub)
    checkpoint = open_checkpoint(REPO, revision="main")
    assert (checkpoint.source.kind, checkpoint.source.id) == ("hub", REPO)
    assert checkpoint.source.revision == COMMIT
    assert_array_equal(checkpoint.embedding(0, 512), open_checkpoint(folder).embedding(0, 512))
    assert checkpoint.assets()["LICENSE"] == b"terms"
    assert hub.fetched == {file.name for file in folder.iterdir()} - {
        "pytorch_model.bin",
        "gemma.gguf",
    }


def test_token_is_sent(
    answer: Callable[[Respond], None], tiny_checkpoint: Callable[..., Path]
) -> None:
    hub = FakeHub(tiny_checkpoint())
    answer(hub)
    open_checkpoint(REPO)
    assert "Bearer hf_test" in hub.tokens


def test_other_architecture_is_refused_before_its_weights_are_fetched(
    answer: Callable[[Respond], None], tiny_checkpoint: Callable[..., Path]
) -> None:
    hub = FakeHub(tiny_checkpoint(config={"model_type": "llama"}))
    answer(hub)
    with pytest.raises(CheckpointError, match=f"{REPO}: config.json: model_type 'llama'"):
        open_checkpoint(REPO)
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_repository_without_config_is_refused(
    answer: Callable[[Respond], None], tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").unlink()
    answer(FakeHub(folder))
    with pytest.raises(CheckpointError, match=f"{REPO}: has no config.json; see {PAGE}"):
        open_checkpoint(REPO)


def test_no_token_for_a_gated_model(answer: Callable[[Respond], None]) -> None:
    answer(refuse(401, code="GatedRepo"))
    assert hub_error() == (
        f"{REPO}: needs an accepted licence and a token; accept the licence at {PAGE}, then set "
        "HF_TOKEN to a token from https://huggingface.co/settings/tokens"
    )


def test_licence_that_is_not_accepted(answer: Callable[[Respond], None]) -> None:
    answer(refuse(403, code="GatedRepo"))
    assert hub_error() == f"{REPO}: the licence is not accepted for this token; accept it at {PAGE}"


def test_gated_file_of_a_listed_repository(
    answer: Callable[[Respond], None], tiny_checkpoint: Callable[..., Path]
) -> None:
    hub = FakeHub(tiny_checkpoint())
    gate = refuse(403, code="GatedRepo")
    answer(lambda request: gate(request) if "/resolve/" in request.url.path else hub(request))
    assert "the licence is not accepted" in hub_error()


@pytest.mark.parametrize(
    ("repo", "ids"),
    [
        ("google/gemma-3-27b", "google/gemma-3-27b-it, google/gemma-3-27b-pt"),
        ("google/gemma-3-270m-pt", "google/gemma-3-270m, google/gemma-3-270m-it"),
        ("google/gemma-2-9b-pt", "google/gemma-2-9b, google/gemma-2-9b-it"),
        ("google/gemma-7b-pt", "google/gemma-7b, google/gemma-7b-it"),
    ],
)
@pytest.mark.parametrize("status", [401, 404])
def test_wrong_id_of_a_known_model_names_those_that_exist(
    answer: Callable[[Respond], None], repo: str, ids: str, status: int
) -> None:
    answer(refuse(status, code="RepoNotFound"))
    assert hub_error(repo) == (
        f"{repo}: no such model on the Hub, or it is private (https://huggingface.co/{repo}); "
        f"these exist: {ids}"
    )


def test_unknown_id_names_the_page(answer: Callable[[Respond], None]) -> None:
    answer(refuse(404, code="RepoNotFound"))
    assert hub_error("someone/gemma-3-27b") == (
        "someone/gemma-3-27b: no such model on the Hub, or it is private "
        "(https://huggingface.co/someone/gemma-3-27b)"
    )


def test_missing_revision(answer: Callable[[Respond], None]) -> None:
    answer(refuse(404, code="RevisionNotFound"))
    assert hub_error(revision="v9") == (
        f"{REPO}: no revision 'v9'; see {PAGE}/tree/main for those that exist"
    )


def test_server_error(answer: Callable[[Respond], None]) -> None:
    answer(refuse(403, message="quota"))
    message = hub_error()
    assert PAGE in message
    assert "403" in message


@pytest.mark.parametrize("error", ["ConnectError", "ConnectTimeout", "ReadError", "ProxyError"])
def test_network_that_is_down(
    answer: Callable[[Respond], None], monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    def fail(request: Any) -> Any:
        raise getattr(httpx, error)("no route to host", request=request)

    answer(fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    message = hub_error()
    assert message == (f"{REPO}: cannot reach the Hub (no route to host) to get {PAGE}; try again")


def test_a_token_that_the_hub_refuses(answer: Callable[[Respond], None]) -> None:
    answer(refuse(401, message="Invalid credentials in Authorization header"))
    assert hub_error() == (
        f"{REPO}: the Hub refuses the token; set HF_TOKEN to one from "
        "https://huggingface.co/settings/tokens"
    )


OPEN = "import sys; from uq.formats.checkpoint import open_checkpoint as o; print(o(sys.argv[1]))"


def offline(cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", OPEN, REPO]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_offline_without_a_copy(tmp_path: Path) -> None:
    assert offline(tmp_path).stderr.splitlines()[-1] == (
        f"uq.errors.HubError: {REPO}: not in the local cache, and HF_HUB_OFFLINE is set; unset "
        f"it, or give the folder of a copy of {PAGE}"
    )


def test_offline_with_a_copy(
    answer: Callable[[Respond], None], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    answer(FakeHub(tiny_checkpoint()))
    open_checkpoint(REPO)
    result = offline(tmp_path / "hub")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/gemma-3-1b-it", True),
        ("org/name.v2", True),
        ("gemma", False),
        ("./models/gemma", False),
        ("/models/gemma", False),
        ("a/b/c", False),
        ("models/gemma.gguf", False),
        ("../gemma", False),
    ],
)
def test_hub_ids_are_told_from_paths(name: str, expected: bool) -> None:
    assert is_hub_id(name) == expected
