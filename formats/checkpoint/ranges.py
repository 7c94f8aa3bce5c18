"""Parts of large files by HTTP range requests, straight into memory.

The client of `huggingface_hub` hands a body on in pieces of 64 KiB, each copied four times under
the interpreter's lock: 2 s of processor time for a GB. urllib3 needs 0.5 s. Were it to read a whole
body at once, that would be new memory in small pages each time, for another 0.3 s.
"""

from __future__ import annotations

import os
import ssl
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi
import numpy as np
from numpy.typing import NDArray
from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Retry, Timeout
from urllib3.exceptions import HTTPError
from urllib3.util import make_headers, parse_url

CONNECTIONS = 8
PIECE = 1 << 20  # bytes that are copied at a time
BUSY = (408, 429, 500, 502, 503, 504)
# Pauses of 0, 1, 2, 4 and 8 s, or what Retry-After says; a body that breaks off counts as well.
RETRIES = Retry(5, backoff_factor=0.5, status_forcelist=BUSY, raise_on_status=False)


def read_range(
    url: str, offset: int, nbytes: int, headers: dict[str, str], timeout: float
) -> tuple[int, NDArray[np.uint8]]:
    """Status of the answer to a request for bytes `offset:offset + nbytes`, and these bytes.

    Fewer where the answer has fewer, none where its status is not 206. Credentials in `headers` are
    not handed on to another host.

    Raises:
        urllib3.exceptions.HTTPError: no whole answer, after the last attempt.
    """
    part = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
    client, left = _client(_proxy(url)), RETRIES
    while True:
        with client.request(
            "GET", url, headers=headers | part, timeout=Timeout(timeout), retries=left,
            preload_content=False,
        ) as response:  # fmt: skip
            try:
                wanted = nbytes if response.status == 206 else 0
                return response.status, _body(response, wanted)
            except HTTPError as error:
                left = (response.retries or left).increment("GET", url, error=error)
        left.sleep()


def _body(response: BaseHTTPResponse, nbytes: int) -> NDArray[np.uint8]:
    """At most `nbytes` of a body."""
    body, size = np.empty(nbytes, np.uint8), 0
    while piece := response.read(min(PIECE, nbytes - size), decode_content=False):
        body[size : size + len(piece)] = np.frombuffer(piece, np.uint8)
        size += len(piece)
    return body[:size]


def _proxy(url: str) -> str | None:
    """The proxy that HTTPS_PROXY, ALL_PROXY and NO_PROXY name for an address."""
    parts, proxies = urlsplit(url), getproxies()
    if proxy_bypass(parts.hostname or ""):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")


@cache
def _client(proxy: str | None) -> PoolManager:
    if proxy is None:
        return PoolManager(maxsize=CONNECTIONS, ssl_context=_trusted())
    login = make_headers(proxy_basic_auth=parse_url(proxy).auth)
    return ProxyManager(proxy, maxsize=CONNECTIONS, proxy_headers=login, ssl_context=_trusted())


def _trusted() -> ssl.SSLContext:
    """Authorities of SSL_CERT_FILE or SSL_CERT_DIR, else those that the Hub's client brings."""
    own = {"SSL_CERT_FILE", "SSL_CERT_DIR"} & os.environ.keys()
    return ssl.create_default_context(cafile=None if own else certifi.where())
