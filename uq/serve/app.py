"""The ASGI application: OpenAI's paths, answered by an `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from uq.serve.answers import Form, Json, Tally, usage
from uq.serve.bodies import Body, ChatBody, CompletionBody, explain
from uq.serve.engine import Engine, QueueFull, Ticket
from uq.serve.errors import ApiError
from uq.serve.gate import GONE, MAX_BODY, Gate, too_large
from uq.serve.job import Sink, Update
from uq.serve.metrics import Metrics
from uq.serve.service import Order, Service

READ_SECONDS = 30
Kind = TypeVar("Kind", bound=BaseModel)
Updates = asyncio.Queue[tuple[int, Update]]


LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def pages(origins: Collection[str]) -> Middleware:
    """Lets a browser's scripts see answers: those of pages of this machine, and of `origins`, each
    a scheme with a host, or `*`. It answers what browsers ask before, which has no key.
    """
    return Middleware(
        CORSMiddleware,
        allow_origins=[*origins],
        allow_origin_regex=LOCAL_PAGES,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )


class Application:
    """The paths of one server; `asgi` is what a web server runs."""

    def __init__(
        self,
        service: Service,
        engine: Engine,
        metrics: Metrics,
        *,
        fingerprint: str,
        key: str | None = None,
        hosts: Collection[str] | None = None,
        origins: Collection[str] = (),
    ) -> None:
        """`fingerprint` names the weights; `key`, `hosts`: see `Gate`; `origins`: see `pages`."""
        self._service, self._engine, self._metrics = service, engine, metrics
        self._fingerprint, self._created = fingerprint, int(time.time())
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/metrics", self.metrics),
            Route("/health", self.health),
        ]
        paths = [route.path for route in routes]
        self.asgi = Starlette(
            routes=routes,
            middleware=[
                pages(origins),
                Middleware(Gate, metrics=metrics, paths=paths, key=key, hosts=hosts),
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse, Exception: _refuse},
        )

    async def completions(self, request: Request) -> Response:
        body = await read(request, CompletionBody)
        order = await asyncio.to_thread(self._service.completion, body)
        return await self._answer(
            request, body, order, self._form(False, body.logprobs is not None)
        )

    async def chat(self, request: Request) -> Response:
        body = await read(request, ChatBody)
        order = await asyncio.to_thread(self._service.chat, body)
        return await self._answer(request, body, order, self._form(True, body.logprobs))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._service.name:
            raise ApiError(404, f"this server has {self._service.name!r}", code="model_not_found")
        return JSONResponse(self._model())

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _model(self) -> Json:
        entry = {"id": self._service.name, "object": "model"}
        return entry | {"created": self._created, "owned_by": "uq"}

    def _form(self, chat: bool, logprobs: bool) -> Form:
        tokenizer = self._service.tokenizer
        return Form(self._service.name, self._fingerprint, tokenizer, chat, logprobs)

    async def _answer(self, request: Request, body: Body, order: Order, form: Form) -> Response:
        updates: Updates = asyncio.Queue()
        try:
            sinks = [_sink(updates, index) for index in range(len(order.jobs))]
            ticket = self._engine.submit(list(zip(order.jobs, sinks, strict=True)))
        except QueueFull as error:
            raise ApiError(503, f"{error}; try again later", code="overloaded") from None
        if body.stream:
            return EventStream(_events(updates, order, form, body.with_usage), ticket)
        try:
            return await unless_gone(request, _whole(updates, order, form))
        finally:
            ticket.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; when the client goes away, its jobs end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()


async def read(request: Request, kind: type[Kind]) -> Kind:
    """The body, checked.

    Raises:
        ApiError: it is too large, too slow, or no such thing.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > MAX_BODY:
                    raise too_large()
        return kind.model_validate_json(bytes(data))
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {READ_SECONDS} s") from None
    except ValidationError as error:
        message, field = explain(error)
        raise ApiError(400, message, param=field) from None


async def unless_gone(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """The answer; when the client goes away first, an empty one that nobody gets."""
    work = asyncio.create_task(answer)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=GONE)
    finally:
        work.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _each(updates: Updates, count: int) -> AsyncIterator[tuple[int, Update]]:
    """Updates of `count` jobs until all are over.

    Raises:
        ApiError: the server failed.
    """
    left = count
    while left:
        index, update = await updates.get()
        if update.error is not None:
            raise ApiError(500, f"the answer could not be computed: {update.error}")
        left -= update.over
        yield index, update


async def _whole(updates: Updates, order: Order, form: Form) -> Response:
    tallies = [Tally(echoed) for echoed in order.echoed]
    async for index, update in _each(updates, len(tallies)):
        tallies[index].add(update)
    choices = [form.choice(index, tally) for index, tally in enumerate(tallies)]
    return JSONResponse(form.whole(choices, usage(order.prompt_lengths, tallies)))


async def _events(
    updates: Updates, order: Order, form: Form, with_usage: bool
) -> AsyncIterator[str]:
    tallies = [Tally(echoed) for echoed in order.echoed]
    try:
        async for index, update in _each(updates, len(tallies)):
            yield event(form.chunk([form.piece(index, update, behind=tallies[index])]))
            tallies[index].add(update)
        if with_usage:
            yield event(form.chunk([], usage(order.prompt_lengths, tallies)))
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status is sent; this is where OpenAI's clients look
        yield event(error.body)


def event(data: Mapping[str, object]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _sink(updates: Updates, index: int) -> Sink:
    """Puts updates of job `index` into the queue from the engine's thread."""
    loop = asyncio.get_running_loop()

    def put(update: Update) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            loop.call_soon_threadsafe(updates.put_nowait, (index, update))

    return put


def _refuse(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            return error.response()
        case HTTPException():
            message = f"{request.method} {request.url.path}: {error.detail.lower()}"
            return ApiError(error.status_code, message).response()
    return ApiError(500, "internal error; the log of the server has more").response()
