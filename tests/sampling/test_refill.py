"""Groups that have nothing to teach give way to others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import sharding
from opd_jax.sampling import refill
from opd_jax.types import EpisodeRollout

SIZE = 2
MIXED = {"size": SIZE, "low": 0.1, "high": 0.9}


def batch(number: int, success, redone=None) -> EpisodeRollout:
    """Episodes that are called 100 * number, and so on; `played` counts them."""
    count = len(success)
    name = 100 * number + jnp.arange(count)
    counted = jnp.ones((count, 1, 1), bool)
    group = jnp.arange(count, dtype=jnp.int32) // SIZE
    again = None if redone is None else jnp.array(redone)
    some = {"episodes": jnp.ones(count), "names": jnp.float32(name)}
    return EpisodeRollout(name, name, counted, jnp.float32(success), name, group, name, name, again, some)


def names(rollout: EpisodeRollout) -> list[int]:
    (observation, *others) = rollout.observation, rollout.drawn, rollout.length, rollout.task
    for other in others:
        np.testing.assert_array_equal(other, observation)
    return observation.tolist()


@pytest.mark.parametrize(("low", "high", "good"), [(0.1, 0.9, [0, 1, 1, 0]), (0.0, 0.5, [1, 1, 0, 0]), (0, 1, [1] * 4)])
def test_a_group_is_informative_by_its_share_of_successes(low, high, good):
    success = jnp.float32([0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    assert refill.informative(success, 4, low, high).tolist() == [bool(one) for one in good]


@pytest.mark.parametrize(("size", "good"), [(10, 1), (10, 9), (8, 1), (8, 7)])
def test_the_ends_of_the_range_belong_to_it(size, good):
    success = jnp.zeros(size).at[:good].set(1.0)
    assert refill.informative(success, size, 0.1, 0.9).tolist() == [True]


def test_a_full_batch_stays_and_nothing_more_is_played():
    def never():
        raise AssertionError("was played")
        yield

    full = batch(0, [0, 1, 1, 0])
    rollout = refill.fill(full, never(), **MIXED)
    assert names(rollout) == [0, 1, 2, 3] and rollout.played["episodes"].sum() == 4 and rollout.states is None


def test_others_take_the_places_until_the_batch_is_full():
    played = []

    def others():
        for number, success in ((1, [1, 1, 0, 1]), (2, [1, 0, 0, 1]), (3, [0, 1, 0, 1])):
            played.append(number)
            yield batch(number, success, [[1, 0]] * 4)

    rollout = refill.fill(batch(0, [0, 0, 0, 0], [[0, 0]] * 4), others(), **MIXED)
    assert names(rollout) == [102, 103, 200, 201] and played == [1, 2]
    assert rollout.success.tolist() == [0, 1, 1, 0] and rollout.group.tolist() == [0, 0, 1, 1]
    assert rollout.played["episodes"].tolist() == [3, 3, 3, 3]
    assert rollout.played["names"].sum() == 4 * 300 + 3 * 6 and rollout.redone.sum(0).tolist() == [4, 0]


def test_where_there_are_too_few_the_earliest_of_the_rest_stay():
    rollout = refill.fill(batch(0, [0, 0, 1, 1, 0, 1]), iter([batch(1, [0, 0, 1, 0, 0, 0])]), **MIXED)
    assert names(rollout) == [4, 5, 102, 103, 0, 1] and rollout.played["episodes"].sum() == 12


def test_on_a_mesh_a_batch_is_filled_as_on_one_device_and_lies_as_it_lay():
    mesh = sharding.make_mesh({"data": 8})
    alone = batch(0, [0] * 16), batch(1, [0, 1] * 8)

    placed = lambda rollout: sharding.shard_batch(rollout, mesh)
    expected = refill.fill(alone[0], iter(alone[1:]), **MIXED)
    found = refill.fill(placed(alone[0]), iter([placed(alone[1])]), **MIXED)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.counted.sharding == placed(alone[0]).counted.sharding
