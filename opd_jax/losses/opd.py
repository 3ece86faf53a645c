# SPDX-License-Identifier: Apache-2.0
"""Standard on-policy distillation of language models: an exact divergence at every token that the student sampled.

On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (GKD), arXiv:2306.13649.

| equation | function |
| --- | --- |
| `E_{x ~ pi_S}[ sum_t D(pi_T, pi_S)(. | x_<t) ]`, states fixed (eq. 4) | `supervise` |
| `D`: KLs, generalized JSD and relatives | `linear_divergence`, from `divergences` |
| the same from the sampled token alone | `lightning_opd.supervise(objective="online")` |

The whole vocabulary is compared, so there is no noise of the sampled token: the gradient is that of the divergence at
the visited states, which are held fixed. The teacher's label is a hidden state per token, and the logits of neither
model are ever held. On the teacher's text instead of the student's this is off-policy distillation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from opd_jax.losses.linear_divergence import Options, linear_divergence
from opd_jax.losses.token_logp import following
from opd_jax.types import PyTree, Supervise, Weighted, as_partial


class TeacherStates(NamedTuple):
    """What the teacher says of a rollout; no gradient."""

    hidden: Float[Array, "B S E"]  # after its final norm; hidden[b, s] predicts tokens[b, s + 1]


def supervise(
    hidden_fn: Callable[..., Array],
    head_fn: Callable[[PyTree], Array],
    teacher_head: Float[Array, "E W"],
    *,
    divergence: str = "reverse_kl",
    options: Options = Options(),  # noqa: B008  a tuple
) -> Supervise:
    """`sum_t D(pi_S(. | x_<t), pi_T(. | x_<t))` over the response, in nats per record; the weight is its tokens.

    Args:
        hidden_fn: the student's, `hidden_fn(params, tokens[B, S], None) -> hidden [B, S, D]`, causal.
        head_fn: `head_fn(params) -> [D, V]`. Gradient flows unless `options.train_head` is false.
        teacher_head: enters compiled steps as an argument.
        divergence: `reverse_kl` = KL(student || teacher), or another of `divergences.F_DIVERGENCES`.
        options: parameter, temperature of both models, vocabulary and block, see `linear_divergence`.

    Returns:
        `supervise(student_params, rollout, TeacherStates, key) -> Weighted`, a `Partial`; it uses no randomness.
        Metrics, means over a record's tokens: `reverse_kl`, `forward_kl`, `student_entropy`, `teacher_entropy`;
        `log_ratio`, teacher - student log-probability of the sampled tokens, with its spread; and `logp_diff`,
        |student - behavior_logp|, rounding where strictly on-policy, where the rollout has it.

        | case | loss and gradient |
        | --- | --- |
        | the teacher's states and head are the student's | exactly 0 |
        | NaN in the teacher's states where no token counts, any id in padding | changes nothing |
        | no token counts | total and weight 0 |

    Raises:
        ValueError: an unknown divergence or a parameter that does not fit, at the first call.
    """
    return Partial(
        functools.partial(_supervise, head_fn, divergence, options), as_partial(hidden_fn), jnp.asarray(teacher_head)
    )


def _supervise(head_fn, divergence, options, hidden_fn, teacher_head, student_params, rollout, labels, key) -> Weighted:
    counted = following(rollout.response)  # hidden state s predicts token s + 1
    tokens = jnp.where(jnp.arange(rollout.tokens.shape[1])[None] < rollout.length[:, None], rollout.tokens, 0)
    found = linear_divergence(
        hidden_fn(student_params, tokens, None),
        head_fn(student_params),
        labels.hidden,
        teacher_head,
        divergence,
        jnp.where(counted, following(tokens), 0),
        counted,
        options,
    )
    count = counted.sum(1).astype(jnp.float32)
    mean = lambda a: jnp.where(counted, a, 0.0).sum(1) / jnp.maximum(count, 1)
    names = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")
    log_ratio = found.teacher_logp - found.student_logp
    metrics = {name: mean(getattr(found, name)) for name in names} | {"log_ratio": mean(log_ratio)}
    if options.temperature == 1:
        behavior = jnp.where(counted, following(rollout.behavior_logp), 0.0)
        metrics["logp_diff"] = mean(jnp.abs(found.student_logp - behavior))
    spread = {"log_ratio": jnp.where(counted, log_ratio, jnp.nan)}
    return Weighted(found.divergence.sum(1), count, *jax.lax.stop_gradient((metrics, spread)))
