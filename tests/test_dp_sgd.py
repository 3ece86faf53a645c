"""The private update: what one record can do to it, what noise is added, and mistakes that must show."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax import dp_sgd, offload, optim, sharding
from opd_jax.types import Weighted

DIM, C = 6, 0.7
SPECIAL = st.sampled_from([0.0, 1e-30, 1.0, -3.0, 1e18, -1e30, 3e38, np.inf, -np.inf, np.nan])


class Rows(NamedTuple):
    """Records of a linear model: one row of features each, `length` of them real."""

    x: jax.Array  # [B, T, DIM]
    length: jax.Array  # [B]
    group: jax.Array  # [B], -1 where there is no record


def rows(seed: int, count: int, length: int = 3, scale: float = 1.0) -> tuple[Rows, jax.Array]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, length + 1, count).astype(np.int32)
    x = (scale * draw.normal(size=(count, length, DIM))).astype(np.float32)
    return Rows(jnp.array(x), jnp.array(lengths), jnp.arange(count)), jnp.array(
        draw.normal(size=(count, length)).astype(np.float32)
    )


def counted(rollout) -> jax.Array:
    return jnp.arange(rollout.x.shape[1])[None] < rollout.length[:, None]


def squares(params, rollout, labels, key) -> Weighted:
    error = jnp.where(counted(rollout), (rollout.x @ params["w"] + params["b"] - labels) ** 2, 0.0)
    return Weighted(error.sum(1), counted(rollout).sum(1).astype(jnp.float32))


def batch_mean(params, rollout, labels, key) -> Weighted:
    """A normaliser of the batch: every record's share depends on how long the others are."""
    total, weight = squares(params, rollout, labels, key)[:2]
    return Weighted(total / weight.sum(), jnp.full_like(weight, 1 / len(weight)))


def whitened(params, rollout, labels, key) -> Weighted:
    """An advantage whitened over the batch."""
    total = squares(params, rollout, labels, key).total
    advantage = jax.lax.stop_gradient((total - total.mean()) / (total.std() + 1e-6))
    return Weighted(advantage * (rollout.x @ params["w"]).sum(1), jnp.ones_like(total))


def params() -> dict:
    return {"w": jnp.linspace(-1, 1, DIM), "b": jnp.float32(0.3)}


def norm(tree) -> float:
    return float(np.sqrt(sum(float(np.sum(np.float64(leaf) ** 2)) for leaf in jax.tree.leaves(tree))))


@functools.partial(jax.jit, static_argnames=("supervise", "rollouts", "micro_batch"))
def clipped(rollout, labels, supervise=squares, is_padding=None, **how):
    return dp_sgd.clipped_sum(supervise, params(), rollout, labels, jax.random.key(0), C, is_padding=is_padding, **how)


def without(tree, i: int):
    return jax.tree.map(lambda leaf: jnp.delete(leaf, i, axis=0), tree)


def by_hand(rollout, labels) -> dict:
    """In float64: the gradient of every record's mean of squares, clipped, summed."""
    total = {"w": np.zeros(DIM), "b": 0.0}
    w, b = np.linspace(-1, 1, DIM), 0.3
    for x, y, n in zip(*map(np.float64, (rollout.x, labels)), np.asarray(rollout.length)):
        error = x[:n] @ w + b - y[:n]
        own = {"w": 2 * error @ x[:n] / n, "b": 2 * error.sum() / n}
        scale = min(1.0, C / np.sqrt(np.sum(own["w"] ** 2) + own["b"] ** 2))
        total = {name: total[name] + scale * own[name] for name in total}
    return total


# ---- the sum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 2, 3])
def test_the_sum_is_that_of_clipped_gradients(micro_batch):
    rollout, labels = rows(0, 6)
    got = clipped(rollout, labels, micro_batch=micro_batch)
    chex.assert_trees_all_close(got, jax.tree.map(np.float32, by_hand(rollout, labels)), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(0, 4), st.lists(SPECIAL, min_size=DIM, max_size=DIM), SPECIAL)
def test_one_record_moves_the_sum_by_the_clip_norm_at_most(seed, place, features, label):
    rollout, labels = rows(seed, 5, scale=3.0)
    rollout = rollout._replace(x=rollout.x.at[place].set(jnp.array(features, jnp.float32)[None]))
    labels = labels.at[place].set(label)
    whole = clipped(rollout, labels)
    removed = clipped(without(rollout, place), without(labels, place))
    other, replaced = rows(seed + 1, 5), clipped(*rows(seed + 1, 5))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole))
    assert norm(jax.tree.map(jnp.subtract, whole, removed)) <= C * (1 + 1e-5)
    mixed = jax.tree.map(lambda a, b: a.at[place].set(b[place]), (rollout, labels), other)
    assert norm(jax.tree.map(jnp.subtract, clipped(*mixed), whole)) <= 2 * C * (1 + 1e-5)
    assert norm(replaced) <= 5 * C * (1 + 1e-5)


@functools.partial(jax.jit, static_argnums=0)
def naively_clipped(supervise, rollout, labels):
    """What a per-record gradient becomes where the loss is of the batch: the gradient of each record's own term."""
    own = jax.jacrev(lambda p: (r := supervise(p, rollout, labels, None)).total / r.weight.sum())(params())
    scale = jnp.minimum(1, C / jax.vmap(optax.tree.norm)(own))
    return jax.tree.map(lambda leaf: jnp.tensordot(scale, leaf, 1), own)


@pytest.mark.parametrize("supervise", [batch_mean, whitened])
def test_what_looks_across_records_breaks_the_bound(supervise):
    """Kept as examples of what not to do. Called on one record at a time, as `private` does, the same losses obey."""
    rollout, labels = rows(1, 30, length=40)
    rollout = rollout._replace(length=rollout.length.at[0].set(40).at[1:].set(1), x=rollout.x.at[1:].set(0.1))
    labels = labels.at[1:].set(5.0) if supervise is batch_mean else labels.at[0].set(50.0)  # one record of outliers
    change = lambda clip: norm(jax.tree.map(jnp.subtract, clip(rollout, labels), clip(without(rollout, 0), labels[1:])))
    assert change(functools.partial(naively_clipped, supervise)) > 2 * C
    assert change(functools.partial(clipped, supervise=supervise)) <= C * (1 + 1e-5)


def test_other_records_change_nothing_of_a_record():
    rollout, labels = rows(2, 4)
    alone = jax.tree.map(lambda leaf: leaf[:1], (rollout, labels))
    longer = rollout._replace(length=rollout.length.at[1:].set(3), x=rollout.x.at[1:].mul(100))
    for changed in (rollout, longer):
        with_others = clipped(changed, labels)
        others = clipped(without(changed, 0), labels[1:])
        rest = jax.tree.map(jnp.subtract, with_others, others)
        chex.assert_trees_all_close(rest, clipped(*alone), rtol=1e-4, atol=1e-5)


def test_rollouts_of_a_record_are_one_before_clipping():
    """Clipped apart and summed, two rollouts would move the sum by twice the clip norm."""
    rollout, labels = rows(3, 8, scale=50.0)
    pair = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf[:1]]), (rollout, labels))
    assert norm(clipped(*pair, rollouts=2)) <= C * (1 + 1e-5)
    assert norm(clipped(*pair)) > 1.5 * C
    alone = jax.tree.map(lambda leaf: leaf[:1], (rollout, labels))
    chex.assert_trees_all_close(clipped(*pair, rollouts=2), clipped(*alone), rtol=1e-5)


def test_padding_counts_exactly_nothing():
    rollout, labels = rows(4, 4)
    nothing = lambda leaf: jnp.full_like(leaf, np.nan if leaf.dtype == jnp.float32 else 0)
    longer = jax.tree.map(lambda leaf: jnp.concatenate([leaf, nothing(leaf)]), (rollout, labels))
    padded = functools.partial(clipped, is_padding=jnp.arange(8) >= 4, micro_batch=4)
    chex.assert_trees_all_close(padded(*longer), clipped(rollout, labels), rtol=1e-5, atol=1e-6)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), (rollout, labels))
    chex.assert_trees_all_equal(padded(*longer), padded(*twice))


def test_the_order_of_records_does_not_matter():
    rollout, labels = rows(5, 6)
    turned = jax.tree.map(lambda leaf: leaf[::-1], (rollout, labels))
    chex.assert_trees_all_close(clipped(*turned), clipped(rollout, labels), rtol=1e-5)


# ---- the update ------------------------------------------------------------------------------------------------------


def updated(rollout, labels, key=0, supervise=squares, **how):
    how = {"clip_norm": C, "noise_multiplier": 0.0, "expected_batch": 4.0} | how
    update = dp_sgd.private(supervise, optax.sgd(1.0), **how)
    state = optim.init_state(params(), optax.sgd(1.0))
    return update(state, rollout, labels, jax.random.key(key))


def noise_of(total, key, multiplier=1.5, expected=8.0):
    return dp_sgd.noised(total, key, clip_norm=C, noise_multiplier=multiplier, expected_batch=expected)


def test_the_sum_is_divided_by_the_expected_batch():
    rollout, labels = rows(6, 6)
    state, metrics = updated(rollout, labels)
    want = jax.tree.map(lambda p, g: p - g / 4, params(), clipped(rollout, labels))
    chex.assert_trees_all_close(state.params, want, rtol=1e-5)
    assert metrics["noised_norm"] == pytest.approx(norm(clipped(rollout, labels)) / 4, rel=1e-5)
    assert set(metrics) == {"noised_norm", "noise_norm"}, "nothing else is private"


def test_an_empty_batch_is_noise():
    rollout, labels = rows(7, 2)
    rollout = rollout._replace(group=jnp.full_like(rollout.group, -1))
    state, _ = updated(rollout, labels, noise_multiplier=2.0)
    change = jax.tree.map(jnp.subtract, state.params, params())
    noise, _ = noise_of(jax.tree.map(jnp.zeros_like, params()), jax.random.fold_in(jax.random.key(0), 1), 2.0, 4.0)
    chex.assert_trees_all_close(change, jax.tree.map(jnp.negative, noise), rtol=1e-5, atol=1e-6)
    assert state.step == 1


def test_noise_has_the_deviation_that_is_accounted_for():
    zero = {"w": jnp.zeros(4_000), "b": jnp.zeros(())}
    draws = [noise_of(zero, jax.random.key(i))[0] for i in (0, 1)]
    std = 1.5 * C / 8
    for draw in draws:
        assert np.std(draw["w"]) == pytest.approx(std, rel=4 / np.sqrt(2 * 4_000))
        assert abs(np.mean(draw["w"])) < 4 * std / 63
    assert abs(np.corrcoef(draws[0]["w"], draws[1]["w"])[0, 1]) < 4 / 63
    both, _ = noise_of({"a": jnp.zeros(4), "b": jnp.zeros(4)}, jax.random.key(0))
    assert not np.array_equal(both["a"], both["b"])


def test_the_average_costs_nothing():
    rollout, labels = rows(8, 4)
    state, _ = updated(rollout, labels, ema_decay=0.5)
    want = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, params(), state.params)  # (1 + 0) / (10 + 0) at first
    chex.assert_trees_all_close(state.ema, want, rtol=1e-5)


def test_eight_devices_give_what_one_gives():
    """Gradients are taken in the global view; inside a shard_map a replicated parameter's would be counted 8 times."""
    rollout, labels = rows(9, 16, scale=4.0)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    whole, _ = updated(rollout, labels, noise_multiplier=0.5, micro_batch=8)
    parts, _ = updated(*sharding.shard_batch((rollout, labels), mesh), noise_multiplier=0.5, micro_batch=8)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)


def test_moments_in_the_memory_of_the_host_change_nothing():
    rollout, labels = rows(10, 4)
    mesh, optimizer = sharding.make_mesh({"data": 8}), optim.adamw(0.1)
    how = {"clip_norm": C, "noise_multiplier": 0.5, "expected_batch": 4.0, "is_padding": lambda rows: rows.group < 0}
    update, ends = dp_sgd.private(squares, optimizer, ema_decay=0.5, **how), []
    for move in (lambda state: state, offload.offloaded):
        state = move(sharding.replicate(optim.init_state(params(), optimizer), mesh))
        for step in range(2):
            state, _ = update(state, rollout, labels, jax.random.key(step))
        ends.append(state)
    plain, away = ends
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((plain, away)))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves((away.opt_state, away.ema)) if leaf.ndim}
    assert kinds == {offload.HOST}


def test_records_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 records do not divide into micro-batches of 4"):
        clipped(*rows(0, 6), micro_batch=4)
