# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: the log-loss of given text: the forward KL from its writer, up to a constant.

Pretrains the models of the worlds, starts students from their teacher's answers, and is the off-policy baseline of
sequence-level distillation (arXiv:1606.07947).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int

from opd_jax.losses.token_logp import token_logp
from opd_jax.types import PyTree, Supervise, Weighted, as_partial


class Text(NamedTuple):
    """Given text, as a rollout. Rows are right-padded, or packed with several segments."""

    tokens: Int[Array, "B S"]
    response: Bool[Array, "B S"]  # tokens to be learnt; never a segment's first
    segment_ids: Int[Array, "B S"] | None = None  # 1, 2, ... in contiguous runs, 0 is padding


def supervise(
    apply_fn: Callable[..., Array], *, head_fn: Callable[[PyTree], Array] | None = None, block: int = 512
) -> Supervise:
    """`-sum_t log pi_S(x_t | x_<t)` over the response, in nats per record; the weight is the number of its tokens.

    Args:
        apply_fn, head_fn, block: as of `token_logp`.

    Returns:
        `supervise(student_params, rollout, labels, key) -> Weighted`, a `Partial`. `rollout` is a `Text`, a
        TokenRollout or anything with `tokens` and `response`; labels and key are not used. Metric: `token_logp`, the
        mean over a record's tokens.

        | case | loss and gradient |
        | --- | --- |
        | any id where nothing is learnt and nothing learnt attends to it | changes nothing |
        | the first token of a row | has no predictor, never counts |
        | no token counts | total and weight 0 |
    """
    return Partial(functools.partial(_supervise, head_fn, block), as_partial(apply_fn))


def _supervise(head_fn, block, apply_fn, student_params, rollout, labels, key) -> Weighted:
    counted = rollout.response & (jnp.arange(rollout.tokens.shape[1]) > 0)[None]
    segments = getattr(rollout, "segment_ids", None)
    logp = token_logp(
        apply_fn, student_params, rollout.tokens, counted, segment_ids=segments, head_fn=head_fn, block=block
    )
    total, weight = -logp.sum(1), counted.sum(1).astype(jnp.float32)
    return Weighted(total, weight, {"token_logp": jax.lax.stop_gradient(-total / jnp.maximum(weight, 1))})
