# SPDX-License-Identifier: Apache-2.0
"""Balancing of Uni-OPD (arXiv:2605.03677): prompts by their difficulty before training, answers by outcome within it.

| section | function |
| --- | --- |
| online correctness-aware balancing | `balance_online` |
| offline difficulty-aware balancing | `balance_offline` |
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax.losses.outcomes import Sides, check_choice, sides

SCOPES = ("group", "batch")
SHAPES = ("u", "j")


def balance_online(
    outcome: Float[Array, "B"], group: Int[Array, "B"], key: Key[Array, ""], ratio: float = 1.0, scope: str = "group"
) -> Bool[Array, "B"]:
    """Which records stay so that right : wrong is `ratio` : 1: of the side that has too many, some go, at random.

    Args:
        outcome, group: as in `margin_shift`.
        ratio: 0 keeps only wrong answers and `inf` only right ones, where a group has both. In between a side that has
            records keeps at least one (the released code rounds down, and may empty it).
        scope: balance the answers to each prompt (`group`), or all of the batch (`batch`).

    Returns:
        False for what is to be left out, of the loss and of every margin. One-sided groups and unknown records stay.

    Raises:
        ValueError: negative ratio, unknown scope.
    """
    check_choice("scope", scope, SCOPES)
    if not ratio >= 0:
        raise ValueError(f"ratio={ratio}: right to wrong answers; give 0 or more, or inf")
    found = sides(outcome, group if scope == "group" else jnp.zeros_like(group))
    right, wrong = found.count(found.right), found.count(found.wrong)
    whole = lambda wanted: jnp.maximum((wanted + 1e-4).astype(jnp.int32), 1)  # 0.1 * 30 is 3
    if ratio == 0 or ratio == math.inf:
        keep_right, keep_wrong = (right * 0, wrong) if ratio == 0 else (right, wrong * 0)
    else:
        keep_right = jnp.minimum(right, whole(wrong * ratio))
        keep_wrong = jnp.where(right > keep_right, wrong, jnp.minimum(wrong, whole(right / ratio)))
    lot = jax.random.uniform(key, outcome.shape)
    surplus = (found.right & (_place(found, found.right, lot) >= keep_right[found.number])) | (
        found.wrong & (_place(found, found.wrong, lot) >= keep_wrong[found.number])
    )
    return ~(surplus & found.mixed[found.number])


def _place(found: Sides, side: Bool[Array, "B"], lot: Float[Array, "B"]) -> Int[Array, "B"]:
    """Place of a record, by its lot, among its group's records of a side."""
    ahead = (found.number[:, None] == found.number[None]) & side[None] & (lot[None] < lot[:, None])
    return ahead.sum(1)


class Balanced(NamedTuple):
    """A set of prompts in which those that teach are as many as the others."""

    prompts: list
    repeats: Int[np.ndarray, "N"]  # how often each of the prompts given stands in it, at least once
    factors: dict[int, int]  # by how often a prompt was solved


def balance_offline(
    prompts: Sequence[Any], solved_counts: Sequence[int], samples: int, shape: str = "u", cap: int = 4
) -> Balanced:
    """Upsamples prompts by how often the student itself solved them, for a flat histogram; never deletes one.

    A prompt solved `k` times is repeated `min(cap, ceil(most / n_k))` times, `n_k` prompts being solved `k` times and
    `most` the largest of all `n`. The paper gives no factor: the ceiling and the cap are ours.

    Args:
        prompts: any records, `N` of them.
        solved_counts: `[N]`, right answers of `samples`; -1 where the outcomes are unknown, which is repeated once.
        shape: of the histogram: `u`, many solved never and always: upsample 1..samples-1; `j`, mirrored, many solved
            never: upsample 1..samples.
        cap: the largest factor.

    Raises:
        ValueError: unknown shape, a count outside -1..samples, a cap below 1, or as many counts as prompts not given.
    """
    check_choice("shape", shape, SHAPES)
    counts = np.asarray(solved_counts, np.int64)
    if counts.shape != (len(prompts),):
        raise ValueError(f"{len(prompts)} prompts with counts {counts.shape}: give one count each")
    if counts.size and not -1 <= counts.min() <= counts.max() <= samples:
        raise ValueError(f"solved_counts {counts.min()}..{counts.max()}: of {samples} samples, or -1 for unknown")
    if cap < 1:
        raise ValueError(f"cap={cap}: the largest factor, at least 1")
    histogram = np.bincount(counts[counts >= 0], minlength=samples + 1)
    raised = range(1, samples if shape == "u" else samples + 1)
    factors = {k: min(cap, -(-int(histogram.max()) // int(histogram[k]))) for k in raised if histogram[k]}
    repeats = np.array([factors.get(int(k), 1) for k in counts], np.int64)
    return Balanced([prompt for prompt, n in zip(prompts, repeats) for _ in range(n)], repeats, factors)
