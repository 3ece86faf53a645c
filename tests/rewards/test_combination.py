"""Weighted sums of rewards in this process and on servers; every mistake of a config at once."""

import json

import jax.numpy as jnp
import numpy as np
import picture_server
import pytest
from picture_server import expected, pictures
from PIL import Image

from opd_jax.config import ConfigError
from opd_jax.losses import policy_gradient
from opd_jax.rewards import combination, tesseract
from opd_jax.rewards.combination import Rewards


@pytest.fixture
def servers(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers = [picture_server.Server(), picture_server.Server()]
    yield servers
    for server in servers:
        server.stop()


def parts(servers, **options):
    common = {"kind": "http", "attempts": 1, "patience": 0, "batch_size": 4}
    return {name: common | {"url": server.url} | options for name, server in zip(("first", "second"), servers)}


def test_the_sum_is_weighted_and_unknown_where_a_part_is(servers, tmp_path):
    servers[1].said = {2: "none", 3: 8.0}
    images, weights = pictures(6), {"first": 1.0, "second": -0.5}
    found = Rewards(weights, parts(servers)).label(images, [""] * 6, tmp_path)
    second = expected(images)
    second[2:4] = np.nan, 8.0
    np.testing.assert_array_equal(found.score, expected(images) - np.float32(0.5) * second)
    np.testing.assert_array_equal(found.known, [True, True, False, True, True, True])
    assert found.score.dtype == np.float32 and found.parts["second"].failures == {"none": 1}
    advantage = policy_gradient.group_advantages(jnp.asarray(found.score), jnp.zeros(6, int), 1)
    np.testing.assert_array_equal(np.asarray(advantage) == 0, ~found.known)
    metrics = found.metrics()
    assert metrics["unknown/first"] == 0 and metrics["unknown/second"] == pytest.approx(1 / 6)
    assert metrics["reward/first"] == pytest.approx(expected(images).mean())
    assert metrics["reward/second"] == pytest.approx(np.nanmean(second))
    watched = Rewards({"first": 2, "second": 0}, parts(servers)).label(images, [""] * 6, tmp_path)
    np.testing.assert_array_equal(watched.score, 2 * expected(images))  # weight 0: its unknowns do not matter
    assert watched.known.all() and set(watched.parts) == {"first", "second"}


def test_floats_are_sent_as_bytes(servers, tmp_path):
    images = pictures(3)
    rewards = Rewards({"first": 1.0}, {"first": parts(servers)["first"]})
    floats = images.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(rewards.label(floats, [""] * 3, tmp_path).score, expected(images))
    np.testing.assert_array_equal(combination.to_uint8(floats), images)
    wild = np.array([-7, 0.0, 7, np.inf] * 3, np.float32).reshape(1, 2, 2, 3)
    assert set(combination.to_uint8(wild).ravel()) == {0, 128, 255}
    wild[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="picture 0 of 1 has NaN"):
        rewards.submit(wild, [""], tmp_path)


def test_when_one_server_is_down_the_scores_of_the_others_are_kept(servers, tmp_path):
    images, weights = pictures(6), {"first": 1.0, "second": 1.0}
    servers[1].always = 503
    with pytest.raises(ConfigError, match=f"reward at {servers[1].url}: down since"):
        Rewards(weights, parts(servers)).label(images, [""] * 6, tmp_path)
    assert set(servers[0].asked()) == set(range(6))
    servers[1].always = None
    for server in servers:
        server.requests.clear()
    found = Rewards(weights, parts(servers)).label(images, [""] * 6, tmp_path)  # the resumed run
    np.testing.assert_array_equal(found.score, 2 * expected(images))
    assert servers[0].asked() == {} and servers[1].asked() == dict.fromkeys(range(6), 1)
    assert not list(tmp_path.rglob("unscored-*"))


def test_self_test_names_all_that_is_wrong(servers, tmp_path):
    Image.fromarray(pictures(1, 16)[0]).save(tmp_path / "known.png")
    known = {"image": str(tmp_path / "known.png"), "prompt": "sixteen", "metadata": {"n": 1}, "score": 2.0}
    rewards = parts(servers, known=known, version="1")
    assert Rewards({"first": 1, "second": 1}, rewards).self_test() == {"first": 2.0, "second": 2.0}
    _, body, _ = servers[0].bodies[0]
    assert body["prompts"] == ["sixteen"] * 2 and body["metadata"] == [{"n": 1}] * 2
    rewards["first"]["version"], servers[1].said = "2", {16: "no"}
    with pytest.raises(ConfigError) as error:
        Rewards({"first": 1, "second": 1}, rewards).self_test()
    first, second = str(error.value).splitlines()
    assert first.startswith("first: ") and "where '2' is expected" in first
    assert second.startswith("second: ") and "no score for the known picture" in second


def test_every_mistake_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    weights = {"a": 1.0, "b": float("nan"), "missing": 1.0, "c": "1", "d": 1, "e": 1, "f": 1}
    rewards = {
        "a": {"kind": "geneval"},
        "b": {"kind": "http", "url": "host:80", "batchsize": 3, "patience": -1, "attempts": 1.5, "timeout": 0},
        "c": {"kind": "clip", "path": str(tmp_path / "no"), "url": "x"},
        "d": {"kind": "ocr", "path": "x"},
        "e": {"kind": "http", "url": "http://x", "api_key_env": "NO_SUCH_KEY", "known": {"image": "no.png", "s": 1}},
        "f": "ocr",
        "unweighted": {"kind": "pickscore"},
    }
    with pytest.raises(ConfigError) as error:
        Rewards(weights, rewards)
    lines = str(error.value).splitlines()
    for match in (
        "weights.b=nan: give a finite number",
        "weights.missing: there is no such reward",
        "weights.c='1'",
        "rewards.unweighted: has no weight",
        "rewards.a.kind='geneval': choose one of http, clip, pickscore, ocr",
        "rewards.b.url='host:80'",
        "rewards.b.batchsize: no such key; did you mean 'batch_size'?",
        "rewards.b.patience=-1",
        "rewards.b.attempts=1.5: give a positive number, a whole one",
        "rewards.b.timeout=0: give a positive number",
        "rewards.c.path=",
        "rewards.c.url: no such key",
        "rewards.d.path: no such key; ocr has none",
        "rewards.e.api_key_env='NO_SUCH_KEY'",
        "rewards.e.known.s: no such key",
        "rewards.e.known.prompt",
        "rewards.e.known.image='no.png'",
        "rewards.f='ocr': give a dictionary",
        "rewards.unweighted.path=None",
    ):
        assert sum(line.startswith(match) for line in lines) == 1, (match, lines)
    assert len(lines) == 19
    assert "weight other than 0" in combination.mistakes({"a": 0.0}, {"a": {"kind": "ocr"}})[0]
    assert combination.mistakes({"a": 1}, {"a": {"kind": "http", "url": "http://x", "timeout": 3}}) == []


def test_a_scorer_that_raises_at_some_pictures_knows_the_others(tmp_path):
    def scorer(images, prompts, metadata):
        if "bad" in prompts:
            raise KeyError("bad")
        return [0.5] * (len(images) - prompts.count("fewer"))

    local = combination._Local(scorer)
    found = local.submit(pictures(3), ["a", "bad", "c"], tmp_path, None).collect()
    np.testing.assert_array_equal(found.score, np.array([0.5, np.nan, 0.5], np.float32))
    assert found.failures == {"KeyError: 'bad'": 1}
    with pytest.raises(KeyError):
        local.submit(pictures(2), ["bad", "bad"], tmp_path, None).collect()
    with pytest.raises(ValueError, match="1 scores for 2 pictures"):
        local.submit(pictures(2), ["fewer", "a"], tmp_path, None).collect()


@pytest.mark.skipif(tesseract.engine("", "SPARSE_TEXT") is None, reason="no Tesseract here")
def test_scorers_in_this_process(servers, tmp_path):
    rewards = Rewards({"first": 1.0, "ocr": 1.0}, {"first": parts(servers)["first"], "ocr": {"kind": "ocr"}})
    assert rewards.self_test() == {"first": picture_server.PROBE / 8, "ocr": 0.0}
    images = pictures(3)
    found = rewards.label(images, ['"a word"', "nothing quoted", '"long words"'], tmp_path)
    np.testing.assert_array_equal(found.known, [True, False, True])
    np.testing.assert_array_equal(found.score[[0, 2]], expected(images)[[0, 2]])
    assert found.parts["ocr"].failures == {"no text in double quotes in the prompt": 1}
    json.dumps(found.metrics())
