# SPDX-License-Identifier: Apache-2.0
"""What a verifier says about the answers to one prompt, taken together: who is right, and does the teacher agree?

An outcome is 1 (right), 0 (wrong) or NaN (unknown: the verifier failed, or there is nothing to verify against). Unknown
is neither: such a record is on no side, and its group is `mixed` only if others make it so. Groups may have any sizes
and any numbers as names, and their records may lie anywhere in the batch, on any device: every function is a pure
reduction over the global batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Sides(NamedTuple):
    """The records of every group, right and wrong ones apart."""

    number: Int[Array, "B"]  # of a record's group, in 0..B-1
    right: Bool[Array, "B"]
    wrong: Bool[Array, "B"]

    def count(self, side: Bool[Array, "B"]) -> Int[Array, "B"]:
        """Records of a side, by the number of the group."""
        return jax.ops.segment_sum(side.astype(jnp.int32), self.number, side.shape[0])

    @property
    def mixed(self) -> Bool[Array, "B"]:
        """By the number of the group: does it have right and wrong answers?"""
        return (self.count(self.right) > 0) & (self.count(self.wrong) > 0)

    def mean(self, side: Bool[Array, "B"], score: Float[Array, "B"]) -> Float[Array, "B"]:
        total = jax.ops.segment_sum(jnp.where(side, score, 0.0), self.number, side.shape[0])
        return total / jnp.maximum(self.count(side), 1)

    def lowest(self, side: Bool[Array, "B"], score: Float[Array, "B"]) -> Float[Array, "B"]:
        return jax.ops.segment_min(jnp.where(side, score, jnp.inf), self.number, side.shape[0])

    def highest(self, side: Bool[Array, "B"], score: Float[Array, "B"]) -> Float[Array, "B"]:
        return -self.lowest(side, -score)


def sides(outcome: Float[Array, "B"], group: Int[Array, "B"], counts: Bool[Array, "B"] | None = None) -> Sides:
    """Args: counts: records that take part; all, unless given."""
    number = jnp.unique(group, return_inverse=True, size=group.shape[0])[1].reshape(-1)
    taken = True if counts is None else counts
    return Sides(number, (outcome == 1) & taken, (outcome == 0) & taken)


def length_mean(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Mean over the counted tokens of a record, 0 where there are none; what lies outside the mask is never read."""
    return jnp.where(mask, values, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)


def order_violation(found: Sides, score: Float[Array, "B"]) -> Float[Array, "B"]:
    """1 for the records of a group in which some right answer scores lower than some wrong one, else 0."""
    least_right, best_wrong = found.lowest(found.right, score), found.highest(found.wrong, score)
    return (found.mixed & (least_right < best_wrong))[found.number].astype(jnp.float32)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises: ValueError naming the setting, its value and the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose {', '.join(choices)}")
