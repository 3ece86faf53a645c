# SPDX-License-Identifier: Apache-2.0
"""The update of private training: per-record gradients, clipped, summed, with noise (DP-SGD, arXiv:1607.00133, alg. 1).

    g_i = clip(grad l_i(theta), C)        l_i: `total / weight` of record i alone, all of its rollouts together
    theta <- optimizer((sum_i g_i + N(0, sigma^2 C^2 I)) / B)        B = sampling rate * records, what is expected

Whatever `supervise` does with a record, adding or removing one changes the sum by at most C: of one record a record's
gradient is a function, because `supervise` is called on it alone. What comes out of an update, metrics too, is made
from the noised sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax_privacy import clipping
from jaxtyping import Array, Bool, Key

from opd_jax import optim, sharding
from opd_jax.offload import fetched, returned
from opd_jax.types import Metrics, PyTree, Supervise, TrainState


def private(
    supervise: Supervise,
    optimizer: optax.GradientTransformation,
    *,
    clip_norm: float | int,
    noise_multiplier: float | int,
    expected_batch: float | int,
    rollouts: int = 1,
    micro_batch: int | None = None,
    ema_decay: float | int = 0,
    is_padding: Callable[[PyTree], Bool[Array, "B"]] = lambda rollout: rollout.group < 0,
    summed: Callable[..., PyTree] | None = None,
) -> Callable[[TrainState, PyTree, PyTree, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """DP-SGD with `optimizer` behind it, in place of `optim.dense`.

    Args:
        supervise: the paper, called on the rows of one record at a time; whatever it returns, NaN and infinity
            included, a record moves the sum by `clip_norm` at most. Its metrics and spread are dropped: they are not
            private.
        clip_norm: most a record's gradient may be, in the norm over all parameters.
        noise_multiplier: standard deviation of the noise over `clip_norm`.
        expected_batch: what the noised sum is divided by; not the records that came, whose number is private.
        rollouts: rows of a record, which lie next to each other; a record's loss is one, over all of them.
        micro_batch: records whose gradients are held at a time, to bound memory; it must divide a batch. None: all.
        ema_decay: as in `optim.dense`; an average of what is released anyway costs nothing.
        is_padding: rows that are no record, and count exactly nothing.
        summed: how the sum is made: `clipped_sum` (None), or `ghost_norms.clipped_sum`, which holds no gradient of a
            record.

    Returns: `update(state, rollout, labels, key) -> (state, metrics)`; `key` draws the noise and must be secret.
        Metrics: `noised_norm`, of the noised sum over `expected_batch`, and `noise_norm`, what it would be expected to
        be of noise alone. `state` is donated; what `offload.offloaded` has moved to the host's memory stays there.
    Raises: ValueError at tracing where the rows do not divide into records, or these into micro-batches.
    """
    settings = {"clip_norm": clip_norm, "noise_multiplier": noise_multiplier, "expected_batch": expected_batch}

    @sharding.InPlace
    def update(supervise, state, rollout, labels, key):
        rows = (rollout, labels)
        total = (summed or clipped_sum)(
            supervise, state.params, *rows, key, clip_norm, rollouts, micro_batch, is_padding(rollout)[::rollouts]
        )
        gradient, metrics = noised(total, jax.random.fold_in(key, 1), **settings)
        change, opt_state = optimizer.update(gradient, fetched(state.opt_state), state.params)
        params = optax.apply_updates(state.params, change)
        ema = optim.averaged(state, params, ema_decay)
        opt_state, ema = returned((opt_state, ema), (state.opt_state, state.ema))
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return Partial(update, supervise if isinstance(supervise, Partial) else Partial(supervise))


def clipped_sum(
    supervise: Supervise,
    params: PyTree,
    rollout: PyTree,
    labels: PyTree,
    key: Key[Array, ""],
    clip_norm: float | int,
    rollouts: int = 1,
    micro_batch: int | None = None,
    is_padding: Bool[Array, "R"] | None = None,
) -> PyTree:
    """Sum over records of the gradients of `loss_of_record`, each clipped to `clip_norm`; float32, no noise yet.

    Args:
        rollout, labels: leaves `[R * rollouts, ...]`, the rows of a record next to each other.
        is_padding: of each record.
    """
    records, count = as_records((rollout, labels), rollouts, micro_batch)
    own = clipping.clipped_grad(
        partial(loss_of_record, supervise),
        l2_clip_norm=clip_norm,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        microbatch_size=micro_batch,
        dtype=jnp.float32,
        prng_argnum=3,
        spmd_axis_name=sharding.mapped_axis(micro_batch or count),
    )
    return own(params, *records, key, is_padding_example=is_padding)


def as_records(rows: PyTree, rollouts: int, micro_batch: int | None) -> tuple[PyTree, int]:
    """Leaves `[R, rollouts, ...]`, and R. Raises: ValueError where R records do not divide into micro-batches."""
    records = jax.tree.map(lambda leaf: leaf.reshape(-1, rollouts, *leaf.shape[1:]), rows)
    count = jax.tree.leaves(records)[0].shape[0]
    if micro_batch is not None and count % micro_batch:
        raise ValueError(f"{count} records do not divide into micro-batches of {micro_batch}; choose a divisor")
    return records, count


def loss_of_record(supervise: Supervise, params: PyTree, rollout: PyTree, labels: PyTree, key: Any) -> Array:
    """`total / weight` over the rows of one record; 0 where nothing counts."""
    result = supervise(params, rollout, labels, key)
    weight = result.weight.sum()
    return result.total.sum() / jnp.where(weight > 0, weight, 1)


def noised(
    total: PyTree,
    key: Key[Array, ""],
    *,
    clip_norm: float | int,
    noise_multiplier: float | int,
    expected_batch: float | int,
) -> tuple[PyTree, Metrics]:
    """`(total + N(0, (noise_multiplier * clip_norm)^2)) / expected_batch`, and its norm beside that of noise alone."""
    leaves, tree = jax.tree.flatten(total)
    std = noise_multiplier * clip_norm
    draw = lambda i, leaf: leaf + std * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
    gradient = tree.unflatten([draw(i, leaf) / expected_batch for i, leaf in enumerate(leaves)])
    size = sum(leaf.size for leaf in leaves)
    return gradient, {
        "noised_norm": optax.tree.norm(gradient),
        "noise_norm": jnp.float32(std * size**0.5 / expected_batch),
    }
