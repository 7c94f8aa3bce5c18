"""Everything of a server put together, and run until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType

import uvicorn

from uq.chat import ChatTemplate
from uq.errors import DeviceError, UsageError
from uq.formats.bundle import Bundle
from uq.kernels.backends import open_batch
from uq.kernels.numerics import FLOAT, Numerics
from uq.kernels.session import BatchSession
from uq.serve.app import Application
from uq.serve.engine import Engine
from uq.serve.metrics import Metrics
from uq.serve.service import Service

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
KEEP_ALIVE = 75  # seconds; shorter, and a busy client's next request meets a closing connection
PATIENCE = 5  # seconds that answers have to end when the server is stopped
STEP = 30  # seconds beyond, for a step of a large model; then connections are cut
CONNECTIONS = 2048  # beyond, uvicorn itself answers 503


@dataclass(frozen=True)
class ServeOptions:
    """How to serve; every field is an option of `uq serve`.

    Attributes:
        name: of the model for clients; None: the bundle's.
        port: 0 takes any that is free.
        parallel: sequences that are computed together.
        queue: requests that may wait for their turn.
        context: tokens of prompt and answer, at most; never more than the model's.
        template: chat template in place of the model's own.
        origins: of pages whose scripts may use it, beside this machine's; `*`: of any.
        numerics: what the device keeps in integers beside the weights.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    device: str = "auto"
    threads: int | None = None
    parallel: int = 16
    queue: int = 256
    context: int = 4096
    key: str | None = None
    template: str | None = None
    origins: tuple[str, ...] = ()
    numerics: Numerics = FLOAT

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Served:
    """What is being served, for the line that says so."""

    name: str
    url: str
    device: str
    cache_bytes: int
    can_chat: bool


@dataclass(frozen=True)
class Server:
    """A model with its engine running, and the application in front of it."""

    session: BatchSession
    engine: Engine
    service: Service
    application: Application

    def served(self, listener: socket.socket) -> Served:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        name, device = self.service.name, self.session.device.name
        url = f"http://{shown}:{port}"
        return Served(name, url, device, self.session.cache_bytes, self.service.can_chat)


def serve(bundle: Bundle, options: ServeOptions, ready: Callable[[Served], None]) -> None:
    """Serve a bundle until SIGINT or SIGTERM.

    Args:
        ready: called once the address takes connections.

    Raises:
        DeviceError: the device or the address is not available.
        UsageError: an option does not fit the model.
    """
    with listening(options) as listener, running(bundle, options) as server:
        served = server.served(listener)
        web_server(server, lambda: ready(served)).run(sockets=[listener])


class WebServer(uvicorn.Server):
    """Says when it is ready: from then on a signal ends it in good order.

    Answers in work have `PATIENCE` seconds to end, or until a second signal; then their clients are
    told that they do not.
    """

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], end_answers: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._ready, self._end_answers = ready, end_answers

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._end_answers()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if count := len(self.server_state.tasks):
            note = f"{count} requests have {PATIENCE} s to end; Ctrl-C again ends them now"
            print(note, file=sys.stderr)
        timer = asyncio.get_running_loop().call_later(PATIENCE, self._end_answers)
        await super().shutdown(sockets)
        timer.cancel()


def web_server(server: Server, ready: Callable[[], None]) -> WebServer:
    config = uvicorn.Config(
        server.application.asgi,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=PATIENCE + STEP,
    )
    return WebServer(config, ready, server.engine.end_all)


@contextlib.contextmanager
def running(bundle: Bundle, options: ServeOptions) -> Iterator[Server]:
    """Everything but the listening; ends with the `with` block."""
    context = min(options.context, bundle.config.max_position_embeddings)
    tokenizer, metrics = bundle.tokenizer(), Metrics()
    name, hosts = options.name or bundle.name, (*LOCAL_NAMES, options.host)
    with contextlib.ExitStack() as stack:
        template = find_template(bundle, options.template)
        if template is not None:
            stack.enter_context(template).start()
        if template is not None and options.template is not None:
            template.try_out()
        thread = stack.enter_context(ThreadPoolExecutor(1, "uq-engine"))
        session = thread.submit(
            open_batch, bundle, options.device, slots=options.parallel, max_context=context,
            threads=options.threads, numerics=options.numerics,
        ).result()  # fmt: skip
        engine = stack.enter_context(
            Engine(session, tokenizer, metrics, thread=thread, queue=options.queue)
        )
        capacity = options.queue + session.slots
        service = Service(name, tokenizer, template, max_context=context, capacity=capacity)
        application = Application(
            service, engine, metrics, fingerprint=f"uq-{bundle.sha256[:12]}",
            key=options.key, hosts=hosts if options.local else None, origins=options.origins,
        )  # fmt: skip
        yield Server(session, engine, service, application)


def find_template(bundle: Bundle, source: str | None) -> ChatTemplate | None:
    """The chat template; None for a base model."""
    try:
        return ChatTemplate.of(bundle, source)
    except UsageError:
        return None


@contextlib.contextmanager
def listening(options: ServeOptions) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        address = f"--host {options.host} --port {options.port}"
        number = error.errno or 0  # negative: of the name resolution
        reason = os.strerror(number) if number > 0 else error.strerror
        raise DeviceError(f"{address}: {reason}; choose another") from None
    with listener:
        yield listener
