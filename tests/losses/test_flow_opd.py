"""Flow-OPD: the analytic loss, the sampled forms of its gradient, and the negative control."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from opd_jax.losses import flow_opd, gaussians
from opd_jax.rng import per_record
from opd_jax.sampling import flow
from opd_jax.types import FlowLabels, FlowRollout

B, T, SHAPE = 3, 4, (2, 1, 2)
TIMES = flow.time_grid(T, 3.0, double_shift=True)
LEVELS = jnp.full(T, 0.7)
KEY = jax.random.key(9)
STUDENT = {"mix": jnp.array([[0.5, -0.3], [0.2, 0.4]]), "bias": jnp.array([0.1, -0.2])}
TEACHER = {"mix": jnp.array([[0.4, -0.1], [0.3, 0.1]]), "bias": jnp.array([0.3, 0.2])}
ANCHOR = jax.tree.map(lambda a: -a, STUDENT)


def velocity_fn(params, x, t, condition):
    shift = params["bias"][None] + condition * t[:, None]
    return jnp.tanh(x @ params["mix"] + shift[:, None, None])


@functools.partial(jax.jit, static_argnames=("b", "kind"))
def roll(key=KEY, b=B, kind="sde", times=TIMES, levels=LEVELS, x_init=None):
    condition = jnp.linspace(-1, 1, 2 * b).reshape(b, 2)
    keys = per_record(key, b)
    path = flow.sample(velocity_fn, STUDENT, condition, keys, SHAPE, times, levels, kind, x_init)
    index = jnp.arange(b)
    return flow.as_rollout(path, condition, index, index, times, levels)


@jax.jit
def label(rollout, teacher=TEACHER, anchor=None):
    steps = lambda params: flow.velocities(
        velocity_fn, params, rollout.condition, rollout.states[:, :-1], rollout.times[0, :-1]
    )
    return FlowLabels(steps(teacher), None if anchor is None else steps(anchor))


@jax.jit
def value_and_gradient(supervise, params, rollout, labels):
    def total(params):
        out = supervise(params, rollout, labels, KEY)
        return out.total.sum(), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return out, gradient


@jax.jit
def evaluate(supervise, params, rollout, labels):
    return supervise(params, rollout, labels, KEY)


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def numpy_loss(params, rollout, teacher, weights, anchor=None, anchor_weight=0.0):
    """Per-record totals in float64, step by step."""
    params, teacher, anchor = (jax.tree.map(lambda a: np.asarray(a, np.float64), p) for p in (params, teacher, anchor))
    condition, states, times = (
        np.asarray(a, np.float64) for a in (rollout.condition, rollout.states, rollout.times[0])
    )

    def velocity(p, i):
        return np.tanh(states[:, i] @ p["mix"] + (p["bias"] + condition * times[i])[:, None, None])

    total = np.zeros(states.shape[0])
    for i, w in enumerate(weights):
        total += w * ((velocity(params, i) - velocity(teacher, i)) ** 2).mean((1, 2, 3))
        if anchor is not None:
            total += anchor_weight * w * ((velocity(params, i) - velocity(anchor, i)) ** 2).mean((1, 2, 3))
    return total


def weights_64(weighting, normalize, steps):
    t, dt, a = np.asarray(TIMES, np.float64), np.diff(np.asarray(TIMES, np.float64)), 0.7
    kl = np.append(
        -dt[0] * (1 - t[1]) / (2 * a**2), (-dt * (1 + a**2 / 2) ** 2 * (1 - t[:-1]) / (2 * a**2 * t[:-1]))[1:]
    )
    mean = np.append(dt[0], dt[1:] * (1 + a**2 / 2)) ** 2
    w = {"kl": kl, "kl_no_dt": -kl * dt, "velocity": np.ones(T), "mean": mean, "x0": t[:-1] ** 2}[weighting][:steps]
    return w / w.mean() if normalize else w


def test_hand_value():
    """One element, two steps, velocities 1 and 0: total = w_0 + w_1, the last step skipped or not."""
    ones, times = jnp.ones((1, 2, 1, 1, 1)), jnp.array([1.0, 0.5, 0.0])
    rollout = FlowRollout(
        jnp.zeros((1, 1)), jnp.zeros(1, int), jnp.zeros(1, int), jnp.zeros((1, 3, 1, 1, 1)), ones, times[None],
        jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.zeros((1, 2)),
    )  # fmt: skip
    one = lambda params, x, t, condition: jnp.ones_like(x) * params
    kl = evaluate(flow_opd.supervise(one, normalize=False, skip_last=False), 1.0, rollout, FlowLabels(0 * ones))
    np.testing.assert_allclose([kl.total[0], kl.weight[0], kl.metrics["reverse_kl"][0]], [0.6875, 2, 0.6875], rtol=1e-6)
    first = evaluate(flow_opd.supervise(one, normalize=False), 1.0, rollout, FlowLabels(0 * ones))
    np.testing.assert_allclose([first.total[0], first.weight[0]], [0.125, 1], rtol=1e-6)
    unit = flow_opd.supervise(one, skip_last=False, anchor_weight=0.5)
    both = evaluate(unit, 3.0, rollout, FlowLabels(0 * ones, ones))
    np.testing.assert_allclose(both.total[0], 2 * (9 + 0.5 * 4), rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighting", gaussians.WEIGHTINGS)
def test_matches_float64_and_its_gradient(weighting, normalize):
    rollout = roll()
    loss = flow_opd.supervise(velocity_fn, weighting=weighting, normalize=normalize, anchor_weight=0.3)
    out, gradient = value_and_gradient(loss, STUDENT, rollout, label(rollout, anchor=ANCHOR))
    weights = weights_64(weighting, normalize, T - 1)
    reference = lambda p: numpy_loss(p, rollout, TEACHER, weights, ANCHOR, 0.3)
    np.testing.assert_allclose(out.total, reference(STUDENT), rtol=2e-4)
    np.testing.assert_array_equal(out.weight, np.full(B, T - 1))
    for name in STUDENT:
        for index in np.ndindex(STUDENT[name].shape):
            moved = [jax.tree.map(lambda a: np.array(a, np.float64), STUDENT) for _ in range(2)]
            moved[0][name][index] += 1e-4
            moved[1][name][index] -= 1e-4
            slope = (reference(moved[0]).sum() - reference(moved[1]).sum()) / 2e-4
            np.testing.assert_allclose(gradient[name][index], slope, rtol=1e-3, atol=1e-4)


def test_metrics():
    """`reverse_kl` is the sum over the counted steps of the exact KL of the transitions, whatever the weighting."""
    rollout = roll()
    labels = label(rollout, anchor=ANCHOR)
    out = evaluate(flow_opd.supervise(velocity_fn, weighting="velocity"), STUDENT, rollout, labels)
    student = label(rollout, STUDENT).teacher_velocity
    kl = jnp.zeros(B)
    for i in range(T - 1):
        step = lambda v, i=i: gaussians.transition("sde", rollout.states[:, i], v[:, i], TIMES[i], TIMES[i + 1], 0.7)
        kl += gaussians.reverse_kl(step(student)[0], step(labels.teacher_velocity)[0], step(student)[1])
    np.testing.assert_allclose(out.metrics["reverse_kl"], kl, rtol=1e-4)
    error = lambda other: ((student - other) ** 2)[:, :-1].mean((1, 2, 3, 4))
    np.testing.assert_allclose(out.metrics["velocity_error"], error(labels.teacher_velocity), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["anchor_error"], error(labels.anchor_velocity), rtol=1e-5)


@pytest.mark.parametrize("name", flow_opd.ESTIMATORS)
def test_student_equal_to_teacher_is_exactly_zero(name):
    rollout = roll()
    loss = flow_opd.ESTIMATORS[name](velocity_fn, skip_last=False, anchor_weight=0.1)
    labels = label(rollout, STUDENT, STUDENT)
    out, gradient = value_and_gradient(loss, STUDENT, rollout, labels)
    np.testing.assert_array_equal(out.total, jnp.zeros(B))
    np.testing.assert_array_equal(flat(gradient), 0)


@pytest.mark.parametrize("name", flow_opd.ESTIMATORS)
def test_no_gradient_to_states_or_labels(name):
    rollout = roll()
    loss = flow_opd.ESTIMATORS[name](velocity_fn, anchor_weight=0.1)

    def total(floats):
        states, logp, labels = floats
        return loss(STUDENT, rollout._replace(states=states, logp=logp), labels, KEY).total.sum()

    gradients = jax.jit(jax.grad(total))((rollout.states, rollout.logp, label(rollout, anchor=ANCHOR)))
    np.testing.assert_array_equal(flat(gradients), 0)


@pytest.mark.parametrize("name", flow_opd.ESTIMATORS)
def test_nan_where_nothing_counts_changes_nothing(name):
    """In the skipped last step, and in a step without noise, of the labels, of the draws and of the states."""
    rollout = roll(levels=jnp.array([0.0, 0.7, 0.7, 0.7]))
    labels = label(rollout, anchor=ANCHOR)
    broken = lambda a: a.at[:, 0].set(jnp.nan).at[:, -1].set(jnp.nan)
    bad_rollout = rollout._replace(
        states=broken(rollout.states), noise=broken(rollout.noise), logp=broken(rollout.logp)
    )
    loss = flow_opd.ESTIMATORS[name](velocity_fn, anchor_weight=0.1)
    expected = value_and_gradient(loss, STUDENT, rollout, labels)
    actual = value_and_gradient(loss, STUDENT, bad_rollout, jax.tree.map(broken, labels))
    np.testing.assert_array_equal(actual[0].weight, np.full(B, 2))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert np.abs(flat(actual[1])).sum() > 0


@pytest.mark.parametrize("name", flow_opd.ESTIMATORS)
def test_split_batch_equals_whole_batch(name):
    rollout = roll()
    labels = label(rollout, anchor=ANCHOR)
    loss = flow_opd.ESTIMATORS[name](velocity_fn, anchor_weight=0.1)
    whole = evaluate(loss, STUDENT, rollout, labels)
    fields = ("condition", "task", "group", "states", "noise", "logp", "logp_sum")
    for part in (slice(0, 1), slice(1, 3)):
        cut = rollout._replace(**{field: getattr(rollout, field)[part] for field in fields})
        piece = evaluate(loss, STUDENT, cut, jax.tree.map(lambda a, part=part: a[part], labels))
        expected = jax.tree.map(lambda a, part=part: a[part], whole)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), piece, expected)


def test_nothing_counts():
    out, gradient = value_and_gradient(flow_opd.supervise(velocity_fn, kind="ode"), STUDENT, roll(), label(roll()))
    np.testing.assert_array_equal(out.total, np.zeros(B))
    np.testing.assert_array_equal(out.weight, np.zeros(B))
    np.testing.assert_array_equal(flat(gradient), 0)


def test_ode_rollout_with_velocity_weights():
    rollout = roll(kind="ode", levels=jnp.zeros(T))
    out = evaluate(flow_opd.supervise(velocity_fn, weighting="velocity", kind="ode"), STUDENT, rollout, label(rollout))
    np.testing.assert_allclose(out.total, numpy_loss(STUDENT, rollout, TEACHER, np.ones(T - 1)), rtol=1e-4)
    np.testing.assert_array_equal(out.metrics["reverse_kl"], np.zeros(B))


def test_frozen_weights_stay_arguments():
    frozen = Partial(lambda scale, params, x, t, condition: scale * velocity_fn(params, x, t, condition), jnp.ones(()))
    loss, rollout = flow_opd.supervise(frozen), roll()
    assert len(jax.tree.leaves(loss)) == 1
    plain = evaluate(flow_opd.supervise(velocity_fn), STUDENT, rollout, label(rollout)).total
    np.testing.assert_allclose(value_and_gradient(loss, STUDENT, rollout, label(rollout))[0].total, plain, rtol=1e-5)


# Sampled estimators: many records that share a start, a condition and one noisy step, so that only the action differs.


def one_step(n, kind, distance):
    times, levels = jnp.array([0.7, 0.5, 0.3]), jnp.array([0.7, 0.0])
    x_init = jnp.broadcast_to(jnp.array([[[0.4, -1.1]], [[0.8, 0.3]]]), (n, *SHAPE))
    condition, index = jnp.zeros((n, 2)), jnp.zeros(n, int)
    path = flow.sample(velocity_fn, STUDENT, condition, per_record(KEY, n), SHAPE, times, levels, kind, x_init)
    rollout = flow.as_rollout(path, condition, index, index, times, levels)
    teacher = jax.tree.map(lambda s, t: s + distance * (t - s), STUDENT, TEACHER)
    return rollout, label(rollout, teacher)


def gradients_per_record(loss, rollout, labels):
    """`[n, parameters]`: linearised once per parameter, as a record's total depends on its own action alone."""
    jacobian = jax.jit(jax.jacfwd(lambda params: loss(params, rollout, labels, KEY).total))(STUDENT)
    return np.concatenate([g.reshape(g.shape[0], -1) for g in jax.tree.leaves(jacobian)], 1)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
@pytest.mark.parametrize("weighting", ["kl", "velocity"])
def test_log_ratio_is_unbiased_and_state_only_is_zero(kind, weighting):
    rollout, labels = one_step(4000, kind, 0.2)
    make = lambda name: flow_opd.ESTIMATORS[name](velocity_fn, kind=kind, weighting=weighting, normalize=False)
    exact = gradients_per_record(make("analytic"), rollout, labels)[0]
    mean, error, noise = {}, {}, {}
    for name in ("log_ratio", "log_ratio_per_dimension", "state_only"):
        samples = gradients_per_record(make(name), rollout, labels)
        mean[name], noise[name] = samples.mean(0), np.sqrt(samples.var(0).sum()) / np.linalg.norm(exact)
        error[name] = samples.std(0) / np.sqrt(len(samples)) + 1e-9
    for name in ("log_ratio", "log_ratio_per_dimension"):
        assert (np.abs(mean[name] - exact) < 4 * error[name]).all()
        assert (np.abs(mean[name]) > 4 * error[name]).any()
    assert (np.abs(mean["state_only"]) < 4 * error["state_only"]).all()
    assert noise["log_ratio"] > noise["log_ratio_per_dimension"]
    value = evaluate(make("log_ratio"), STUDENT, rollout, labels).total
    expected = evaluate(make("analytic"), STUDENT, rollout, labels).total[0]
    assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(len(value))


@pytest.mark.parametrize("name", ["log_ratio", "log_ratio_per_dimension"])
def test_value_of_the_log_ratio_form(name):
    """`D total = sum_t log pi_S(a|s) - log pi_T(a|s)`: the sampled estimate of the reverse KL."""
    rollout = roll()
    labels = label(rollout)
    loss = flow_opd.ESTIMATORS[name](velocity_fn, normalize=False)
    student = label(rollout, STUDENT).teacher_velocity

    def logp(velocity):
        mean, std = gaussians.path_transition("sde", rollout.states[:, :-1], velocity, TIMES, LEVELS)
        return gaussians.path_log_density(rollout.states[:, 1:], mean, std)[:, :-1].sum(1)

    expected = jax.jit(lambda: logp(student) - logp(labels.teacher_velocity))()
    np.testing.assert_allclose(4 * evaluate(loss, STUDENT, rollout, labels).total, expected, rtol=1e-3, atol=1e-4)


def test_one_draw_of_the_state_only_form():
    """The control is not inert: on-policy its value is the analytic one, and a draw's gradient is not 0."""
    rollout = roll()
    labels = label(rollout)
    out, gradient = value_and_gradient(flow_opd.state_only_policy_gradient(velocity_fn), STUDENT, rollout, labels)
    np.testing.assert_allclose(
        out.total, evaluate(flow_opd.supervise(velocity_fn), STUDENT, rollout, labels).total, rtol=1e-5
    )
    error = ((label(rollout, STUDENT).teacher_velocity - labels.teacher_velocity) ** 2).mean((2, 3, 4))[:, :-1]
    weighted = error * jnp.array(weights_64("kl", True, T - 1), jnp.float32)[None]

    def credited(params):
        velocity = label(rollout, params).teacher_velocity
        mean, std = gaussians.path_transition("sde", rollout.states[:, :-1], velocity, TIMES, LEVELS)
        logp = gaussians.path_log_density(rollout.states[:, 1:], mean, std)[:, :-1] / 4
        return (logp * weighted).sum()

    np.testing.assert_allclose(flat(gradient), flat(jax.jit(jax.grad(credited))(STUDENT)), rtol=1e-3, atol=1e-5)
    assert np.abs(flat(gradient)).max() > 1e-2


@pytest.mark.parametrize("side", [4, 16])
def test_noise_of_the_log_ratio_grows_with_the_dimension(side):
    """With one parameter per element: about sqrt(D + 1) for one scalar, sqrt(2) per dimension."""
    n, d = 2000, side
    free = lambda params, x, t, condition: jnp.broadcast_to(params[None, None, :, None], x.shape)
    times, levels, params = jnp.array([0.7, 0.5, 0.3]), jnp.array([0.7, 0.0]), jnp.zeros(d)
    condition, keys, index = jnp.zeros((n, 1)), per_record(KEY, n), jnp.zeros(n, int)
    path = flow.sample(free, params, condition, keys, (1, d, 1), times, levels, "sde", jnp.zeros((n, 1, d, 1)))
    rollout = flow.as_rollout(path, condition, index, index, times, levels)
    labels = FlowLabels(jnp.full((n, 2, 1, d, 1), 0.01))
    noise = {}
    for name in ("log_ratio", "log_ratio_per_dimension"):
        loss = flow_opd.ESTIMATORS[name](free)
        total = lambda params, loss=loss: loss(params, rollout, labels, KEY).total
        samples = np.asarray(jax.jit(jax.jacfwd(total))(params))
        exact = jax.grad(lambda p: evaluate(flow_opd.supervise(free), p, rollout, labels).total[0])(params)
        noise[name] = np.sqrt(samples.var(0).sum()) / np.linalg.norm(exact)
    np.testing.assert_allclose(noise["log_ratio"], np.sqrt(d + 1), rtol=0.1)
    np.testing.assert_allclose(noise["log_ratio_per_dimension"], np.sqrt(2), rtol=0.1)


def test_bad_arguments():
    rollout = roll()
    with pytest.raises(ValueError, match=r"anchor_weight=0\.5"):
        flow_opd.supervise(velocity_fn, anchor_weight=0.5)(STUDENT, rollout, label(rollout), KEY)
    with pytest.raises(ValueError, match="'vector'"):
        flow_opd.log_ratio_policy_gradient(velocity_fn, credit="vector")
    with pytest.raises(ValueError, match="'dpm'"):
        flow_opd.supervise(velocity_fn, kind="dpm")(STUDENT, rollout, label(rollout), KEY)
    short = roll(times=jnp.array([1.0, 0.0]), levels=jnp.ones(1))
    with pytest.raises(ValueError, match="path of 1 step"):
        flow_opd.supervise(velocity_fn)(STUDENT, short, label(short), KEY)


def test_what_is_watched_at_the_sampled_actions():
    """The log-ratio against densities written out in float64; and the student is the sampler, up to rounding."""
    rollout = roll()
    labels = label(rollout)
    out = evaluate(flow_opd.supervise(velocity_fn), STUDENT, rollout, labels)
    student = label(rollout, STUDENT).teacher_velocity
    times, levels = (np.asarray(a[0], np.float64) for a in (rollout.times, rollout.levels))
    ratio = np.zeros((B, T - 1))
    for i in range(T - 1):  # the last step is left out
        c = gaussians.coefficients("sde", times[i], times[i + 1], levels[i])
        state, velocity, std = (float(a) for a in c)
        actions, x = (np.asarray(rollout.states[:, j], np.float64) for j in (i + 1, i))
        squares = lambda v: ((actions - state * x - velocity * np.asarray(v[:, i], np.float64)) ** 2).sum((1, 2, 3))  # noqa: B023
        ratio[:, i] = (squares(student) - squares(labels.teacher_velocity)) / (2 * std**2)
    np.testing.assert_allclose(out.spread["log_ratio"], ratio, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.metrics["log_ratio"], ratio.mean(1), rtol=1e-4, atol=1e-4)
    assert (out.metrics["logp_diff"] < 1e-5).all()
    moved = jax.tree.map(lambda a: a + 0.1, STUDENT)
    assert (evaluate(flow_opd.supervise(velocity_fn), moved, rollout, labels).metrics["logp_diff"] > 1e-3).all()


def test_actions_without_noise_are_not_watched():
    rollout = roll(levels=jnp.zeros(T))
    out = evaluate(flow_opd.supervise(velocity_fn, weighting="velocity"), STUDENT, rollout, label(rollout))
    assert np.isnan(out.spread["log_ratio"]).all()
    assert (out.metrics["log_ratio"] == 0).all()
    assert (out.metrics["logp_diff"] == 0).all()
