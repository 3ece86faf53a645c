# SPDX-License-Identifier: Apache-2.0
"""Uni-OPD: Unifying On-Policy Distillation with a Dual-Perspective Recipe.

arXiv:2605.03677.

Sampled-token distillation with an opinion on outcomes: answers are verified, right and wrong ones are balanced, and
where the teacher scores the wrong answers to a prompt above the right ones, its advantages are moved apart.

| equation or section | function |
| --- | --- |
| `A_t = sg[log pi_T(a_t|s_t) - log pi_S(a_t|s_t)]`, tokens with `|A_t| >= 10` left out | `calibrate` |
| `G`, the length mean of `A` over an answer; its order, `m >= delta` (eqs. 9-11) | `margin_shift`, `outcomes.sides` |
| `lambda = delta - m` where violated: margin shift, margin mask | `margin_shift`, `margin_mask` |
| balancing, online and offline | `balancing.balance_online`, `balance_offline` |
| `max(-rho A, -clip(rho, 1 - 0.2, 1 + 0.28) A)` | `supervise` |

**What each part does to the gradient.** With nothing but the log-ratio it is that of `reverse_kl` at the visited
states, by the sampled token (unbiased while the sampler is the student and nothing is clipped or left out). The shift
adds a constant to all tokens of an answer: REINFORCE with the outcome as reward, switched on by a hinge on the group's
margin, so that the optimum is no longer the teacher. Balancing leaves records out by their outcome: the gradient is
then that of another mixture of answers. Token mask, clip and margin mask leave out or cut off terms, which is biased.

Group statistics are taken in `calibrate`, once, over the whole batch and before it is split into micro-batches or over
devices; `supervise` never looks from one record to another.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax.losses.balancing import balance_online
from opd_jax.losses.linear_divergence import Options, linear_divergence
from opd_jax.losses.outcomes import Sides, check_choice, length_mean, order_violation, sides
from opd_jax.losses.policy_gradient import clipped_surrogate
from opd_jax.losses.token_logp import following, preceding, token_logp
from opd_jax.types import PyTree, Supervise, Weighted, as_partial

Scalar = float | int | Float[Array, ""]
MODES = ("mean", "minmax")
DIRECTIONS = ("both", "correct_up", "incorrect_down")
MARGINS = ("shift", "mask", "none", "reinforce")

# ---- margins ---------------------------------------------------------------------------------------------------------


def margin_shift(
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    outcome: Float[Array, "B"],
    group: Int[Array, "B"],
    delta: Scalar,
    mode: str = "mean",
    direction: str = "both",
) -> Float[Array, "B T"]:
    """Advantages moved apart where a group's right answers do not lead its wrong ones by `delta` nats; eqs. 9-11.

    `gap = mean over right G - mean over wrong G` (`minmax`: `min over right - max over wrong`), `G` the length mean of
    an answer's counted advantages. Where `gap < delta`, `delta - gap` is added to every counted token of right answers
    (`correct_up`), taken from those of wrong ones (`incorrect_down`), or half and half (`both`): the gap is `delta`
    then. The paper's text runs have `mean` and `both`, its body describes `minmax` and `correct_up`.

    Args:
        advantages: nats; no gradient flows. What lies outside the mask is neither read nor changed.
        mask: counted tokens. A record without any is on neither side.
        outcome: 1 right, 0 wrong, NaN unknown.
        group: any numbers; records of a group may lie anywhere.

    Returns:
        | group | advantages |
        | --- | --- |
        | gap at least delta; all right, all wrong or all unknown | as given, bit by bit |
        | an unknown record of any group | as given |

    Raises:
        ValueError: unknown mode or direction.
    """
    score, found = length_mean(advantages, mask), sides(outcome, group, mask.any(1))
    shift = record_shift(score, found, delta, mode, direction)
    return jnp.where(mask & (shift != 0)[:, None], advantages + shift[:, None], advantages)


def record_shift(
    score: Float[Array, "B"], found: Sides, delta: Scalar, mode: str = "mean", direction: str = "both"
) -> Float[Array, "B"]:
    """What `margin_shift` adds to every counted token of a record, from the records' length means."""
    check_choice("mode", mode, MODES)
    check_choice("direction", direction, DIRECTIONS)
    missing = jnp.where(found.mixed, jnp.maximum(delta - _gap(score, found, mode), 0.0), 0.0)[found.number]
    up, down = {"both": (0.5, 0.5), "correct_up": (1.0, 0.0), "incorrect_down": (0.0, 1.0)}[direction]
    return jnp.where(found.right, up * missing, 0.0) - jnp.where(found.wrong, down * missing, 0.0)


def _gap(score: Float[Array, "B"], found: Sides, mode: str) -> Float[Array, "B"]:
    """By the number of the group; of no meaning where it is not mixed."""
    if mode == "mean":
        return found.mean(found.right, score) - found.mean(found.wrong, score)
    gap = found.lowest(found.right, score) - found.highest(found.wrong, score)
    return jnp.where(found.mixed, gap, 0.0)  # infinite where a side is empty


def margin_mask(
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    outcome: Float[Array, "B"],
    group: Int[Array, "B"],
    delta: Scalar,
    mode: str = "mean",
    retain: float = 0.25,
) -> Bool[Array, "B"]:
    """Which records stay, when the worst-scored are taken out of a group until its gap is `delta`: the alternative.

    Greedy: the right answer with the lowest `G` or the wrong one with the highest, whichever widens the gap more (the
    right one where both do alike), until the gap is reached, no removal widens it, or each side is down to
    `max(1, int(retain * n))` records. Arguments, unknown records and one-sided groups as in `margin_shift`.
    """
    check_choice("mode", mode, MODES)
    score, all_sides = length_mean(advantages, mask), sides(outcome, group, mask.any(1))
    least = lambda side: jnp.maximum(1, (retain * all_sides.count(side) + 1e-6).astype(jnp.int32))
    least_right, least_wrong = least(all_sides.right), least(all_sides.wrong)
    index = jnp.arange(score.shape[0])

    def among(kept):
        return Sides(all_sides.number, all_sides.right & kept, all_sides.wrong & kept)

    def worst(found, side, score):  # of every group: the first record with the lowest score
        at = side & (score == found.lowest(side, score)[found.number])
        first = jax.ops.segment_min(jnp.where(at, index, index.size), found.number, index.size)
        return index == first[found.number]

    def remove(carry):
        kept, _ = carry
        found = among(kept)
        gap = _gap(score, found, mode)
        gains, candidates = [], []
        for side, badness, floor in ((found.right, score, least_right), (found.wrong, -score, least_wrong)):
            candidate = worst(found, side, badness)
            widened = _gap(score, among(kept & ~candidate), mode) - gap
            gains.append(jnp.where(found.mixed & (gap < delta) & (found.count(side) > floor), widened, 0.0))
            candidates.append(candidate)
        right_first = gains[0] >= gains[1]
        out = jnp.where(right_first[found.number], *candidates) & (jnp.maximum(*gains) > 0)[found.number]
        return kept & ~out, out.any()

    return jax.lax.while_loop(lambda carry: carry[1], remove, (jnp.ones(score.shape, bool), jnp.bool_(True)))[0]


# ---- labels and loss -------------------------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """Settings of `calibrate`, static; the values of the paper's text runs.

    margin: `shift`; `mask`; `none`; or `reinforce`, a **control** the paper lacks: the mean of |shift| over the answers
        of mixed groups is given to all of them, whatever their margin: an outcome reward of that size, no hinge.
    """

    token_gap: float = 10.0  # tokens with |log pi_T - log pi_S| from here on are left out, not clamped
    ratio: float | None = 1.0  # of `balance_online`; None: off
    scope: str = "group"
    margin: str = "shift"
    delta: float = 0.4
    mode: str = "mean"
    direction: str = "both"
    retain: float = 0.25  # of the margin mask


class UniLabels(NamedTuple):
    """What teacher, verifier and group say of a rollout; no gradient."""

    teacher_logp: Float[Array, "B S"]
    proximal_logp: Float[Array, "B S"]  # the student's before this update; its ratio to it is clipped
    mask: Bool[Array, "B S"]  # tokens that count
    shift: Float[Array, "B"]  # added to the advantage of every one of them
    metrics: dict[str, Float[Array, "B"]]
    teacher_hidden: Float[Array, "B S E"] | None = None  # for an exact divergence
    teacher: Int[Array, "B"] | None = None  # number of the record's teacher, where there are several


def calibrate(
    student_logp: Float[Array, "B S"],
    teacher_logp: Float[Array, "B S"],
    response: Bool[Array, "B S"],
    outcome: Float[Array, "B"],
    group: Int[Array, "B"],
    key: Key[Array, ""],
    how: Calibration = Calibration(),  # noqa: B008  a tuple
) -> UniLabels:
    """Token mask, then balance, then margin, in this order, over a whole batch.

    So every statistic is of the tokens and records that are trained on; the released code takes margins over records
    that balancing has removed, and silently skips the balancing.

    Args:
        student_logp: of the sampled tokens, nats at temperature 1. Online this is `rollout.behavior_logp`; for stored
            rollouts, the present student's, since the advantage is.
        teacher_logp: of each record's own teacher. NaN where the teacher gave none: such a record does not count.
        response: sampled tokens; what lies outside is not read.
        key: of the balancing.

    Returns:
        Labels for `supervise`. Metrics per record: `log_ratio` (mean A), `order_violation`, `order_violation_after` (of
        mixed groups among what is trained on, with A and with what it has become), `mixed`, `balanced_out`,
        `margin_out`, `token_out` (shares left out), `unknown`, `right`, `shift` (|shift|), `teacher_failed`.

    Raises:
        ValueError: an unknown setting.
    """
    check_choice("margin", how.margin, MARGINS)
    given = jnp.where(response, ~jnp.isnan(teacher_logp), True).all(1)
    advantage = jnp.where(response & given[:, None], teacher_logp - student_logp, 0.0)
    near = jnp.abs(advantage) < how.token_gap
    keep = jnp.ones(given.shape, bool)
    if how.ratio is not None:
        keep = balance_online(jnp.where(given, outcome, jnp.nan), group, key, how.ratio, how.scope)
    mask = response & near & (keep & given)[:, None]
    score, found = length_mean(advantage, mask), sides(outcome, group, mask.any(1))

    shift, stays = jnp.zeros_like(score), jnp.ones(score.shape, bool)
    if how.margin in ("shift", "reinforce"):
        shift = record_shift(score, found, how.delta, how.mode, how.direction)
    if how.margin == "reinforce":
        on_a_side = found.mixed[found.number] & (found.right | found.wrong)
        size = jnp.abs(shift).sum() / jnp.maximum(on_a_side.sum(), 1)
        shift = jnp.where(on_a_side, jnp.where(found.right, size, -size), 0.0)
    if how.margin == "mask":
        stays = margin_mask(advantage, mask, outcome, group, how.delta, how.mode, how.retain)
    after = Sides(found.number, found.right & stays, found.wrong & stays)
    left = found.mixed[found.number] & (found.right | found.wrong)
    metrics = {
        "log_ratio": length_mean(advantage, response),
        "order_violation": order_violation(found, score) * left,
        "order_violation_after": order_violation(after, score + shift) * left,
        "mixed": left,
        "balanced_out": ~keep,
        "margin_out": ~stays,
        "token_out": length_mean((~near).astype(jnp.float32), response),
        "unknown": jnp.isnan(outcome),
        "right": outcome == 1,
        "shift": jnp.abs(shift),
        "teacher_failed": ~given,
    }
    zeroed = lambda logp: jnp.where(mask, logp, 0.0).astype(jnp.float32)
    labels = UniLabels(
        zeroed(teacher_logp),
        zeroed(student_logp),
        mask & stays[:, None],
        shift,
        {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()},
    )
    return jax.lax.stop_gradient(labels)


def supervise(
    apply_fn: Callable[..., Array],
    *,
    head_fn: Callable[[PyTree], Array] | None = None,
    divergence: str = "sampled",
    teacher_heads: Float[Array, "N E W"] | None = None,
    options: Options = Options(),  # noqa: B008  a tuple
    clip: float = 0.2,
    clip_high: float = 0.28,
    reduction: str = "record",
    block: int = 512,
) -> Supervise:
    """`sum_t -min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip_high) A_t)` over counted tokens, per record, in nats.

    `A_t = log pi_T - log pi_proximal + shift` without gradient, `rho_t = pi_S / pi_proximal`. With an exact divergence
    the log-ratio's part is replaced by what it estimates, `D(pi_S, pi_T)` over the vocabulary at every counted token,
    and the surrogate credits the shift alone: the teacher's part has no noise of the sampled token any more, the
    outcome's part stays REINFORCE. Of all divergences only `reverse_kl` has the sampled form's expected gradient.

    Args:
        apply_fn, head_fn, block: as of `token_logp`; an exact divergence needs `head_fn`.
        divergence: `sampled`, or one of `divergences.F_DIVERGENCES`.
        teacher_heads: of all teachers, for an exact divergence; a narrower teacher's rows and hidden states are padded
            with zeros. A record is compared with each of the `N` in turn, and its own is taken: `N` times the cost.
        options: of `linear_divergence`.
        reduction: `record`, the mean over a record's tokens, weight 1, as released: then the shift weighs an answer by
            +-delta/2 whatever its length; `token`: every token counts alike, weight its number of counted tokens.

    Returns:
        `supervise(student_params, rollout, UniLabels, key) -> Weighted`, a `Partial`; it uses no randomness. Metrics:
        those of the labels, `reverse_kl_k1`, `ratio` (exactly 1 before the first update up to rounding),
        `clip_fraction`, `logp_diff`, and, if exact, `reverse_kl`. Spread: `log_ratio`.

        | case | loss and gradient |
        | --- | --- |
        | teacher = student, no shift | exactly 0 |
        | teacher = student, a shift | that of REINFORCE with reward +-delta/2 |
        | no token counts | total and weight 0 |

    Raises:
        ValueError: unknown reduction, or an exact divergence without the heads of student and teachers.
    """
    check_choice("reduction", reduction, ("record", "token"))
    if divergence != "sampled" and (head_fn is None or teacher_heads is None):
        raise ValueError(f"divergence={divergence!r} compares the whole vocabulary: give head_fn and teacher_heads")
    if divergence == "sampled":
        loss, teacher_heads = functools.partial(_sampled, head_fn, block), None
    else:
        loss, teacher_heads = functools.partial(_exact, head_fn, divergence, options), jnp.asarray(teacher_heads)
    return Partial(functools.partial(_supervise, loss, clip, clip_high, reduction), as_partial(apply_fn), teacher_heads)


def _supervise(loss, clip, clip_high, reduction, apply_fn, heads, student_params, rollout, labels, key) -> Weighted:
    counted = labels.mask & (jnp.arange(rollout.tokens.shape[1]) > 0)[None]
    tokens = jnp.where(jnp.arange(rollout.tokens.shape[1])[None] < rollout.length[:, None], rollout.tokens, 0)
    dense, student, reward, more = loss(apply_fn, heads, student_params, tokens, counted, labels)
    ratio = jnp.exp(jnp.where(counted, student - labels.proximal_logp, 0.0))
    per_token = dense + clipped_surrogate(ratio, reward + labels.shift[:, None], clip, clip_high)
    total, weight = jnp.where(counted, per_token, 0.0).sum(1), counted.sum(1).astype(jnp.float32)
    mean = functools.partial(length_mean, mask=counted)
    outside = ((ratio < 1 - clip) | (ratio > 1 + clip_high)).astype(jnp.float32)
    metrics = labels.metrics | {
        "reverse_kl_k1": mean(student - labels.teacher_logp),
        "ratio": mean(ratio),
        "clip_fraction": mean(outside),
        "logp_diff": mean(jnp.abs(student - rollout.behavior_logp)),
        **{name: mean(value) for name, value in more.items()},
    }
    if reduction == "record":
        total, weight = total / jnp.maximum(weight, 1), (weight > 0).astype(jnp.float32)
    spread = {"log_ratio": jnp.where(counted, labels.teacher_logp - student, jnp.nan)}
    return Weighted(total, weight, *jax.lax.stop_gradient((metrics, spread)))


def _sampled(head_fn, block, apply_fn, heads, params, tokens, counted, labels):
    """Loss beside the surrogate, the student's log-probs, what the surrogate credits beside the shift, metrics."""
    student = token_logp(apply_fn, params, tokens, counted, head_fn=head_fn, block=block)
    return 0.0, student, labels.teacher_logp - labels.proximal_logp, {}


def _exact(head_fn, divergence, options, apply_fn, heads, params, tokens, counted, labels):
    hidden, head = apply_fn(params, tokens, None), head_fn(params)
    wanted, targets = following(counted), following(jnp.where(counted, tokens, 0))
    which = jnp.zeros_like(tokens[:, 0]) if labels.teacher is None else labels.teacher
    found = [
        linear_divergence(
            hidden, head, labels.teacher_hidden, teacher_head, divergence, targets,
            wanted & (which == n)[:, None], options,
        )
        for n, teacher_head in enumerate(heads)
    ]  # fmt: skip
    add = lambda name: preceding(sum(getattr(one, name) for one in found))  # 0 where another's
    nothing = jnp.zeros(counted.shape, jnp.float32)
    return add("divergence"), add("student_logp"), nothing, {"reverse_kl": add("reverse_kl")}
