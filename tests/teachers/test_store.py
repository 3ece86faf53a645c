"""The store of rollouts and labels: written whole or not at all, refused by name when anything is wrong."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import ConfigError
from opd_jax.losses import divergences
from opd_jax.losses.lightning_opd import LightningLabels, residual_teacher_logp, supervise
from opd_jax.teachers import lookup, payloads
from opd_jax.teachers import store as stores
from opd_jax.teachers.store import About, Record, Writer
from opd_jax.types import TokenRollout

ABOUT = About("teacher-1", "teacher-1", "student-1", "tokenizer-1", {"temperature": 0.8, "top_p": 1.0, "seed": 3})
SHARDS, PER_SHARD = 4, 3


def record(i, payload=False):
    """A function of its index alone, 3 to 11 tokens long."""
    rng = np.random.default_rng(i)
    prompt, answer = int(rng.integers(1, 4)), int(rng.integers(2, 9))
    response = np.arange(prompt + answer) >= prompt
    tokens = rng.integers(0, 99, prompt + answer).astype(np.int32)
    logps = np.where(response, -rng.exponential(size=(4, prompt + answer)), 0).astype(np.float32)
    extra = {"hidden_int8": rng.integers(-9, 9, (answer, 2)).astype(np.int8)} if payload else {}
    return Record(tokens, response, *logps, i // 2, i % 3, float(i % 2), i % 5 == 0, extra)


def make_shard(index, **options):
    return [record(i, **options) for i in range(index * PER_SHARD, (index + 1) * PER_SHARD)]


def written(folder, about=ABOUT, **options):
    return stores.write(folder, about, SHARDS, lambda index: make_shard(index, **options))


def opened(folder, **options):
    return stores.open_store(folder, **({"tokenizer": "tokenizer-1"} | options))


def same(a, b):
    for name, one, two in zip(a._fields, a, b):
        jax.tree.map(lambda x, y, name=name: np.testing.assert_array_equal(x, y, err_msg=name), one, two)


def refused(match, function, *args, **options):
    with pytest.raises(ConfigError, match=match) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)


# ---- writing and opening -----------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    manifest = written(tmp_path, payload=True)
    store = opened(tmp_path, reference="student-1")
    assert store.manifest == manifest and len(store) == SHARDS * PER_SHARD
    for i, found in enumerate(store):
        same(found, record(i, payload=True))
    expected = [record(i) for i in range(12)]
    assert manifest.counts == {
        "records": 12,
        "tokens": sum(len(r.tokens) for r in expected),
        "max_length": max(len(r.tokens) for r in expected),
        "response_tokens": sum(int(r.response.sum()) for r in expected),
    }
    body = json.loads((tmp_path / "manifest.json").read_text())
    assert body["about"]["sampler"]["temperature"] == 0.8 and body["max_length"] == manifest.counts["max_length"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_half_precision_is_recorded(tmp_path):
    manifest = written(tmp_path, ABOUT._replace(logp_dtype="float16"))
    assert manifest.about.logp_dtype == "float16"
    found, exact = opened(tmp_path)[5], record(5)
    assert found.teacher_logp.dtype == np.float32
    np.testing.assert_allclose(found.teacher_logp, exact.teacher_logp, rtol=1e-3)
    assert (found.teacher_logp != exact.teacher_logp).any()


def test_only_missing_shards_are_made(tmp_path):
    made = []

    def counted(index):
        made.append(index)
        if len(made) == 3:
            raise RuntimeError("the machine went away")
        return make_shard(index)

    with pytest.raises(RuntimeError):
        stores.write(tmp_path, ABOUT, SHARDS, counted)
    refused("unfinished", opened, tmp_path)
    assert stores.write(tmp_path, ABOUT, SHARDS, counted, shards=[3]) is None  # another process's share
    manifest = stores.write(tmp_path, ABOUT, SHARDS, counted)
    assert made == [0, 1, 2, 3, 2]
    assert manifest == written(tmp_path / "unbroken")


def test_records_that_disagree_are_refused(tmp_path):
    writer, good = Writer(tmp_path, ABOUT, 1), record(0)
    bad = good.teacher_logp.copy()
    bad[-1] = np.nan
    for wrong, match in (
        (good._replace(teacher_logp=bad), "teacher_logp"),
        (good._replace(reference_logp=good.reference_logp[:-1]), "reference_logp"),
        (good._replace(payload={"x": np.zeros(1)}), "payload x"),
    ):
        with pytest.raises(ValueError, match=match):
            writer.write_shard(0, [good, wrong])
    with pytest.raises(ValueError, match="no records"):
        writer.write_shard(0, [])
    assert writer.missing == [0] and not list(tmp_path.iterdir())
    refused("1 shards missing", writer.finish)


def test_a_folder_of_another_store_is_refused(tmp_path):
    written(tmp_path)
    refused(
        'about.*|teacher: "teacher-1" -> "teacher-2"', Writer, tmp_path, ABOUT._replace(teacher="teacher-2"), SHARDS
    )
    refused("5 shards", Writer, tmp_path, ABOUT, 5)
    refused("bfloat16", Writer, tmp_path / "new", ABOUT._replace(logp_dtype="bfloat16"), 1)


CHILD = """
    import sys, time
    sys.path[:0] = {path!r}
    from tests_store import ABOUT, SHARDS, make_shard
    from opd_jax.teachers.store import Writer

    def slowly(records):
        for record in records:
            yield record
            time.sleep(60 if index == 2 else 0)

    writer = Writer({folder!r}, ABOUT, SHARDS)
    for index in range(SHARDS):
        writer.write_shard(index, slowly(make_shard(index)))
"""


def test_a_killed_writer_continues(tmp_path):
    """SIGKILL in the middle of the third shard: two are kept, the third is made again, the store is the same."""
    folder, here = tmp_path / "store", os.path.abspath(__file__)
    (tmp_path / "tests_store.py").symlink_to(here)
    root = os.path.dirname(os.path.dirname(os.path.dirname(here)))
    code = textwrap.dedent(CHILD.format(path=[str(tmp_path), root], folder=str(folder)))
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as child:
        while not list(folder.glob(".shard-00002*.tmp")):
            assert child.poll() is None, child.stderr.read().decode()
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert list(folder.glob(".shard-00002*.tmp")) and not (folder / "manifest.json").exists()
    assert Writer(folder, ABOUT, SHARDS).missing == [2, 3]
    made = []
    manifest = stores.write(folder, ABOUT, SHARDS, lambda index: made.append(index) or make_shard(index))
    assert made == [2, 3] and not list(folder.glob(".*.tmp"))
    assert manifest == written(tmp_path / "unbroken")
    for i, found in enumerate(opened(folder)):
        same(found, record(i))


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_shard_is_refused_and_made_again(tmp_path, damage):
    written(tmp_path)
    shard = tmp_path / "shard-00002-of-00004.arrayrecord"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[100] ^= 1
        shard.write_bytes(content)
    refused(f"shard-00002-of-00004.arrayrecord: shard .*{damage}", opened, tmp_path)
    shard.unlink(missing_ok=True)  # as the message says
    written(tmp_path)
    assert len(opened(tmp_path)) == 12


def test_a_manifest_that_is_not_right_is_refused(tmp_path):
    written(tmp_path)
    path = tmp_path / "manifest.json"
    text = path.read_text()
    for new, match in (
        (text.replace('"version": 1', '"version": 2'), "version 2"),
        (text.replace("teacher-1", "teacher-2"), "altered"),
        (text[:-20], "cannot be read"),
        ("[]", "cannot be read"),
    ):
        path.write_text(new)
        refused(f"manifest.json.*{match}", opened, tmp_path)
    path.write_text(text)
    refused("manifest.json: tokenizer tokenizer-1.*tokenizer-2", opened, tmp_path, tokenizer="tokenizer-2")
    refused("reference student-1", opened, tmp_path, reference="student-9")
    opened(tmp_path)


def test_teacher_consistency(tmp_path):
    consistent = written(tmp_path)
    stores.check_consistency(consistent)
    mixed = consistent._replace(about=ABOUT._replace(sft_teacher="teacher-0"))
    refused(
        "teacher-1.*teacher-0.*write_residual.*--config.allow_inconsistent_teacher", stores.check_consistency, mixed
    )
    stores.check_consistency(mixed, allow_inconsistent=True)
    stores.check_consistency(mixed._replace(about=mixed.about._replace(residual=True)))


def test_residual_store(tmp_path):
    written(tmp_path / "plain", ABOUT._replace(sft_teacher="teacher-0"))
    plain = opened(tmp_path / "plain")
    lookup.write_residual(plain, tmp_path / "residual", folds=3, bins=(2, 2))
    residual = opened(tmp_path / "residual")
    stores.check_consistency(residual.manifest)
    whole = lookup.collate(list(plain), 11)
    scored = whole.tokens, whole.teacher_logp, whole.reference_logp, whole.response, whole.group
    expected = residual_teacher_logp(*scored, folds=3, bins=(2, 2))
    found = lookup.collate(list(residual), 11)
    np.testing.assert_array_equal(found.teacher_logp, expected)
    same(found._replace(teacher_logp=whole.teacher_logp), whole)


# ---- reading -----------------------------------------------------------------------------------------------------


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    written(folder, payload=True)
    return opened(folder)


def test_batches_are_padded_records(store):
    batch = next(lookup.batches(store, 4, seed=0, payload=["hidden_int8"]))
    longest = store.manifest.counts["max_length"]
    assert batch.tokens.shape == (4, longest) and batch.payload["hidden_int8"].shape == (4, longest, 2)
    ids = {record(i).tokens.tobytes(): i for i in range(12)}
    for b in range(4):
        n = batch.length[b]
        expected = record(ids[batch.tokens[b, :n].tobytes()], payload=True)
        for name in ("tokens", "response", *stores.LOGPS):
            np.testing.assert_array_equal(getattr(batch, name)[b, :n], getattr(expected, name))
            assert not getattr(batch, name)[b, n:].any()
        for name in ("group", "task", "outcome", "truncated"):
            assert getattr(batch, name)[b] == getattr(expected, name)
        np.testing.assert_array_equal(
            batch.payload["hidden_int8"][b, :n][expected.response], expected.payload["hidden_int8"]
        )


def test_position_is_restored_and_threads_change_nothing(store):
    iterator = lookup.batches(store, 5, seed=1)
    take(iterator, 3)
    position = iterator.get_state()
    later = take(iterator, 4)
    resumed = lookup.batches(store, 5, seed=1, threads=3)
    resumed.set_state(position)
    for a, b in zip(take(resumed, 4), later):
        same(a, b)
    assert any((a.tokens != b.tokens).any() for a, b in zip(later, take(lookup.batches(store, 5, seed=2), 4)))


def test_an_epoch_visits_every_record_once(store):
    names = lambda batches: [batch.tokens[b, : batch.length[b]].tobytes() for batch in batches for b in range(4)]
    for buckets in (None, (5, 8, 16)):
        iterator = lookup.batches(store, 4, seed=0, buckets=buckets)
        first, second = names(take(iterator, 3)), names(take(iterator, 3))
        assert sorted(first) == sorted(second) == sorted(r.tokens.tobytes() for r in store) and first != second


def test_whole_groups_come_together(store):
    """Records 2i and 2i + 1 answer one prompt: both are in a batch or neither, and an epoch has each prompt once."""
    iterator = lookup.batches(store, 4, seed=0, whole_groups=True)
    seen = []
    for _ in range(3):
        batch = next(iterator)
        names, counts = np.unique(batch.group, return_counts=True)
        assert (counts == 2).all()
        seen += names.tolist()
    assert sorted(seen) == list(range(6))
    refused("whole groups have", lookup.batches, store, 3, seed=0, whole_groups=True)


def test_buckets(store):
    batches = take(lookup.batches(store, 2, seed=0, buckets=(5, 8, 16)), 6)
    shapes = [batch.tokens.shape[1] for batch in batches]
    assert set(shapes) <= {5, 8, 16} and len(set(shapes)) > 1
    assert all(batch.length.max() <= shape for batch, shape in zip(batches, shapes))
    refused("buckets=.*add that length", lookup.batches, store, 2, 0, buckets=(5,))
    refused("batch_size=13", lookup.batches, store, 13, 0)


def test_from_a_sampled_batch_through_the_store_to_the_loss(tmp_path):
    """records_of, write, batches and the look-ups end in the very loss of the batch that was sampled."""
    whole = lookup.collate([record(i) for i in range(4)], 12)
    fields = {name: jnp.asarray(getattr(whole, name)) for name in TokenRollout._fields}
    rollout = TokenRollout(**fields)
    labels = LightningLabels(*map(jnp.asarray, (whole.teacher_logp, whole.reference_logp, whole.outcome)))
    stores.write(tmp_path, ABOUT, 1, lambda index: lookup.records_of(rollout, labels))
    batch = next(lookup.batches(opened(tmp_path), 4, seed=0))
    params = jnp.float32(np.random.default_rng(0).normal(size=(99, 99)))
    loss = jax.jit(supervise(lambda params, tokens, segment_ids: params[tokens]))
    found = lookup.rollout(None, batch, None)
    one = loss(params, found, lookup.labels(None, found), jax.random.key(0))
    two = loss(params, rollout, labels, jax.random.key(0))
    for a, b in ((one.total, two.total), (one.metrics["sampling_gap"], two.metrics["sampling_gap"])):
        np.testing.assert_allclose(np.sort(a), np.sort(b), rtol=1e-6)
    unlabelled = lookup.records_of(rollout, LightningLabels(labels.teacher_logp))[2]
    np.testing.assert_array_equal(unlabelled.reference_logp, unlabelled.behavior_logp)
    assert np.isnan(unlabelled.outcome)


# ---- payloads ----------------------------------------------------------------------------------------------------


def test_topk_payload_reproduces_the_coarse_teacher():
    rng = np.random.default_rng(0)
    student, teacher = (jnp.float32(rng.normal(size=(6, 9))) for _ in range(2))
    for k in (3, 9):
        payload = payloads.topk_payload(teacher, k)
        p = np.exp(np.float64(teacher)) / np.exp(np.float64(teacher)).sum(-1, keepdims=True)
        np.testing.assert_allclose(np.exp(payload["topk_logp"]), -np.sort(-p)[:, :k], rtol=1e-5)
        np.testing.assert_allclose(np.exp(payload["tail_logp"]), np.sort(p)[:, : 9 - k].sum(-1), rtol=1e-5, atol=1e-7)
        few = jax.jit(lambda *a: divergences.reverse_kl(*divergences.stored_topk(*a)))
        exact = jax.jit(lambda *a, k=k: divergences.reverse_kl(*divergences.coarsen(*a, "teacher_topk", k)))
        ours = few(student, jnp.asarray(payload["topk_ids"]), jnp.asarray(payload["topk_logp"]))
        np.testing.assert_allclose(ours, exact(student, teacher), rtol=1e-3, atol=1e-5)


def test_quantised_states_and_their_error():
    rng = np.random.default_rng(1)
    hidden, head = np.float32(rng.normal(size=(7, 16))), np.float32(rng.normal(size=(16, 11)))
    hidden[3] = 0
    payload = payloads.hidden_payload(hidden)
    assert payload["hidden_int8"].dtype == np.int8 and np.abs(payload["hidden_int8"]).max() == 127
    back = np.asarray(payloads.hidden_of(payload))
    assert np.abs(back - hidden).max() <= np.abs(hidden).max() / 127 / 2 * 1.01
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p, q = (softmax(np.float64(h) @ np.float64(head)) for h in (hidden, back))
    ours = payloads.reproduced_forward_kl(hidden, head, block=3)
    np.testing.assert_allclose(ours, (p * np.log(p / q)).sum(-1), rtol=0.02, atol=1e-7)
    assert ours[3] == 0 and 0 < ours.max() < 1e-3
