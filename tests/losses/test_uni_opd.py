"""Uni-OPD: margins against a loop in numpy, and the loss against enumeration and REINFORCE by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.losses import lightning_opd, opd, uni_opd
from opd_jax.losses.lightning_opd import LightningLabels
from opd_jax.losses.opd import TeacherStates
from opd_jax.losses.outcomes import length_mean, order_violation, sides
from opd_jax.losses.token_logp import token_logp
from opd_jax.losses.uni_opd import Calibration, UniLabels, calibrate, margin_mask, margin_shift, supervise
from opd_jax.types import TokenRollout

KEY = jax.random.key(3)
RIGHT, WRONG, UNKNOWN = 1.0, 0.0, math.nan

# ---- margins, against loops in float64 -------------------------------------------------------------------------------


def numpy_gap(scores, outcome, group, name, mode, kept=None):
    kept = np.ones(len(scores), bool) if kept is None else kept
    right, wrong = (scores[(group == name) & (outcome == side) & kept] for side in (1, 0))
    if not len(right) or not len(wrong):
        return None
    return right.mean() - wrong.mean() if mode == "mean" else right.min() - wrong.max()


def numpy_scores(advantages, mask):
    total = np.where(mask, advantages.astype(np.float64), 0).sum(1)
    return total / np.maximum(mask.sum(1), 1)


@st.composite
def batches(draw):
    """Advantages in eighths, whose float32 arithmetic is nearly exact; ragged masks; any group sizes, in any order."""
    records, length = 12, 4
    rows = lambda values: st.lists(values, min_size=records, max_size=records)
    advantages = draw(rows(st.lists(st.integers(-16, 16), min_size=length, max_size=length)))
    outcome = draw(rows(st.sampled_from([RIGHT, WRONG, RIGHT, WRONG, UNKNOWN])))
    group = draw(rows(st.sampled_from([7, 0, 41])))
    lengths = draw(rows(st.integers(0, length)))
    mask = np.arange(length)[None] < np.array(lengths)[:, None]
    return np.float32(advantages) / 8, mask, np.float32(outcome), np.int32(group)


SHIFT = jax.jit(margin_shift, static_argnames=("mode", "direction"))


@settings(max_examples=60, deadline=None)
@given(batch=batches(), mode=st.sampled_from(uni_opd.MODES), direction=st.sampled_from(uni_opd.DIRECTIONS))
def test_after_the_shift_a_violated_gap_is_delta_and_nothing_else_has_changed(batch, mode, direction):
    advantages, mask, outcome, group = batch
    counted = np.where(mask.any(1), outcome, UNKNOWN)  # a record without tokens is on no side
    shifted = np.asarray(SHIFT(*batch, 0.4, mode=mode, direction=direction))
    np.testing.assert_array_equal(shifted[~mask], advantages[~mask])
    for name in np.unique(group):
        before = numpy_gap(numpy_scores(advantages, mask), counted, group, name, mode)
        own = group == name
        if before is None or before >= 0.4:
            np.testing.assert_array_equal(shifted[own], advantages[own])
            continue
        after = numpy_gap(numpy_scores(shifted, mask), counted, group, name, mode)
        np.testing.assert_allclose(after, 0.4, atol=1e-6)
        moved = shifted - advantages
        still = {"both": counted != counted, "correct_up": counted == WRONG, "incorrect_down": counted == RIGHT}
        fixed = own & (still[direction] | np.isnan(counted))
        np.testing.assert_array_equal(moved[fixed], 0)


def test_margin_shift_by_hand():
    """Right answers score 0 and -1, the wrong one 1: gap -1.5, so 1.9 nats are missing; lengths do not matter."""
    advantages = jnp.array([[0.0, 0.0], [-1.0, 9.0], [1.0, 1.0], [5.0, 5.0]])
    mask = jnp.array([[True, True], [True, False], [True, True], [True, True]])
    outcome, group = jnp.array([1.0, 1, 0, jnp.nan]), jnp.array([2, 2, 2, 2])
    both = margin_shift(advantages, mask, outcome, group, 0.4)
    np.testing.assert_allclose(both, [[0.95, 0.95], [-0.05, 9.0], [0.05, 0.05], [5, 5]], atol=1e-6)
    up = margin_shift(advantages, mask, outcome, group, 0.4, direction="correct_up")
    np.testing.assert_allclose(up, [[1.9, 1.9], [0.9, 9.0], [1, 1], [5, 5]], atol=1e-6)
    widest = margin_shift(advantages, mask, outcome, group, 0.0, "minmax", "incorrect_down")  # -1 - 1: 2 are missing
    np.testing.assert_allclose(widest, [[0, 0], [-1, 9], [-1, -1], [5, 5]], atol=1e-6)
    with pytest.raises(ValueError, match="direction 'up'; choose both"):
        margin_shift(advantages, mask, outcome, group, 0.4, direction="up")


def numpy_margin_mask(advantages, mask, outcome, group, delta, mode, retain):
    scores, kept = numpy_scores(advantages, mask), np.ones(len(outcome), bool)
    outcome = np.where(mask.any(1), outcome, UNKNOWN)
    for name in np.unique(group):
        on = {side: (group == name) & (outcome == side) for side in (RIGHT, WRONG)}
        floor = {side: max(1, int(retain * on[side].sum())) for side in on}
        while (gap := numpy_gap(scores, outcome, group, name, mode, kept)) is not None and gap < delta - 1e-9:
            options = []
            for side, sign in ((RIGHT, 1), (WRONG, -1)):
                here = np.flatnonzero(on[side] & kept)
                if len(here) > floor[side]:
                    one = here[np.argmin(sign * scores[here])]
                    without = kept.copy()
                    without[one] = False
                    options.append((numpy_gap(scores, outcome, group, name, mode, without) - gap, one))
            best = max(options, key=lambda option: option[0], default=(0, None))
            if best[0] <= 1e-9:
                break
            kept[best[1]] = False
    return kept


@settings(max_examples=40, deadline=None)
@given(batch=batches(), mode=st.sampled_from(uni_opd.MODES), retain=st.sampled_from([0.25, 0.5]))
def test_margin_mask_is_the_greedy_loop(batch, mode, retain):
    advantages, mask, outcome, group = batch
    # distinct scores, and no two removals that widen a gap alike: ties are decided by rounding
    advantages = advantages + np.random.default_rng(0).uniform(0, 0.1, advantages.shape).astype(np.float32)
    found = np.asarray(MASK(advantages, mask, outcome, group, 0.4, mode=mode, retain=retain))
    np.testing.assert_array_equal(found, numpy_margin_mask(advantages, mask, outcome, group, 0.4, mode, retain))


MASK = jax.jit(margin_mask, static_argnames=("mode", "retain"))


def test_margin_mask_keeps_a_quarter_of_each_side():
    score = jnp.array([0.0, 1, 2, 3, 10, 11, 12, 13])[:, None]  # four right ones below four wrong ones
    outcome, group = jnp.array([1.0] * 4 + [0] * 4), jnp.zeros(8, jnp.int32)
    kept = margin_mask(score, jnp.ones((8, 1), bool), outcome, group, 100.0)
    np.testing.assert_array_equal(kept, [False, False, False, True, True, False, False, False])
    kept = margin_mask(score, jnp.ones((8, 1), bool), outcome, group, -10.0)  # gap -10: reached already
    assert kept.all()


def test_groups_over_devices_and_in_any_order():
    """Eight devices with a record each give what one gives, and so does another order of the records."""
    rng = np.random.default_rng(5)
    batch = rng.normal(size=(16, 6)).astype(np.float32), rng.random((16, 6)) < 0.7
    batch += np.float32(rng.integers(0, 2, 16)), np.int32(rng.integers(0, 4, 16))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("data")))
    expected = SHIFT(*batch, 0.4)
    np.testing.assert_allclose(SHIFT(*map(place, batch), 0.4), expected, atol=1e-6)
    order = rng.permutation(16)
    np.testing.assert_allclose(SHIFT(*(a[order] for a in batch), 0.4), expected[order], atol=1e-6)
    np.testing.assert_array_equal(MASK(*map(place, batch), 0.4), MASK(*batch, 0.4))


def test_order_violation_counts_mixed_groups_only():
    outcome = jnp.array([1.0, 0, 1, 0, 1, 1, jnp.nan, 0])
    group = jnp.array([0, 0, 1, 1, 2, 2, 3, 3])
    score = jnp.array([0.0, 1, 1, 0, 5, 0, -9, 0])
    np.testing.assert_array_equal(order_violation(sides(outcome, group), score), [1, 1, 0, 0, 0, 0, 0, 0])


# ---- a toy model: one token of context, all answers of two tokens ----------------------------------------------------

V, S = 5, 3
ALL = jnp.array([(0, *answer) for answer in itertools.product(range(V), repeat=2)], jnp.int32)  # [25, 3]
RESPONSE = jnp.ones(ALL.shape, bool).at[:, 0].set(False)
hidden_fn = lambda params, tokens, segment_ids: params["embed"][tokens]
head_fn = lambda params: params["head"]


def model(seed, width=4):
    keys = jax.random.split(jax.random.key(seed))
    return {"embed": jax.random.normal(keys[0], (V, width)), "head": jax.random.normal(keys[1], (width, V))}


STUDENT, TEACHER = model(0), model(1)


def logp_of(params, tokens=ALL, response=RESPONSE):
    return token_logp(hidden_fn, params, tokens, response, head_fn=head_fn)


def rollout_of(outcome=None, group=None, teacher=TEACHER, how=None):
    """All answers with their labels; `how=None` leaves everything off."""
    n = ALL.shape[0]
    zero, logp = jnp.zeros(n, jnp.int32), logp_of(STUDENT)
    group = zero if group is None else group
    outcome = jnp.full(n, jnp.nan) if outcome is None else jnp.asarray(outcome)
    rollout = TokenRollout(ALL, RESPONSE, zero + S, group, zero, logp, logp, zero > 0)
    how = Calibration(math.inf, None, margin="none") if how is None else how
    return rollout, calibrate(logp, logp_of(teacher), RESPONSE, outcome, group, KEY, how)


def gradient(loss, rollout, labels, params=STUDENT, weight=None):
    def value(params):
        out = loss(params, rollout, labels, KEY)
        return jnp.vdot(out.total, jnp.ones_like(out.total) if weight is None else weight)

    return jax.grad(value)(params)


P_STUDENT = jnp.exp(logp_of(STUDENT).sum(1))
close = lambda a, b, **tolerance: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_without_calibration_it_is_the_sampled_reverse_kl():
    """The gradient is that of `lightning_opd`'s online objective, bit for bit of the same log-probs up to rounding."""
    rollout, labels = rollout_of()
    ours = supervise(hidden_fn, head_fn=head_fn, reduction="token")
    online = lightning_opd.supervise(hidden_fn, head_fn=head_fn, objective="online", clip=math.inf)
    theirs = gradient(online, rollout, LightningLabels(logp_of(TEACHER)))
    close(gradient(ours, rollout, labels), theirs, atol=1e-5)
    out = ours(STUDENT, rollout, labels, KEY)
    np.testing.assert_allclose(out.metrics["ratio"], 1, atol=1e-6)
    np.testing.assert_allclose(out.total, -(logp_of(TEACHER) - logp_of(STUDENT)).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(out.weight, 2)


def test_exact_divergence_has_the_expected_gradient_of_the_sampled_token():
    """Summed over all answers with their probabilities, sampled equals exact; a shift adds the same to both."""
    states = hidden_fn(TEACHER, ALL, None)
    outcome = jnp.float32(jnp.arange(25) % 2)
    rollout, labels = rollout_of(outcome, how=Calibration(math.inf, None, delta=3.0))
    labels = labels._replace(teacher_hidden=states)
    assert jnp.abs(labels.shift).min() > 0
    sampled = supervise(hidden_fn, head_fn=head_fn, reduction="token")
    exact = supervise(
        hidden_fn, head_fn=head_fn, reduction="token", divergence="reverse_kl", teacher_heads=TEACHER["head"][None]
    )
    close(*(gradient(loss, rollout, labels, weight=P_STUDENT) for loss in (sampled, exact)), atol=1e-5)
    plain = opd.supervise(hidden_fn, head_fn, TEACHER["head"])
    nothing = labels._replace(shift=0 * labels.shift)
    close(gradient(exact, rollout, nothing), gradient(plain, rollout, TeacherStates(states)), atol=1e-5)


def test_every_record_is_compared_with_its_own_teacher():
    """Teachers of two widths in one batch, the narrower padded with zeros, against each alone."""
    narrow, wide = model(7, width=3), model(8, width=6)
    pad = lambda a, axis, size: jnp.pad(a, [(0, size - a.shape[i] if i == axis else 0) for i in range(a.ndim)])
    which = jnp.arange(25) % 2
    states = jnp.where((which == 0)[:, None, None], pad(hidden_fn(narrow, ALL, None), 2, 6), hidden_fn(wide, ALL, None))
    heads = jnp.stack([pad(narrow["head"], 0, 6), wide["head"]])
    rollout, labels = rollout_of()
    labels = labels._replace(teacher_hidden=states, teacher=which)
    loss = supervise(hidden_fn, head_fn=head_fn, reduction="token", divergence="reverse_kl", teacher_heads=heads)
    found = loss(STUDENT, rollout, labels, KEY).total
    for n, own in enumerate((narrow, wide)):
        plain = opd.supervise(hidden_fn, head_fn, own["head"])
        alone = plain(STUDENT, rollout, TeacherStates(hidden_fn(own, ALL, None)), KEY).total
        np.testing.assert_allclose(found[which == n], alone[which == n], rtol=1e-5)


def test_the_shift_alone_is_reinforce():
    """Teacher = student: the gradient is that of -sum +-d/2 log pi by hand, whatever the length of an answer."""
    outcome = (jnp.arange(25) < 9).astype(jnp.float32)
    how = Calibration(math.inf, None, delta=0.4)
    rollout, labels = rollout_of(outcome, teacher=STUDENT, how=how)
    half = jnp.where(outcome == 1, 0.2, -0.2)
    np.testing.assert_allclose(labels.shift, half, rtol=1e-6)
    reinforce = lambda params: -jnp.vdot(half, logp_of(params).sum(1) / 2)  # mean over the two tokens
    close(gradient(supervise(hidden_fn, head_fn=head_fn), rollout, labels), jax.grad(reinforce)(STUDENT), atol=1e-6)
    short = labels._replace(mask=labels.mask.at[:, 2].set(outcome == 1))
    value = supervise(hidden_fn, head_fn=head_fn)(STUDENT, rollout, short, KEY)
    np.testing.assert_allclose(value.total, -half, rtol=1e-6)
    np.testing.assert_array_equal(value.weight, 1)


def test_student_equal_to_the_teacher_is_exactly_zero():
    rollout, labels = rollout_of(teacher=STUDENT)
    heads = STUDENT["head"][None]
    exact = {"divergence": "reverse_kl", "teacher_heads": heads}
    labels = labels._replace(teacher_hidden=hidden_fn(STUDENT, ALL, None))
    for settings_ in ({}, exact):
        loss = supervise(hidden_fn, head_fn=head_fn, **settings_)
        np.testing.assert_array_equal(loss(STUDENT, rollout, labels, KEY).total, 0)
        close(gradient(loss, rollout, labels), jax.tree.map(jnp.zeros_like, STUDENT), atol=0)


def test_surrogate_is_clipped_off_policy():
    """rho = 1.5 with a positive advantage is credited 1.28 times, and has no gradient; with a negative one it has."""
    rollout, labels = rollout_of()
    behind = labels._replace(proximal_logp=jnp.where(labels.mask, logp_of(STUDENT) - math.log(1.5), 0.0))
    for sign in (1.0, -1.0):
        one = behind._replace(teacher_logp=behind.proximal_logp + jnp.where(labels.mask, sign, 0.0))
        out = supervise(hidden_fn, head_fn=head_fn)(STUDENT, rollout, one, KEY)
        np.testing.assert_allclose(out.total, -1.28 if sign > 0 else 1.5, rtol=1e-5)
        np.testing.assert_allclose(out.metrics["clip_fraction"], 1)
        size = sum(
            jnp.abs(leaf).sum()
            for leaf in jax.tree.leaves(gradient(supervise(hidden_fn, head_fn=head_fn), rollout, one))
        )
        assert (size == 0) == (sign > 0)


# ---- calibration -----------------------------------------------------------------------------------------------------


def tokens_of(advantage):
    """Student and teacher log-probs of one counted token per record, behind an uncounted one."""
    student = jnp.stack([jnp.zeros(len(advantage)), jnp.full(len(advantage), -2.0)], 1)
    teacher = student + jnp.stack([jnp.full(len(advantage), jnp.nan), jnp.float32(advantage)], 1)
    response = jnp.zeros(student.shape, bool).at[:, 1].set(True)
    return student, teacher, response


CALIBRATE = jax.jit(calibrate, static_argnames="how")


def labels_of(advantage, outcome, how, group=None):
    group = jnp.zeros(len(advantage), jnp.int32) if group is None else jnp.asarray(group)
    return CALIBRATE(*tokens_of(advantage), jnp.float32(outcome), group, KEY, how=how)


def test_statistics_are_of_what_is_trained_on():
    """A token of 10 nats is left out, and its record is on no side; balancing goes before the margin."""
    off = Calibration(ratio=None)
    labels = labels_of([0.0, 1.0, 11.0, -10.0], [1, 0, 1, 0], off)
    np.testing.assert_array_equal(labels.mask[:, 1], [True, True, False, False])
    np.testing.assert_allclose(labels.shift, [0.7, -0.7, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(labels.metrics["token_out"], [0, 0, 1, 1])
    np.testing.assert_array_equal(labels.metrics["order_violation"], [1, 1, 0, 0])
    np.testing.assert_array_equal(labels.metrics["order_violation_after"], 0)
    balanced = labels_of([0.0, 1.0, 3.0, 5.0, 9.0], [1, 0, 0, 0, 0], Calibration())
    kept = np.asarray(balanced.mask[:, 1])
    assert kept.sum() == 2 and kept[0]
    wrong = np.array([0.0, 1.0, 3.0, 5.0, 9.0])[kept][1]
    np.testing.assert_allclose(np.asarray(balanced.shift)[kept], [(0.4 + wrong) / 2, -(0.4 + wrong) / 2], rtol=1e-6)
    np.testing.assert_array_equal(balanced.metrics["balanced_out"], ~kept)


def test_unknown_outcomes_and_failed_teachers_take_no_part():
    labels = labels_of([0.0, 1.0, 50.0, math.nan], [1, 0, math.nan, 1], Calibration(math.inf))
    np.testing.assert_allclose(labels.shift, [0.7, -0.7, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(labels.mask[:, 1], [True, True, True, False])  # an unknown answer is distilled
    np.testing.assert_array_equal(labels.metrics["teacher_failed"], [0, 0, 0, 1])
    np.testing.assert_array_equal(labels.metrics["unknown"], [0, 0, 1, 0])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(labels))


def test_margin_mask_takes_records_out_and_no_token_counts():
    how = Calibration(ratio=None, margin="mask", retain=0.25)
    labels = labels_of([0.0, 1.0, 0.5, 0.3], [1, 1, 0, 0], how)
    np.testing.assert_array_equal(labels.metrics["margin_out"], [1, 0, 0, 0])  # the gap goes from .1 to .6
    np.testing.assert_array_equal(labels.mask[:, 1], [False, True, True, True])
    np.testing.assert_array_equal(labels.shift, 0)


def test_the_control_has_the_size_of_the_shift_without_its_hinge():
    advantage, outcome, group = [0.0, 1.0, 1.0, 0.0], [1, 0, 1, 0], [0, 0, 1, 1]  # the first group is violated
    shifted = labels_of(advantage, outcome, Calibration(ratio=None), group).shift
    np.testing.assert_allclose(shifted, [0.7, -0.7, 0, 0], rtol=1e-6)
    control = labels_of(advantage, outcome, Calibration(ratio=None, margin="reinforce"), group).shift
    np.testing.assert_allclose(control, [0.35, -0.35, 0.35, -0.35], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: labels_of([0.0], [1], Calibration(margin="shove")), "margin 'shove'; choose shift"),
        (lambda: supervise(hidden_fn, reduction="mean"), "reduction 'mean'; choose record"),
        (lambda: supervise(hidden_fn, divergence="reverse_kl"), "give head_fn and teacher_heads"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_padding_changes_nothing():
    rollout, labels = rollout_of(how=Calibration(math.inf, None))
    loss = supervise(hidden_fn, head_fn=head_fn)
    extra = lambda a, value: jnp.pad(a, ((0, 0), (0, 2)), constant_values=value)
    padded = rollout._replace(
        tokens=extra(rollout.tokens, 10**6),
        response=extra(rollout.response, False),
        behavior_logp=extra(rollout.behavior_logp, jnp.nan),
    )
    wider = labels._replace(
        teacher_logp=extra(labels.teacher_logp, jnp.nan),
        proximal_logp=extra(labels.proximal_logp, jnp.nan),
        mask=extra(labels.mask, False),
    )
    close(gradient(loss, padded, wider), gradient(loss, rollout, labels), rtol=1e-5, atol=1e-6)
    assert isinstance(wider, UniLabels)
    np.testing.assert_allclose(
        length_mean(wider.teacher_logp, wider.mask), length_mean(labels.teacher_logp, labels.mask)
    )
