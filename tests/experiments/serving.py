"""A model behind a server that answers as vLLM does, for tests of remote teachers."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

LENGTH = 64  # of what the model sees: compiled once


@contextlib.contextmanager
def serving(logits_of: Callable[[jax.Array], jax.Array]) -> Iterator[str]:
    """Its address; `logits_of(tokens [1, LENGTH]) -> [1, LENGTH, V]`."""
    logp = jax.jit(lambda tokens: jax.nn.log_softmax(logits_of(tokens)))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            choices = []
            for index, ids in enumerate(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]):
                row = np.asarray(logp(jnp.asarray([ids + [0] * (LENGTH - len(ids))])))[0]
                scored = [None, *({str(t): {"logprob": float(row[i, t])}} for i, t in enumerate(ids[1:]))]
                choices.append({"index": index, "prompt_logprobs": scored})
            content = json.dumps({"choices": choices}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
