# SPDX-License-Identifier: Apache-2.0
"""Dynamic sampling: a batch of episodes filled up with groups that have something to teach.

Where all episodes of an initial state end alike, none has an advantage over the others. Groups whose share of successes
is too low or too high give way to those of other initial states (DAPO, arXiv:2503.14476; of robots SimpleVLA-RL,
arXiv:2509.09674), as long as there are any: shapes stay, so nothing is compiled anew.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opd_jax import hosts
from opd_jax.types import EpisodeRollout


def informative(success: Float[Array, "B"], size: int, low: float | int, high: float | int) -> Bool[Array, "n"]:
    """By group: does its share of successes lie in `[low, high]`? Groups are `size` episodes side by side."""
    count = success.reshape(-1, size).sum(1)
    return (count >= low * size) & (count <= high * size)


def fill(
    rollout: EpisodeRollout, others: Iterator[EpisodeRollout], *, size: int, low: float | int, high: float | int
) -> EpisodeRollout:
    """`rollout` with informative groups of `others` in the place of its own that are not.

    Args:
        rollout: groups of `size` episodes side by side.
        others: as large, played when they are asked for; no more are than it takes to fill the batch.
        low, high: which groups stay, see `informative`.

    Returns:
        As many groups as in `rollout`, informative ones first, in the order of being played. Where there are too few,
        the earliest of the rest stay. `group` is numbered anew, `states` are dropped, and `played` of an episode has
        that of one that gave way added, so that its sum is of all that was played.
    """
    rollout = rollout._replace(states=None)
    full = lambda: bool(hosts.fetch(_full(rollout.success, size=size, low=low, high=high)))
    while not full() and (other := next(others, None)) is not None:
        merged = _merged(rollout, other._replace(states=None), size=size, low=low, high=high)
        rollout = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), merged, rollout)
    return rollout


@functools.partial(jax.jit, static_argnames=("size", "low", "high"))
def _full(success, *, size, low, high) -> Bool[Array, ""]:
    return informative(success, size, low, high).all()


@functools.partial(jax.jit, static_argnames=("size", "low", "high"))
def _merged(old: EpisodeRollout, new: EpisodeRollout, *, size, low, high) -> EpisodeRollout:
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), old, new)
    order = jnp.argsort(~informative(both.success, size, low, high), stable=True)
    kept, gone = jnp.split((order[:, None] * size + jnp.arange(size)[None]).reshape(-1), 2)
    taken = jax.tree.map(lambda leaf: leaf[kept], both)
    played = jax.tree.map(lambda leaf: leaf[kept] + leaf[gone], both.played)
    return taken._replace(group=jnp.arange(len(kept), dtype=old.group.dtype) // size, played=played)
