"""The server and web pages: whose scripts a browser lets see its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serve_site import KEY, Site, site
from uq.cli import main
from uq.formats.bundle import open_bundle

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
