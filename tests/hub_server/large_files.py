"""Uploads of large objects: Git LFS's batch API with the Hub's own transfer in parts."""

from __future__ import annotations

import hashlib
from typing import Any

from tests.hub_server.access import require_writer
from tests.hub_server.exchange import Refusal, Reply, Request
from tests.hub_server.store import Bytes


def batch(request: Request, repo: str) -> Reply:
    """Where each object is to be sent; nowhere if it is there already."""
    require_writer(request, repo)
    wanted = request.json()["objects"]
    return Reply.json({"transfer": "basic", "objects": [actions(request, o) for o in wanted]})


def actions(request: Request, wanted: dict[str, Any]) -> dict[str, Any]:
    oid, size, part = wanted["oid"], wanted["size"], request.hub.part_size
    if oid in request.store.objects:
        return {"oid": oid, "size": size}
    here = f"{request.hub.cdn}/lfs/{oid}"
    upload: dict[str, Any] = {"href": here}
    if part is not None and size > part:
        parts = {str(n + 1): f"{here}/{n + 1}" for n in range(-(-size // part))}
        upload = {"href": f"{here}/complete", "header": parts | {"chunk_size": str(part)}}
    return {"oid": oid, "size": size, "actions": {"upload": upload}}


def put(request: Request, oid: str) -> Reply:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "", "the object has another hash")
    request.store.objects[oid] = Bytes(request.body)
    return Reply()


def put_part(request: Request, oid: str, part: str) -> Reply:
    request.store.parts[oid, int(part)] = request.body
    return Reply(headers={"ETag": hashlib.md5(request.body).hexdigest()})


def complete(request: Request, oid: str) -> Reply:
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    request.body = b"".join(request.store.parts[oid, number] for number in numbers)
    return put(request, oid)
