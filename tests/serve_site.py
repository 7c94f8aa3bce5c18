"""A server of this process, and a client of it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from uq.formats.bundle import Bundle
from uq.serve.server import ServeOptions, Server, listening, running, web_server

KEY = "a-key"


Reply = tuple[int, dict[str, str], Any]


@dataclass(frozen=True)
class Site:
    """A server that runs in this process."""

    port: int
    server: Server

    @property
    def client(self) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)

    def send(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """Status, headers and body, which is JSON where the headers say so."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.request(method, path, data, **headers) as answer:
            read = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            is_json = found.get("content-type") == "application/json"
            return answer.status, found, json.loads(read) if is_json else read.decode()

    @contextmanager
    def request(
        self, method: str, path: str, data: bytes, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, data or None, sent | headers)
        with connection.getresponse() as answer:
            yield answer
        connection.close()

    def metric(self, name: str) -> float:
        lines = self.send("GET", "/metrics")[2].splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


@contextmanager
def site(bundle: Bundle, **options: Any) -> Iterator[Site]:
    chosen = ServeOptions(port=0, **options)
    with listening(chosen) as listener, running(bundle, chosen) as server:
        web = web_server(server, lambda: None)
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Site(listener.getsockname()[1], server)
        finally:
            web.should_exit = True
            thread.join()
