"""Updates: from a paper's per-record losses to new parameters."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Int, Key, Shaped

from opd_jax import sharding
from opd_jax.offload import fetched, returned
from opd_jax.types import Metrics, PyTree, Supervise, TrainState

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}  # of `Weighted.spread`, as NAME_p05 and so on; 0 of nothing


def adamw(
    learning_rate: float,
    *,
    warmup: int = 0,
    decay: tuple[int, int] | None = None,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm.

    Args:
        learning_rate: reached after `warmup` steps of linear increase.
        decay: `(total, last)`: linear decrease to zero over the last `last` of `total` steps; None: constant.
    """
    parts, ends = [optax.constant_schedule(learning_rate)], []
    if warmup:
        parts, ends = [optax.linear_schedule(0.0, learning_rate, warmup), *parts], [warmup]
    if decay:
        total, last = decay
        parts, ends = [*parts, optax.linear_schedule(learning_rate, 0.0, last)], [*ends, total - last]
    schedule = optax.join_schedules(parts, ends)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, b1=0.9, b2=b2, weight_decay=weight_decay)
    )


def schedule_mistake(steps: int, warmup: int, decay_steps: int) -> str:
    """What is wrong with a warm-up and a decay of `adamw` in so many steps, one line; "" where they fit."""
    least = warmup + decay_steps
    fits = not decay_steps or steps >= least
    return "" if fits else f"steps={steps}: give {least} or more, warmup + decay_steps, or lower these"


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0. The buffers are its own, because `dense` donates the state and must not destroy `params` elsewhere."""
    own = jax.tree.map(jnp.array, params)
    return TrainState(jnp.zeros((), jnp.int32), own, optimizer.init(own), jax.tree.map(jnp.array, params))


def dense(
    supervise: Supervise,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    updates: int = 1,
    ema_decay: float = 0.0,
    widths: tuple[int, ...] = (),
) -> Callable[[TrainState, PyTree, PyTree, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """The update of every method without privacy: gradient of `sum(total) / sum(weight)`, divided once.

    Totals and weights are added over records, micro-batches and devices (jit in the global view: no collective is
    spelled out), so neither the split into micro-batches nor the number of devices changes the result; every part sees
    the same key.

    Args:
        supervise: the paper. Made a `Partial`, its frozen weights are arguments of the compiled step.
        optimizer: any optax transformation.
        micro_batches: forward and backward over this many parts of the batch in turn, to bound memory.
        updates: optimiser steps per rollout, each on its share of the records (1: strictly on-policy).
        ema_decay: weight of the past in the average that is evaluated; warmed up as (1 + step) / (10 + step). 0: none.
        widths: of rollouts with tokens `[B, S]`: each micro-batch has records of like length, and is computed at the
            smallest of these widths that holds them all, or at S. So padding is not paid for, and nothing is compiled
            anew. For losses without randomness: a record's place in the batch changes. (): all at S.

    Returns: `update(state, rollout, labels, key) -> (state, metrics)`. `state` is donated, and the new one lies where
    it did, on a mesh and in the host's memory (`offload.offloaded`).
    Raises: ValueError at tracing where the records do not divide into `updates * micro_batches`.
    """

    def one(supervise, state: TrainState, rollout, labels, key):
        def loss(params, part):
            result = supervise(params, *part, key)
            counts = {name: value.sum() for name, value in result.metrics.items()}
            return result.total.sum(), (result.weight.sum(), counts, jnp.float32(result.weight.size), result.spread)

        contribution = partial(_contribution, loss, state.params)
        if widths:
            contribution = at_own_width(contribution, widths, rollout.tokens.shape[1])

        def accumulate(carry, part):
            added, spread = contribution(part)
            return jax.tree.map(jnp.add, carry, added), spread

        whole = rollout, labels
        parts = split_by_length(whole, rollout.length, micro_batches) if widths else split(whole, micro_batches)
        shapes, _ = jax.eval_shape(contribution, jax.tree.map(lambda x: x[0], parts))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (gradient, total, weight, sums, records), spread = jax.lax.scan(accumulate, zero, parts)
        weight = jnp.maximum(weight, 1e-12)
        gradient = jax.tree.map(lambda g: g / weight.astype(g.dtype), gradient)
        change, opt_state = optimizer.update(gradient, fetched(state.opt_state), state.params)
        params = optax.apply_updates(state.params, change)
        ema = averaged(state, params, ema_decay)
        opt_state, ema = returned((opt_state, ema), (state.opt_state, state.ema))
        metrics = {
            "loss": total / weight,
            "weight": weight,
            "gradient_norm": optax.tree.norm(gradient),
        } | {name: value / records for name, value in sums.items()}
        for name, values in spread.items():
            quantiles = jnp.nanquantile(values, jnp.array(tuple(QUANTILES.values())))
            metrics |= {f"{name}_{suffix}": jnp.nan_to_num(value) for suffix, value in zip(QUANTILES, quantiles)}
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    @sharding.InPlace
    def update(supervise, state, rollout, labels, key):
        def step(state, part):
            return one(supervise, state, *part, key)

        state, metrics = jax.lax.scan(step, state, split((rollout, labels), updates))
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    return Partial(update, supervise if isinstance(supervise, Partial) else Partial(supervise))


def averaged(state: TrainState, params: PyTree, ema_decay: float | int) -> PyTree:
    """The moving average after a step to `params`; the weight of the past is warmed up as (1 + step) / (10 + step)."""
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    past = fetched(state.ema)
    return jax.tree.map(lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), past, params)


def _contribution(loss, params, part):
    """What one micro-batch adds up to (gradient, total and the sums beside it), and what it does not: the spread."""
    (total, (*sums, spread)), gradient = jax.value_and_grad(loss, has_aux=True)(params, part)
    return (gradient, total, *sums), spread


def split(tree: PyTree, parts: int) -> PyTree:
    """`[B, ...]` leaves to `[parts, B / parts, ...]`, record i going to part i % parts.

    Interleaved because `reshape(parts, B // parts)` of a sharded batch would gather it on every device.
    """

    def leaf(x: Shaped[Array, "B *rest"]):
        if x.shape[0] % parts:
            raise ValueError(f"{x.shape[0]} records do not divide into {parts} parts; choose a multiple of {parts}")
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(leaf, tree)


def in_parts(function: Callable[[PyTree], PyTree], tree: PyTree, parts: int) -> PyTree:
    """`function(tree)` of records, in `parts` one after the other, to bound memory; records stay in their order."""
    if parts == 1:
        return function(tree)
    whole = lambda y: y.swapaxes(0, 1).reshape(-1, *y.shape[2:])
    return jax.tree.map(whole, jax.lax.map(function, split(tree, parts)))


def split_by_length(tree: PyTree, length: Int[Array, "B"], parts: int) -> PyTree:
    """As `split`, but the records of a part are of like length: the first has the shortest of every device, and so on.

    Raises: ValueError where the records of a device do not divide into parts.
    """
    devices = sharding.record_parts()
    if len(length) % (devices * parts):
        raise ValueError(f"{len(length)} records do not divide into {parts} parts on each of {devices} devices")
    order = jnp.argsort(length.reshape(devices, -1), axis=1)

    def leaf(x: Shaped[Array, "B *rest"]):
        own = x.reshape(*order.shape, *x.shape[1:])
        own = jax.vmap(lambda x, order: x[order])(own, order)
        own = own.reshape(devices, parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return own.reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(leaf, tree)


def at_own_width(contribution, widths: tuple[int, ...], most: int):
    """`contribution(part)` without the padding that all of the part's records have.

    It is differentiated within each branch: outside, all branches' residuals would be kept. What has `most` entries
    along the second axis is taken to be along the tokens; spread is NaN where it was cut off.
    """
    sizes = (*sorted(width for width in set(widths) if width < most), most)

    def at(width: int):
        cut = lambda x: x[:, :width] if x.ndim > 1 and x.shape[1] == most else x
        pad = lambda x: jnp.pad(x, ((0, 0), (0, most - width)), constant_values=jnp.nan) if x.ndim > 1 else x

        def branch(part):
            added, spread = contribution(jax.tree.map(cut, part))
            return added, jax.tree.map(pad, spread)

        return branch

    def smallest(part):
        too_narrow = part[0].length.max() > jnp.array(sizes[:-1], jnp.int32)
        return jax.lax.switch(too_narrow.sum(), [at(width) for width in sizes], part)

    return smallest
