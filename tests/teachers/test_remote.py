"""The remote teacher against a server that really scores with a small table model, and fails on demand."""

import collections
import http.server
import json
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import ConfigError
from opd_jax.teachers import remote
from opd_jax.teachers.remote import RemoteTeacher, Retry
from opd_jax.types import TokenRollout

V = 50
CRASHES, TOO_LONG = 49, 12  # a token that makes the server fail with 500; the longest sequence it takes
LOGITS = np.random.default_rng(0).normal(size=(V, V))
TABLE = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))  # log-prob of a token given the one before it


def expected(ids):
    return np.array([0.0, *TABLE[ids[:-1], ids[1:]]], np.float32)


class Server(http.server.ThreadingHTTPServer):
    """`faults` are taken one per request; afterwards requests are served."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.always, self.crashes = collections.deque(), [], None, True
        self.noise, self.delay, self.busy, self.busiest, self.lock = 0.0, 0.0, 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, body, self.headers.get("Authorization"), time.monotonic()))
            fault = server.faults.popleft() if server.faults else server.always
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        time.sleep(server.delay)
        with server.lock:
            server.busy -= 1  # before the answer, after which the client may ask again
        self.serve(body, fault)

    def serve(self, body, fault):
        batch = body["input_ids"] if self.path == "/generate" else body["prompt"]
        if isinstance(fault, int):
            return self.reply(fault, b"no\nway", {"Retry-After": "1"} if fault == 429 else {})
        if fault == "drop":
            return self.connection.close()
        if fault == "slow":
            time.sleep(1.5)
        if any(len(ids) > TOO_LONG for ids in batch):
            return self.reply(400, b'{"error": "too long"}')
        if self.server.crashes and any(CRASHES in ids for ids in batch):
            return self.reply(500, b"boom")
        content = json.dumps(self.answer(batch, fault)).encode()
        if fault == "cut":
            return self.reply(200, content, size=2 * len(content))
        self.reply(200, b"<html>" if fault == "garbage" else content)

    def answer(self, batch, fault):
        rows = []
        for ids in batch:
            logp = [None, *(TABLE[ids[:-1], ids[1:]] + self.server.noise * len(self.server.requests)).tolist()]
            rows.append((list(ids), logp))
        if fault == "ids":
            rows = [([ids[0], *((i + 1) % V for i in ids[1:])], logp) for ids, logp in rows]
        if fault == "extra":  # a begin token put in front
            rows = [([0, *ids], [None, *logp[1:], -1.0]) for ids, logp in rows]
        if fault == "nan":
            rows = [(ids, [None, *[float("nan")] * (len(ids) - 1)]) for ids, logp in rows]
        if fault == "fewer":
            rows = rows[1:]
        if self.path == "/generate":
            entries = lambda ids, logp: [[x, i, None] for x, i in zip(logp, ids)]
            return [{"text": "", "meta_info": {"input_token_logprobs": entries(*row)}} for row in rows]
        choices = [{"index": i, "text": ""} for i in range(len(rows))]
        for choice, (ids, logp) in zip(choices, rows):
            if "echo" in self.requested():
                choice["logprobs"] = {"token_logprobs": logp, "tokens": [f"<{i}>" for i in ids]}
            else:
                scored = [None, *({str(i): {"logprob": x, "rank": 1}} for i, x in zip(ids[1:], logp[1:]))]
                choice["prompt_logprobs"] = scored
        return {"choices": choices[::-1]}  # in no particular order

    def requested(self):
        return self.server.requests[-1][1]

    def reply(self, code, content, headers=(), size=None):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


FAST = Retry(attempts=3, first_wait=0.01, longest_wait=0.02)


def teacher(server, **options):
    return RemoteTeacher(server.url, **({"model": "m", "batch_size": 3, "retry": FAST, "timeout": 10.0} | options))


def sequences(count, seed=1, length=9):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CRASHES, rng.integers(3, length)).tolist() for _ in range(count)]


def check(scored, ids, failed=()):
    assert sorted(scored.failed) == sorted(failed)
    for i, logp in enumerate(scored.logp):
        if i in failed:
            assert logp is None and "\n" not in scored.failed[i]
        else:
            assert logp.dtype == np.float32
            np.testing.assert_allclose(logp, expected(ids[i]), rtol=1e-6)


@pytest.mark.parametrize("api", ["vllm", "openai", "sglang"])
def test_scores_in_order(server, api):
    ids = sequences(10)
    check(teacher(server, api=api, api_key="secret").score(ids), ids)
    assert len(server.requests) == 4  # 3 + 3 + 3 + 1
    path, body, key, _ = server.requests[0]
    assert key == "Bearer secret"
    if api == "sglang":
        assert path == "/generate" and body["logprob_start_len"] == 0 and body["return_logprob"] is True
        assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}
    else:
        assert path == "/v1/completions" and body["model"] == "m" and body["temperature"] == 1.0
    assert teacher(server, api=api).score([]) == ([], {})


def test_the_v1_of_a_url_is_optional(server):
    urls = [RemoteTeacher(server.url + end).url for end in ("", "/", "/v1", "/v1/")]
    assert set(urls) == {server.url + "/v1/completions"}


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "cut", "garbage", "ids", "extra", "nan", "fewer"])
def test_one_failure_is_retried(server, fault):
    server.faults.extend([fault, fault])
    ids = sequences(3)
    check(teacher(server, api="sglang").score(ids), ids)
    assert len(server.requests) == 3


def test_a_slow_server_is_timed_out_and_retried(server):
    server.faults.append("slow")
    ids = sequences(2)
    check(teacher(server, timeout=0.5).score(ids), ids)
    assert len(server.requests) == 2


def test_waits_grow_and_respect_the_server(server):
    server.faults.extend([500, 500, 500, 429])
    teacher(server, retry=Retry(attempts=5, first_wait=0.2, longest_wait=2.0)).score(sequences(1))
    times = [request[-1] for request in server.requests]
    waits = np.diff(times)
    assert (waits >= np.array([0.1, 0.2, 0.4, 1.0]) * 0.99).all()
    assert teacher(server, retry=FAST).score(sequences(1)).failed == {}


def test_concurrency_is_bounded(server):
    server.delay = 0.1
    ids = sequences(24)
    check(teacher(server, batch_size=2, concurrency=3).score(ids), ids)
    assert server.busiest == 3 and len(server.requests) == 12


def test_one_bad_sequence_costs_only_itself(server):
    """Too long: refused at once, and not retried. One that crashes the server: tried again, then left out."""
    ids = sequences(8)
    ids[2] = [1] * (TOO_LONG + 1)
    check(teacher(server, batch_size=4).score(ids), ids, failed=[2])
    assert len(server.requests) == 2 + 4  # the batch, its halves, the halves' halves
    ids[6] = [1, CRASHES, 2]
    scored = teacher(server, batch_size=4, concurrency=4).score(ids)
    check(scored, ids, failed=[2, 6])
    assert "400" in scored.failed[2] and "too long" in scored.failed[2] and "500 boom" in scored.failed[6]


def test_refusals_are_no_sign_of_a_server_that_is_down(server):
    ids = [[1] * (TOO_LONG + 1)] * 5 + sequences(2)
    check(teacher(server, batch_size=1, concurrency=1).score(ids), ids, failed=range(5))
    assert len(server.requests) == 7


def test_a_server_that_is_down_loses_nothing(server):
    server.always = 503
    ids = sequences(30)
    scored = teacher(server, concurrency=2).score(ids)
    assert sorted(scored.failed) == list(range(30)) and scored.logp == [None] * 30
    assert len(server.requests) <= 5 * FAST.attempts and "not sent" in scored.failed[29]
    server.always = None
    check(teacher(server).score(ids), ids)
    url, _ = server.url, server.shutdown()
    server.server_close()
    gone = RemoteTeacher(url, retry=FAST).score(ids[:2])
    assert "refused" in gone.failed[0]


def test_self_test(server):
    ids = sequences(1)[0]
    for api in ("vllm", "sglang", "openai"):
        assert teacher(server, api=api).self_test(ids, expected(ids)) < 1e-6

    def stops(match, **options):
        with pytest.raises(ConfigError, match=match) as error:
            teacher(server).self_test(ids, **options)
        assert "\n" not in str(error.value) and server.url in str(error.value)

    wrong = expected(ids)
    wrong[2] += 0.1
    stops("the known log-probs by 0.1000 nats at token 2", expected=wrong)
    stops("known log-probs for", expected=wrong[:-1])
    server.noise = 0.05
    stops("itself, scored again by 0.0500 nats")
    assert teacher(server).self_test(ids, tolerance=0.1) == pytest.approx(0.05, rel=1e-3)
    server.noise = 0.0
    for fault, match in (
        ("ids", "scored token"),
        ("extra", "log-probs for"),
        (404, "HTTP 404"),
        ("nan", "log-prob of nan"),
    ):
        server.always = fault
        stops(f"self-test failed.*{match}")


def rollout(ids):
    length = np.array([len(one) for one in ids], np.int32)
    tokens = np.array([one + [0] * (length.max() - len(one)) for one in ids], np.int32)
    place = np.arange(tokens.shape[1])[None]
    response = (place >= 2) & (place < length[:, None])
    zero = np.zeros(len(ids), np.int32)
    logp = np.where(response, -0.5, 0).astype(np.float32)
    return TokenRollout(*map(jnp.asarray, (tokens, response, length, zero, zero, logp, logp, zero > 0)))


def test_labels_of_a_batch_outlive_a_failing_server(server, tmp_path):
    ids = sequences(6)
    ids[1][2] = CRASHES
    batch = rollout(ids)
    with pytest.raises(ConfigError, match=r"^1 sequences unscored \(HTTP 500 boom\); kept in .*unscored-.*npz"):
        teacher(server).label(batch, tmp_path)
    (path,) = tmp_path.glob("unscored-*.npz")
    kept, logp = remote.read_unscored(path)
    for name, one, two in zip(batch._fields, kept, batch):
        np.testing.assert_array_equal(one, two, err_msg=name)
    np.testing.assert_array_equal(np.isnan(logp).all(1), np.arange(6) == 1)
    server.requests.clear()
    server.crashes = False
    labels = teacher(server).label(batch, tmp_path)
    assert [body["prompt"] for _, body, _, _ in server.requests] == [[ids[1]]]
    assert not path.exists()
    for i, one in enumerate(ids):
        mask = np.asarray(batch.response)[i, : len(one)]
        np.testing.assert_allclose(labels.teacher_logp[i, : len(one)], np.where(mask, expected(one), 0), rtol=1e-6)
        assert not labels.teacher_logp[i, len(one) :].any()


def test_wrong_settings_are_named():
    for options, match in (({"api": "grpc"}, "grpc"), ({"batch_size": 0}, "batch_size=0"), ({"timeout": 0.0}, "0.0")):
        with pytest.raises(ConfigError, match=match):
            RemoteTeacher("http://x", **options)
    with pytest.raises(ConfigError, match="begins with http"):
        RemoteTeacher("localhost:8000")
