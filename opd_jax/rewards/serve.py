# SPDX-License-Identifier: Apache-2.0
"""A reward server: any Python function that scores pictures, behind the protocol of `remote.py`.

    python -m opd_jax.rewards.serve --scorer=pickscore --path=PickScore_v1 --device=cuda --port=8001
    python -m opd_jax.rewards.serve --scorer=ocr --port=8002
    python serve.py --scorer=geneval_scorer.py:score --version=2024-05 --port=8003

The last is for an environment of its own: this file, copied there, needs numpy and Pillow and nothing of this library.
A scorer is `score(images, prompts, metadata) -> list`: pictures uint8 `[H, W, 3]`, texts, and dictionaries or None; for
each picture a number, or a string that says why it has none.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Scorer = Callable[[list, list, list], Sequence]


class Refused(Exception):
    """An HTTP status and one line for the client."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves until `shutdown`; a thread for each request, of which `at_once` call the scorer, and the others wait.

    | request | status |
    | --- | --- |
    | not the protocol's: JSON, lengths, base64, PNG | 400, naming the picture |
    | more pictures than `max_images`, or a longer body than `max_bytes` | 413 |
    | `waiting` others are there already | 429, Retry-After 1 |
    | the scorer raises, or returns another number of scores | 500, with the exception; its traceback on stderr |
    | a wrong key, where `api_key` is given | 401 |

    Args:
        scorer: `score(images, prompts, metadata)`. A score that is not finite is sent as the text that says so.
        address: host and port; port 0 takes a free one, `server_port`.
        name, version: what the server says that it is.
        at_once: calls of the scorer at a time; 1 for whatever is not thread-safe, or has one device.
        waiting: requests at a time, those in the scorer included.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        scorer: Scorer,
        address: tuple[str, int] = ("127.0.0.1", 0),
        *,
        name: str,
        version: str,
        max_images: int = 64,
        max_bytes: int = 64 << 20,
        at_once: int = 1,
        waiting: int = 32,
        api_key: str | None = None,
    ):
        super().__init__(address, _Handler)
        self.scorer, self.about = scorer, {"name": name, "version": version}
        self.max_images, self.max_bytes, self.api_key = max_images, max_bytes, api_key
        self.places, self.scorers = threading.Semaphore(waiting), threading.Semaphore(at_once)

    def scores(self, body: Any) -> list[float | str]:
        """What the scorer says of a request's body. Raises: Refused."""
        images, prompts, metadata = self._columns(body)
        images = [_picture(i, text) for i, text in enumerate(images)]
        try:
            with self.scorers:
                said = list(self.scorer(images, prompts, metadata))
            scores = [one if isinstance(one, str) else float(one) for one in said]
        except Exception as error:
            traceback.print_exc()
            raise Refused(500, f"{type(error).__name__}: {error}") from error
        if len(scores) != len(images):
            raise Refused(500, f"the scorer gave {len(scores)} scores for {len(images)} pictures")
        return [one if isinstance(one, str) or math.isfinite(one) else f"a score of {one}" for one in scores]

    def _columns(self, body: Any) -> tuple[list, list, list]:
        if not isinstance(body, dict) or not isinstance(body.get("images"), list):
            raise Refused(400, 'give {"images": [...], "prompts": [...], "metadata": [...]}')
        images, prompts, metadata = body["images"], body.get("prompts"), body.get("metadata")
        metadata = [None] * len(images) if metadata is None else metadata
        for key, column, kinds in (("prompts", prompts, str), ("metadata", metadata, (dict, type(None)))):
            if not isinstance(column, list) or len(column) != len(images):
                raise Refused(400, f"{key}: give one for each of {len(images)} images")
            if not all(isinstance(one, kinds) for one in column):
                raise Refused(400, f"{key}: give {'texts' if kinds is str else 'objects or null'}")
        if len(images) > self.max_images:
            raise Refused(413, f"{len(images)} images in a request, at most {self.max_images} are taken")
        return images, prompts, metadata


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 120

    def do_GET(self):
        if self.path == "/health":
            self._reply(200, self.server.about)
        else:
            self._reply(404, {"error": "GET /health, or POST /score"})

    def do_POST(self):
        room = self.server.places.acquire(blocking=False)
        try:
            content = self._content(room)
            if not room:
                raise Refused(429, "busy")
            try:
                body = json.loads(content)
            except ValueError as error:
                raise Refused(400, f"no JSON: {error}") from error
            self._reply(200, {"scores": self.server.scores(body), **self.server.about})
        except Refused as refused:
            self._reply(refused.status, {"error": str(refused)})
        finally:
            if room:
                self.server.places.release()

    def _content(self, wanted: bool) -> bytes:
        """The body. One that is not wanted is read and dropped, or the client would not get to see the reply."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            raise Refused(400, "no Content-Length")
        left = int(length)
        key = self.server.api_key
        allowed = key is None or hmac.compare_digest(self.headers.get("Authorization", ""), f"Bearer {key}")
        if wanted and allowed and self.path == "/score" and left <= self.server.max_bytes:
            return self.rfile.read(left)
        while left > 0 and (read := len(self.rfile.read(min(left, 1 << 16)))):
            left -= read
        if not allowed:
            raise Refused(401, "a wrong key")
        if self.path != "/score":
            raise Refused(404, "GET /health, or POST /score")
        if int(length) > self.server.max_bytes:
            raise Refused(413, f"{length} bytes, at most {self.server.max_bytes} are taken")
        return b""

    def _reply(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def _picture(index: int, text: Any) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow finds many ways to fail
        raise Refused(400, f"images[{index}]: no PNG in base64 ({type(error).__name__})") from error


def load(spec: str, options: dict[str, Any]) -> Scorer:
    """The scorer of `module:function`, of `file.py:function`, or of a kind that the library has, made with `options`.

    Raises:
        ValueError: there is none.
    """
    where, colon, name = spec.rpartition(":")
    if not colon:
        from opd_jax.rewards.combination import make_scorer  # not where this file stands alone

        return make_scorer({"kind": spec, **options})
    if options:
        raise ValueError(f"--scorer={spec} takes no {', '.join(f'--{key}' for key in options)}")
    try:
        if where.endswith(".py"):
            found = importlib.util.spec_from_file_location("scorer", where)
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return getattr(module, name)
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(f"--scorer={spec}: {error}; give module:function, or file.py:function") from error


def _version(scorer: Scorer) -> str:
    """What a scorer says of itself, else a hash of the file that it is written in."""
    said = getattr(scorer, "version", None)
    if said is not None:
        return str(said)
    with open(inspect.getsourcefile(scorer), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serves a scorer of pictures over HTTP.")
    parser.add_argument("--scorer", required=True, help="ocr, clip, pickscore, module:function or file.py:function")
    parser.add_argument("--path", help="directory of clip's or pickscore's model")
    parser.add_argument("--device", help="of clip or pickscore, such as cuda; cpu otherwise")
    parser.add_argument("--name", help="what the server calls itself; the scorer's name otherwise")
    parser.add_argument("--version", help="of the scorer; a hash of its weights, or of its file, otherwise")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max_images", type=int, default=64, help="in a request")
    parser.add_argument("--max_mib", type=int, default=64, help="of a request")
    parser.add_argument("--at_once", type=int, default=1, help="calls of the scorer at a time")
    parser.add_argument("--api_key_env", help="name of an environment variable with a key that clients must send")
    args = parser.parse_args(argv)
    try:
        options = {key: getattr(args, key) for key in ("path", "device") if getattr(args, key) is not None}
        key = args.api_key_env and os.environ.get(args.api_key_env, "")
        if key == "":
            raise ValueError(f"--api_key_env={args.api_key_env}: no such environment variable")
        scorer = load(args.scorer, options)
        name = args.name or getattr(scorer, "name", None) or args.scorer.rpartition(":")[2]
        server = Server(
            scorer,
            (args.host, args.port),
            name=name,
            version=args.version or _version(scorer),
            max_images=args.max_images,
            max_bytes=args.max_mib << 20,
            at_once=args.at_once,
            api_key=key,
        )
    except (ValueError, OSError) as error:  # ConfigError is a ValueError
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    about = f"{name}, version {server.about['version']}"
    print(f"{about}, at http://{args.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
