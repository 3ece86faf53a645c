"""DP-OPD's loss: by hand, beside float64, at both ends of beta, and what must not reach it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import dp_sgd, optim
from opd_jax.losses import dp_opd
from opd_jax.losses.dp_opd import PrivateLabels
from opd_jax.types import TokenRollout

V, D, E = 7, 5, 4


def hidden(params, tokens, segment_ids):
    """Of a causal model: the mean of the embeddings so far."""
    x = params["embedding"][tokens]
    return jnp.cumsum(x, 1) / jnp.arange(1.0, tokens.shape[1] + 1)[None, :, None]


def head(params):
    return params["head"]


def model(seed: int, width: int = D) -> dict:
    draw = np.random.default_rng(seed)
    return {
        "embedding": jnp.array(draw.normal(size=(V, width)), jnp.float32),
        "head": jnp.array(draw.normal(size=(width, V)), jnp.float32),
    }


STUDENT, TEACHER = model(0), model(1, E)
TOKENS = jnp.array([[1, 2, 3, 4, 0, 0], [2, 2, 5, 6, 1, 3]], jnp.int32)
LENGTH, PROMPT = np.array([4, 6], np.int32), np.array([2, 1])


def rollout() -> TokenRollout:
    place = np.arange(6)[None]
    response = jnp.array((place >= PROMPT[:, None]) & (place < LENGTH[:, None]))
    nothing = jnp.zeros((2, 6))
    index = jnp.arange(2, dtype=jnp.int32)
    return TokenRollout(TOKENS, response, jnp.array(LENGTH), index, 0 * index, nothing, nothing, index > 5)


def labels(own=(False, False), teacher=TEACHER) -> PrivateLabels:
    return PrivateLabels(hidden(teacher, TOKENS, None), jnp.array(own))


def supervise(teacher=TEACHER, **how):
    return dp_opd.supervise(hidden, head, head(teacher), **how)


def log_probs(params, temperature=1.0) -> np.ndarray:
    z = np.float64(hidden(params, TOKENS, None)) @ np.float64(head(params)) / temperature
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reference(beta: float, own_weight: float, own, temperature=1.0) -> np.ndarray:
    """Float64, token by token."""
    student, teacher, plain = log_probs(STUDENT, temperature), log_probs(TEACHER, temperature), log_probs(STUDENT)
    kl = lambda p, q: (np.exp(p) * (p - q)).sum()
    totals = np.zeros(2)
    for b in range(2):
        for s in range(PROMPT[b], LENGTH[b]):
            p, q = teacher[b, s - 1], student[b, s - 1]
            mixture = np.log(beta * np.exp(p) + (1 - beta) * np.exp(q))
            value = {0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, mixture) + (1 - beta) * kl(q, mixture))
            a = own_weight if own[b] else 0.0
            totals[b] += (1 - a) * value - a * plain[b, s - 1, TOKENS[b, s]]
    return totals


@pytest.mark.parametrize("beta", [0, 0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("own_weight", "temperature"), [(0.0, 1.0), (0.4, 1.0), (0.0, 2.0)])
def test_beside_float64(beta, own_weight, temperature):
    own = (True, False)
    got = supervise(beta=beta, own_weight=own_weight, temperature=temperature)(STUDENT, rollout(), labels(own), None)
    np.testing.assert_allclose(got.total, reference(beta, own_weight, own, temperature), rtol=2e-5)
    assert got.weight.tolist() == [2, 5]
    assert not got.metrics and not got.spread, "they would not be private"


def test_by_hand():
    """Two symbols, student even, teacher 3 to 1: forward KL = .75 ln 1.5 + .25 ln .5."""
    one, odds = jnp.ones((1, 2, 1)), jnp.array([[np.log(3.0), 0.0]], jnp.float32)
    own = dp_opd.supervise(lambda p, t, s: one * p, lambda p: jnp.zeros((1, 2)), odds)
    text = TokenRollout(*(jax.tree.map(lambda leaf: leaf[:1], rollout())))
    text = text._replace(
        tokens=jnp.zeros((1, 2), jnp.int32), response=jnp.array([[False, True]]), length=jnp.array([2])
    )
    got = own(jnp.float32(1.0), text, PrivateLabels(one, jnp.array([False])), None)
    assert got.total[0] == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-6)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_a_teacher_like_the_student_teaches_nothing_and_the_update_is_noise(beta):
    same = supervise(STUDENT, beta=beta)
    total = dp_sgd.clipped_sum(same, STUDENT, rollout(), labels(teacher=STUDENT), jax.random.key(0), 1.0)
    assert same(STUDENT, rollout(), labels(teacher=STUDENT), None).total.tolist() == [0, 0]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(total))


def test_what_reaches_neither_loss_nor_gradient():
    own = supervise(own_weight=0.3)
    value = jax.value_and_grad(lambda params, *rows: own(params, *rows, None).total.sum())
    want = value(STUDENT, rollout(), labels((True, True)))
    spoilt = labels((True, True))
    spoilt = spoilt._replace(hidden=jnp.where(rollout().response[:, 1:, None], spoilt.hidden[:, :-1], jnp.nan))
    spoilt = spoilt._replace(hidden=jnp.pad(spoilt.hidden, ((0, 0), (0, 1), (0, 0)), constant_values=jnp.nan))
    padded = rollout()._replace(tokens=TOKENS.at[0, 4:].set(6))
    chex.assert_trees_all_equal(value(STUDENT, padded, spoilt), want)
    to_teacher = jax.grad(lambda h: own(STUDENT, rollout(), labels()._replace(hidden=h), None).total.sum())
    assert not to_teacher(labels().hidden).any()


def test_the_loss_of_a_record_is_its_own_mean():
    """One long text weighs as much as a short one, and neither looks at the other."""
    own, key = supervise(), jax.random.key(0)
    cut = lambda i: jax.tree.map(lambda leaf: leaf[i : i + 1], (rollout(), labels()))
    each = [dp_sgd.loss_of_record(own, STUDENT, *cut(i), key) for i in range(2)]
    np.testing.assert_allclose(each, reference(0, 0.0, (False, False)) / [2, 5], rtol=2e-5)
    both = dp_sgd.clipped_sum(own, STUDENT, rollout(), labels(), key, 1e9)
    alone = [jax.grad(functools.partial(dp_sgd.loss_of_record, own))(STUDENT, *cut(i), key) for i in range(2)]
    chex.assert_trees_all_close(both, jax.tree.map(jnp.add, *alone), rtol=1e-4, atol=1e-6)


def test_descent_brings_the_student_to_its_teacher():
    import optax

    own, optimizer = supervise(), optax.adam(0.05)
    update = dp_sgd.private(own, optimizer, clip_norm=1.0, noise_multiplier=0.0, expected_batch=2.0)
    state = optim.init_state(STUDENT, optimizer)
    before = own(STUDENT, rollout(), labels(), None).total.sum()
    for step in range(60):
        state, _ = update(state, rollout(), labels(), jax.random.key(step))
    assert own(state.params, rollout(), labels(), None).total.sum() < 0.2 * before


def test_the_draw_of_lambda_has_its_probability():
    drawn = jax.vmap(lambda i: dp_opd.on_policy(jax.random.fold_in(jax.random.key(0), i), 0.3))(jnp.arange(2_000))
    assert drawn.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 2_000))
    assert not dp_opd.on_policy(jax.random.key(0), 0.0) and dp_opd.on_policy(jax.random.key(0), 1.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"beta": 1.2}, "beta=1.2"),
        ({"own_weight": -1}, "own_weight=-1"),
        ({"own_weight": 0.5, "temperature": 2}, "temperature=2"),
    ],
)
def test_settings_that_make_no_sense(wrong, says):
    with pytest.raises(ValueError, match=says):
        supervise(**wrong)
