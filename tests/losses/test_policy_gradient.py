"""Flow-GRPO: advantages, the clipped ratio, and the loss on flow rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import gaussians, policy_gradient
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.rng import per_record
from opd_jax.sampling import flow

B, T, SHAPE = 4, 5, (2, 1, 2)
TIMES = flow.time_grid(T, 3.0, double_shift=True)
LEVELS = jnp.array([0.0, 0.7, 0.7, 0.0, 0.0])
ADVANTAGE = jnp.array([1.5, -0.5, 0.0, -2.0])
KEY = jax.random.key(5)
STUDENT = {"mix": jnp.array([[0.5, -0.3], [0.2, 0.4]]), "bias": jnp.array([0.1, -0.2])}
MOVED = jax.tree.map(lambda a: a + 0.05, STUDENT)


def velocity_fn(params, x, t, condition):
    shift = params["bias"][None] + condition * t[:, None]
    return jnp.tanh(x @ params["mix"] + shift[:, None, None])


@jax.jit
def roll(levels=LEVELS):
    condition, index = jnp.linspace(-1, 1, 2 * B).reshape(B, 2), jnp.arange(B)
    path = flow.sample(velocity_fn, STUDENT, condition, per_record(KEY, B), SHAPE, TIMES, levels)
    return flow.as_rollout(path, condition, index, index // 2, TIMES, levels)


@jax.jit
def reference(rollout, params=MOVED):
    return flow.velocities(velocity_fn, params, rollout.condition, rollout.states[:, :-1], rollout.times[0, :-1])


@jax.jit
def value_and_gradient(loss, params, rollout, labels):
    def total(params):
        out = loss(params, rollout, labels, KEY)
        return out.total.sum(), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return out, gradient


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


advantages = jax.jit(policy_gradient.group_advantages, static_argnames=("num_groups", "global_std", "clip"))


def test_advantages_by_hand():
    rewards, group = jnp.array([1.0, 3.0, 5.0, 5.0]), jnp.array([0, 0, 1, 1])
    own = advantages(rewards, group, num_groups=2, global_std=False)
    np.testing.assert_allclose(own, [-1 / 1.0001, 1 / 1.0001, 0, 0], rtol=1e-6)
    std = np.std([1.0, 3, 5, 5]) + 1e-4
    np.testing.assert_allclose(advantages(rewards, group, num_groups=2), [-1 / std, 1 / std, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("global_std", [True, False])
def test_advantages_match_numpy(global_std):
    rng = np.random.default_rng(0)
    group, rewards = rng.integers(0, 4, 30), rng.normal(size=30) ** 3
    expected = np.zeros(30)
    for g in range(4):
        member = group == g
        std = rewards.std() if global_std else rewards[member].std()
        expected[member] = np.clip((rewards[member] - rewards[member].mean()) / (std + 1e-4), -2, 2)
    ours = advantages(jnp.float32(rewards), jnp.array(group), num_groups=6, global_std=global_std, clip=2.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert (np.abs(expected) == 2).any()


@pytest.mark.parametrize("global_std", [True, False])
def test_equal_rewards_and_nan(global_std):
    """A group of equal rewards is exactly 0 though its mean is rounded; NaN is excluded from everything."""
    rewards = jnp.array([0.1, 0.1, 0.1, 1.0, 2.0, jnp.nan, jnp.nan, 7.0])
    group = jnp.array([0, 0, 0, 1, 1, 1, 2, 3])
    ours = advantages(rewards, group, num_groups=4, global_std=global_std)
    np.testing.assert_array_equal(np.asarray(ours)[[0, 1, 2, 5, 6, 7]], 0)
    np.testing.assert_array_equal(ours[jnp.array([3, 4])], -ours[jnp.array([4, 3])])
    keep = jnp.array([0, 1, 2, 3, 4, 7])
    without = advantages(rewards[keep], group[keep], num_groups=4, global_std=global_std)
    np.testing.assert_allclose(ours[keep], without, rtol=1e-6)
    rounded = advantages(jnp.full(7, 0.1), jnp.zeros(7, int), num_groups=1, global_std=global_std)
    np.testing.assert_array_equal(rounded, np.zeros(7))
    nothing = advantages(jnp.full(8, jnp.nan), group, num_groups=4, global_std=global_std)
    np.testing.assert_array_equal(nothing, np.zeros(8))


def test_clipped_surrogate_by_hand():
    ratio, advantage = jnp.array([[1.5, 0.5], [1.5, 0.5]]), jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    surrogate = lambda r: policy_gradient.clipped_surrogate(r, advantage, 0.2)
    np.testing.assert_allclose(surrogate(ratio), [[-1.2, -0.5], [1.5, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda r: surrogate(r).sum())(ratio), [[0, -1], [1, 0]])


def test_ratio_is_one_before_the_first_update():
    """To the rounding of a forward pass in another batch layout; then total = -A per step, and nothing is clipped."""
    out, gradient = value_and_gradient(policy_gradient.grpo(velocity_fn), STUDENT, roll(), RewardLabels(ADVANTAGE))
    np.testing.assert_allclose(out.metrics["ratio"], np.ones(B), atol=2e-6)
    np.testing.assert_array_equal(out.metrics["clip_fraction"], np.zeros(B))
    np.testing.assert_allclose(out.total, -2 * ADVANTAGE, atol=1e-5)
    np.testing.assert_array_equal(out.weight, np.full(B, 2))
    assert np.abs(flat(gradient)).max() > 1e-3


def test_matches_float64():
    """Ratios, clipping and the KL to the reference, for a student that has moved away from the sampler."""
    rollout, clip, beta = roll(), 0.01, 0.5
    labels = RewardLabels(ADVANTAGE, reference(rollout, STUDENT))
    loss = policy_gradient.grpo(velocity_fn, clip=clip, beta=beta, weighting="kl_no_dt", normalize=False)
    out, _ = value_and_gradient(loss, MOVED, rollout, labels)
    x, times, a = np.asarray(rollout.states, np.float64), np.asarray(TIMES, np.float64), 0.7
    new, old = (np.asarray(reference(rollout, p), np.float64) for p in (MOVED, STUDENT))
    total, kl, ratios = np.zeros(B), np.zeros(B), []
    for i in (1, 2):
        t, dt = times[i], times[i + 1] - times[i]
        s = a * np.sqrt(t / (1 - t))
        mean = lambda v: x[:, i] + v * dt + s**2 / (2 * t) * (x[:, i] + (1 - t) * v) * dt  # noqa: B023
        square = lambda v: ((x[:, i + 1] - mean(v)) ** 2).mean((1, 2, 3)) / (2 * s**2 * -dt)  # noqa: B023
        ratio = np.exp(square(old[:, i]) - square(new[:, i]))
        advantage = np.asarray(ADVANTAGE, np.float64)
        total -= np.minimum(ratio * advantage, np.clip(ratio, 1 - clip, 1 + clip) * advantage)
        difference = (mean(new[:, i]) - mean(old[:, i])) ** 2
        total += beta * difference.mean((1, 2, 3)) / (2 * s**2)
        kl += difference.sum((1, 2, 3)) / (2 * s**2 * -dt)
        ratios.append(ratio)
    clipped = np.abs(np.array(ratios) - 1) > clip
    assert clipped.any() and not clipped.all()
    np.testing.assert_allclose(out.total, total, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(out.metrics["reverse_kl"], kl, rtol=1e-3)
    np.testing.assert_allclose(out.metrics["ratio"], np.mean(ratios, 0), rtol=1e-4)
    np.testing.assert_allclose(out.metrics["clip_fraction"], clipped.mean(0))


def test_gradient_is_that_of_the_log_density():
    """On-policy and unclipped, `-sum_t A grad logp_t`; the KL to the student itself adds exactly nothing."""
    rollout = roll()
    mean_logp = lambda params: (
        gaussians.path_log_density(
            rollout.states[:, 1:],
            *gaussians.path_transition("sde", rollout.states[:, :-1], reference(rollout, params), TIMES, LEVELS),
        )
        / 4
    )
    expected = jax.grad(lambda params: -(mean_logp(params) * ADVANTAGE[:, None]).sum())(STUDENT)
    _, plain = value_and_gradient(policy_gradient.grpo(velocity_fn), STUDENT, rollout, RewardLabels(ADVANTAGE))
    np.testing.assert_allclose(flat(plain), flat(expected), rtol=1e-4, atol=1e-6)
    labels = RewardLabels(jnp.zeros(B), reference(rollout, STUDENT))
    out, gradient = value_and_gradient(policy_gradient.grpo(velocity_fn, beta=1.0), STUDENT, rollout, labels)
    np.testing.assert_array_equal(out.total, np.zeros(B))
    np.testing.assert_array_equal(flat(gradient), 0)
    labels = labels._replace(reference_velocity=reference(rollout, MOVED))
    out, gradient = value_and_gradient(policy_gradient.grpo(velocity_fn, beta=1.0), STUDENT, rollout, labels)
    assert (out.total > 0).all() and np.abs(flat(gradient)).max() > 1e-3


def test_a_policy_gradient_step_raises_the_density_of_good_samples():
    rollout, loss = roll(), policy_gradient.grpo(velocity_fn)
    _, gradient = value_and_gradient(loss, STUDENT, rollout, RewardLabels(jnp.ones(B)))
    stepped = jax.tree.map(lambda p, g: p - 1e-3 * g, STUDENT, gradient)
    out, _ = value_and_gradient(loss, stepped, rollout, RewardLabels(jnp.ones(B)))
    assert out.metrics["ratio"].mean() > 1


@pytest.mark.parametrize("window", [2, 3])
def test_window_equals_all_steps(window):
    rollout = roll()
    labels = RewardLabels(ADVANTAGE, reference(rollout))
    make = functools.partial(policy_gradient.grpo, velocity_fn, beta=0.5, clip=0.03)
    whole = value_and_gradient(make(), MOVED, rollout, labels)
    evaluated = policy_gradient.window_of(rollout, window)
    part = value_and_gradient(make(window=window), MOVED, rollout, RewardLabels(ADVANTAGE, reference(evaluated)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), part, whole)


def test_window_evaluates_only_its_steps():
    sizes = []

    def counting(params, x, t, condition):
        sizes.append(x.shape[0])
        return velocity_fn(params, x, t, condition)

    jax.eval_shape(policy_gradient.grpo(counting, window=2), STUDENT, roll(), RewardLabels(ADVANTAGE), KEY)
    assert sizes == [2 * B]


def test_a_reference_at_other_steps_is_refused():
    rollout = roll()
    with pytest.raises(ValueError, match=r"not of the evaluated steps.*window_of"):
        policy_gradient.grpo(velocity_fn, beta=0.5, window=2)(
            STUDENT, rollout, RewardLabels(ADVANTAGE, reference(rollout)), KEY
        )


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_balanced_steps_have_the_same_gradient_by_the_velocity(kind):
    """Whatever its noise level and time: the advantage times the draw (negated, as d mean / d velocity is negative)."""

    def shift(params, x, t, condition):
        return jnp.full_like(x, params["v"])

    params, condition = {"v": jnp.float32(0.3)}, jnp.zeros((B, 1))
    path = flow.sample(shift, params, condition, per_record(KEY, B), SHAPE, TIMES, LEVELS, kind)
    rollout = flow.as_rollout(path, condition, jnp.arange(B), jnp.arange(B) // 2, TIMES, LEVELS)
    loss = policy_gradient.grpo(shift, kind=kind, clip=0.1, balanced=True)
    gradient = jax.grad(lambda p: loss(p, rollout, RewardLabels(ADVANTAGE), KEY).total.sum())(params)
    draws = np.asarray(rollout.noise, np.float64).mean((2, 3, 4))[:, np.asarray(LEVELS) > 0]
    np.testing.assert_allclose(gradient["v"], (np.asarray(ADVANTAGE)[:, None] * draws).sum(), rtol=1e-3)


def test_no_gradient_to_samples_advantages_or_reference():
    rollout, loss = roll(), policy_gradient.grpo(velocity_fn, beta=0.5)

    def total(floats):
        states, logp, labels = floats
        return loss(MOVED, rollout._replace(states=states, logp=logp), labels, KEY).total.sum()

    labels = RewardLabels(ADVANTAGE, reference(rollout))
    np.testing.assert_array_equal(flat(jax.jit(jax.grad(total))((rollout.states, rollout.logp, labels))), 0)


def test_nan_in_steps_that_do_not_count_changes_nothing():
    rollout, loss = roll(), policy_gradient.grpo(velocity_fn, beta=0.5, clip=0.03)
    labels = RewardLabels(ADVANTAGE, reference(rollout))
    broken = lambda a, steps: a.at[:, jnp.array(steps)].set(jnp.nan)
    bad = rollout._replace(states=broken(rollout.states, [0, 4, 5]), logp=broken(rollout.logp, [0, 3, 4]))
    bad_labels = labels._replace(reference_velocity=broken(labels.reference_velocity, [0, 3, 4]))
    expected = value_and_gradient(loss, MOVED, rollout, labels)
    jax.tree.map(np.testing.assert_array_equal, value_and_gradient(loss, MOVED, bad, bad_labels), expected)


def test_split_batch_equals_whole_batch():
    rollout, loss = roll(), policy_gradient.grpo(velocity_fn, beta=0.5)
    labels = RewardLabels(ADVANTAGE, reference(rollout))
    whole = value_and_gradient(loss, MOVED, rollout, labels)[0]
    fields = ("condition", "task", "group", "states", "noise", "logp", "logp_sum")
    for part in (slice(0, 1), slice(1, 4)):
        cut = rollout._replace(**{field: getattr(rollout, field)[part] for field in fields})
        piece = value_and_gradient(loss, MOVED, cut, jax.tree.map(lambda a, part=part: a[part], labels))[0]
        expected = jax.tree.map(lambda a, part=part: a[part], whole)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), piece, expected)


def test_no_noise_counts_nothing_and_beta_needs_a_reference():
    rollout = roll(jnp.zeros(T))
    out, gradient = value_and_gradient(policy_gradient.grpo(velocity_fn), STUDENT, rollout, RewardLabels(ADVANTAGE))
    np.testing.assert_array_equal(out.total, np.zeros(B))
    np.testing.assert_array_equal(out.weight, np.zeros(B))
    np.testing.assert_array_equal(flat(gradient), 0)
    with pytest.raises(ValueError, match=r"beta=0\.1"):
        policy_gradient.grpo(velocity_fn, beta=0.1)(STUDENT, rollout, RewardLabels(ADVANTAGE), KEY)
