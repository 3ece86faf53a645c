"""The reward server: what it answers, what it refuses, and the client against it."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from picture_server import pictures
from PIL import Image

from opd_jax.rewards import serve
from opd_jax.rewards.remote import Known, RemoteReward
from opd_jax.web import Retry

FAST = Retry(attempts=2, first_wait=0.01, longest_wait=0.02)


def brightness(images, prompts, metadata):
    """One for each: the mean, why there is none, a failure of the scorer; by the prompt."""
    if "raise" in prompts:
        raise RuntimeError("two\nlines")
    if "few" in prompts:
        return []
    special = {"none": "nothing asked for", "nan": np.nan}
    scores = [special.get(prompt, np.float32(image.mean() / 255)) for image, prompt in zip(images, prompts)]
    return [score if one is None else score + one["add"] for score, one in zip(scores, metadata)]


@pytest.fixture
def start(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(scorer=brightness, **options):
        server = serve.Server(scorer, name="brightness", version="7", **options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def ask(url, body=None, headers=()):
    """Status and content of the reply."""
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, dict(headers)), timeout=10) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_scores_and_says_who_it_is(start):
    _, url = start()
    about = {"name": "brightness", "version": "7"}
    assert ask(f"{url}/health") == (200, about)
    images = pictures(3)
    mean = [float(np.float32(image.mean() / 255)) for image in images]
    body = {"images": [encoded(image) for image in images], "prompts": ["a", "none", "c"]}
    said = {"scores": [mean[0], "nothing asked for", mean[2]]}
    assert ask(f"{url}/score", body) == (200, said | about)
    body |= {"metadata": [{"add": 1.0}, None, None], "prompts": ["a", "nan", "c"]}
    said = {"scores": [pytest.approx(mean[0] + 1), "a score of nan", mean[2]]}
    assert ask(f"{url}/score", body) == (200, said | about)
    assert ask(f"{url}/score", {"images": [], "prompts": []})[1]["scores"] == []
    grey = {"images": [encoded(images[0, :, :, 0])], "prompts": ["a"]}  # a picture of one channel
    assert ask(f"{url}/score", grey)[1]["scores"] == [pytest.approx(images[0, :, :, 0].mean() / 255)]


def test_bad_requests_are_refused_in_one_line(start, capsys):
    _, url = start(max_images=2, max_bytes=4000)
    png = encoded(pictures(1)[0])
    jpeg = encoded(pictures(1)[0], "JPEG")
    for body, status, match in (
        (b"{", 400, "no JSON"),
        (b"[]", 400, "give {"),
        ({"prompts": []}, 400, "give {"),
        ({"images": [png]}, 400, "prompts: give one for each of 1 images"),
        ({"images": [png], "prompts": []}, 400, "prompts: give one for each"),
        ({"images": [png], "prompts": [1]}, 400, "prompts: give texts"),
        ({"images": [png], "prompts": ["a"], "metadata": ["b"]}, 400, "metadata: give objects or null"),
        ({"images": [png, "?"], "prompts": ["a", "b"]}, 400, "images[1]: no PNG"),
        ({"images": [png, 5], "prompts": ["a", "b"]}, 400, "images[1]: no PNG"),
        ({"images": [jpeg], "prompts": ["a"]}, 400, "images[0]: no PNG"),
        ({"images": [png] * 3, "prompts": ["a"] * 3}, 413, "3 images in a request, at most 2"),
        ({"images": [png], "prompts": ["a" * 16_000_000]}, 413, "at most 4000"),
        ({"images": [png], "prompts": ["raise"]}, 500, "RuntimeError: two\nlines"),
        ({"images": [png], "prompts": ["few"]}, 500, "the scorer gave 0 scores for 1 pictures"),
    ):
        found, said = ask(f"{url}/score", body)
        assert found == status and match in said["error"], (match, found, said)
    assert ask(f"{url}/other")[0] == 404 and ask(f"{url}/other", b"{}")[0] == 404
    assert ask(f"{url}/score", {"images": [png], "prompts": ["a"]})[0] == 200
    assert "RuntimeError: two" in capsys.readouterr().err


def test_a_key_is_asked_for(start):
    _, url = start(api_key="secret")
    assert ask(f"{url}/score", {"images": [], "prompts": []})[0] == 401
    assert ask(f"{url}/score", {"images": [], "prompts": []}, {"Authorization": "Bearer secret"})[0] == 200
    assert RemoteReward(url, api_key="secret").self_test() > 0


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_scorer_is_called_by_so_many_at_once_and_crowds_are_sent_away(start, at_once, tmp_path):
    busy, busiest, gate, lock = 0, 0, threading.Event(), threading.Lock()

    def scorer(images, prompts, metadata):
        nonlocal busy, busiest
        with lock:
            busy += 1
            busiest = max(busiest, busy)
        gate.wait(5)
        with lock:
            busy -= 1
        return [0.5] * len(images)

    server, url = start(scorer, at_once=at_once, waiting=4)
    images = pictures(4)
    pending = RemoteReward(url, batch_size=1, concurrency=4).submit(images, [""] * 4, tmp_path)
    while server.places._value > 0:
        time.sleep(0.01)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(f"{url}/score", b'{"images": [], "prompts": []}'), timeout=10)
    assert error.value.code == 429 and error.value.headers["Retry-After"] == "1"
    assert ask(f"{url}/health")[0] == 200
    gate.set()
    assert (pending.collect().score == 0.5).all() and busiest == at_once


def test_the_client_gets_what_the_scorer_says(start, tmp_path):
    _, url = start(max_images=4)
    images = pictures(20)
    reward = RemoteReward(url, retry=FAST, batch_size=16)
    assert reward.self_test(Known(images[0], "a", {"add": 2.0})) == pytest.approx(images[0].mean() / 255 + 2)
    prompts = ["none" if i == 7 else "raise" if i == 9 else "a" for i in range(20)]
    scores = reward.label(images, prompts, tmp_path)
    wanted = images.mean((1, 2, 3), dtype=np.float64) / 255
    wanted[[7, 9]] = np.nan
    np.testing.assert_allclose(scores.score, wanted, rtol=1e-6)
    assert scores.failures.pop("nothing asked for") == 1
    ((reason, count),) = scores.failures.items()
    assert count == 1 and "HTTP 500" in reason and "RuntimeError: two" in reason and "\n" not in reason
    assert reward.batch_size == 4


def test_the_file_runs_alone_and_dies_without_loss(tmp_path):
    """In a process that cannot import this library: scores, is killed, comes back on the same port."""
    (tmp_path / "serve.py").write_bytes(Path(serve.__file__).read_bytes())
    (tmp_path / "mine.py").write_text(
        "import sys\ndef score(images, prompts, metadata):\n"
        "    assert not {'jax', 'opd_jax', 'torch'} & set(sys.modules)\n"
        "    return [float(image[0, 0, 0]) for image in images]\n"
    )
    (tmp_path / "opd_jax.py").write_text("raise ImportError")
    command = [sys.executable, "serve.py", "--scorer=mine.py:score", "--max_images=8"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def serving(port):
        process = subprocess.Popen(
            [*command, f"--port={port}"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        return process, process.stdout.readline().strip()

    process, line = serving(0)
    again = None
    try:
        about, _, url = line.rpartition(", at ")
        assert about.startswith("score, version ") and len(about.split()[-1]) == 16
        reward = RemoteReward(url, retry=FAST, patience=120.0)
        assert reward.self_test() == 230
        process.kill()
        process.wait()
        images = pictures(4)
        pending = reward.submit(images, [""] * 4, tmp_path / "kept")
        again, line_again = serving(int(url.rpartition(":")[2]))
        np.testing.assert_array_equal(pending.collect().score, [0, 1, 2, 3])
        assert line_again == line  # the same version: a hash of the scorer's file
    finally:
        for one in filter(None, (process, again)):
            one.kill()
            one.wait()
            one.stdout.close()


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for options, match in (
        (["--scorer=nothing.py:score"], "nothing.py"),
        (["--scorer=json:score"], "no attribute 'score'"),
        (["--scorer=mjson:score"], "No module named 'mjson'"),
        (["--scorer=json:loads", "--path=x"], "takes no --path"),
        (["--scorer=geneval"], "kind='geneval': choose one of"),
        (["--scorer=http"], "is a server already"),
        (["--scorer=clip"], "path=None: no such directory"),
        (["--scorer=clip", f"--path={tmp_path}"], "holds no config.json"),
        (["--scorer=json:loads", "--api_key_env=NO_SUCH_KEY"], "no such environment variable"),
    ):
        with pytest.raises(SystemExit) as error:
            serve.main(options)
        assert error.value.code == 2
        said = capsys.readouterr().err
        assert match in said and said.startswith("error: ") and "Traceback" not in said, said


def test_the_guide_is_right(start, tmp_path):
    """Its request is one, and its server of 20 lines serves the client."""
    guide = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    request = guide.split("POST /score\n", 1)[1].split("\n\n200", 1)[0]
    _, url = start(lambda images, prompts, metadata: [float(image[0, 0, 0]) for image in images])
    assert ask(f"{url}/score", json.loads(request))[1]["scores"] == [200.0]
    server = guide.split("## A server in 20 lines\n\n```python\n", 1)[1].split("```", 1)[0].replace("8000", "0")
    assert "0), Handler).serve_forever()" in server
    server = server.replace("http.server.HTTPServer((", "s = http.server.HTTPServer((").replace(
        ".serve_forever()", "\nprint(s.server_port, flush=True)\ns.serve_forever()"
    )
    (tmp_path / "server.py").write_text(server)
    process = subprocess.Popen([sys.executable, "server.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        reward = RemoteReward(f"http://127.0.0.1:{int(process.stdout.readline())}", retry=FAST, version="1")
        assert 0 < reward.self_test() < 1 and reward.name == "brightness"
        images = pictures(5)
        wanted = images.mean((1, 2, 3), dtype=np.float64) / 255
        np.testing.assert_allclose(reward.label(images, [""] * 5, tmp_path).score, wanted, rtol=1e-6)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
