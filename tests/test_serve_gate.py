"""What a request passes before it is answered: the gate, and what a browser asks for a page."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serve_site import KEY, Site, site
from uq.cli import main
from uq.formats.bundle import open_bundle
from uq.serve import app

MINE = "https://chat.example"
ASKS = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
    "Authorization": "",  # browsers ask without the key
}


@pytest.fixture(scope="module")
def local(tiny_bundle: Callable[..., Path]) -> Iterator[Site]:
    with site(open_bundle(tiny_bundle()), key=KEY, context=64, origins=(MINE,)) as local:
        yield local


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": ""}, 401),
        ({"Content-Type": "text/plain"}, 415),
        ({"Host": "evil.example:80"}, 403),
        ({"Content-Length": str(1 << 40)}, 413),
    ],
)
def test_a_request_is_stopped_at_the_gate(
    local: Site, headers: dict[str, str], status: int
) -> None:
    found, replied, answer = local.send("POST", "/v1/completions", {"prompt": "x"}, **headers)
    assert found == status and answer["error"]["message"]
    assert ("www-authenticate" in replied) == (status == 401)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "LOCALHOST:1"},
        {"Host": "[::1]"},
        {"Host": "[::1]:80"},
        {"Authorization": f"bearer  {KEY}"},
    ],
)
def test_names_are_those_of_the_standards(local: Site, headers: dict[str, str]) -> None:
    assert local.send("GET", "/v1/models", **headers)[0] == 200


def test_a_body_without_end_is_cut_off(local: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", local.port)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    pieces = (b"x" * (1 << 20) for _ in range(9))
    connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=False)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_slow_body_is_given_up(local: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "READ_SECONDS", 0.05)
    headers = {"Content-Length": "100"}
    assert local.send("POST", "/v1/completions", b'{"prompt"', **headers)[0] == 408


def allowed(local: Site, origin: str) -> bool:
    """To ask, and to see what is answered."""
    status, replied, _ = local.send("OPTIONS", "/v1/completions", Origin=origin, **ASKS)
    assert status in (200, 400)
    may_ask = status == 200 and "authorization" in replied["access-control-allow-headers"].lower()
    _, replied, _ = local.send("GET", "/v1/models", Origin=origin)
    assert may_ask == (replied.get("access-control-allow-origin") == origin)
    return may_ask


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:80", MINE]
)
def test_pages_of_this_machine_and_those_that_were_named(local: Site, origin: str) -> None:
    assert allowed(local, origin)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost.evil.example", f"{MINE}:8443", "null"]
)
def test_no_other_pages(local: Site, origin: str) -> None:
    assert not allowed(local, origin)


def test_a_page_sees_errors(local: Site) -> None:
    status, replied, _ = local.send("GET", "/v1/models", Origin=MINE, Authorization="Bearer wrong")
    assert (status, replied["access-control-allow-origin"]) == (401, MINE)


def test_who_asks_first_needs_the_key_all_the_same(local: Site) -> None:
    assert local.send("GET", "/v1/models", Origin=MINE, Authorization="")[0] == 401


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "ftp://x", "https://"])
def test_what_is_no_origin(
    origin: str, tiny_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny_bundle()), "--allow-origin", origin]) == 2
    assert f"{origin!r} is no origin" in capsys.readouterr().err
