"""Flow matching: its target, its value and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.losses import flow_matching
from opd_jax.rng import per_record, stream

KEYS = per_record(stream(0, "x"), 6)
DATA = jax.random.normal(jax.random.key(1), (6, 2, 2, 3))
CONDITION = jnp.linspace(-1, 1, 6)


def velocity_fn(params, x, t, condition):
    return params["scale"] * x + (params["shift"] * t * condition)[:, None, None, None]


PARAMS = {"scale": jnp.float32(0.3), "shift": jnp.float32(-0.7)}


def rolled():
    return flow_matching.noised(DATA, CONDITION, KEYS, 0.5, 1.2)


def test_a_noised_datum_lies_on_the_path():
    pair = rolled()
    t = pair.t[:, None, None, None]
    np.testing.assert_allclose(pair.x - t * pair.velocity, DATA, atol=1e-5)  # x_0 = x_t - t v
    assert ((pair.t > 0) & (pair.t < 1)).all()
    again = flow_matching.noised(DATA[:3], CONDITION[:3], KEYS[:3], 0.5, 1.2)
    np.testing.assert_allclose(again.x, pair.x[:3], rtol=1e-6)  # a record's noise is its own key's


def test_matches_float64_and_its_gradient():
    pair = rolled()
    loss = flow_matching.supervise(velocity_fn)
    out = loss(PARAMS, pair, pair.velocity, KEYS[0])
    x, t, target, c = (np.asarray(a, np.float64) for a in (pair.x, pair.t, pair.velocity, CONDITION))
    error = 0.3 * x + (-0.7 * t * c)[:, None, None, None] - target
    np.testing.assert_allclose(out.total, (error**2).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(out.weight, np.ones(6))
    gradient = jax.grad(lambda p: loss(p, pair, pair.velocity, KEYS[0]).total.sum())(PARAMS)
    np.testing.assert_allclose(gradient["scale"], (2 * error * x).mean((1, 2, 3)).sum(), rtol=1e-4)
    shift = (2 * error * (t * c)[:, None, None, None]).mean((1, 2, 3)).sum()
    np.testing.assert_allclose(gradient["shift"], shift, rtol=1e-4)


def test_zero_where_the_model_is_right_and_no_gradient_to_data():
    pair = rolled()
    loss = flow_matching.supervise(velocity_fn)
    own = velocity_fn(PARAMS, pair.x, pair.t, CONDITION)
    out, gradient = jax.value_and_grad(lambda p: loss(p, pair, own, KEYS[0]).total.sum())(PARAMS)
    assert out == 0
    assert all(g == 0 for g in jax.tree.leaves(gradient))
    to_data = jax.grad(lambda v, x: loss(PARAMS, pair._replace(x=x), v, KEYS[0]).total.sum(), argnums=(0, 1))
    assert all((g == 0).all() for g in to_data(pair.velocity, pair.x))
