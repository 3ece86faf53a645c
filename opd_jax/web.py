# SPDX-License-Identifier: Apache-2.0
"""JSON from a server that may fail: one request with what went wrong in one line, and the same tried again."""

import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Found = TypeVar("Found")


class Retry(NamedTuple):
    """How long to keep trying: waits double from `first_wait` to `longest_wait` seconds, each cut by up to a half."""

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def wait(self, attempt: int) -> float:
        """Seconds to wait after a failure, the first of which is number 0."""
        return min(self.longest_wait, self.first_wait * 2 ** min(attempt, 60)) * random.uniform(0.5, 1)


class Failure(Exception):
    """One line on what a server did; whether to try again, and not before how many seconds; its HTTP status, or 0."""

    def __init__(self, reason: str, again: bool = True, after: float = 0.0, status: int = 0):
        super().__init__(reason)
        self.again, self.after, self.status = again, after, status


def fetch(url: str, body: Any = None, *, timeout: float, api_key: str | None = None) -> Any:
    """What a server answers to a POST of `body` as JSON, or to a GET where `body` is None; read as JSON.

    Args:
        timeout: seconds without a byte from the server.
        api_key: sent as a bearer token, and never shown.

    Raises:
        Failure: to be tried again after connection errors, time-outs, 408, 425, 429, 5xx, and replies that are no JSON;
            `after` is the server's `Retry-After` in seconds. Other 4xx are not to be tried again.
    """
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            content = reply.read()
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(300).decode(errors="replace")
        again = error.code >= 500 or error.code in (408, 425, 429)
        after = error.headers.get("Retry-After", "0")
        after = float(after) if after.isdigit() else 0.0
        raise Failure(f"HTTP {error.code} {' '.join(said.split())}", again, after, error.code) from error
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        raise Failure(f"{type(error).__name__}: {error}") from error
    try:
        return json.loads(content)
    except ValueError as error:
        raise Failure(f"a reply that is no JSON ({error})") from error


def retried(ask: Callable[[], Found], retry: Retry, pause: Callable[[float], Any] = time.sleep) -> Found:
    """What `ask` returns, asked again after failures that allow it, never sooner than the server's `Retry-After`.

    Args:
        pause: waits for so many seconds; `Retry-After` is heeded up to `retry.longest_wait`.

    Raises:
        Failure: the last one.
    """
    attempt = 0
    while True:
        try:
            return ask()
        except Failure as failure:
            if not failure.again or attempt + 1 >= retry.attempts:
                raise
            pause(max(retry.wait(attempt), min(failure.after, retry.longest_wait)))
        attempt += 1
