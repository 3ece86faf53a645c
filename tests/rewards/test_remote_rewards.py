"""The client of reward servers against a real server that fails, dies and comes back on demand."""

import contextlib
import signal
import threading
import time

import numpy as np
import picture_server
import pytest
from picture_server import expected, pictures

from opd_jax.config import ConfigError
from opd_jax.rewards import remote
from opd_jax.rewards.remote import Known, RemoteReward
from opd_jax.web import Retry

FAST = Retry(attempts=3, first_wait=0.01, longest_wait=0.02)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = picture_server.Server()
    yield server
    server.stop()


def reward(server, **options):
    return RemoteReward(server.url, **({"batch_size": 3, "retry": FAST, "timeout": 10.0, "patience": 0.0} | options))


def prompts(images):
    return [f"picture {image[0, 0, 0]}" for image in images]


def check(scores, images, unknown=()):
    known = ~np.isin(images[:, 0, 0, 0], list(unknown))
    np.testing.assert_array_equal(scores.score, np.where(known, expected(images), np.float32(np.nan)))
    np.testing.assert_array_equal(scores.known, known)
    assert scores.score.dtype == np.float32 and sum(scores.failures.values()) == len(unknown)
    assert not any("\n" in reason for reason in scores.failures)


def unused(folder):
    return not list(folder.rglob("unscored-*"))


def test_scores_in_order_whatever_the_order_of_replies(server, tmp_path):
    server.delay = lambda ids: 0.3 if 0 in ids else 0.0
    images = pictures(10)
    metadata = [{"n": i} if i % 2 else None for i in range(10)]
    check(reward(server, api_key="secret").label(images, prompts(images), tmp_path, metadata), images)
    assert sorted(map(len, server.requests)) == [1, 3, 3, 3]
    path, body, key = next(one for one in server.bodies if len(one[1]["images"]) == 1)
    assert path == "/score" and key == "Bearer secret"
    assert body["prompts"] == ["picture 9"] and body["metadata"] == [{"n": 9}]
    assert unused(tmp_path)
    check(reward(server).label(images[:0], [], tmp_path), images[:0])
    with pytest.raises(ValueError, match="give one for each"):
        reward(server).submit(images, ["one"], tmp_path)


def test_pictures_arrive_as_they_were_sent(server, tmp_path):
    import base64
    import io

    from PIL import Image

    images = pictures(1)
    reward(server).label(images, ["x"], tmp_path)
    sent = server.bodies[0][1]["images"][0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(sent)))), images[0])


def test_batches_are_scored_while_the_caller_works(server, tmp_path):
    gate = threading.Event()
    server.delay = lambda ids: 0.0 if gate.wait(8) else 1e9
    first, second = pictures(12), pictures(6, 20)
    asked = reward(server, concurrency=3)
    pending = [asked.submit(images, prompts(images), tmp_path) for images in (first, second)]  # no reply needed
    while server.busy < 3:
        time.sleep(0.01)
    time.sleep(0.1)
    assert server.busiest == 3 and len(server.requests) == 3  # in flight at once, and no more than that
    gate.set()
    check(pending[1].collect(), second)
    check(pending[0].collect(), first)
    assert server.busiest == 3 and len(server.requests) == 6


@pytest.mark.parametrize(
    "fault", [500, 503, 429, "drop", "cut", "garbage", "empty", "nan", "null", "inf", "fewer", "slow"]
)
def test_one_failure_is_retried(server, tmp_path, fault):
    server.faults.extend([fault] if fault in (429, "slow") else [fault, fault])
    images = pictures(3)
    check(reward(server, timeout=0.4).label(images, prompts(images), tmp_path), images)
    assert len(server.requests) == (2 if fault in (429, "slow") else 3)


def test_a_server_that_is_busy_makes_no_picture_unknown(server, tmp_path, capsys):
    server.faults.extend([429] * 2 * FAST.attempts)
    images = pictures(1)
    check(reward(server, patience=20.0).label(images, prompts(images), tmp_path), images)
    assert len(server.requests) == 2 * FAST.attempts + 1 and capsys.readouterr().out.count("HTTP 429") == 2


def test_waits_grow_and_respect_the_server(server, tmp_path):
    server.faults.extend([500, 500, 500, 429])
    images = pictures(1)
    asked = reward(server, retry=Retry(attempts=5, first_wait=0.1, longest_wait=2.0))
    check(asked.label(images, prompts(images), tmp_path), images)
    assert (np.diff(server.times) >= np.array([0.05, 0.1, 0.2, 1.0]) * 0.99).all()


def test_a_batch_refused_as_too_large_is_split_and_later_ones_are_smaller(server, tmp_path):
    server.most = 3
    images, later = pictures(8), pictures(8, 20)
    asked = reward(server, batch_size=8, concurrency=1)
    check(asked.label(images, prompts(images), tmp_path), images)
    assert list(map(len, server.requests)) == [8, 4, 2, 2, 4, 2, 2] and server.probes == 0
    check(asked.label(later, prompts(later), tmp_path), later)
    assert list(map(len, server.requests[7:])) == [2, 2, 2, 2]
    server.most = 0
    assert asked.batch_size == 2
    with pytest.raises(ConfigError, match=r"none of 1 pictures has a score \(HTTP 413 too many\)"):
        asked.label(later[:1], prompts(later[:1]), tmp_path)
    assert asked.batch_size == 2  # a picture that is too large by itself says nothing of the others


def test_a_refusal_is_not_retried_and_costs_only_its_picture(server, tmp_path):
    server.bad = (2,)
    images = pictures(8)
    scores = reward(server, batch_size=4).label(images, prompts(images), tmp_path)
    check(scores, images, unknown=[2])
    assert scores.failures == {'HTTP 400 {"error": "bad picture"}': 1}
    assert len(server.requests) == 2 + 4  # the batches, the halves of one, the halves of one of these
    assert server.asked()[2] == 3 and server.probes == 0


def test_what_the_scorer_says_of_a_picture_is_final(server, tmp_path):
    server.said = {1: "no quoted text", 4: "no quoted text", 5: ""}
    images = pictures(6)
    scores = reward(server).label(images, prompts(images), tmp_path)
    check(scores, images, unknown=[1, 4, 5])
    assert scores.failures == {"no quoted text": 2, "no reason given": 1} and len(server.requests) == 2
    images = pictures(2, 4)
    check(reward(server).label(images, prompts(images), tmp_path), images, unknown=[4, 5])  # all of a batch


def test_a_score_of_nan_is_asked_for_again_alone(server, tmp_path):
    server.said = {1: float("nan")}
    images = pictures(3)
    scores = reward(server).label(images, prompts(images), tmp_path)
    check(scores, images, unknown=[1])
    assert server.asked() == {0: 1, 1: FAST.attempts, 2: 1}
    assert scores.failures == {"a score that is no finite number": 1}


def test_a_picture_that_crashes_the_scorer_costs_only_itself(server, tmp_path):
    server.crash = (5,)
    images = pictures(8)
    scores = reward(server, batch_size=4).label(images, prompts(images), tmp_path)
    check(scores, images, unknown=[5])
    assert scores.failures == {"HTTP 500 boom": 1} and server.probes == 3
    assert unused(tmp_path)


def test_refusing_everything_is_an_error(server, tmp_path):
    server.bad = range(100)
    images = pictures(2)
    with pytest.raises(ConfigError, match=r"none of 2 pictures has a score \(HTTP 400 .*kept in .*unscored") as error:
        reward(server).label(images, prompts(images), tmp_path)
    assert "\n" not in str(error.value)
    server.bad = ()
    check(reward(server).label(images, prompts(images), tmp_path), images)
    assert unused(tmp_path)


def test_a_server_that_is_killed_and_restarted_loses_nothing(server, tmp_path, capsys):
    """Half of the batch is scored when the server dies; the run waits, and then asks for the other half alone."""
    server.delay = lambda ids: 0.0 if max(ids) < 6 else 5.0
    images = pictures(12)
    pending = reward(server, patience=20.0, timeout=0.5).submit(images, prompts(images), tmp_path)
    while len(server.requests) < 3:
        time.sleep(0.01)
    server.stop()
    assert set(range(6)) <= set(server.asked())
    started = []
    timer = threading.Timer(2.5, lambda: started.append(picture_server.Server(server.server_port)))
    timer.start()
    try:
        check(pending.collect(), images)
    finally:
        timer.join()
        started[0].stop()
    assert started[0].asked() == dict.fromkeys(range(6, 12), 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "up again after" in lines[1]
    assert f"reward at {server.url}: down since" in lines[0] and "waiting up to 20 seconds" in lines[0]
    assert "6 of 12 scores, and the pictures, are kept in" in lines[0] and str(tmp_path) in lines[0]
    assert unused(tmp_path)


@pytest.mark.parametrize("patience", [0.0, 0.3])
def test_when_patience_ends_a_resumed_run_asks_for_the_rest(server, tmp_path, capsys, patience):
    images = pictures(6)
    server.faults.append(None)  # the first request is served
    server.always = 503
    asked = reward(server, concurrency=1, patience=patience)
    pending, began = asked.submit(images, prompts(images), tmp_path), time.monotonic()
    with pytest.raises(ConfigError, match=r"down since \d\d:\d\d:\d\d \(HTTP 503 .*mend it and resume") as error:
        pending.collect()
    assert patience * 0.9 <= time.monotonic() - began < patience + 2
    (path,) = tmp_path.glob("unscored-*.npz")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(capsys.readouterr().out.splitlines()) == (patience > 0)
    kept = remote.read_unscored(path)
    np.testing.assert_array_equal(kept.images, images)
    assert kept.prompts == prompts(images) and kept.metadata == [None] * 6
    np.testing.assert_array_equal(kept.score, [0, 1 / 8, 2 / 8, np.nan, np.nan, np.nan])

    server.always = None
    server.requests.clear()
    other = images.copy()
    other[0, 1, 1, 1] ^= 1
    check(reward(server).label(other, prompts(images), tmp_path), images)  # another batch
    assert path.exists() and len(server.asked()) == 6
    server.requests.clear()
    check(reward(server).label(images, prompts(images), tmp_path), images)  # the resumed run
    assert server.asked() == {3: 1, 4: 1, 5: 1}
    assert not path.exists()


def test_an_interrupt_while_waiting_keeps_the_scores(server, tmp_path):
    server.faults.append(None)
    server.always = 503
    images = pictures(6)
    asked = reward(server, concurrency=1, patience=60.0)
    pending = asked.submit(images, prompts(images), tmp_path)
    main = threading.main_thread().ident
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pending.collect()
    (path,) = tmp_path.glob("unscored-*.npz")
    assert np.isfinite(remote.read_unscored(path).score).sum() == 3


def test_a_server_that_comes_back_as_another_is_not_believed(server, tmp_path):
    images = pictures(3)
    asked = reward(server)
    assert asked.self_test() == picture_server.PROBE / 8
    server.about["version"] = "2"
    with pytest.raises(ConfigError, match="its version is '2', where '1' is expected"):
        asked.label(images, prompts(images), tmp_path)
    assert len(server.requests) == 1  # not retried
    server.about["version"] = "1"
    check(asked.label(images, prompts(images), tmp_path), images)


def test_a_picture_that_ends_the_server_is_found_and_left_out(server, tmp_path):
    """A supervisor starts the server again each time; the picture is unknown in the end, the others are scored."""
    server.deadly = (6,)
    images, servers, over = pictures(10), [server], threading.Event()

    def supervise():
        while not over.wait(0.02):
            if servers[-1].socket.fileno() == -1:
                time.sleep(0.3)  # longer than requests are tried again
                with contextlib.suppress(OSError, ValueError):
                    servers[-1].stop()
                servers.append(picture_server.Server(server.server_port))
                servers[-1].deadly = (6,)

    thread = threading.Thread(target=supervise)
    thread.start()
    asked = reward(server, batch_size=4, patience=20.0, retry=Retry(2, 0.01, 0.02), timeout=1.0)
    try:
        scores = asked.label(images, prompts(images), tmp_path)
    finally:
        over.set()
        thread.join()
        for other in servers[1:]:
            other.stop()
    check(scores, images, unknown=[6])
    (reason,) = scores.failures
    assert reason.startswith("the server went down whenever it was to score it (")


def test_self_test(server):
    square = Known(remote.SQUARE.image, "a square", {"kind": 1}, picture_server.PROBE / 8)
    asked = reward(server, name="eighths", version="1")
    assert asked.self_test(square) == picture_server.PROBE / 8 and server.probes == 1
    assert str(asked) == f"reward eighths at {server.url}"

    def stops(match, known=square, **options):
        with pytest.raises(ConfigError, match=match) as error:
            reward(server, **options).self_test(known)
        assert "\n" not in str(error.value) and server.url in str(error.value)

    stops("its name is 'eighths', where 'ocr' is expected", name="ocr")
    stops("its version is '1', where '0' is expected", version="0")
    stops("the known picture scores 28.75, as the config states it 28", known=square._replace(score=28.0))
    server.said = {picture_server.PROBE: "no quoted text"}
    stops(r"no score for the known picture \(no quoted text\); give one that it can score")
    for fault, match in ((401, "HTTP 401"), ("nan", "nan"), ("garbage", "no JSON"), ("fewer", "1 scores for 2 pict")):
        server.always, server.said = fault, {}
        stops(match)
    server.always, server.about = None, ["eighths"]
    stops("no name and version")


def test_self_test_finds_a_scorer_that_is_not_deterministic(server):
    class Noisy(dict):
        def get(self, key, default):
            self[len(self)] = 0
            return default + 0.01 * len(self)

    server.said = Noisy()
    with pytest.raises(ConfigError, match="scored again in the same request"):
        reward(server).self_test()
    assert reward(server).self_test(tolerance=0.1) > 0


def test_wrong_settings_are_named():
    for options, match in (({"batch_size": 0}, "batch_size=0"), ({"timeout": 0.0}, "0.0"), ({"concurrency": 0}, "=0")):
        with pytest.raises(ConfigError, match=match):
            RemoteReward("http://x", **options)
    with pytest.raises(ConfigError, match="begins with http"):
        RemoteReward("localhost:8000")
