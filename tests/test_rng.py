"""Keys are functions of seed, name, step and record."""

import jax
import numpy as np

from opd_jax import rng


def data(key):
    return tuple(np.ravel(jax.random.key_data(key)))


def test_streams_steps_and_records_differ_and_repeat():
    keys = [rng.stream(0, "sample"), rng.stream(0, "update"), rng.stream(1, "sample")]
    keys += [rng.at_step(keys[0], 1), rng.at_step(keys[0], 2)]
    assert len({data(key) for key in keys}) == len(keys)
    assert data(rng.stream(0, "sample")) == data(keys[0])
    assert data(rng.stream(jax.random.key(0), "sample")) == data(keys[0])


def test_a_record_keeps_its_key_in_another_batch():
    key = rng.stream(3, "records")
    np.testing.assert_array_equal(
        jax.random.key_data(rng.per_record(key, 8))[:4], jax.random.key_data(rng.per_record(key, 4))
    )
