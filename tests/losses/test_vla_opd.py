"""VLA-OPD's losses: by hand, beside float64, what must not count, and how noisy the sampled form is."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import gaussians, vla_opd
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.types import ActionLabels, ActionPaths, ActionTokens, EpisodeRollout, PathLabels

B, T, H, A, K, D, F = 3, 4, 3, 2, 5, 6, 4


def policy(params, observation):
    """A linear policy: logits [N, H, A, K] of observations [N, D]."""
    return (observation @ params).reshape(-1, H, A, K)


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


STUDENT, TEACHER, SEEN = draw(0, D, H * A * K), draw(1, D, H * A * K), draw(2, B, T, D)


def counted() -> np.ndarray:
    """Chunks of which two actions are executed; the second episode ends in the middle of one, the third is all."""
    mask = np.zeros((B, T, H), bool)
    mask[:, :, :2] = True
    mask[1, 1, 1] = False
    mask[1, 2:] = False
    return mask


def rollout(**changes) -> EpisodeRollout:
    tokens = jnp.array(np.random.default_rng(3).integers(0, K, (B, T, H, A)), jnp.int32)
    logp = jax.nn.log_softmax(logits(STUDENT))
    drawn = ActionTokens(tokens, jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0])
    index = jnp.arange(B, dtype=jnp.int32)
    whole = EpisodeRollout(SEEN, drawn, jnp.array(counted()), jnp.array([1.0, 0, 1]), 8 - index, index, index)
    return whole._replace(**changes)


def logits(params) -> jax.Array:
    return policy(params, SEEN.reshape(B * T, D)).reshape(B, T, H, A, K)


def result(objective="reverse_kl", params=STUDENT, teacher=TEACHER, given=None, labels=None, **how):
    labels = ActionLabels(logits(teacher)) if labels is None else labels
    return vla_opd.supervise(policy, objective, **how)(params, given or rollout(), labels, None)


def reference(objective: str, temperatures=(1.0, 1.0)) -> np.ndarray:
    """Float64, token by token."""
    p, q = (np.float64(logits(params)) / t for params, t in zip((STUDENT, TEACHER), temperatures))
    p, q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (p, q))
    tokens, total = np.asarray(rollout().drawn.tokens), np.zeros(B)
    for index in zip(*np.nonzero(counted())):
        for a in range(A):
            at = (*index, a)
            s, t, token = p[at], q[at], tokens[at]
            value = {
                "reverse_kl": (np.exp(s) * (s - t)).sum(),
                "forward_kl": (np.exp(t) * (t - s)).sum(),
                "hard_cross_entropy": -s[t.argmax()],
                "sampled": (s[token] - t[token]) * s[token],
            }[objective]
            total[index[0]] += value
    return total


@pytest.mark.parametrize("objective", vla_opd.OBJECTIVES)
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.6, 1.6), (2.0, 0.5)])
def test_beside_float64(objective, temperatures):
    names = {"student_temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    got = result(objective, **names)
    np.testing.assert_allclose(got.total, reference(objective, temperatures), rtol=1e-5)
    np.testing.assert_array_equal(got.weight, counted().sum((1, 2)) * A)


def test_by_hand():
    """One token of two bins, student (1/2, 1/2), teacher (1/4, 3/4)."""
    fixed = lambda params, observation: jnp.zeros((1, 1, 1, 2)) + params
    index = jnp.zeros(1, jnp.int32)
    tokens = ActionTokens(jnp.zeros((1, 1, 1, 1), jnp.int32), jnp.full((1, 1, 1, 1), np.log(0.5)))
    given = EpisodeRollout(jnp.zeros((1, 1, 1)), tokens, jnp.ones((1, 1, 1), bool), jnp.ones(1), index, index, index)
    labels = ActionLabels(jnp.log(jnp.array([0.25, 0.75])).reshape(1, 1, 1, 1, 2))
    value = lambda objective: float(vla_opd.supervise(fixed, objective)(jnp.zeros(()), given, labels, None).total[0])
    assert value("reverse_kl") == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-6)
    assert value("forward_kl") == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5), rel=1e-6)
    assert value("hard_cross_entropy") == pytest.approx(np.log(2), rel=1e-6)


def total_of(objective, teacher=TEACHER, **how):
    return jax.value_and_grad(lambda params: result(objective, params, teacher, **how).total.sum())


def test_the_gradient_is_that_of_the_formula():
    """`p_i (log(p_i / q_i) - KL)` by each logit, through the linear policy."""
    p, q = (jax.nn.log_softmax(logits(params)) for params in (STUDENT, TEACHER))
    kl = (jnp.exp(p) * (p - q)).sum(-1, keepdims=True)
    by_logits = jnp.where(counted()[..., None, None], jnp.exp(p) * (p - q - kl), 0).reshape(B * T, -1)
    chex.assert_trees_all_close(
        total_of("reverse_kl")(STUDENT)[1], SEEN.reshape(-1, D).T @ by_logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl", "sampled"])
def test_a_teacher_like_the_student_teaches_nothing(objective):
    value, gradient = total_of(objective, STUDENT, student_temperature=1.3, teacher_temperature=1.3)(STUDENT)
    assert value == 0 and not np.any(gradient)


def spoil(leaf, there, value):
    return jnp.where(there.reshape(*there.shape, *[1] * (leaf.ndim - there.ndim)), leaf, value)


@pytest.mark.parametrize("objective", vla_opd.OBJECTIVES)
def test_what_is_not_executed_changes_nothing(objective):
    mask = jnp.array(counted())
    given = rollout()
    drawn = ActionTokens(spoil(given.drawn.tokens, mask, 10**6), spoil(given.drawn.behavior_logp, mask, jnp.nan))
    spoilt = given._replace(drawn=drawn, observation=spoil(SEEN, mask.any(-1), jnp.nan))
    labels = ActionLabels(spoil(logits(TEACHER), mask, jnp.nan))
    clean = total_of(objective)(STUDENT)
    chex.assert_trees_all_equal(total_of(objective, given=spoilt, labels=labels)(STUDENT), clean)
    assert np.isfinite(clean[0])


def test_no_gradient_reaches_the_teacher_and_nothing_counts_in_no_episode():
    to_teacher = jax.grad(lambda teacher: result("reverse_kl", teacher=teacher).total.sum())(TEACHER)
    assert not np.any(to_teacher)
    nothing = result(given=rollout(counted=jnp.zeros((B, T, H), bool)))
    assert not np.any(nothing.total) and not np.any(nothing.weight)


def test_a_split_batch_is_the_whole():
    whole = result()
    for i in range(B):
        part = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (rollout(), ActionLabels(logits(TEACHER))))
        alone = vla_opd.supervise(policy)(STUDENT, *part, None)
        chex.assert_trees_all_close(alone.total[0], whole.total[i], rtol=1e-6)


def test_moments_of_the_gradient_are_those_of_autodiff_summed_over_every_token():
    student, teacher = (draw(seed, 3, K) for seed in (11, 12))
    s, t = (jax.nn.log_softmax(logits) for logits in (student, teacher))
    exact = jax.grad(lambda logits: (jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - t)).sum())(student)
    probability, variance = np.exp(np.float64(s)), 0.0
    for token in range(K):
        of_token = jax.grad(lambda logits, a=token: ((s - t)[:, a] * jax.nn.log_softmax(logits)[:, a]).sum())(student)
        variance += probability[:, token] * np.square(np.float64(of_token - exact)).sum(-1)
    moments = vla_opd.gradient_moments(s, t)
    np.testing.assert_allclose(moments["exact_gradient_square"], np.square(np.float64(exact)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(moments["sampled_gradient_variance"], variance, rtol=1e-5)


def test_moments_of_the_gradient_at_the_edges():
    half, sure, never = jnp.log(0.5), 0.0, -jnp.inf
    student = jnp.array([[half, half], [half, half], [never, sure]], jnp.float32)
    teacher = jnp.array([[half, half], [never, sure], [never, sure]], jnp.float32)
    for values in vla_opd.gradient_moments(student, teacher).values():
        np.testing.assert_array_equal(values, [0, np.inf, 0])


def test_the_sampled_token_has_the_exact_gradient_on_average_and_much_noise():
    """At fixed states. Every bin is drawn from the student; 4.5 standard errors, coordinate by coordinate."""
    exact = total_of("reverse_kl")(STUDENT)[1]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=0)
    def sampled(key):
        tokens = jax.random.categorical(key, logits(STUDENT))
        given = rollout(drawn=ActionTokens(tokens, rollout().drawn.behavior_logp))
        return jax.grad(lambda params: result("sampled", params, given=given).total.sum())(STUDENT)

    draws = sampled(jax.random.split(jax.random.key(0), 4_000))
    error, deviation = draws.mean(0) - exact, draws.std(0)
    assert np.all(np.abs(error) <= 4.5 * deviation / np.sqrt(4_000) + 1e-5)
    assert np.linalg.norm(deviation) > 1.5 * np.linalg.norm(exact), "one draw says little of the direction"


def test_metrics_are_means_over_what_was_executed():
    got = result().metrics
    p = np.float64(jax.nn.log_softmax(logits(STUDENT)))
    entropy = np.where(counted()[..., None], -(np.exp(p) * p).sum(-1), 0).sum((1, 2, 3)) / (counted().sum((1, 2)) * A)
    np.testing.assert_allclose(got["student_entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(got["reverse_kl"], result().total / result().weight, rtol=1e-5)
    np.testing.assert_array_equal(got["success"], [1, 0, 1])
    own, its = (np.float64(jax.nn.log_softmax(logits(params) / 2)) for params in (STUDENT, TEACHER))
    tokens = np.asarray(rollout().drawn.tokens)[..., None]
    each = np.take_along_axis(its - own, tokens, -1)[..., 0]
    cool = result(student_temperature=2, teacher_temperature=2)
    mean = np.where(counted()[..., None], each, 0).sum((1, 2, 3)) / (counted().sum((1, 2)) * A)
    np.testing.assert_allclose(cool.metrics["log_ratio"], mean, rtol=1e-5)
    each[~counted()] = np.nan
    np.testing.assert_allclose(cool.spread["log_ratio"], each.reshape(B, -1), rtol=1e-4, atol=1e-6)


def test_what_the_sampler_said_is_compared_at_the_temperature_at_which_it_acted():
    """Drawn at temperature .3, scored at 2; a sampler that is off by .25 nats is noticed."""
    assert "logp_diff" not in result().metrics
    logp = jax.nn.log_softmax(logits(STUDENT) / 0.3)
    own = jnp.take_along_axis(logp, rollout().drawn.tokens[..., None], -1)[..., 0]
    for off in (0.0, 0.25):
        given = rollout(drawn=ActionTokens(rollout().drawn.tokens, own + off))
        found = result(given=given, student_temperature=2, acting_temperature=0.3).metrics["logp_diff"]
        np.testing.assert_allclose(found, off, atol=1e-5)


def test_bins_that_both_exclude_and_logits_of_fewer_bits():
    def masked(params, observation):
        return policy(params, observation).at[..., 0].set(-jnp.inf)

    given = rollout(drawn=rollout().drawn._replace(tokens=jnp.maximum(rollout().drawn.tokens, 1)))
    teacher = ActionLabels(logits(TEACHER).at[..., 0].set(-jnp.inf))
    for objective in vla_opd.OBJECTIVES:
        loss = vla_opd.supervise(masked, objective)
        both = jax.value_and_grad(lambda params, loss=loss: loss(params, given, teacher, None).total.sum())
        chex.assert_tree_all_finite((both(STUDENT), loss(STUDENT, given, teacher, None).metrics))
    rewarded = vla_opd.grpo(masked)(STUDENT, given, RewardLabels(jnp.ones(B)), None)
    chex.assert_tree_all_finite((rewarded.total, rewarded.metrics["student_entropy"]))
    short = lambda params, observation: policy(params, observation).astype(jnp.bfloat16)
    out = vla_opd.supervise(short)(STUDENT, rollout(), ActionLabels(logits(TEACHER)), None)
    assert out.total.dtype == jnp.float32
    np.testing.assert_allclose(out.total, reference("reverse_kl"), rtol=2e-2)


def test_wrong_objectives_and_shapes_are_refused():
    with pytest.raises(ValueError, match="unknown objective 'kl'; choose one of reverse_kl"):
        vla_opd.supervise(policy, "kl")
    with pytest.raises(ValueError, match=r"the teacher's logits \(3, 4, 3, 2, 4\) are not of"):
        result(labels=ActionLabels(logits(TEACHER)[..., :4]))


# ---- GRPO ------------------------------------------------------------------------------------------------------------


def test_grpo_is_the_policy_gradient_of_success_where_nothing_is_clipped():
    advantage = jnp.array([1.0, -2.0, 0.0])
    loss = lambda params: vla_opd.grpo(policy)(params, rollout(), RewardLabels(advantage), None)
    first = loss(STUDENT)
    np.testing.assert_allclose(first.metrics["ratio"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(first.total, -advantage * first.weight, rtol=1e-5)

    def plain(params):
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits(params)), rollout().drawn.tokens[..., None], -1)[..., 0]
        return -(advantage * jnp.where(counted()[..., None], logp, 0).sum((1, 2, 3))).sum()

    got, want = jax.grad(lambda params: loss(params).total.sum())(STUDENT), jax.grad(plain)(STUDENT)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_grpo_of_what_is_not_executed_changes_nothing():
    """NaN in observations and log-probabilities, tokens that do not exist; value, gradient, metrics."""
    mask, given = jnp.array(counted()), rollout()
    drawn = ActionTokens(spoil(given.drawn.tokens, mask, 10**6), spoil(given.drawn.behavior_logp, mask, jnp.nan))
    spoilt = given._replace(drawn=drawn, observation=spoil(SEEN, mask.any(-1), jnp.nan))

    def loss(params, given):
        out = vla_opd.grpo(policy)(params, given, RewardLabels(jnp.array([1.0, -2.0, 0.5])), None)
        return out.total.sum(), (out.weight, out.metrics)

    both = jax.value_and_grad(loss, has_aux=True)
    clean = both(1.1 * STUDENT, given)  # ratios beside 1
    chex.assert_trees_all_equal(both(1.1 * STUDENT, spoilt), clean)
    chex.assert_tree_all_finite(clean)


# ---- flow ------------------------------------------------------------------------------------------------------------

TIMES, LEVELS = jnp.linspace(1, 0, F + 1), jnp.full(F, 0.7)


def velocity(params, observation, actions, t):
    return (observation @ params).reshape(-1, H, A) * (1 + t[:, None, None]) + 0.3 * actions


def path_rollout() -> EpisodeRollout:
    of_all = lambda leaf: jnp.broadcast_to(leaf, (B, T, len(leaf)))
    return rollout(drawn=ActionPaths(draw(5, B, T, F + 1, H, A), of_all(TIMES), of_all(LEVELS)))


def velocities(params) -> jax.Array:
    states = path_rollout().drawn.states
    each = [
        velocity(params, SEEN.reshape(-1, D), states[:, :, i].reshape(-1, H, A), jnp.full(B * T, TIMES[i]))
        for i in range(F)
    ]
    return jnp.stack(each, 1).reshape(B, T, F, H, A)


def test_the_flow_loss_is_the_kl_of_the_transitions():
    own, other = draw(6, D, H * A), draw(7, D, H * A)
    given, labels = path_rollout(), PathLabels(velocities(other))
    loss = vla_opd.supervise_flow(velocity, skip_last=False, normalize=False)
    got = loss(own, given, labels, None)
    want = np.zeros(B)
    for i in range(F):
        step = functools.partial(gaussians.transition, "sde", given.drawn.states[:, :, i].reshape(B * T, H, A))
        means = [
            step(v[:, :, i].reshape(B * T, H, A), TIMES[i], TIMES[i + 1], LEVELS[i])
            for v in map(velocities, (own, other))
        ]
        squares = np.float64((means[0][0] - means[1][0]) ** 2 / (2 * means[0][1] ** 2)).reshape(B, T, H, A)
        want += np.where(counted()[..., None], squares, 0).sum((1, 2, 3))
    np.testing.assert_allclose(got.total, want, rtol=1e-4)
    np.testing.assert_array_equal(got.weight, counted().sum((1, 2)) * A * F)
    same = jax.value_and_grad(lambda params: loss(params, given, PathLabels(velocities(own)), None).total.sum())(own)
    assert same[0] == 0 and not np.any(same[1])
    spoilt = PathLabels(jnp.where(counted()[:, :, None, :, None], labels.velocity, jnp.nan))
    chex.assert_trees_all_equal(loss(own, given, spoilt, None).total, got.total)


def test_the_flow_loss_of_what_is_not_executed_changes_nothing():
    """NaN in states of the path, in observations and in the teacher's velocity; value, gradient, metrics."""
    own, other, mask = draw(6, D, H * A), draw(7, D, H * A), jnp.array(counted())
    given, labels = path_rollout(), PathLabels(velocities(other))
    along = jnp.broadcast_to(mask[:, :, None], (B, T, F + 1, H))
    drawn = given.drawn._replace(states=spoil(given.drawn.states, along, jnp.nan))
    spoilt = given._replace(drawn=drawn, observation=spoil(SEEN, mask.any(-1), jnp.nan))
    spoilt_labels = PathLabels(spoil(labels.velocity, along[:, :, :F], jnp.nan))

    def loss(params, given, labels):
        out = vla_opd.supervise_flow(velocity)(params, given, labels, None)
        return out.total.sum(), (out.weight, out.metrics)

    both = jax.value_and_grad(loss, has_aux=True)
    clean = both(own, given, labels)
    chex.assert_trees_all_equal(both(own, spoilt, spoilt_labels), clean)
    chex.assert_tree_all_finite(clean)
    assert np.any(clean[1])
