"""Balancing: counts by hand, limits, and what is never removed."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses.balancing import balance_offline, balance_online

KEY = jax.random.key(0)


def kept(right, wrong, ratio, unknown=0, key=KEY):
    """How many right, wrong and unknown answers of one group stay."""
    outcome = jnp.array([1.0] * right + [0.0] * wrong + [jnp.nan] * unknown)
    keep = np.asarray(balance_online(outcome, jnp.zeros(outcome.size, jnp.int32), key, ratio))
    return keep[:right].sum(), keep[right : right + wrong].sum(), keep[right + wrong :].sum()


@pytest.mark.parametrize(
    ("right", "wrong", "ratio", "expected"),
    [
        (6, 2, 1.0, (2, 2)),
        (2, 6, 1.0, (2, 2)),
        (6, 2, 0.0, (0, 2)),
        (6, 2, math.inf, (6, 0)),
        (6, 2, 2.0, (4, 2)),
        (3, 10, 0.1, (1, 10)),
        (30, 10, 0.1, (1, 10)),
        (3, 30, 0.1, (3, 30)),
        (1, 1, 0.75, (1, 1)),  # never emptied in between
        (8, 0, 1.0, (8, 0)),
        (0, 8, math.inf, (0, 8)),
        (8, 0, 0.0, (8, 0)),
    ],
)
def test_counts(right, wrong, ratio, expected):
    assert kept(right, wrong, ratio) == (*expected, 0)
    assert kept(right, wrong, ratio, unknown=3) == (*expected, 3)


def test_the_surplus_is_drawn_at_random_and_by_key():
    outcome, group = jnp.array([1.0] * 3 + [0.0]), jnp.zeros(4, jnp.int32)
    keeps = [np.asarray(balance_online(outcome, group, jax.random.key(seed)))[:3] for seed in range(300)]
    share = np.mean(keeps, axis=0)
    np.testing.assert_allclose(share, 1 / 3, atol=4 * math.sqrt(2 / 9 / 300))
    np.testing.assert_array_equal(*(balance_online(outcome, group, KEY) for _ in range(2)))


def test_groups_apart_or_the_batch_as_one():
    outcome = jnp.array([1.0, 1, 1, 1, 0, 0, 0, 1])
    group = jnp.array([5, 5, 5, 5, 9, 9, 9, 9])  # one group has right answers only, and stays whole
    keep = np.asarray(balance_online(outcome, group, KEY))
    assert keep[:4].all() and keep[4:7].sum() == 1 and keep[7]
    whole = np.asarray(balance_online(outcome, group, KEY, scope="batch"))
    assert whole[np.asarray(outcome) == 1].sum() == 3 and whole[4:7].all()
    with pytest.raises(ValueError, match="ratio=-1"):
        balance_online(outcome, group, KEY, -1.0)
    with pytest.raises(ValueError, match="scope 'prompt'"):
        balance_online(outcome, group, KEY, scope="prompt")


def test_offline_flattens_and_deletes_nothing():
    solved = [0] * 10 + [1] * 4 + [2] * 1 + [4] * 8 + [-1]
    prompts = list(range(len(solved)))
    out = balance_offline(prompts, solved, 4, cap=3)
    assert out.factors == {1: 3, 2: 3}  # ceil(10 / 4) = 3, and ceil(10 / 1) = 10 is capped
    assert Counter(solved[p] for p in out.prompts) == {0: 10, 1: 12, 2: 3, 4: 8, -1: 1}
    np.testing.assert_array_equal(np.unique(out.prompts), prompts)
    mirrored = balance_offline(prompts, solved, 4, shape="j", cap=3)
    assert mirrored.factors == {1: 3, 2: 3, 4: 2}
    np.testing.assert_array_equal(mirrored.repeats, np.bincount(mirrored.prompts))
    assert balance_offline(prompts, solved, 4, cap=1).prompts == prompts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solved_counts": [5]}, "of 4 samples"),
        ({"solved_counts": [1, 2]}, "one count each"),
        ({"cap": 0}, "cap=0"),
        ({"shape": "flat"}, "shape 'flat'; choose u, j"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        balance_offline(**({"prompts": ["p"], "solved_counts": [1], "samples": 4} | arguments))
