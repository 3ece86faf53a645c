# SPDX-License-Identifier: Apache-2.0
"""Categorical divergences, their budgets and sampled-token estimators, against plain float64 definitions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import divergences
from opd_jax.losses.divergences import BUDGETS, F_DIVERGENCES, KINDS, TRUNCATED, divergence

PARAMETER = {
    "reverse_kl": None,
    "forward_kl": None,
    "generalized_jsd": 0.3,
    "scaled_jsd": 0.3,
    "skewed_forward_kl": 0.1,
    "skewed_reverse_kl": 0.1,
    "adaptive_kl": 0.5,
}
INF = np.inf


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def everything(student, teacher, budget="exact", k=None, temperature=1.0, parameters=None):
    """For every kind the value and the gradients by student and teacher, compiled together."""

    def of(kind, parameter):
        total = lambda s, t: divergence(s, t, kind, parameter, budget, k, temperature)
        out, pull = jax.vjp(total, student, teacher)
        return out, *pull(jnp.ones_like(out))

    return {kind: of(kind, parameter) for kind, parameter in parameters or PARAMETER.items()}


def value(student, teacher, kind, *static):
    return everything(student, teacher, *(static or ("exact", 3)))[kind][0]


def gradient(student, teacher, kind, *static):
    return everything(student, teacher, *static)[kind][1]


def pair(shape=(5, 11), scale=2.0, seed=0):
    student, teacher = scale * jax.random.normal(jax.random.key(seed), (2, *shape))
    return student, teacher


# ---- the definitions, in float64 -------------------------------------------------------------------------------------


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1)


def defined(kind, parameter, p_s, p_t):
    """The divergence of two distributions as its paper prints it."""
    if kind == "reverse_kl":
        return kl(p_s, p_t)
    if kind == "forward_kl":
        return kl(p_t, p_s)
    if kind in ("generalized_jsd", "scaled_jsd"):
        m = parameter * p_t + (1 - parameter) * p_s
        total = parameter * kl(p_t, m) + (1 - parameter) * kl(p_s, m)
        return total / (parameter * (1 - parameter)) if kind == "scaled_jsd" else total
    if kind == "skewed_forward_kl":
        return kl(p_t, parameter * p_t + (1 - parameter) * p_s)
    if kind == "skewed_reverse_kl":
        return kl(p_s, parameter * p_s + (1 - parameter) * p_t)
    share = head_share(parameter, p_s, p_t)
    return share * kl(p_t, p_s) + (1 - share) * kl(p_s, p_t)


def head_share(mu, p_s, p_t):
    """AKL's weight of the forward KL, token by token, in loops."""
    shares = np.zeros(p_s.shape[:-1])
    for i in np.ndindex(*shares.shape):
        head, tail, cumulated = 0.0, 0.0, 0.0
        for rank, v in enumerate(np.argsort(-p_t[i], kind="stable")):
            cumulated += p_t[i][v]
            gap = abs(p_t[i][v] - p_s[i][v])
            head, tail = (head + gap, tail) if rank == 0 or cumulated <= mu else (head, tail + gap)
        shares[i] = head / (head + tail)
    return shares


def numerical_gradient(kind, parameter, student, teacher, step=1e-5):
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    share = head_share(parameter, softmax(student), softmax(teacher)) if kind == "adaptive_kl" else None

    def total(z):
        p_s, p_t = softmax(z), softmax(teacher)
        if share is None:
            return defined(kind, parameter, p_s, p_t).sum()
        return (share * kl(p_t, p_s) + (1 - share) * kl(p_s, p_t)).sum()  # the weights carry no gradient

    slopes = np.zeros_like(student)
    for i in np.ndindex(*student.shape):
        bump = np.zeros_like(student)
        bump[i] = step
        slopes[i] = (total(student + bump) - total(student - bump)) / (2 * step)
    return slopes


# ---- values and gradients --------------------------------------------------------------------------------------------


def test_values_worked_out_by_hand():
    student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    reverse = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)  # 0.510826
    forward = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)  # 0.368064
    np.testing.assert_allclose(divergences.reverse_kl(student, teacher), reverse, rtol=1e-6)
    np.testing.assert_allclose(divergences.reverse_kl(student, teacher), 0.510826, rtol=1e-5)
    np.testing.assert_allclose(divergences.forward_kl(student, teacher), forward, rtol=1e-6)
    np.testing.assert_allclose(divergences.forward_kl(student, teacher), 0.368064, rtol=1e-5)
    np.testing.assert_allclose(divergences.generalized_jsd(student, teacher, 0.5), 0.1017488, rtol=1e-5)
    np.testing.assert_allclose(divergences.skewed_forward_kl(student, teacher, 0.5), 0.116322, rtol=1e-5)
    # head: the first token; both gaps are 0.4
    np.testing.assert_allclose(divergences.adaptive_kl(student, teacher, 0.5), (reverse + forward) / 2, rtol=1e-6)


def test_value_and_gradient_are_the_definition():
    student, teacher = pair()
    for kind, (out, by_student, by_teacher) in everything(student, teacher, "exact", 3).items():
        parameter = PARAMETER[kind]
        assert out.shape == (5,) and out.dtype == jnp.float32
        expected = defined(kind, parameter, softmax(student), softmax(teacher))
        np.testing.assert_allclose(out, expected, rtol=2e-6, err_msg=kind)
        expected = numerical_gradient(kind, parameter, student, teacher)
        np.testing.assert_allclose(by_student, expected, atol=2e-6, err_msg=kind)
        np.testing.assert_array_equal(by_teacher, 0.0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_equal_logits_give_exactly_zero(budget):
    logits, _ = pair((5, 1000) if budget == "exact" else (5, 11), 5.0)
    for kind, (out, by_student, _) in everything(logits, logits, budget, 3).items():
        np.testing.assert_array_equal(out, 0.0, err_msg=kind)
        np.testing.assert_array_equal(by_student, 0.0, err_msg=kind)


def test_never_negative_and_accurate_close_to_the_teacher():
    teacher, noise = pair((5, 1000), 3.0)
    student = teacher + 1e-3 * noise
    for kind, (out, _, _) in everything(student, teacher, "exact", 3).items():
        expected = defined(kind, PARAMETER[kind], softmax(student), softmax(teacher))
        assert expected.max() < 1e-4
        np.testing.assert_allclose(out, expected, rtol=1e-3, err_msg=kind)
    for seed in range(3):
        nearly = teacher * (1 + 1e-7 * jax.random.normal(jax.random.key(seed), teacher.shape))
        for kind, (out, _, _) in everything(nearly, teacher, "exact", 3).items():
            assert (out >= 0).all(), kind


def test_the_second_derivative_at_the_teacher_is_the_fisher_information():
    logits = pair((6,))[0]
    p = softmax(logits)
    fisher = np.diag(p) - np.outer(p, p)
    for kind, scale in [("reverse_kl", 1), ("forward_kl", 1), ("generalized_jsd", 0.3 * 0.7)]:
        hessian = jax.jit(jax.hessian(lambda s, kind=kind: divergence(s, logits, kind, PARAMETER[kind])))(logits)
        np.testing.assert_allclose(hessian, scale * fisher, atol=1e-6, err_msg=kind)


@pytest.mark.parametrize("budget", ["exact", "student_topk"])
def test_temperature_divides_both_rows(budget):
    student, teacher = pair()
    hot, scaled = everything(student, teacher, budget, 3, 2.5), everything(student / 2.5, teacher / 2.5, budget, 3)
    for kind in KINDS:
        np.testing.assert_allclose(hot[kind][0], scaled[kind][0], rtol=1e-5, err_msg=kind)
        np.testing.assert_allclose(hot[kind][1], scaled[kind][1] / 2.5, atol=1e-6, err_msg=kind)


def test_extreme_logits_and_bfloat16():
    student = jnp.broadcast_to(jnp.array([1e4, -1e4, 300.0, -300.0, *[0.0] * 7]), (5, 11)).at[1].multiply(0.01)
    for teacher in (student, -student, jnp.zeros_like(student)):
        for kind, (out, by_student, _) in everything(student, teacher, "exact", 3).items():
            assert jnp.isfinite(out).all() and jnp.isfinite(by_student).all(), kind
    low = [x.astype(jnp.bfloat16) for x in pair()]
    full = everything(*(x.astype(jnp.float32) for x in low), "exact", 3)
    for kind, (out, by_student, _) in everything(*low).items():
        assert out.dtype == jnp.float32 and by_student.dtype == jnp.bfloat16
        np.testing.assert_allclose(out, full[kind][0], rtol=1e-6, err_msg=kind)


# ---- limits of the families ------------------------------------------------------------------------------------------


def test_limits_are_the_kls_exactly_and_only_the_scaled_form_has_no_jump():
    student, teacher = pair(scale=0.5)
    at = lambda *pairs: {kind: out[0] for kind, out in everything(student, teacher, "exact", None, 1.0, pairs).items()}
    forward, reverse = value(student, teacher, "forward_kl"), value(student, teacher, "reverse_kl")
    assert (forward > 0.02).all() and (reverse > 0.02).all()
    low = at(("generalized_jsd", 0), ("scaled_jsd", 0.0), ("skewed_forward_kl", 0.0), ("skewed_reverse_kl", 0))
    for kind, out in low.items():
        np.testing.assert_array_equal(out, reverse if kind == "skewed_reverse_kl" else forward, err_msg=kind)
    for kind, out in at(("generalized_jsd", 1.0), ("scaled_jsd", 1)).items():
        np.testing.assert_array_equal(out, reverse, err_msg=kind)
    small = 1e-4
    near = at(("generalized_jsd", small), ("scaled_jsd", small), ("skewed_forward_kl", small))
    np.testing.assert_allclose(near["scaled_jsd"], forward, rtol=5e-3)
    np.testing.assert_allclose(near["skewed_forward_kl"], forward, rtol=5e-3)
    np.testing.assert_allclose(near["generalized_jsd"], small * forward, rtol=5e-3)
    np.testing.assert_allclose(at(("scaled_jsd", 1 - small))["scaled_jsd"], reverse, rtol=5e-3)


def test_bounds():
    apart = jnp.array([30.0, -30.0]), jnp.array([-30.0, 30.0])
    np.testing.assert_allclose(divergences.generalized_jsd(*apart, 0.5), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(divergences.skewed_forward_kl(*apart, 0.1), -np.log(0.1), rtol=1e-6)
    np.testing.assert_allclose(divergences.skewed_reverse_kl(*apart, 0.1), -np.log(0.1), rtol=1e-6)


# ---- masked vocabulary and NaN ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["exact", "union_topk"])
def test_entries_absent_from_both_do_not_exist(budget):
    student, teacher = pair()
    padded = [jnp.concatenate([x, jnp.full((5, 4), -INF)], -1) for x in (student, teacher)]
    plain = everything(student, teacher, budget, 3)
    for kind, (out, by_student, _) in everything(*padded, budget, 3).items():
        np.testing.assert_allclose(out, plain[kind][0], rtol=1e-5, atol=1e-6, err_msg=kind)
        np.testing.assert_allclose(by_student[:, :11], plain[kind][1], atol=1e-6, err_msg=kind)
        np.testing.assert_array_equal(by_student[:, 11:], 0.0, err_msg=kind)
    nothing = jnp.full((5, 15), -INF)
    for kind, (out, by_student, _) in everything(nothing, nothing, budget, 3).items():
        np.testing.assert_array_equal(out, 0.0, err_msg=kind)
        np.testing.assert_array_equal(by_student, 0.0, err_msg=kind)


@pytest.mark.parametrize("absent_from", ["student", "teacher"])
def test_an_entry_absent_from_one(absent_from):
    whole, cut = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.5, -INF, 0.0]])
    student, teacher = (cut, whole) if absent_from == "student" else (whole, cut)
    infinite = ("forward_kl", "adaptive_kl") if absent_from == "student" else ("reverse_kl", "adaptive_kl")
    for kind, (out, by_student, _) in everything(student, teacher, "exact", 3).items():
        assert jnp.isposinf(out).all() if kind in infinite else jnp.isfinite(out).all(), kind
        assert jnp.isfinite(by_student).all(), kind
        if kind not in infinite:
            expected = defined(kind, PARAMETER[kind], softmax(student), softmax(teacher))
            np.testing.assert_allclose(out, expected, rtol=1e-6, err_msg=kind)


@pytest.mark.parametrize("budget", BUDGETS)
def test_nan_is_never_hidden(budget):
    student, teacher = pair()
    for bad in (jnp.nan, jnp.inf):
        for broken in ((student.at[0, 2].set(bad), teacher), (student, teacher.at[0, 2].set(bad))):
            for kind, (out, _, _) in everything(*broken, budget, 11 if budget != "exact" else 3).items():
                assert jnp.isnan(out[0]) and jnp.isfinite(out[1:]).all(), kind


def test_padding_replaced_before_and_after_reaches_nothing():
    student, teacher = pair((2, 3, 8))
    mask = jnp.array([[True, True, False], [True, False, False]])

    @jax.jit
    @jax.value_and_grad
    def total(s, t):
        s, t = (jnp.where(mask[..., None], x, 0.0) for x in (s, t))
        return jnp.where(mask, divergences.reverse_kl(s, t), 0.0).sum()

    broken = [jnp.where(mask[..., None], x, jnp.nan) for x in (student, teacher)]
    jax.tree.map(np.testing.assert_array_equal, total(*broken), total(student, teacher))


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS[1:])
def test_every_budget_is_exact_at_the_whole_vocabulary(budget):
    student, teacher = pair()
    exact = everything(student, teacher, "exact", 3)
    for kind, (out, by_student, _) in everything(student, teacher, budget, 11).items():
        np.testing.assert_allclose(out, exact[kind][0], rtol=3e-6, err_msg=kind)
        np.testing.assert_allclose(by_student, exact[kind][1], atol=1e-6, err_msg=kind)


@pytest.mark.parametrize("budget", TRUNCATED)
def test_with_a_tail_a_budget_rises_to_the_exact_value(budget):
    student, teacher = pair()
    steps = [*(everything(student, teacher, budget, k) for k in (1, 3, 11)), everything(student, teacher, "exact", 3)]
    for kind in F_DIVERGENCES:
        for smaller, larger in itertools.pairwise(steps):
            assert (smaller[kind][0] <= larger[kind][0] + 1e-6).all(), kind
        assert (steps[0][kind][0] < steps[-1][kind][0] - 1e-3).any(), kind


@pytest.mark.parametrize("budget", BUDGETS[1:])
def test_a_budget_is_the_divergence_of_the_coarse_distributions(budget):
    student, teacher = pair()
    out = everything(student, teacher, budget, 3)
    for i, rows in enumerate(zip(softmax(student), softmax(teacher))):
        asked = [row for row, name in zip(rows, ("student", "teacher")) if name in budget or "union" in budget]
        chosen = sorted({v for row in asked for v in np.argsort(-row)[:3]})
        few = [row[chosen] for row in rows]
        if budget.startswith("renormalized"):
            few = [row / row.sum() for row in few]
        else:
            few = [np.append(row, 1 - row.sum()) for row in few]
        for kind in KINDS:
            expected = defined(kind, PARAMETER[kind], *(row[None] for row in few))[0]
            np.testing.assert_allclose(out[kind][0][i], expected, rtol=2e-5, err_msg=kind)


def test_only_the_tail_sees_mass_that_leaves_the_kept_tokens():
    teacher = jnp.log(jnp.array([0.6, 0.3, 0.05, 0.05]))
    student = jnp.log(jnp.array([0.02, 0.01, 0.485, 0.485]))  # in the teacher's proportions, nearly all mass elsewhere
    np.testing.assert_allclose(value(student, teacher, "reverse_kl", "renormalized_teacher_topk", 2), 0.0, atol=1e-6)
    assert value(student, teacher, "reverse_kl", "teacher_topk", 2) > 1
    pulled = gradient(student, teacher, "reverse_kl", "teacher_topk", 2)
    assert (pulled[:2] < 0).all() and (pulled[2:] > 0).all()  # descent raises the teacher's tokens


def test_stored_topk_is_the_teachers_budget():
    student, teacher = pair()
    ids = jnp.argsort(teacher, axis=-1, descending=True)[:, :4]
    logp = jnp.take_along_axis(jax.nn.log_softmax(teacher), ids, -1)
    stored = jax.jit(jax.value_and_grad(lambda s: divergences.reverse_kl(*divergences.stored_topk(s, ids, logp)).sum()))
    expected = everything(student, teacher, "teacher_topk", 4)["reverse_kl"]
    np.testing.assert_allclose(stored(student)[0], expected[0].sum(), rtol=1e-4)
    np.testing.assert_allclose(stored(student)[1], expected[1], atol=1e-5)
    every = jnp.broadcast_to(jnp.arange(11), (5, 11))
    few = divergences.stored_topk(student, every, jax.nn.log_softmax(teacher) + 1e-6)  # sums to more than one
    assert jnp.isneginf(few[0][:, -1]).all() and jnp.isneginf(few[1][:, -1]).all()


# ---- sampled tokens --------------------------------------------------------------------------------------------------


def test_estimators_by_enumeration():
    student, teacher = pair((9,))
    teacher_logp = jax.nn.log_softmax(teacher)
    p_s = jax.nn.softmax(student)  # a constant below: samples carry no gradient

    def mean(estimator, z):
        return (p_s * estimator(jax.nn.log_softmax(z), teacher_logp)).sum()

    for estimator in (divergences.k1, divergences.k3):
        np.testing.assert_allclose(mean(estimator, student), divergences.reverse_kl(student, teacher), rtol=1e-5)
    assert abs(mean(divergences.k2, student) - divergences.reverse_kl(student, teacher)) > 0.1
    direct = lambda estimator: jax.grad(lambda z: mean(estimator, z))(student)
    np.testing.assert_array_equal(direct(divergences.k1), 0.0)
    for estimator, kl_ in [(divergences.k2, divergences.reverse_kl), (divergences.k3, divergences.forward_kl)]:
        np.testing.assert_allclose(direct(estimator), jax.grad(kl_)(student, teacher), atol=1e-6)
    reward = lambda z: (jax.nn.log_softmax(z) * p_s * divergences.k1(jax.nn.log_softmax(student), teacher_logp)).sum()
    np.testing.assert_allclose(jax.grad(reward)(student), jax.grad(divergences.reverse_kl)(student, teacher), atol=1e-6)


def test_estimators_from_samples():
    student, teacher = pair((9,), 1.0)
    ids = jax.random.categorical(jax.random.key(1), student, shape=(20_000,))
    logps = [jax.nn.log_softmax(x)[ids] for x in (student, teacher)]
    for estimator in (divergences.k1, divergences.k3):
        draws = np.asarray(estimator(*logps))
        error = draws.std() / np.sqrt(draws.size)
        assert abs(draws.mean() - divergences.reverse_kl(student, teacher)) < 4 * error
    assert (divergences.k3(*logps) >= 0).all() and np.std(divergences.k3(*logps)) < np.std(divergences.k1(*logps))


def test_estimators_at_the_edges():
    logp = jnp.array([-1.0, -2.0])
    for estimator in (divergences.k1, divergences.k2, divergences.k3):
        np.testing.assert_array_equal(estimator(logp, logp), 0.0)
        np.testing.assert_array_equal(jax.grad(lambda s, f=estimator: f(s, logp).sum())(logp), 0.0)
        np.testing.assert_array_equal(jax.grad(lambda t, f=estimator: f(2 * logp, t).sum())(logp), 0.0)
        assert jnp.isposinf(estimator(logp, jnp.full(2, -INF))).all()
    np.testing.assert_array_equal(jax.grad(lambda s: divergences.k3(s, jnp.full(2, -INF)).sum())(logp), 1.0)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    student, teacher = pair()
    for call, message in [
        (lambda: divergence(student, teacher, "kl"), "'kl' is no sum over the vocabulary; choose one of reverse_kl"),
        (lambda: divergence(student, teacher, "reverse_kl", 0.5), "reverse_kl with parameter=0.5: it takes no"),
        (lambda: divergence(student, teacher, "generalized_jsd"), "generalized_jsd with parameter=None: give beta"),
        (lambda: divergences.generalized_jsd(student, teacher, 1.5), "parameter=1.5: give beta from 0 to 1"),
        (lambda: divergences.skewed_reverse_kl(student, teacher, 1.0), "parameter=1.0: give alpha from 0 to below 1"),
        (lambda: divergences.adaptive_kl(student, teacher, -1), "parameter=-1: give the head's mass"),
        (lambda: divergence(student, teacher, budget="topk", k=2), "unknown budget 'topk'; choose one of exact"),
        (lambda: divergence(student, teacher, budget="union_topk"), "k=None with budget 'union_topk': give a number"),
        (lambda: divergence(student, teacher, budget="student_topk", k=12), "k=12 .* from 1 to the 11 tokens"),
        (lambda: divergence(student, teacher[:, :9]), "cut both to the tokenizer's vocabulary, logits"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
