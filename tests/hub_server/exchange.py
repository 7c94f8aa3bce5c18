"""A request and its answer, as the routes of the loopback Hub see them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.hub_server.store import Account, Bytes, Content, Store

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer


@dataclass
class Request:
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    hub: HubServer
    body: bytes = b""

    @property
    def store(self) -> Store:
        return self.hub.store

    def header(self, name: str) -> str | None:
        return next((v for key, v in self.headers.items() if key.lower() == name.lower()), None)

    def argument(self, name: str) -> str | None:
        return parse_qs(self.query).get(name, [None])[0]

    @property
    def token(self) -> str | None:
        return (self.header("authorization") or "").removeprefix("Bearer ") or None

    @property
    def account(self) -> Account | None:
        return self.store.accounts.get(self.token or "")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Reply:
    """A status, headers, and `content[start:stop]`."""

    status: int = 200
    content: Content = Bytes(b"")
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int = 0

    @classmethod
    def of(cls, content: Content, status: int = 200, **headers: str) -> Reply:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return cls(status, content, named, 0, content.size)

    @classmethod
    def json(cls, data: Any, status: int = 200) -> Reply:
        reply = cls.of(Bytes(json.dumps(data).encode()), status)
        reply.headers["Content-Type"] = "application/json"
        return reply


@dataclass
class Refusal(Exception):
    """Ends a route with an error as the Hub words it."""

    status: int
    code: str
    message: str

    @property
    def reply(self) -> Reply:
        reply = Reply.json({"error": self.message}, self.status)
        reply.headers |= {"X-Error-Message": self.message}
        if self.code:
            reply.headers["X-Error-Code"] = self.code
        return reply
