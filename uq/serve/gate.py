"""What every request passes: is it allowed, is it small enough; then it is counted."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Collection
from secrets import compare_digest

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uq.serve.errors import ApiError
from uq.serve.metrics import Metrics

MAX_BODY = 8 << 20  # bytes; a context of 128K tokens as JSON has about 1 MB
OPEN = ("/health",)
PORT, SCHEME = re.compile(r":\d+$"), re.compile(r"^bearer +", re.IGNORECASE)
GONE = 499  # the client went away, as nginx has it; for the count only


class Gate:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: Collection[str],
        key: str | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        """
        Args:
            paths: that are counted under their own names.
            key: what `Authorization: Bearer` must hold.
            hosts: names by which the server may be called; None: any. A page on the web can point
                a name of its own at this machine, and would be let in by a browser here.
        """
        self._app, self._metrics, self._paths = app, metrics, paths
        self._key = key
        self._hosts = None if hosts is None else {name.lower() for name in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), GONE

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            with contextlib.suppress(ClientDisconnect):
                await self._app(scope, receive, counted)
        except ApiError as refusal:
            await refusal.response()(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = PORT.sub("", headers.get("host", "").lower())
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, f"this server is not called {host[:100]!r}")
        given = SCHEME.sub("", headers.get("authorization", ""))
        if (
            self._key
            and path not in OPEN
            and not compare_digest(given.encode(), self._key.encode())
        ):
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key")
        if method == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":  # others are sent by browsers without asking
                raise ApiError(415, f"content type {kind[:100]!r}; send application/json")
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > MAX_BODY:
                raise too_large()


def too_large() -> ApiError:
    return ApiError(413, f"the body has more than {MAX_BODY} bytes")
