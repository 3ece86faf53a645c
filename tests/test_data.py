"""Batches are a function of the seed and can be taken up again where they were left."""

import numpy as np

from opd_jax import data


def draw(rng):
    return {"x": rng.standard_normal(3).astype(np.float32), "n": np.int32(rng.integers(100))}


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(a, b):
    return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b) for name in x)


def test_the_seed_decides():
    one, two, other = (take(data.batches(draw, 4, seed), 3) for seed in (1, 1, 2))
    assert same(one, two)
    assert not same(one, other)
    assert one[0]["x"].shape == (4, 3)


def test_position_is_restored():
    iterator = data.batches(draw, 4, 0)
    take(iterator, 2)
    position = iterator.get_state()
    later = take(iterator, 3)
    resumed = data.batches(draw, 4, 0)
    resumed.set_state(position)
    assert same(take(resumed, 3), later)


def test_threads_and_place_change_no_record():
    plain = take(data.batches(draw, 4, 0), 4)
    assert same(take(data.batches(draw, 4, 0, threads=3), 4), plain)
    placed = take(data.batches(draw, 4, 0, place=lambda batch: batch | {"placed": True}), 1)
    assert placed[0]["placed"]


def test_records_do_not_repeat():
    values = np.concatenate([batch["x"][:, 0] for batch in take(data.batches(draw, 8, 0), 8)])
    assert len(np.unique(values)) == 64


def test_epochs_take_every_record_once_in_another_order():
    iterator = data.epochs(lambda i: {"n": np.int32(i)}, 10, 5, seed=3)
    first, second = (np.concatenate([next(iterator)["n"] for _ in range(2)]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    position = iterator.get_state()
    following = next(iterator)["n"].tolist()
    again = data.epochs(lambda i: {"n": np.int32(i)}, 10, 5, seed=3)
    again.set_state(position)
    assert next(again)["n"].tolist() == following
    assert next(data.epochs(lambda i: {"n": np.int32(i)}, 10, 5, seed=4))["n"].tolist() != first[:5]
