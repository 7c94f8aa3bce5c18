"""The routes: what the Hub answers to what `huggingface_hub` asks."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from tests.hub_server.access import found, require_accepted, require_writer
from tests.hub_server.exchange import Refusal, Reply, Request
from tests.hub_server.large_files import batch, complete, put, put_part
from tests.hub_server.store import Bytes, Commit, File, is_large

NAME = r"[\w.-]+/[\w.-]+?"
REPO = rf"/api/models/(?P<repo>{NAME})"
REVISION = r"(?P<revision>.+?)"


def whoami(request: Request) -> Reply:
    account = request.account
    if account is None:
        raise Refusal(401, "", "Invalid credentials in Authorization header")
    return Reply.json(
        {
            "type": "user",
            "name": account.name,
            "orgs": [{"type": "org", "name": name} for name in account.organizations],
            "auth": {"type": "access_token", "accessToken": {"role": account.role}},
        }
    )


def model_info(request: Request, repo: str, revision: str = "main") -> Reply:
    repository, commit = found(request, repo, revision)
    siblings = [
        {"rfilename": path} | (blob_facts(file) if request.argument("blobs") else {})
        for path, file in sorted(commit.files.items())
    ]
    card = {"cardData": {"license": repository.licence}} if repository.licence else {}
    facts: dict[str, Any] = {
        "id": repository.id,
        "sha": commit.sha,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "siblings": siblings,
    }
    return Reply.json(facts | card)


def blob_facts(file: File) -> dict[str, Any]:
    facts: dict[str, Any] = {"size": file.content.size, "blobId": file.oid}
    if file.large:
        size = len(file.pointer)
        facts["lfs"] = {
            "sha256": file.content.sha256, "size": file.content.size, "pointerSize": size,
        }  # fmt: skip
    return facts


def tree(request: Request, repo: str, revision: str) -> Reply:
    _, commit = found(request, repo, revision)
    return Reply.json([tree_entry(path, file) for path, file in sorted(commit.files.items())])


def tree_entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": file.content.size, "oid": file.oid}
    if file.large:
        size = len(file.pointer)
        entry["lfs"] = {"oid": file.content.sha256, "size": file.content.size, "pointerSize": size}
    return entry


def auth_check(request: Request, repo: str) -> Reply:
    repository, _ = found(request, repo, "main")
    require_accepted(request, repository)
    return Reply.json({})


def auth_check_write(request: Request, repo: str) -> Reply:
    found(request, repo, "main")
    require_writer(request, repo)
    return Reply.json({})


def resolve(request: Request, repo: str, revision: str, path: str) -> Reply:
    """A small file itself, or the way to a large one: on another host, without a token."""
    repository, commit = found(request, repo, revision)
    require_accepted(request, repository)
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if not file.large:
        reply = ranged(request, Reply.of(file.content))
        reply.headers |= headers | {"ETag": f'"{file.etag}"'}
        return reply
    return Reply(302, headers=headers | way_to(request, repo, commit, file))


def way_to(request: Request, repo: str, commit: Commit, file: File) -> dict[str, str]:
    """Headers that lead to a large object; of Xet storage too, for clients that can use it."""
    sha256, hub = file.content.sha256, request.hub
    signature = urlencode({"Signature": hub.signature})
    headers = {
        "X-Linked-Etag": f'"{file.etag}"',
        "X-Linked-Size": str(file.content.size),
        "Location": f"{hub.cdn}/cdn/{sha256}?{signature}",
    }
    if hub.xet:
        token = f"{hub.url}/api/models/{repo}/xet-read-token/{commit.sha}"
        headers |= {
            "X-Xet-Hash": sha256,
            "Link": f'<{token}>; rel="xet-auth", <{hub.cdn}/xet/{sha256}>; '
            'rel="xet-reconstruction-info"',
        }
    return headers


def large_object(request: Request, oid: str) -> Reply:
    if request.token is not None:
        raise Refusal(400, "", "a token was sent to the store of large objects")
    if request.argument("Signature") != request.hub.signature:
        raise Refusal(403, "", "Request has expired")
    reply = ranged(request, Reply.of(request.store.objects[oid]))
    reply.headers["ETag"] = f'"{oid}"'
    return reply


def ranged(request: Request, reply: Reply) -> Reply:
    """The part that `Range: bytes=first-last` asks for, both inclusive (RFC 9110, 14.1.2)."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.header("range") or "")
    if not match:
        return reply
    size = reply.content.size
    reply.start, reply.stop = int(match[1]), min(int(match[2] or size - 1) + 1, size)
    if reply.start >= size:
        return Reply(416, headers={"Content-Range": f"bytes */{size}"})
    reply.status = 206
    reply.headers["Content-Range"] = f"bytes {reply.start}-{reply.stop - 1}/{size}"
    return reply


def create(request: Request) -> Reply:
    wanted = request.json()
    account = request.account
    owner = wanted.get("organization") or (account.name if account else "")
    repo_id = f"{owner}/{wanted['name']}"
    require_writer(request, repo_id)
    if repo_id in request.store.repositories:
        return Reply.json({"url": f"{request.hub.url}/{repo_id}", "error": "exists"}, 409)
    request.store.create(repo_id, wanted.get("visibility") == "private")
    return Reply.json({"url": f"{request.hub.url}/{repo_id}", "id": repo_id})


def branch(request: Request, repo: str, revision: str) -> Reply:
    require_writer(request, repo)
    repository, commit = found(request, repo, "main")
    if revision in repository.branches:
        return Reply.json({"error": "Reference already exists"}, 409)
    repository.branches[revision] = commit.sha
    return Reply.json({})


def preupload(request: Request, repo: str, revision: str) -> Reply:
    require_writer(request, repo)
    _, commit = found(request, repo, revision)
    return Reply.json({"files": [mode(commit, file) for file in request.json()["files"]]})


def mode(commit: Commit, wanted: dict[str, Any]) -> dict[str, Any]:
    path, present = wanted["path"], commit.files.get(wanted["path"])
    return {
        "path": path,
        "uploadMode": "lfs" if is_large(path, wanted["size"]) else "regular",
        "shouldIgnore": False,
        "oid": present.etag if present else None,
    }


def validate_yaml(request: Request) -> Reply:
    text = request.json()["content"]
    if not text.startswith("---\n"):
        return Reply.json({"errors": [{"message": "empty metadata"}], "warnings": []}, 400)
    return Reply.json({"errors": [], "warnings": []})


def commit(request: Request, repo: str, revision: str) -> Reply:
    """All operations or none: every large object must be there before a file names it."""
    require_writer(request, repo)
    with request.store.lock:
        repository, base = found(request, repo, revision)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent not in (None, base.sha):
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for operation in operations:
            apply(request, files, operation["key"], operation["value"])
        made = repository.commit(revision, files, header["value"]["summary"])
    url = f"{request.hub.url}/{repo}/commit/{made.sha}"
    return Reply.json({"success": True, "commitOid": made.sha, "commitUrl": url})


def apply(request: Request, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = File(Bytes(base64.b64decode(value["content"])), large=False)
    elif key == "lfsFile":
        content = request.store.objects.get(value["oid"])
        if content is None:
            raise Refusal(400, "", f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = File(content, large=True)
    else:
        del files[path]


Route = tuple[str, str, Callable[..., Reply]]


def refusable(respond: Callable[..., Reply]) -> Callable[..., Reply]:
    def answered(request: Request, **names: str) -> Reply:
        try:
            return respond(request, **names)
        except Refusal as refusal:
            return refusal.reply

    return answered


TABLE: tuple[Route, ...] = (
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", rf"{REPO}/auth-check", auth_check),
    ("GET", rf"{REPO}/auth-check/write", auth_check_write),
    ("GET", rf"{REPO}/tree/{REVISION}", tree),
    ("POST", rf"{REPO}/branch/{REVISION}", branch),
    ("POST", rf"{REPO}/preupload/{REVISION}", preupload),
    ("POST", rf"{REPO}/commit/{REVISION}", commit),
    ("GET", rf"{REPO}/revision/{REVISION}", model_info),
    ("GET", REPO, model_info),
    ("GET", rf"/(?P<repo>{NAME})/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ("GET", r"/cdn/(?P<oid>\w+)", large_object),
    ("POST", rf"/(?P<repo>{NAME})\.git/info/lfs/objects/batch", batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", put),
    ("PUT", r"/lfs/(?P<oid>\w+)/(?P<part>\d+)", put_part),
    ("POST", r"/lfs/(?P<oid>\w+)/complete", complete),
)
ROUTES = [(method, pattern, refusable(respond)) for method, pattern, respond in TABLE]
