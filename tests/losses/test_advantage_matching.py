"""Advantage weighted matching: the noised copies, and the loss against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import advantage_matching
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.rng import per_record

B, K, SHAPE = 4, 3, (2, 2, 1)
KEY = jax.random.key(2)
STUDENT = {"scale": jnp.array(0.4), "bias": jnp.array(0.2)}
ADVANTAGE = jnp.array([1.5, -0.5, 0.0, -1.0])


def velocity_fn(params, x, t, condition):
    return jnp.tanh(x * params["scale"] + (params["bias"] + condition[:, :1] * t[:, None])[:, None, None])


def rollout(draws=K):
    image = jax.random.normal(KEY, (B, *SHAPE))
    condition, index = jnp.linspace(-1, 1, 2 * B).reshape(B, 2), jnp.arange(B)
    return advantage_matching.noised_again(image, condition, index % 2, index // 2, per_record(KEY, B), draws)


def reference(again):
    return jnp.sin(again.x)


def value_and_gradient(loss, again, labels, params=STUDENT):
    def total(params):
        out = loss(params, again, labels, KEY)
        return out.total.sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return out, gradient


def test_copies_lie_between_picture_and_noise():
    again = rollout()
    noise = again.velocity + again.image[:, None]
    w = again.t[..., None, None, None]
    np.testing.assert_allclose(again.x, (1 - w) * again.image[:, None] + w * noise, atol=1e-6)
    assert len(np.unique(again.t)) == B * K, "every copy has a time of its own"
    assert len(np.unique(noise)) == noise.size, "and noise of its own"
    np.testing.assert_array_equal(again.t[:, :2], rollout(draws=2).t)


def test_matches_float64():
    again, beta = rollout(), 0.3
    labels = RewardLabels(ADVANTAGE, reference(again), reward=jnp.arange(4.0))
    out, _ = value_and_gradient(advantage_matching.supervise(velocity_fn, beta=beta), again, labels)
    x, t, target = (np.asarray(a, np.float64) for a in (again.x, again.t, again.velocity))
    condition = np.asarray(again.condition, np.float64)
    total, errors = np.zeros(B), np.zeros(B)
    for b in range(B):
        for k in range(K):
            student = np.tanh(0.4 * x[b, k] + 0.2 + condition[b, 0] * t[b, k])
            error = ((student - target[b, k]) ** 2).mean()
            errors[b] += error / K
            total[b] += float(ADVANTAGE[b]) * error + beta * ((student - np.sin(x[b, k])) ** 2).mean()
    np.testing.assert_allclose(out.total, total, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["matching_error"], errors, rtol=1e-5)
    np.testing.assert_array_equal(out.weight, np.full(B, K))
    np.testing.assert_array_equal(out.metrics["reward"], np.arange(4))


def test_one_value_by_hand():
    again = advantage_matching.SampledAgain(
        jnp.zeros((1, 2)), jnp.zeros(1, int), jnp.zeros(1, int), jnp.zeros((1, 1, 1, 1)),
        jnp.zeros((1, 1, 1, 1, 1)), jnp.full((1, 1), 0.5), jnp.full((1, 1, 1, 1, 1), 2.0),
    )  # fmt: skip
    labels = RewardLabels(jnp.array([-1.5]), jnp.full((1, 1, 1, 1, 1), 1.0))
    loss = advantage_matching.supervise(lambda params, x, t, condition: x + params["v"], beta=0.5)
    out, gradient = value_and_gradient(loss, again, labels, {"v": jnp.float32(0.0)})
    np.testing.assert_allclose(out.total, -1.5 * 4 + 0.5 * 1)
    np.testing.assert_allclose(gradient["v"], -1.5 * -4 + 0.5 * -2)


def test_a_step_draws_towards_good_pictures_and_away_from_bad():
    again, loss = rollout(), advantage_matching.supervise(velocity_fn)
    for sign in (1, -1):
        before, gradient = value_and_gradient(loss, again, RewardLabels(jnp.full(B, float(sign))))
        stepped = jax.tree.map(lambda p, g: p - 1e-2 * g, STUDENT, gradient)
        after, _ = value_and_gradient(loss, again, RewardLabels(jnp.full(B, float(sign))), stepped)
        change = (after.metrics["matching_error"] - before.metrics["matching_error"]).sum()
        assert change * sign < 0


def test_nothing_to_learn_is_exactly_zero():
    """No advantage, and the student is the reference."""
    again = rollout()
    own = jax.jit(lambda r: advantage_matching.copy_velocities(velocity_fn, STUDENT, r))(again)
    loss = advantage_matching.supervise(velocity_fn, beta=0.5)
    out, gradient = value_and_gradient(loss, again, RewardLabels(jnp.zeros(B), own))
    np.testing.assert_allclose(out.total, 0, atol=1e-12)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0, atol=1e-7), gradient)


def test_no_gradient_to_pictures_or_labels():
    loss, again = advantage_matching.supervise(velocity_fn, beta=0.5), rollout()

    def total(image, advantage, other):
        labels = RewardLabels(advantage, other)
        return loss(STUDENT, again._replace(x=again.x + image[:, None]), labels, KEY).total.sum()

    gradients = jax.grad(total, argnums=(0, 1, 2))(jnp.zeros((B, *SHAPE)), ADVANTAGE, reference(again))
    assert all((g == 0).all() for g in gradients)


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match=r"beta=0.5 needs a reference"):
        advantage_matching.supervise(velocity_fn, beta=0.5)(STUDENT, rollout(), RewardLabels(ADVANTAGE), KEY)
