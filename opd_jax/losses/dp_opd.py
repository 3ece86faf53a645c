# SPDX-License-Identifier: Apache-2.0
"""DP-OPD: Differentially Private On-Policy Distillation for Language Models, arXiv:2604.04461.

| equation | function |
| --- | --- |
| sec. 3.2, eq. 1: `y ~ S_theta(. | x_i)` with probability lambda, else the record's own | `on_policy` |
| sec. 3.3, eq. 4: `l_i = mean_t D_beta(p_T, p_S)(. | x_i, y_<t)` over the continuation | `supervise` |
| `(1 - a) D_beta - a log p_S(y_t)` on the record's own continuation; ours | `supervise`, `own_weight` |
| clip, sum, noise | `opd_jax.dp_sgd.private` |

The paper's text is known in part: its equations at second hand, delta, clip norm and batch not at all. Nothing across
records enters: the mean is over a record's own tokens, and the draw of lambda looks at no data. The student's rollouts
are functions of one record and of randomness of its own, so they cost nothing beyond the clipped sum.

`D_beta` is GKD's generalized JSD (arXiv:2306.13649): beta 0 is `forward_kl` = KL(teacher || student), 1 `reverse_kl` =
KL(student || teacher). Between them it is the formula as written, which tends to 0 at both ends: under one clip norm
losses of different beta are of different size.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Key

from opd_jax.losses.linear_divergence import Options, linear_divergence
from opd_jax.types import PyTree, Supervise, Weighted, as_partial


class PrivateLabels(NamedTuple):
    """What the public teacher says of every token of a rollout, and whether its text is the record's; no gradient."""

    hidden: Float[Array, "B S E"]  # the teacher's, after its final norm; hidden[b, s] predicts tokens[b, s + 1]
    own: Bool[Array, "B"]  # True where the continuation is the record's own


def on_policy(key: Key[Array, ""], fraction: float | int) -> Bool[Array, ""]:
    """Whether a step is on the student's own continuations, with probability `fraction` (lambda); one draw for all."""
    return jax.random.bernoulli(key, fraction)


def divergence_of(beta: float | int) -> tuple[str, float | int | None]:
    """The name and parameter of `D_beta` for `linear_divergence`: its two ends are KLs.

    Raises:
        ValueError: a beta outside 0 to 1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta}: give 0, forward_kl, to 1, reverse_kl")
    return {0: ("forward_kl", None), 1: ("reverse_kl", None)}.get(beta, ("generalized_jsd", beta))


def supervise(
    hidden_fn: Callable[..., Array],
    head_fn: Callable[[PyTree], Array],
    teacher_head: Float[Array, "E W"],
    *,
    beta: float | int = 0,
    temperature: float | int = 1,
    own_weight: float | int = 0,
    train_head: bool = True,
    vocab_size: int | None = None,
) -> Supervise:
    """`sum_t D_beta(p_T, p_S)` over the continuation, in nats per record; the weight is its tokens.

    Args:
        hidden_fn: the student's, `hidden_fn(params, tokens[B, S], None) -> hidden [B, S, D]`, causal.
        head_fn: `head_fn(params) -> [D, V]`; frozen weights of a `Partial` enter compiled steps as arguments.
        teacher_head: enters compiled steps as an argument.
        beta: of the divergence; 0 is what the paper reports as best.
        temperature: divides the logits of both models in the divergence.
        own_weight: a; on the record's own text, `(1 - a) D_beta - a log p_S` (at temperature 1 only).
        train_head: False where the head is frozen, as under LoRA.
        vocab_size: columns from there on are padding.

    Returns:
        `supervise(student_params, rollout, PrivateLabels, key) -> Weighted`, a `Partial`, for `dp_sgd.private`, which
        divides each record's total by its own weight. No metrics: they would not be private.

        | case | loss and gradient |
        | --- | --- |
        | the teacher's states and head are the student's, `own_weight` 0 | exactly 0 |
        | prompt tokens | count nothing |
        | NaN in the teacher's states where no token counts, any id in padding | changes nothing |
        | no token counts | total and weight 0 |

    Raises:
        ValueError: beta or own_weight outside 0 to 1; an own_weight at another temperature than 1.
    """
    if not 0 <= own_weight <= 1:
        raise ValueError(f"own_weight={own_weight}: give 0 to 1")
    if own_weight and temperature != 1:
        raise ValueError(f"own_weight={own_weight} with temperature={temperature}: the text itself has temperature 1")
    kind, parameter = divergence_of(beta)
    options = Options(parameter=parameter, temperature=temperature, train_head=train_head, vocab_size=vocab_size)
    static = functools.partial(_supervise, kind, options, own_weight)
    return Partial(static, as_partial(hidden_fn), as_partial(head_fn), jnp.asarray(teacher_head))


def _supervise(kind, options, own_weight, hidden_fn, head_fn, teacher_head, student_params, rollout, labels, key):
    counted = rollout.response[:, 1:]  # hidden state s predicts token s + 1
    tokens = jnp.where(jnp.arange(rollout.tokens.shape[1])[None] < rollout.length[:, None], rollout.tokens, 0)
    found = linear_divergence(
        hidden_fn(student_params, tokens, None)[:, :-1],
        head_fn(student_params),
        labels.hidden[:, :-1],
        teacher_head,
        kind,
        jnp.where(counted, tokens[:, 1:], 0),
        counted,
        options,
    )
    share = jnp.where(labels.own, own_weight, 0.0)[:, None]
    each = (1 - share) * found.divergence - share * found.student_logp
    return Weighted(each.sum(1), counted.sum(1).astype(jnp.float32))
