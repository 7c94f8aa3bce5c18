"""A Hugging Face Hub on the loopback, for the unmodified `huggingface_hub` client.

It speaks what the client uses of the Hub's HTTP API, stores what it is sent, and can be told to
fail: with a status, or by cutting a connection in the middle. It has no Xet service, so a client
that downloads or sends whole files must run with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub_server.api import ROUTES
from tests.hub_server.exchange import Reply, Request
from tests.hub_server.store import Content, OnDisk, Store

BLOCK = 1 << 20


@dataclass
class Fault:
    """What the next `times` requests that match, behind the first `after`, get for an answer.

    Attributes:
        status, headers: the answer, if `cut` is None.
        cut: the connection ends after so many bytes of the answer, or of an upload.
    """

    method: str
    path: str
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    times: float = 1
    after: int = 0


@dataclass(frozen=True)
class Logged:
    """A request as it was answered; `sent` and `received` count the bytes of the bodies."""

    method: str
    path: str
    status: int
    range: str | None
    token: str | None
    sent: int
    received: int


class HubServer:
    """The server, running in threads of its own; `with HubServer() as hub:`.

    Attributes:
        part_size: uploads that are larger are asked for in parts of so many bytes.
        signature: of the addresses of large objects; one that is changed makes them expire.
        xet: name the hash and the service of Xet storage beside each large object, as the Hub does.
    """

    def __init__(self, *, part_size: int | None = None) -> None:
        self.store = Store()
        self.part_size = part_size
        self.signature = "of this hour"
        self.xet = False
        self.faults: list[Fault] = []
        self.log: list[Logged] = []
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._http = QuietServer(("127.0.0.1", 0), handler)
        self._thread = Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def cdn(self) -> str:
        """Another host name, as the Hub's large objects have: tokens must not be sent to it."""
        return f"http://localhost:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, method: str, path: str, **options: Any) -> None:
        """Add a fault; `path` is a regular expression."""
        self.faults.append(Fault(method, path, **options))

    def fault(self, request: Request) -> Fault | None:
        with self.store.lock:
            for fault in self.faults:
                same = fault.method == request.method and re.search(fault.path, request.path)
                if same and fault.after > 0:
                    fault.after -= 1
                elif same and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def requests(self, method: str, path: str) -> list[Logged]:
        """What was answered so far and matches, in order."""
        found = (entry for entry in list(self.log) if entry.method == method)
        return [entry for entry in found if re.search(path, entry.path)]


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no matter for the terminal."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are sent apart
    hub: HubServer

    def answer(self) -> None:
        parts = urlsplit(self.path)
        request = Request(
            self.command, unquote(parts.path), parts.query, dict(self.headers.items()), self.hub
        )
        fault = self.hub.fault(request)
        received = self._receive(request, fault)
        if fault is None:
            reply = self._dispatch(request)
        elif fault.cut is None:
            reply = Reply(fault.status, headers=dict(fault.headers))
        elif self.command == "PUT":
            self._note(request, 0, 0, received)
            return self._hang_up()
        else:
            reply = self._dispatch(request)
        self._send(request, reply, fault, received)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _receive(self, request: Request, fault: Fault | None) -> int:
        length = int(self.headers.get("Content-Length", 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            request.body = b"".join(self._chunks(fault))
        elif fault is not None and fault.cut is not None and self.command == "PUT":
            return len(self.rfile.read(min(length, fault.cut)))
        else:
            request.body = self.rfile.read(length)
        return len(request.body)

    def _chunks(self, fault: Fault | None) -> Any:
        limit = fault.cut if fault is not None and fault.cut is not None else None
        total = 0
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
            total += size
            if limit is not None and total >= limit:
                return
        self.rfile.readline()

    def _dispatch(self, request: Request) -> Reply:
        for method, pattern, respond in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and method in (request.method, "GET" if request.method == "HEAD" else ""):
                return respond(request, **match.groupdict())
        return Reply(404)

    def _send(self, request: Request, reply: Reply, fault: Fault | None, received: int) -> None:
        size = reply.stop - reply.start
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        wanted = 0 if request.method == "HEAD" else size
        stop = wanted if fault is None or fault.cut is None else min(wanted, fault.cut)
        self._note(request, reply.status, stop, received)  # before the client can go on
        self.end_headers()
        self._send_body(reply.content, reply.start, reply.start + stop)
        if fault is not None and fault.cut is not None:
            self._hang_up()

    def _send_body(self, content: Content, start: int, stop: int) -> None:
        if isinstance(content, OnDisk) and stop > start:
            with content.path.open("rb") as file:
                self.connection.sendfile(file, start, stop - start)
            return
        for first in range(start, stop, BLOCK):
            self.wfile.write(content.read(first, min(stop, first + BLOCK)))

    def _note(self, request: Request, status: int, sent: int, received: int) -> None:
        self.hub.log.append(
            Logged(
                request.method,
                request.path,
                status,
                request.header("range"),
                request.token,
                sent,
                received,
            )  # fmt: skip
        )

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: `HubServer.log` keeps what was asked for."""
