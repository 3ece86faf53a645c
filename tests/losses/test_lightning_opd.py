"""Lightning OPD: the offline objective against its identities, by enumeration of all answers of a toy model."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import lightning_opd
from opd_jax.losses.lightning_opd import LightningLabels, residual_teacher_logp, supervise
from opd_jax.losses.token_logp import token_logp
from opd_jax.types import TokenRollout

V, LENGTH = 5, 3
S = LENGTH + 1  # a prompt of one token, then the response
ALL = np.array([(0, *answer) for answer in itertools.product(range(V), repeat=LENGTH)], np.int32)  # [125, 4]
KEY = jax.random.key(0)
SHAPES = {"after": (V, V), "place": (S, V), "before": (V, V)}


def apply_fn(params, tokens, segment_ids):
    """Logits of the next token from the last two and the place: causal, and different in every state."""
    previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    return params["after"][tokens] + params["before"][previous] + params["place"][None, : tokens.shape[1]]


def model(seed, scale=0.7):
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


REFERENCE, TEACHER = model(0), model(1)
STUDENT = jax.tree.map(lambda r, d: r + 0.4 * d, REFERENCE, model(2))


def logp_of(params, tokens, response, temperature=1.0):
    scaled = jax.tree.map(lambda a: a / temperature, params)
    return token_logp(apply_fn, scaled, jnp.asarray(tokens), jnp.asarray(response))


@jax.jit
def batch(tokens=ALL, sampler=REFERENCE, response=None, temperature=1.0, outcome=None):
    """Rollouts of `sampler`, scored by the teacher and by REFERENCE."""
    tokens = jnp.asarray(tokens)
    if response is None:
        response = jnp.ones(tokens.shape, bool).at[:, 0].set(False)
    zero = jnp.zeros(tokens.shape[0], jnp.int32)
    behavior = logp_of(sampler, tokens, response)
    sampling = logp_of(sampler, tokens, response, temperature)
    rollout = TokenRollout(tokens, response, zero + tokens.shape[1], zero, zero, behavior, sampling, zero > 0)
    labels = LightningLabels(logp_of(TEACHER, tokens, response), logp_of(REFERENCE, tokens, response), outcome)
    return rollout, labels


ROLLOUT, LABELS = batch()
probability = lambda logp: np.exp(np.asarray(logp, np.float64).sum(1))
P_REFERENCE = probability(LABELS.reference_logp)
P_STUDENT = probability(logp_of(STUDENT, ALL, ROLLOUT.response))


@jax.jit
def weighted_gradient(loss, params, rollout, labels, weight):
    """Gradient, value and output of `sum_x weight(x) total(x)`: an expectation, with the weights held fixed."""

    def value(params):
        out = loss(params, rollout, labels, KEY)
        return jnp.vdot(out.total, weight), out

    (value, out), gradient = jax.value_and_grad(value, has_aux=True)(params)
    return flat(gradient), value, out


def flat(tree):
    return jnp.concatenate([jnp.ravel(tree[name]) for name in SHAPES])


def gradient_of(loss, params=STUDENT, weight=P_REFERENCE, rollout=ROLLOUT, labels=LABELS):
    return np.asarray(weighted_gradient(loss, params, rollout, labels, jnp.float32(weight))[0], np.float64)


def run(loss, params=STUDENT, rollout=ROLLOUT, labels=LABELS):
    return weighted_gradient(loss, params, rollout, labels, jnp.ones(rollout.tokens.shape[0]))[2]


OFFLINE, ONLINE = supervise(apply_fn), supervise(apply_fn, objective="online")


# ---- an independent float64 model --------------------------------------------------------------------------------


def numpy_logits(params, tokens):
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    previous = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
    return p["after"][tokens] + p["before"][previous] + p["place"][None, : tokens.shape[1]]


def numpy_log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def numpy_logp(params, tokens):
    """[N, S - 1]: of tokens 1..S-1."""
    return np.take_along_axis(numpy_log_softmax(numpy_logits(params, tokens))[:, :-1], tokens[:, 1:, None], 2)[..., 0]


def numpy_scores(params, tokens, coefficient):
    """`sum_t coefficient_t grad log pi(a_t|s_t)` of every record, [N, parameters], from the softmax by hand."""
    score = -np.exp(numpy_log_softmax(numpy_logits(params, tokens)))[:, :-1]
    n, t = np.indices(tokens[:, 1:].shape)
    score[n, t, tokens[:, 1:]] += 1
    score *= coefficient[..., None]
    out = {name: np.zeros((len(tokens), *shape)) for name, shape in SHAPES.items()}
    previous = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
    np.add.at(out["after"], (n, tokens[:, :-1]), score)
    np.add.at(out["before"], (n, previous[:, :-1]), score)
    np.add.at(out["place"], (n, t), score)
    return np.concatenate([out[name].reshape(len(tokens), -1) for name in SHAPES], 1)


def numpy_f(params=STUDENT, tau=math.inf):
    """The paper's `f(x) = sum_t sg(A_t) grad log pi`, [125, parameters]."""
    advantage = numpy_logp(TEACHER, ALL) - numpy_logp(params, ALL)
    return numpy_scores(params, ALL, np.clip(advantage, -tau, tau))


# ---- values ------------------------------------------------------------------------------------------------------


def uniform_case(teacher_logp, response=((False, True, True),)):
    """A student that gives every token log(1/2); A = teacher_logp + log 2."""
    response = jnp.array(response)
    tokens, zero = jnp.zeros(response.shape, jnp.int32), jnp.zeros(response.shape[0], jnp.int32)
    logp = jnp.where(response, -math.log(2.0), 0.0)
    rollout = TokenRollout(tokens, response, zero + 3, zero, zero, logp, logp, zero > 0)
    return rollout, LightningLabels(jnp.float32(teacher_logp), logp)


TWO = {"after": jnp.zeros((2, 2)), "before": jnp.zeros((2, 2)), "place": jnp.zeros((3, 2))}


def test_by_hand():
    rollout, labels = uniform_case([[0.0, -math.log(2) + 0.4, -math.log(2) - 3.0]])
    out = run(OFFLINE, TWO, rollout, labels)
    np.testing.assert_allclose(out.total, [0.4**2 / 2 + 3.0**2 / 2], rtol=1e-6)
    np.testing.assert_allclose(out.weight, [2.0])
    out = run(supervise(apply_fn, clip=1.0), TWO, rollout, labels)
    np.testing.assert_allclose(out.total, [0.4**2 / 2 + (3.0 - 0.5)], rtol=1e-6)  # Huber: tau |A| - tau^2 / 2
    expected = {"clip_fraction": 0.5, "reverse_kl_k1": 1.3, "half_squared_advantage": 2.29, "importance_ratio": 1.0}
    for name, value in expected.items():
        np.testing.assert_allclose(out.metrics[name], [value], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(run(ONLINE, TWO, rollout, labels).total, [2.6], rtol=1e-6)
    record = run(supervise(apply_fn, reduction="record"), TWO, rollout, labels)
    np.testing.assert_allclose([record.total[0], record.weight[0]], [2.29, 1.0], rtol=1e-6)
    np.testing.assert_allclose(out.spread["log_ratio"][0, 1:], [0.4, -3.0], rtol=1e-6)
    assert np.isnan(out.spread["log_ratio"][0, 0])


@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_matches_numpy(tau):
    out = run(supervise(apply_fn, clip=tau))
    advantage = numpy_logp(TEACHER, ALL) - numpy_logp(STUDENT, ALL)
    size = np.abs(advantage)
    np.testing.assert_allclose(out.total, np.where(size > tau, tau * size - tau**2 / 2, size**2 / 2).sum(1), rtol=2e-5)
    ratio = np.exp(numpy_logp(STUDENT, ALL) - numpy_logp(REFERENCE, ALL))
    np.testing.assert_allclose(out.metrics["importance_ratio"], ratio.mean(1), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["clip_fraction"], (size > tau).mean(1), atol=1e-6)
    drift = np.abs(numpy_logp(STUDENT, ALL) - numpy_logp(REFERENCE, ALL)).mean(1)
    np.testing.assert_allclose(out.metrics["logp_diff"], drift, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_the_gradient_is_the_papers_update(tau):
    """`-grad total = sum_t clip(A_t) grad log pi`, record by record, for both arms."""
    expected = -(P_REFERENCE[:, None] * numpy_f(tau=tau)).sum(0)
    for objective in ("offline", "online"):
        ours = gradient_of(supervise(apply_fn, objective=objective, clip=tau))
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-6, err_msg=objective)


def test_the_gradient_is_autodiff_of_half_the_squared_advantage():
    def half_square(params):
        advantage = LABELS.teacher_logp - logp_of(params, ALL, ROLLOUT.response)
        return jnp.vdot((advantage**2 / 2).sum(1), jnp.float32(P_REFERENCE))

    expected = flat(jax.jit(jax.grad(half_square))(STUDENT))
    np.testing.assert_allclose(gradient_of(OFFLINE), expected, rtol=1e-4, atol=1e-6)


def test_hidden_states_and_head_give_the_same():
    """logits = hidden @ head in blocks that do not divide the length; value and gradient of both factors."""
    rng = np.random.default_rng(3)
    params = {"embed": jnp.float32(rng.normal(size=(V, 4))), "head": jnp.float32(rng.normal(size=(4, V)))}
    hidden_fn = lambda p, tokens, segment_ids: jnp.cumsum(p["embed"][tokens], 1)
    full = supervise(lambda p, tokens, segment_ids: hidden_fn(p, tokens, None) @ p["head"])
    ragged = np.asarray(ROLLOUT.response) & (np.arange(S)[None] < 2 + np.arange(125)[:, None] % 3)
    rollout = ROLLOUT._replace(response=jnp.array(ragged))

    @jax.jit
    def value_and_gradient(loss, params):
        return jax.value_and_grad(lambda p: loss(p, rollout, LABELS, KEY).total.sum())(params)

    expected, expected_gradient = value_and_gradient(full, params)
    for block in (1, 2, 512):
        chunked = supervise(hidden_fn, head_fn=lambda p: p["head"], block=block)
        value, gradient = value_and_gradient(chunked, params)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected_gradient)


# ---- identities of the reference ---------------------------------------------------------------------------------


def test_offline_equals_online_at_the_start():
    off = gradient_of(OFFLINE, REFERENCE, P_REFERENCE)
    on = gradient_of(ONLINE, REFERENCE, P_REFERENCE)
    np.testing.assert_allclose(off, on, rtol=1e-5, atol=1e-6)
    assert np.abs(off).max() > 0.1


def test_covariance_identity():
    """Theorem 3.7: `g_off = g_on - Cov_ref[w, f]`, away from the reference, every expectation over all 125 answers."""
    p, q = P_REFERENCE, P_STUDENT
    np.testing.assert_allclose([p.sum(), q.sum()], 1, rtol=1e-5)
    f, w = numpy_f(), q / p
    covariance = (p[:, None] * (w - 1)[:, None] * (f - p @ f)).sum(0)
    off, on = -gradient_of(OFFLINE, weight=p), -gradient_of(ONLINE, weight=q)
    assert np.abs(covariance).max() > 0.05
    np.testing.assert_allclose(off, on - covariance, rtol=1e-3, atol=5e-6)


# Every state of the second response token, with every action: 25 states x 5 actions, one counted token each.
STATE, ACTION = np.divmod(np.arange(V**3), V)
STEPS = np.stack([np.zeros(V**3, np.int64), STATE // V, STATE % V, ACTION], 1).astype(np.int32)
ONE_STEP, ONE_LABEL = batch(STEPS, response=jnp.zeros((V**3, S), bool).at[:, 3].set(True))


def reverse_kl_gradient():
    def summed(params):
        student, teacher = (jax.nn.log_softmax(apply_fn(p, jnp.asarray(STEPS), None)[:, 2]) for p in (params, TEACHER))
        return (jnp.exp(student) * (student - teacher)).sum() / V  # every state is there once per action

    return np.asarray(flat(jax.jit(jax.grad(summed))(STUDENT)))


def action_probability(params):
    return np.exp(numpy_logp(params, STEPS)[:, 2])


def test_online_gradient_is_the_reverse_kl_gradient_of_every_state():
    ours = gradient_of(ONLINE, weight=action_probability(STUDENT), rollout=ONE_STEP, labels=ONE_LABEL)
    np.testing.assert_allclose(ours, reverse_kl_gradient(), rtol=1e-3, atol=2e-6)


def test_token_weights_restore_the_reverse_kl_gradient():
    """Also for samples drawn at another temperature, by their own density; without weights it is another gradient."""
    expected, p = reverse_kl_gradient(), action_probability(REFERENCE)
    step = lambda weighting, weight, rollout: gradient_of(
        supervise(apply_fn, weighting=weighting, max_ratio=1e6), weight=weight, rollout=rollout, labels=ONE_LABEL
    )
    np.testing.assert_allclose(step("reference", p, ONE_STEP), expected, rtol=1e-3, atol=2e-6)
    assert np.abs(step("unit", p, ONE_STEP) - expected).max() > 0.05
    cold = logp_of(REFERENCE, STEPS, ONE_STEP.response, temperature=0.8)
    tempered, q = ONE_STEP._replace(sampling_logp=cold), np.exp(np.asarray(cold, np.float64)[:, 3])
    np.testing.assert_allclose(step("sampling", q, tempered), expected, rtol=1e-3, atol=2e-6)
    assert np.abs(step("reference", q, tempered) - expected).max() > 0.05


def test_ratios_are_cut():
    out = run(supervise(apply_fn, weighting="reference", max_ratio=1.2))
    ratio = np.exp(numpy_logp(STUDENT, ALL) - numpy_logp(REFERENCE, ALL))
    advantage = numpy_logp(TEACHER, ALL) - numpy_logp(STUDENT, ALL)
    np.testing.assert_allclose(out.total, (np.minimum(ratio, 1.2) * advantage**2 / 2).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(out.metrics["ratio_clip_fraction"], (ratio > 1.2).mean(1), atol=1e-6)


def test_there_is_no_baseline_offline():
    shifted = LABELS._replace(teacher_logp=jnp.where(ROLLOUT.response, LABELS.teacher_logp + 0.5, 0.0))
    on = [gradient_of(ONLINE, weight=P_STUDENT, labels=labels) for labels in (LABELS, shifted)]
    off = [gradient_of(OFFLINE, weight=P_REFERENCE, labels=labels) for labels in (LABELS, shifted)]
    np.testing.assert_allclose(on[0], on[1], atol=2e-6)
    assert np.abs(off[0] - off[1]).max() > 0.05


def test_the_importance_ratio():
    at_start = run(OFFLINE, REFERENCE).metrics
    np.testing.assert_allclose(at_start["importance_ratio"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(at_start["logp_diff"], 0.0, atol=1e-6)
    later = run(OFFLINE).metrics["importance_ratio"]
    np.testing.assert_allclose(P_REFERENCE @ later, 1.0, rtol=1e-5)  # in expectation, per token
    rollout, labels = batch(temperature=0.8)
    q = probability(rollout.sampling_logp)
    flagged = run(OFFLINE, rollout=rollout, labels=labels).metrics
    assert abs(q @ flagged["importance_ratio"] - 1) > 0.01
    cold, warm = numpy_logp(jax.tree.map(lambda a: a / 0.8, REFERENCE), ALL), numpy_logp(REFERENCE, ALL)
    np.testing.assert_allclose(q @ flagged["sampling_gap"], q @ (cold - warm).mean(1), rtol=1e-4)
    np.testing.assert_allclose(run(OFFLINE).metrics["sampling_gap"], 0.0, atol=1e-6)


def test_k1_estimates_the_reverse_kl():
    """On-policy, the mean of -A per token is the mean over visited states of KL(student || teacher)."""
    student, teacher = (numpy_log_softmax(numpy_logits(p, ALL))[:, :-1] for p in (STUDENT, TEACHER))
    kl = (np.exp(student) * (student - teacher)).sum(-1).mean(1)
    np.testing.assert_allclose(P_STUDENT @ run(ONLINE).metrics["reverse_kl_k1"], P_STUDENT @ kl, rtol=1e-4)
    np.testing.assert_allclose(P_STUDENT @ run(ONLINE).total, LENGTH * P_STUDENT @ kl, rtol=1e-4)


def test_descent():
    """The offline loss falls at every small step; differentiating k1 directly never heard of the teacher."""

    @jax.jit
    def descend(loss, params, labels):
        def value(params):
            out = loss(params, ROLLOUT, labels, KEY)
            return jnp.vdot(out.total, jnp.float32(P_REFERENCE))

        def step(params, _):
            loss, gradient = jax.value_and_grad(value)(params)
            return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), loss

        return jax.lax.scan(step, params, length=40)

    params, losses = descend(OFFLINE, REFERENCE, LABELS)
    assert (np.diff(losses) < 0).all()
    kl = lambda p: float(P_REFERENCE @ numpy_kl(p))
    assert kl(params) < 0.6 * kl(REFERENCE)
    direct = supervise(apply_fn, objective="k1_direct")
    other = LABELS._replace(teacher_logp=LABELS.teacher_logp * 0.3)
    np.testing.assert_array_equal(gradient_of(direct), gradient_of(direct, labels=other))
    assert kl(descend(direct, REFERENCE, LABELS)[0]) > 0.99 * kl(REFERENCE)


def numpy_kl(params):
    student, teacher = (numpy_log_softmax(numpy_logits(p, ALL))[:, :-1] for p in (params, TEACHER))
    return (np.exp(student) * (student - teacher)).sum((1, 2))


# ---- edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["offline", "online"])
@pytest.mark.parametrize("weighting", lightning_opd.WEIGHTINGS)
def test_exactly_zero_where_the_student_is_the_teacher(objective, weighting):
    loss = supervise(apply_fn, objective=objective, weighting=weighting)

    @jax.jit
    def gradient(params):
        def total(p):
            out = loss(p, ROLLOUT, LABELS._replace(teacher_logp=logp_of(params, ALL, ROLLOUT.response)), KEY)
            return out.total.sum(), out

        return jax.grad(total, has_aux=True)(params)

    slope, out = gradient(STUDENT)
    assert not flat(slope).any()
    assert not np.any(out.total) and not np.any(out.metrics["half_squared_advantage"])


def test_padding_changes_nothing():
    response = np.asarray(ROLLOUT.response) & (np.arange(S)[None] < 2 + np.arange(125)[:, None] % 3)
    clean, labels = batch(response=jnp.array(response))
    spoil = lambda a: jnp.where(jnp.array(response), a, jnp.nan)
    clean = clean._replace(length=jnp.array(1 + response.sum(1), jnp.int32))
    tokens = jnp.where(jnp.arange(S)[None] < clean.length[:, None], clean.tokens, 10**6)
    dirty = clean._replace(
        tokens=tokens, behavior_logp=spoil(clean.behavior_logp), sampling_logp=spoil(clean.sampling_logp)
    )
    bad = LightningLabels(spoil(labels.teacher_logp), spoil(labels.reference_logp))
    loss = supervise(apply_fn, weighting="sampling")
    np.testing.assert_array_equal(
        gradient_of(loss, rollout=clean, labels=labels), gradient_of(loss, rollout=dirty, labels=bad)
    )
    one, two = run(loss, rollout=clean, labels=labels), run(loss, rollout=dirty, labels=bad)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert list(one.weight[:3]) == [1, 2, 3]


def test_the_end_token_is_trained_and_the_prompt_is_not():
    one = lambda *counted: jnp.array([[s in counted for s in range(S)]])
    tokens = ALL[77:78]
    for s in range(1, S):
        rollout, labels = batch(tokens, response=one(s))
        expected = (numpy_logp(TEACHER, tokens) - numpy_logp(STUDENT, tokens))[0, s - 1]
        np.testing.assert_allclose(run(OFFLINE, rollout=rollout, labels=labels).total, [expected**2 / 2], rtol=1e-4)
    rollout, labels = batch(tokens, response=one(0))
    out = run(OFFLINE, rollout=rollout, labels=labels)
    assert not out.total[0] and not out.weight[0] and not np.isnan(out.metrics["importance_ratio"][0])


def test_split_batch_equals_whole():
    loss = supervise(apply_fn, weighting="reference")
    whole = run(loss)
    part = lambda i: run(
        loss, rollout=jax.tree.map(lambda a: a[i], ROLLOUT), labels=jax.tree.map(lambda a: a[i], LABELS)
    )
    both = jax.tree.map(lambda *a: jnp.concatenate(a), part(slice(0, 50)), part(slice(50, 125)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), both, whole)


def test_no_gradient_to_the_labels():
    def total(rollout, labels):
        return supervise(apply_fn, weighting="sampling")(STUDENT, rollout, labels, KEY).total.sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1), allow_int=True))(ROLLOUT, LABELS)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jax.dtypes.float0 or not np.any(leaf)


def test_an_impossible_token_has_a_finite_gradient():
    labels = LABELS._replace(teacher_logp=LABELS.teacher_logp.at[3, 2].set(-jnp.inf))
    for loss in (OFFLINE, ONLINE):
        assert np.isinf(run(loss, labels=labels).total[3])
        assert np.isfinite(gradient_of(loss, labels=labels)).all()


def test_bfloat16_and_extreme_logits():
    big = jax.tree.map(lambda a: (a * 300).astype(jnp.bfloat16), STUDENT)
    out = run(OFFLINE, big)
    assert out.total.dtype == jnp.float32 and np.isfinite(out.total).all()
    assert np.isfinite(gradient_of(OFFLINE, big)).all()


def test_order_violation():
    rollout, labels = batch(ALL[:6], outcome=jnp.array([1.0, 0, 1, 0, jnp.nan, 0]))
    score = run(OFFLINE, rollout=rollout, labels=labels).spread["log_ratio"][:, 1:].mean(1)
    group = jnp.array([0, 0, 1, 1, 1, 2])
    rollout = rollout._replace(group=group)
    violation = run(OFFLINE, rollout=rollout, labels=labels).metrics["order_violation"]
    first, second = float(score[0] < score[1]), float(score[2] < score[3])
    np.testing.assert_array_equal(violation, [first, first, second, second, second, 0])
    swapped = labels._replace(outcome=jnp.array([0.0, 1, 0, 1, jnp.nan, 0]))
    violation = run(OFFLINE, rollout=rollout, labels=swapped).metrics["order_violation"]
    np.testing.assert_array_equal(violation, [1 - first, 1 - first, *[1 - second] * 3, 0])
    assert "order_violation" not in run(OFFLINE).metrics


def test_wrong_settings_are_named():
    for wrong in ({"objective": "of"}, {"weighting": "rho"}, {"reduction": "mean"}, {"clip": 0.0}, {"max_ratio": -1.0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            supervise(apply_fn, **wrong)


# ---- residual correction -----------------------------------------------------------------------------------------


def stored(n=24, seed=0):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 8, n)
    place = np.arange(10)[None]
    response = (place >= 2) & (place < 2 + length[:, None])
    draw = lambda: np.where(response, -rng.exponential(size=(n, 10)), np.nan).astype(np.float32)
    return rng.integers(0, V, (n, 10)), draw(), draw(), response, rng.integers(0, 9, n)


def test_residual_matches_loops():
    tokens, teacher, reference, response, group = stored()
    ours = residual_teacher_logp(tokens, teacher, reference, response, group, folds=3, smoothing=2.0, bins=(2, 2))
    fold = {g: i % 3 for i, g in enumerate(sorted(set(group.tolist())))}
    added = lambda rows: (sum(r[6] * r[7] for r in rows), sum(r[6] for r in rows))
    rows = []
    for n, s in zip(*np.nonzero(response)):
        size, place = response[n].sum(), response[n, :s].sum()
        d = np.float64(teacher[n, s]) - np.float64(reference[n, s])
        rows.append((n, s, fold[group[n]], tokens[n, s], place * 2 // size, -np.float64(reference[n, s]), 1 / size, d))
    for n, s, k, token, place, surprisal, _, _ in rows:
        fit = [row for row in rows if row[2] != k]
        middle = np.quantile([row[5] for row in fit], 0.5)
        overall = added(fit)[0] / added(fit)[1]
        same_token = added([r for r in fit if r[3] == token])
        same_cell = added([r for r in fit if r[4] == place and (r[5] > middle) == (surprisal > middle)])
        m_tok, m_ctx = ((d + 2.0 * overall) / (weight + 2.0) for d, weight in (same_token, same_cell))
        np.testing.assert_allclose(ours[n, s], teacher[n, s] - (m_tok + m_ctx) / 2, rtol=1e-5, atol=1e-6)
    assert not ours[~response].any() and ours.dtype == np.float32


def test_residual_removes_a_constant_and_only_what_others_share():
    tokens, _, reference, response, group = stored()
    constant = residual_teacher_logp(tokens, reference + 0.3, reference, response, group)
    np.testing.assert_allclose(constant[response], reference[response], atol=1e-6)
    tokens, teacher, reference, response, group = stored()
    changed = np.where((group == group[0])[:, None], teacher - 1.0, teacher)  # a prompt's own labels
    one, two = (residual_teacher_logp(tokens, t, reference, response, group) for t in (teacher, changed))
    mine = response & (group == group[0])[:, None]
    np.testing.assert_allclose((one - two)[mine], 1.0, atol=1e-5)
    with pytest.raises(ValueError, match="1 prompts"):
        residual_teacher_logp(tokens, teacher, reference, response, np.zeros_like(group))
