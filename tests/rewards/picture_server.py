"""A reward server that fails on demand, and pictures that it knows by a number in their first pixel."""

import base64
import collections
import contextlib
import http.server
import io
import json
import threading
import time

import numpy as np
from PIL import Image

PROBE = 230  # the first pixel of the known picture


def pictures(count, start=0):
    images = np.random.default_rng(start).integers(0, 256, (count, 6, 8, 3)).astype(np.uint8)
    images[:, 0, 0, 0] = np.arange(start, start + count)
    return images


def expected(images):
    return images[:, 0, 0, 0].astype(np.float32) / 8


class Server(http.server.ThreadingHTTPServer):
    """Scores a picture n/8. `faults` are taken one per request for scores, those of the known picture aside."""

    daemon_threads = True

    def __init__(self, port=0, about=(("name", "eighths"), ("version", "1"))):
        super().__init__(("127.0.0.1", port), Handler)
        self.about, self.faults, self.always, self.said = dict(about), collections.deque(), None, {}
        self.most, self.delay, self.bad, self.crash, self.deadly = 1000, lambda ids: 0.0, (), (), ()
        self.requests, self.times, self.bodies, self.probes = [], [], [], 0
        self.busy, self.busiest, self.lock = 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def asked(self):
        """How often each picture was asked for."""
        return collections.Counter(i for ids in self.requests for i in ids)

    def stop(self):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200 if self.path == "/health" else 404, json.dumps(self.server.about).encode())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in body["images"]]
        ids = [int(image[0, 0, 0]) for image in images]
        with server.lock:
            fault = server.always
            if PROBE in ids:
                server.probes += 1
            else:
                server.requests.append(ids)
                server.times.append(time.monotonic())
                server.bodies.append((self.path, body, self.headers.get("Authorization")))
                fault = server.faults.popleft() if server.faults else fault
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        time.sleep(server.delay(ids))
        with server.lock:
            server.busy -= 1
        self.serve(ids, fault)

    def serve(self, ids, fault):
        server = self.server
        if set(ids) & set(server.deadly):  # as a process that ends: nothing is answered, nobody listens any more
            with contextlib.suppress(OSError):
                server.socket.close()
            return self.connection.close()
        if isinstance(fault, int):
            return self.reply(fault, b"no\nway", {"Retry-After": "1"} if fault == 429 else {})
        if fault == "drop":
            return self.connection.close()
        if fault == "slow":
            time.sleep(1.0)
        if len(ids) > server.most:
            return self.reply(413, b"too many")
        if set(ids) & set(server.bad):
            return self.reply(400, b'{"error": "bad picture"}')
        if set(ids) & set(server.crash):
            return self.reply(500, b"boom")
        scores = [server.said.get(i, i / 8) for i in ids]
        if fault in ("nan", "null", "inf"):
            scores[-1] = {"nan": float("nan"), "null": None, "inf": float("inf")}[fault]
        if fault == "fewer":
            scores = scores[1:]
        content = json.dumps({"scores": scores} | server.about if fault != "empty" else {}).encode()
        if fault == "cut":
            return self.reply(200, content, size=2 * len(content))
        self.reply(200, b"<html>" if fault == "garbage" else content)

    def reply(self, code, content, headers=(), size=None):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
