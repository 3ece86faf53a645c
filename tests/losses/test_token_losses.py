"""SFT, exact OPD and GRPO of tokens: against float64, by hand, at equal models, in padding, and split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import sharding
from opd_jax.losses import cross_entropy, opd, policy_gradient
from opd_jax.losses.cross_entropy import Text
from opd_jax.losses.linear_divergence import Options
from opd_jax.losses.opd import TeacherStates
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.losses.token_logp import token_logp
from opd_jax.types import TokenRollout

B, S, V, D, E = 8, 6, 11, 4, 3
KEY = jax.random.key(0)


def hidden_fn(params, tokens, segment_ids):
    """States from the last two tokens of the same segment: causal, and padding changes nothing before it."""
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    if segment_ids is not None:
        same = segment_ids == jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
        before = jnp.where(same, before, 0)
    return jnp.tanh(params["now"][tokens] + params["before"][before])


def look_up(params, tokens, segment_ids):
    return params["now"][tokens]


def head_fn(params):
    return params["head"]


def model(seed, width=D):
    rng = np.random.default_rng(seed)
    shapes = {"now": (V, width), "before": (V, width), "head": (width, V)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


STUDENT, TEACHER = model(0), model(1, E)


def make_rollout(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, S)).astype(np.int32)
    length, prompt = rng.integers(3, S + 1, B), rng.integers(1, 3, B)
    place = np.arange(S)[None]
    response = (place >= prompt[:, None]) & (place < length[:, None])
    zero = np.zeros(B, np.int32)
    logp = np.asarray(token_logp(hidden_fn, STUDENT, jnp.asarray(tokens), jnp.asarray(response), head_fn=head_fn))
    rollout = TokenRollout(tokens, response, length.astype(np.int32), zero, zero, logp, logp, zero > 0)
    return jax.tree.map(jnp.asarray, rollout)


ROLLOUT = make_rollout()
LABELS = TeacherStates(hidden_fn(TEACHER, ROLLOUT.tokens, None))


def logits64(params, tokens):
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    tokens = np.asarray(tokens)
    before = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    logits = np.tanh(p["now"][tokens] + p["before"][before]) @ p["head"]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@jax.jit
def value_and_gradient(loss, rollout, labels, params=STUDENT):
    """The loss is an argument, as in `optim.dense`: a head that is a constant is multiplied by another kernel."""

    def total(params):
        out = loss(params, rollout, labels, KEY)
        return out.total.sum(), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return out, gradient


def close(a, b, **how):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(how or {"rtol": 2e-5, "atol": 1e-6})), a, b)


LOSSES = {
    "sft": (cross_entropy.supervise(hidden_fn, head_fn=head_fn), None),
    "opd": (opd.supervise(hidden_fn, head_fn, TEACHER["head"]), LABELS),
    "grpo": (policy_gradient.token_grpo(hidden_fn, head_fn=head_fn), RewardLabels(jnp.linspace(-1, 1, B))),
}

# ---- values ----------------------------------------------------------------------------------------------------------


def test_sft_is_the_log_loss():
    logp, response = logits64(STUDENT, ROLLOUT.tokens)[:, :-1], np.asarray(ROLLOUT.response)[:, 1:]
    picked = np.take_along_axis(logp, np.asarray(ROLLOUT.tokens)[:, 1:, None], -1)[..., 0]
    out, _ = value_and_gradient(*LOSSES["sft"][:1], ROLLOUT, None)
    np.testing.assert_allclose(out.total, -(picked * response).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(out.weight, response.sum(1))


def test_sft_by_hand():
    """A uniform model is ln V per token."""
    uniform = jax.tree.map(jnp.zeros_like, STUDENT)
    out, _ = value_and_gradient(LOSSES["sft"][0], ROLLOUT, None, uniform)
    np.testing.assert_allclose(out.total / out.weight, np.log(V), rtol=1e-6)


def test_packed_segments_are_as_if_alone():
    rows = [np.array([3, 1, 4]), np.array([1, 5, 9, 2])]
    alone = []
    for row in rows:
        text = Text(jnp.asarray(row[None]), jnp.arange(len(row))[None] > 0)
        alone.append(float(LOSSES["sft"][0](STUDENT, text, None, KEY).total[0]))
    tokens, segments = np.concatenate(rows)[None], np.repeat([1, 2], [3, 4])[None]
    response = np.array([[False, True, True, False, True, True, True]])
    packed = LOSSES["sft"][0](STUDENT, Text(*map(jnp.asarray, (tokens, response, segments))), None, KEY)
    np.testing.assert_allclose(packed.total[0], sum(alone), rtol=1e-6)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "generalized_jsd"])
def test_opd_is_the_divergence_at_every_token_of_the_answer(kind):
    beta = 0.3 if kind == "generalized_jsd" else None
    s, t = (logits64(params, ROLLOUT.tokens)[:, :-1] for params in (STUDENT, TEACHER))
    response = np.asarray(ROLLOUT.response)[:, 1:]
    kl = lambda p, q: (np.exp(p) * (p - q)).sum(-1)
    if kind == "generalized_jsd":
        m = np.log(beta * np.exp(t) + (1 - beta) * np.exp(s))
        expected = beta * kl(t, m) + (1 - beta) * kl(s, m)
    else:
        expected = kl(s, t) if kind == "reverse_kl" else kl(t, s)
    loss = opd.supervise(hidden_fn, head_fn, TEACHER["head"], divergence=kind, options=Options(parameter=beta))
    out, _ = value_and_gradient(loss, ROLLOUT, LABELS)
    np.testing.assert_allclose(out.total, (expected * response).sum(1), rtol=2e-5)
    np.testing.assert_allclose(out.metrics["logp_diff"], 0, atol=1e-6)
    reverse = (kl(s, t) * response).sum(1) / np.maximum(response.sum(1), 1)
    np.testing.assert_allclose(out.metrics["reverse_kl"], reverse, rtol=2e-5, atol=1e-6)


def test_opd_gradient_against_differences():
    loss, labels = LOSSES["opd"]
    _, gradient = value_and_gradient(loss, ROLLOUT, labels)
    direction = model(7)
    moved = lambda h: jax.tree.map(lambda a, d: a + h * d, STUDENT, direction)
    total = lambda h: float(loss(moved(h), ROLLOUT, labels, KEY).total.sum())
    slope = (total(1e-2) - total(-1e-2)) / 2e-2
    along = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
    np.testing.assert_allclose(along, slope, rtol=2e-3)


def test_opd_of_equal_models_is_exactly_zero():
    """Of equal states: looked up, so that no other fusion of the same arithmetic rounds them differently."""
    loss = opd.supervise(look_up, head_fn, STUDENT["head"])
    out, gradient = value_and_gradient(loss, ROLLOUT, TeacherStates(look_up(STUDENT, ROLLOUT.tokens, None)))
    assert not np.asarray(out.total).any()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_no_gradient_reaches_the_teacher():
    def total(head, hidden):
        return opd.supervise(hidden_fn, head_fn, head)(STUDENT, ROLLOUT, TeacherStates(hidden), KEY).total.sum()

    for gradient in jax.jit(jax.grad(total, (0, 1)))(TEACHER["head"], LABELS.hidden):
        assert not np.asarray(gradient).any()


def test_an_unknown_divergence_is_named():
    loss = opd.supervise(hidden_fn, head_fn, TEACHER["head"], divergence="kl")
    with pytest.raises(ValueError, match="'kl' does not come from hidden states; choose one of"):
        loss(STUDENT, ROLLOUT, LABELS, KEY)


def test_grpo_is_the_policy_gradient_where_nothing_is_clipped():
    loss, labels = LOSSES["grpo"]
    out, gradient = value_and_gradient(loss, ROLLOUT, labels)
    np.testing.assert_allclose(out.metrics["ratio"], (np.asarray(out.weight) > 0).astype(np.float32), atol=1e-6)
    np.testing.assert_allclose(out.total, -labels.advantage * out.weight, rtol=1e-5, atol=1e-6)

    def score(params):
        logp = token_logp(hidden_fn, params, ROLLOUT.tokens, ROLLOUT.response, head_fn=head_fn)
        return -(logp.sum(1) * labels.advantage).sum()

    close(gradient, jax.grad(score)(STUDENT))


def test_grpo_clips_by_hand():
    """Ratios 0.5, 1 and 2 within [0.8, 1.28]: a good answer is credited up to 1.28, a bad one down to 0.8."""
    ratio = jnp.array([[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]])
    advantage = jnp.array([[1.0] * 3, [-1.0] * 3])
    loss = policy_gradient.clipped_surrogate(ratio, advantage, 0.2, 0.28)
    np.testing.assert_allclose(loss, [[-0.5, -1.0, -1.28], [0.8, 1.0, 2.0]], rtol=1e-6)
    old = ROLLOUT._replace(behavior_logp=ROLLOUT.behavior_logp - jnp.log(2.0))
    out, gradient = value_and_gradient(LOSSES["grpo"][0], old, RewardLabels(jnp.ones(B)))
    np.testing.assert_allclose(out.total, -1.28 * np.asarray(out.weight), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["clip_fraction"], np.asarray(out.weight) > 0)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


# ---- what all of them keep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    loss, labels = LOSSES[name]
    outside = ~np.asarray(ROLLOUT.response)
    padding = np.arange(S)[None] >= np.asarray(ROLLOUT.length)[:, None]
    other = ROLLOUT._replace(
        tokens=jnp.where(padding, (ROLLOUT.tokens + 1) % V, ROLLOUT.tokens),
        behavior_logp=jnp.where(outside, jnp.nan, ROLLOUT.behavior_logp),
    )
    if name == "opd":
        unread = np.pad(outside[:, 1:], ((0, 0), (0, 1)), constant_values=True)[..., None]
        other_labels = TeacherStates(jnp.where(unread, jnp.nan, labels.hidden))
    else:
        other_labels = labels
    (out, gradient), (again, same) = value_and_gradient(loss, ROLLOUT, labels), value_and_gradient(
        loss, other, other_labels
    )  # fmt: skip
    np.testing.assert_array_equal(out.total, again.total)
    close(gradient, same, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_counted_is_nothing(name):
    loss, labels = LOSSES[name]
    out, gradient = value_and_gradient(loss, ROLLOUT._replace(response=jnp.zeros((B, S), bool)), labels)
    assert not np.asarray(out.total).any()
    assert not np.asarray(out.weight).any()
    assert all(np.isfinite(leaf).all() and not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_is_the_sum_of_its_records(name):
    loss, labels = LOSSES[name]
    whole, gradient = value_and_gradient(loss, ROLLOUT, labels)
    halves = [jax.tree.map(lambda leaf, part=part: leaf[part], (ROLLOUT, labels)) for part in np.split(np.arange(B), 2)]
    parts = [value_and_gradient(loss, *half) for half in halves]
    np.testing.assert_allclose(whole.total, np.concatenate([out.total for out, _ in parts]), rtol=1e-5, atol=1e-6)
    close(gradient, jax.tree.map(jnp.add, parts[0][1], parts[1][1]))


@pytest.mark.parametrize("name", LOSSES)
def test_one_device_equals_eight(name):
    loss, labels = LOSSES[name]
    one = value_and_gradient(loss, ROLLOUT, labels)
    mesh = sharding.make_mesh({"data": 8})
    split = jax.device_put((ROLLOUT, labels), NamedSharding(mesh, PartitionSpec("data")))
    eight = value_and_gradient(loss, *split, sharding.replicate(STUDENT, mesh))
    close(one[0].total, eight[0].total)
    close(one[1], eight[1])


def test_the_head_s_gradient_is_summed_in_float32_beside_bfloat16_states():
    """A thousand pieces of one position that each add the same: in bfloat16 the sum stops growing at 256 of them."""
    states = jnp.ones((1, 1025, 4), jnp.bfloat16)
    tokens, counted = jnp.zeros((1, 1025), jnp.int32), jnp.ones((1, 1025), bool)
    total = lambda head, block: token_logp(
        lambda *_: states, None, tokens, counted, head_fn=lambda _: head, block=block
    ).sum()
    head = jnp.zeros((4, 8), jnp.float32)
    pieces = jax.jit(jax.grad(total), static_argnums=1)(head, 1)
    np.testing.assert_allclose(pieces[:, 0], 1024 * 7 / 8, rtol=1e-3)
