"""The flow sampler: its grid, its path, its keys and guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from opd_jax.rng import per_record
from opd_jax.sampling import flow
from opd_jax.types import Condition

SHAPE = (2, 2, 3)
B, T = 8, 5
TIMES = flow.time_grid(T, 3.0, double_shift=True)
LEVELS = jnp.full(T, 0.7)
KEYS = per_record(jax.random.key(0), B)
CONDITION = Condition(jax.random.normal(jax.random.key(1), (B, 4, 3)), jax.random.normal(jax.random.key(2), (B, 3)))
PARAMS = {"mix": 0.3 * jax.random.normal(jax.random.key(3), (3, 3)), "pool": jnp.array([0.2, -0.5, 0.4])}


def velocity_fn(params, x, t, condition):
    shift = condition.pooled * params["pool"][None] + condition.context.mean(1) + t[:, None]
    return jnp.tanh(x @ params["mix"] + shift[:, None, None])


def numpy_velocity(x, t):
    params, condition = jax.tree.map(lambda a: np.asarray(a, np.float64), (PARAMS, CONDITION))
    shift = condition.pooled * params["pool"] + condition.context.mean(1) + t
    return np.tanh(x @ params["mix"] + shift[:, None, None])


def sample(kind="sde", keys=KEYS, condition=CONDITION, levels=LEVELS, **kwargs):
    return jax.jit(flow.sample, static_argnames=("shape", "kind"))(
        Partial(velocity_fn), PARAMS, condition, keys, shape=SHAPE, times=TIMES, levels=levels, kind=kind, **kwargs
    )


def test_time_grid_values():
    np.testing.assert_allclose(flow.time_grid(4, 3.0), [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(flow.time_grid(4), [1, 0.75, 0.5, 0.25, 0])
    expected = [1.0, 0.94754, 0.88278, 0.80084, 0.69379, 0.54805, 0.33797, 0.00893, 0]
    np.testing.assert_allclose(flow.time_grid(8, 3.0, double_shift=True), expected, atol=1e-5)
    assert flow.time_grid(10, 3.3)[0] == 1.0


@pytest.mark.parametrize(("steps", "shift"), [(8, 3.0), (10, 3.0), (40, 1.0), (5, 2.5)])
def test_time_grid_is_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(flow.time_grid(steps, shift, double_shift=True), scheduler.sigmas.numpy(), atol=1e-6)


def test_ode_sample_is_diffusers():
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(T)
    path = sample("ode")
    x = np.asarray(path.states[:, 0], np.float64)
    for timestep in scheduler.timesteps:
        v = torch.tensor(numpy_velocity(x, float(timestep) / 1000))
        x = scheduler.step(v, timestep, torch.tensor(x)).prev_sample.numpy()
    np.testing.assert_allclose(path.states[:, -1], x, atol=1e-5)


def test_time_grid_refuses_no_steps():
    with pytest.raises(ValueError, match="steps=0"):
        flow.time_grid(0)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
def test_path_matches_numpy(kind):
    path = sample(kind)
    times, noise = np.asarray(TIMES, np.float64), np.asarray(path.noise, np.float64)
    x, a = np.asarray(path.states[:, 0], np.float64), 0.7
    for i in range(T):
        t, u = times[i], times[i + 1]
        v, dt = numpy_velocity(x, t), u - t
        if kind == "cps":
            std = u * np.sin(a * np.pi / 2)
            mean = (1 - u) * (x - t * v) + np.sqrt(u**2 - std**2) * (x + (1 - t) * v)
        else:
            s = a * np.sqrt(t / (1 - (u if i == 0 else t))) if kind == "sde" else a
            mean, std = x + v * dt + s**2 / (2 * t) * (x + (1 - t) * v) * dt, s * np.sqrt(-dt)
        x = mean + std * noise[:, i]
        np.testing.assert_allclose(path.states[:, i + 1], x, atol=1e-5)
        density = -0.5 * noise[:, i] ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi) if std > 0 else 0 * x
        np.testing.assert_allclose(path.logp_sum[:, i], density.sum((1, 2, 3)), rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(path.logp * np.prod(SHAPE), path.logp_sum, rtol=1e-5)


def test_noise_is_standard_normal_and_steps_differ():
    path = sample(keys=KEYS)
    assert abs(float(path.noise.mean())) < 0.2 and abs(float(path.noise.std()) - 1) < 0.2
    assert not np.allclose(path.noise[:, 0], path.noise[:, 1])
    assert not np.allclose(path.noise[0], path.noise[1])


def test_level_zero_is_the_ode():
    """The same states up to the rounding of a fused multiply, and a log-density of exactly 0."""
    ode = sample("ode")
    for kind in ("sde", "dance", "cps"):
        path = sample(kind, levels=jnp.zeros(T))
        np.testing.assert_allclose(path.states, ode.states, atol=1e-6)
        np.testing.assert_array_equal(path.logp_sum, jnp.zeros((B, T)))


def test_a_window_is_stochastic_only_inside():
    levels = jnp.array([0.0, 0.7, 0.7, 0.0, 0.0])
    path = sample(levels=levels)
    np.testing.assert_array_equal(path.logp != 0, np.broadcast_to(levels > 0, (B, T)))
    assert np.isfinite(path.states).all()


def test_a_record_does_not_depend_on_its_batch():
    whole = sample()
    part = sample(keys=KEYS[2:4], condition=jax.tree.map(lambda a: a[2:4], CONDITION))
    np.testing.assert_array_equal(part.noise, whole.noise[2:4])
    np.testing.assert_allclose(part.states, whole.states[2:4], atol=1e-6)


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    split = sample(keys=jax.device_put(KEYS, sharding), condition=jax.device_put(CONDITION, sharding))
    whole = sample()
    np.testing.assert_array_equal(split.noise, whole.noise)
    np.testing.assert_allclose(split.states, whole.states, atol=1e-6)


def test_generate_is_the_end_of_sample_and_x_init_is_used():
    x_init = jnp.ones((B, *SHAPE))
    path = sample(x_init=x_init)
    np.testing.assert_array_equal(path.states[:, 0], x_init)
    generate = functools.partial(flow.generate, velocity_fn, PARAMS, CONDITION, KEYS, SHAPE, TIMES)
    same = functools.partial(np.testing.assert_allclose, atol=1e-6)
    same(jax.jit(lambda: generate(LEVELS, "sde", x_init))(), path.states[:, -1])
    same(jax.jit(generate)(), sample("ode").states[:, -1])


def test_sample_carries_no_gradient():
    loss = lambda params: flow.sample(velocity_fn, params, CONDITION, KEYS, SHAPE, TIMES, LEVELS).states.sum()
    assert all((g == 0).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(PARAMS)))


def test_velocities_are_those_of_each_step():
    path = sample()
    v = flow.velocities(velocity_fn, PARAMS, CONDITION, path.states[:, :-1], TIMES[:-1])
    for i in range(T):
        np.testing.assert_allclose(v[:, i], numpy_velocity(path.states[:, i], float(TIMES[i])), atol=1e-5)


def test_guidance():
    null = jax.tree.map(lambda a: jnp.zeros_like(a[:1]), CONDITION)
    x, t = jax.random.normal(jax.random.key(4), (B, *SHAPE)), jnp.full(B, 0.4)
    v_c = velocity_fn(PARAMS, x, t, CONDITION)
    v_u = velocity_fn(PARAMS, x, t, jax.tree.map(jnp.zeros_like, CONDITION))
    out = jax.jit(lambda f: f(PARAMS, x, t, CONDITION))(flow.guided(velocity_fn, null, 4.5))
    np.testing.assert_allclose(out, v_u + 4.5 * (v_c - v_u), atol=1e-5)
    assert flow.guided(velocity_fn, null, 1.0) is velocity_fn
    np.testing.assert_allclose(flow.guided(velocity_fn, null, 0.0)(PARAMS, x, t, CONDITION), v_u, atol=1e-6)


def test_guidance_keeps_weights_as_arguments():
    frozen = Partial(lambda weights, params, x, t, condition: weights * x, jnp.float32(2.0))
    null = jax.tree.map(lambda a: a[:1], CONDITION)
    assert len(jax.tree.leaves(flow.guided(frozen, null, 2.0))) == 1 + 2 + 1


def test_sde_window():
    windows = np.stack([flow.sde_window(jax.random.key(i), 10, 3, 0.8) for i in range(40)]) > 0
    assert (windows.sum(1) == 3).all()
    starts = windows.argmax(1)
    assert all(w[s : s + 3].all() for w, s in zip(windows, starts))
    assert set(starts) == {0, 1, 2, 3, 4}
    np.testing.assert_allclose(flow.sde_window(jax.random.key(0), 4, 4, 0.5), [0.5] * 4)
    with pytest.raises(ValueError, match="size 5"):
        flow.sde_window(jax.random.key(0), 4, 5, 0.5)
