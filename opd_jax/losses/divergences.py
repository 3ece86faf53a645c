# SPDX-License-Identifier: Apache-2.0
"""Divergences of two categorical distributions: student and teacher over the vocabulary, per token, in nats.

Every function takes logits `[..., V]` of both models and returns `[...]`, unreduced, in float32; gradients flow to the
student alone. With `p_s`, `p_t` the two softmaxes and `m = w p_t + (1 - w) p_s` a mixture in which the teacher has
weight `w`:

| kind | source | value |
| --- | --- | --- |
| `reverse_kl` | MiniLLM, arXiv:2306.08543 | `KL(p_s || p_t)` |
| `forward_kl` | Hinton et al., arXiv:1503.02531 | `KL(p_t || p_s)` |
| `generalized_jsd` | GKD, arXiv:2306.13649 | `b KL(p_t || m) + (1-b) KL(p_s || m)`, `w = b` |
| `scaled_jsd` | ours | the same divided by `b (1-b)` |
| `skewed_forward_kl` | DistiLLM, arXiv:2402.03898 | `KL(p_t || m)`, `w = a` |
| `skewed_reverse_kl` | DistiLLM | `KL(p_s || m)`, `w = 1 - a` |
| `adaptive_kl` | AKL, arXiv:2404.02657 | both KLs, weighted by the errors in the teacher's head and tail |

All but the last are sums over the vocabulary of a `term` of the two log-probabilities, with a `slope`, its derivative
by the student's; the gradient by the student's logits is `slope - p_s sum(slope)`. `pointwise` defines both, once, and
`linear_divergence` uses it too. Each term includes what sums to zero over the vocabulary, `p_t - p_s` or its like, so
that it is never negative, rounding in a log-sum-exp enters only squared, and equal logits give exactly 0.

What logits of -inf, a masked vocabulary, do (`e` one entry of a row):

| case | value | gradient |
| --- | --- | --- |
| both -inf at e | as if e did not exist | the same |
| `p_s(e) > 0`, teacher -inf at e | `reverse_kl`, `adaptive_kl`: +inf; others finite | that of the other entries |
| `p_t(e) > 0`, student -inf at e | `forward_kl`, `adaptive_kl`: +inf; others finite | finite |
| a whole row -inf in both | 0 | 0 |
| equal rows | exactly 0 | exactly 0 |
| NaN or +inf | NaN | NaN |

A finite logit far below the others has probability 0 in float32 and behaves as -inf with a finite log-probability.
Padding that may hold NaN is replaced by `where` before the call, on the logits, and after it.

Vocabularies of two sizes are cut to the tokenizer's before the call, `logits[..., :vocab_size]`. A `temperature`
divides both rows of logits; gradients then carry one factor `1 / temperature`, and Hinton's form of the loss is
`temperature**2` times the value.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

F_DIVERGENCES = "reverse_kl", "forward_kl", "generalized_jsd", "scaled_jsd", "skewed_forward_kl", "skewed_reverse_kl"
KINDS = (*F_DIVERGENCES, "adaptive_kl")
TRUNCATED = "teacher_topk", "student_topk", "union_topk"
BUDGETS = ("exact", *TRUNCATED, *(f"renormalized_{name}" for name in TRUNCATED))

Logits = Float[Array, "*tokens V"]
PerToken = Float[Array, "*tokens"]
Entries = Float[Array, "..."]
Few = Float[Array, "*tokens N"]
Number = float | int


# ---- divergences -----------------------------------------------------------------------------------------------------


def divergence(
    student_logits: Logits,
    teacher_logits: Float[Array, "*tokens W"],
    kind: str = "reverse_kl",
    parameter: Number | None = None,
    budget: str = "exact",
    k: int | None = None,
    temperature: Number = 1.0,
) -> PerToken:
    """Any divergence of this module at any budget, chosen by name.

    Args:
        student_logits: gradient flows, through the entries that a budget keeps and through its tail.
        teacher_logits: of the same shape; no gradient.
        kind: one of `KINDS`.
        parameter: beta of the JSDs, alpha of the skewed divergences, head mass of `adaptive_kl`; static.
        budget: one of `BUDGETS`, with its `k`, see `coarsen`. All budgets are the exact value at `k = V`.
        temperature: positive; divides both rows of logits, before the budget is taken.

    Returns:
        nats per token, float32, not reduced.

    Raises:
        ValueError: unknown kind or budget, a parameter or `k` out of range or missing, logits of different shapes.
    """
    student_logp, teacher_logp = coarsen(student_logits, teacher_logits, budget, k, temperature)
    if kind == "adaptive_kl":
        return _adaptive_kl(student_logp, teacher_logp, parameter)
    return _total(kind, parameter, student_logp, teacher_logp)


def reverse_kl(student_logits: Logits, teacher_logits: Logits, temperature: Number = 1.0) -> PerToken:
    """`KL(student || teacher) = sum_v p_s (log p_s - log p_t)` in nats. Gradient `p_s (log p_s - log p_t - KL)`."""
    return divergence(student_logits, teacher_logits, "reverse_kl", temperature=temperature)


def forward_kl(student_logits: Logits, teacher_logits: Logits, temperature: Number = 1.0) -> PerToken:
    """`KL(teacher || student) = sum_v p_t (log p_t - log p_s)` in nats. Gradient `p_s - p_t`."""
    return divergence(student_logits, teacher_logits, "forward_kl", temperature=temperature)


def generalized_jsd(
    student_logits: Logits, teacher_logits: Logits, beta: Number, temperature: Number = 1.0
) -> PerToken:
    """GKD's Jensen-Shannon divergence (arXiv:2306.13649) in nats; beta is the teacher's share of `m`.

    `beta KL(p_t || m) + (1 - beta) KL(p_s || m)`, `m = beta p_t + (1 - beta) p_s`, with GKD's limits, as in TRL:

    | beta | value |
    | --- | --- |
    | 0 | exactly `forward_kl` |
    | 1/2 | Jensen-Shannon divergence, at most `log 2` |
    | 1 | exactly `reverse_kl` |

    The formula itself vanishes towards both ends, as `beta forward_kl` and `(1 - beta) reverse_kl`, so the published
    family jumps there and beta 0.01 is a hundred times weaker than beta 0. `scaled_jsd` does neither.

    Raises: ValueError for beta outside `[0, 1]`.
    """
    return divergence(student_logits, teacher_logits, "generalized_jsd", beta, temperature=temperature)


def scaled_jsd(student_logits: Logits, teacher_logits: Logits, beta: Number, temperature: Number = 1.0) -> PerToken:
    """`generalized_jsd / (beta (1 - beta))`: from `forward_kl` at beta 0 to `reverse_kl` at 1, with no jump.

    Not in GKD: ours, so that values of beta compare at one learning rate and one clipping norm. Four times the
    Jensen-Shannon divergence at 1/2.

    Raises: ValueError for beta outside `[0, 1]`.
    """
    return divergence(student_logits, teacher_logits, "scaled_jsd", beta, temperature=temperature)


def skewed_forward_kl(
    student_logits: Logits, teacher_logits: Logits, alpha: Number, temperature: Number = 1.0
) -> PerToken:
    """`KL(p_t || alpha p_t + (1 - alpha) p_s)` in nats, at most `-log alpha`. DistiLLM (arXiv:2402.03898): alpha 0.1.

    Raises: ValueError for alpha outside `[0, 1)`; 0 is exactly `forward_kl`.
    """
    return divergence(student_logits, teacher_logits, "skewed_forward_kl", alpha, temperature=temperature)


def skewed_reverse_kl(
    student_logits: Logits, teacher_logits: Logits, alpha: Number, temperature: Number = 1.0
) -> PerToken:
    """`KL(p_s || alpha p_s + (1 - alpha) p_t)` in nats, at most `-log alpha`. DistiLLM (arXiv:2402.03898): alpha 0.1.

    Raises: ValueError for alpha outside `[0, 1)`; 0 is exactly `reverse_kl`.
    """
    return divergence(student_logits, teacher_logits, "skewed_reverse_kl", alpha, temperature=temperature)


def adaptive_kl(
    student_logits: Logits, teacher_logits: Logits, head_mass: Number, temperature: Number = 1.0
) -> PerToken:
    """AKL (arXiv:2404.02657): forward KL where the student errs in the teacher's head, reverse KL where in its tail.

    `(h forward_kl + r reverse_kl) / (h + r)`. The head is the teacher's most probable token and those after it while
    the cumulated probability is at most `head_mass` (mu, 0.5 in the paper); `h` and `r` are `sum |p_t - p_s|` over
    head and tail, per token. The weights carry no gradient, as released. Equal probabilities go by order of vocabulary.

    Raises: ValueError for head mass outside `[0, 1]`.
    """
    return divergence(student_logits, teacher_logits, "adaptive_kl", head_mass, temperature=temperature)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def coarsen(
    student_logits: Logits,
    teacher_logits: Float[Array, "*tokens W"],
    budget: str,
    k: int | None = None,
    temperature: Number = 1.0,
) -> tuple[Few, Few]:
    """Both distributions over the few tokens that a budget keeps, as log-probabilities that sum to one.

    | budget | N | entries |
    | --- | --- | --- |
    | `exact` | V | all |
    | `teacher_topk` | k + 1 | the teacher's k most probable tokens, and a tail: all others as one |
    | `student_topk` | k + 1 | the student's k, and a tail |
    | `union_topk` | 2k + 1 | both (a token of both is an entry once, its second place is empty), and a tail |
    | `renormalized_...` | without the 1 | the same without a tail, each distribution divided by what it keeps |

    With the tail a divergence is that of two coarser distributions: a true one, never above the exact value, which
    sees the mass that the student moves out of the kept tokens. Renormalized, it is blind to that mass and not bounded
    by the exact value: for comparison with code that has no tail. A truncated sum that is neither, which may be
    negative, is not offered. The choice of tokens carries no gradient. All are exact at `k = V`.

    Args:
        student_logits, teacher_logits: as in `divergence`.
        budget: one of `BUDGETS`; k: static, `1 <= k <= V`, unused by `exact`.

    Returns:
        `(student_logp, teacher_logp)`, float32, -inf where an entry is empty; they may be given to any function of
        this module as logits.

    Raises:
        ValueError: unknown budget, `k` out of range, logits of different shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {student_logits.shape} and teacher logits {teacher_logits.shape} differ: cut both to the "
            "tokenizer's vocabulary, logits[..., :vocab_size]"
        )
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}; choose one of {', '.join(BUDGETS)}")
    student_logp = log_probs(student_logits, temperature)
    teacher_logp = jax.lax.stop_gradient(log_probs(teacher_logits, temperature))
    if budget == "exact":
        return student_logp, teacher_logp
    vocabulary = student_logits.shape[-1]
    if k is None or not 1 <= k <= vocabulary:
        raise ValueError(f"k={k} with budget {budget!r}: give a number from 1 to the {vocabulary} tokens there are")
    ids, kept, new = _kept(student_logp, teacher_logp, budget.removeprefix("renormalized_"), k)
    few = tuple(jnp.where(new, jnp.take_along_axis(logp, ids, -1), -jnp.inf) for logp in (student_logp, teacher_logp))
    if budget.startswith("renormalized_"):
        return log_probs(few[0]), log_probs(few[1])
    tails = (_logsumexp(jnp.where(kept, -jnp.inf, logp)) for logp in (student_logp, teacher_logp))
    student_few, teacher_few = (jnp.concatenate(pair, -1) for pair in zip(few, tails))
    return student_few, teacher_few


def stored_topk(
    student_logits: Logits, ids: Int[Array, "*tokens K"], teacher_logp: Float[Array, "*tokens K"]
) -> tuple[Few, Few]:
    """`coarsen(..., "teacher_topk")` from what a store or a server keeps of the teacher: log-probs at a few ids.

    `reverse_kl(*stored_topk(student_logits, ids, teacher_logp))` and its like. At temperature 1 only: the tail of the
    teacher is not known at another.

    Args:
        student_logits: gradient flows.
        ids: distinct tokens; teacher_logp: their log-probabilities in nats among the *whole* vocabulary, no gradient.

    Returns:
        `(student_logp, teacher_logp)`, `N = K + 1` entries, the last one the tail; a teacher's tail that rounding makes
        negative is empty.
    """
    student_logp, teacher_logp = log_probs(student_logits), jax.lax.stop_gradient(teacher_logp.astype(jnp.float32))
    kept = _marked(student_logp, ids)
    rest = 1 - jnp.exp(teacher_logp).sum(-1, keepdims=True)
    teacher_tail = jnp.where(rest > 0, jnp.log(jnp.where(rest > 0, rest, 1.0)), -jnp.inf)
    student_tail = _logsumexp(jnp.where(kept, -jnp.inf, student_logp))
    student_few = jnp.concatenate([jnp.take_along_axis(student_logp, ids, -1), student_tail], -1)
    return student_few, jnp.concatenate([teacher_logp, teacher_tail], -1)


def _kept(
    student_logp: Logits, teacher_logp: Logits, budget: str, k: int
) -> tuple[Int[Array, "*tokens N"], Bool[Array, "*tokens V"], Bool[Array, "*tokens N"]]:
    """Ids of the entries; which tokens are among them; and which entries are a token's first."""
    top = lambda logp: jax.lax.top_k(jax.lax.stop_gradient(logp), k)[1]
    if budget != "union_topk":
        ids = top(teacher_logp if budget == "teacher_topk" else student_logp)
        return ids, _marked(student_logp, ids), jnp.ones(ids.shape, bool)
    first, second = top(student_logp), top(teacher_logp)
    new = ~jnp.take_along_axis(_marked(student_logp, first), second, -1)
    ids = jnp.concatenate([first, second], -1)
    return ids, _marked(student_logp, ids), jnp.concatenate([jnp.ones(first.shape, bool), new], -1)


def _marked(logp: Logits, ids: Int[Array, "*tokens N"]) -> Bool[Array, "*tokens V"]:
    return jnp.put_along_axis(jnp.zeros(logp.shape, bool), ids, True, -1, inplace=False)


# ---- sampled tokens --------------------------------------------------------------------------------------------------


def k1(student_logp: Entries, teacher_logp: Entries) -> Entries:
    """`log p_s - log p_t` of a token sampled from the student: unbiased for `reverse_kl`, of high variance, any sign.

    The estimators are Schulman's (joschu.net/blog/kl-approx.html). With `r = p_t / p_s` at a token drawn from `p_s`:

    | | value | its mean | direct derivative, mean | differentiate? |
    | --- | --- | --- | --- | --- |
    | `k1` | `-log r` | `reverse_kl` | 0: the teacher's term is a constant | no |
    | `k2` | `(log r)^2 / 2` | not a KL, near both when `r` is near 1 | gradient of `reverse_kl`, exactly | yes |
    | `k3` | `r - 1 - log r` | `reverse_kl`, never negative | gradient of `forward_kl` | yes, if that is wanted |

    So `k1` carries no gradient here. It is a cost: a policy gradient with the reward or advantage `-k1` descends
    `reverse_kl`. The means hold for tokens of the student itself: older ones need the ratio to the
    policy that drew them. With log-probabilities at another temperature they are those of that temperature.

    Args:
        student_logp, teacher_logp: log-probabilities of the sampled token in nats; no gradient to the teacher.

    Returns:
        float32, of the same shape; +inf where the teacher excludes the token.
    """
    return jax.lax.stop_gradient(-_sampled_log_ratio(student_logp, teacher_logp))


def k2(student_logp: Entries, teacher_logp: Entries) -> Entries:
    """`(log p_s - log p_t)^2 / 2`: differentiated directly, the unbiased gradient of `reverse_kl`. See `k1`.

    +inf, with an infinite gradient, where the teacher excludes the token.
    """
    return _sampled_log_ratio(student_logp, teacher_logp) ** 2 / 2


def k3(student_logp: Entries, teacher_logp: Entries) -> Entries:
    """`r - 1 - log r`, `r = p_t / p_s`: unbiased for `reverse_kl`; its gradient is that of `forward_kl`. See `k1`.

    +inf where the teacher excludes the token, with the gradient 1, and where it prefers it by more than 88 nats.
    """
    log_ratio = _sampled_log_ratio(student_logp, teacher_logp)
    return jnp.expm1(log_ratio) - log_ratio


def _sampled_log_ratio(student_logp: Entries, teacher_logp: Entries) -> Entries:
    """`log r`: teacher - student, in float32."""
    return jax.lax.stop_gradient(teacher_logp.astype(jnp.float32)) - student_logp.astype(jnp.float32)


# ---- the definitions -------------------------------------------------------------------------------------------------


def pointwise(kind: str, parameter: Number | None, student_logp: Entries, teacher_logp: Entries) -> tuple:
    """What one entry adds to a divergence, `term`, and the derivative of the sum by its `student_logp`, `slope`.

    Both are exactly 0 at equal arguments; the slope is finite where the term is not. Take what you need: under jit
    the other costs nothing.

    Args:
        kind: one of `F_DIVERGENCES`; parameter: beta or alpha, None for the two KLs.
        student_logp, teacher_logp: float32 log-probabilities, of one shape.

    Returns:
        `(term, slope)`, of that shape.

    Raises:
        ValueError: another kind, or a parameter out of range or missing.
    """
    kind, w = _canonical(kind, parameter)
    absent = jnp.isneginf(student_logp) & jnp.isneginf(teacher_logp)
    log_ratio = jnp.where(absent, 0.0, teacher_logp) - jnp.where(absent, 0.0, student_logp)
    p_s, p_t = jnp.exp(student_logp), jnp.exp(teacher_logp)
    if kind == "reverse_kl":
        return _excess(p_s, p_t, log_ratio), -times(p_s, jnp.where(jnp.isinf(log_ratio), 0.0, log_ratio))
    if kind == "forward_kl":
        return _excess(p_t, p_s, -log_ratio), -_difference(p_s, p_t, log_ratio)
    m = w * p_t + (1 - w) * p_s
    over_student, over_teacher = _mixture(log_ratio, w), _mixture(-log_ratio, 1 - w)  # log(m / p_s), log(m / p_t)
    if kind == "skewed_forward_kl":
        return _excess(p_t, m, over_teacher), -(1 - w) * times(p_s, jnp.expm1(-over_teacher))
    if kind == "skewed_reverse_kl":
        return _excess(p_s, m, over_student), times(p_s, w * jnp.expm1(-over_teacher) - over_student)
    scale = 1 / (w * (1 - w)) if kind == "scaled_jsd" else 1.0
    term = w * _excess(p_t, m, over_teacher) + (1 - w) * _excess(p_s, m, over_student)
    return scale * term, -scale * (1 - w) * times(p_s, over_student)


def _canonical(kind: str, parameter: Number | None) -> tuple[str, Number]:
    """The kind with `w`, the teacher's weight in the mixture; at the limits of a family, the KL that it is there."""
    if kind in ("reverse_kl", "forward_kl"):
        _check(kind, parameter, parameter is None, "it takes no parameter")
        return kind, 0.0
    if kind in ("generalized_jsd", "scaled_jsd"):
        _check(kind, parameter, parameter is not None and 0 <= parameter <= 1, "give beta from 0 to 1")
        return {0: ("forward_kl", 0.0), 1: ("reverse_kl", 0.0)}.get(parameter, (kind, float(parameter)))
    if kind in ("skewed_forward_kl", "skewed_reverse_kl"):
        _check(kind, parameter, parameter is not None and 0 <= parameter < 1, "give alpha from 0 to below 1")
        kind = kind if parameter > 0 else kind.removeprefix("skewed_")
        return kind, float(parameter if kind == "skewed_forward_kl" else 1 - parameter)
    raise ValueError(f"{kind!r} is no sum over the vocabulary; choose one of {', '.join(F_DIVERGENCES)}")


def _check(kind: str, parameter: Number | None, fits: bool, remedy: str) -> None:
    if not fits:
        raise ValueError(f"{kind} with parameter={parameter}: {remedy}")


def _mixture(log_ratio: Entries, w: float) -> Entries:
    """`log(m / q)` with `m = w p + (1 - w) q` and `log_ratio = log(p / q)`, 0 < w < 1: exactly 0 at `p = q`."""
    far = log_ratio > 30  # where 1 - w is lost beside w p / q
    near = jnp.log1p(w * jnp.expm1(jnp.where(far, 0.0, log_ratio)))
    return jnp.where(far, log_ratio + math.log(w), near)


def _excess(p: Entries, q: Entries, log_ratio: Entries) -> Entries:
    """What an entry adds to `KL(p || q)`: `p log(p / q) - p + q`, with `log_ratio = log(q / p)`."""
    return _difference(p, q, log_ratio) - times(p, log_ratio)


def _difference(p: Entries, q: Entries, log_ratio: Entries) -> Entries:
    """`q - p`, accurate where they are close: there, of the rounding in either, `expm1` keeps nothing."""
    near = log_ratio < 1
    return jnp.where(near, times(p, jnp.expm1(jnp.where(near, log_ratio, 0.0))), q - p)


def times(p: Entries, x: Entries) -> Entries:
    """`p x`, with `0 inf = 0`; NaN stays NaN."""
    return jnp.where(p == 0, 0.0, p * jnp.where(p == 0, 0.0, x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total(kind: str, parameter: Number | None, student_logp: Logits, teacher_logp: Logits) -> PerToken:
    """The sum of the terms; its derivative is made of slopes, with nothing left of rounding where all are 0."""
    term, _ = pointwise(kind, parameter, student_logp, teacher_logp)
    return jnp.maximum(term, 0.0).sum(-1)


@_total.defjvp
def _total_jvp(kind, parameter, primals, tangents):
    _, slope = pointwise(kind, parameter, *primals)
    return _total(kind, parameter, *primals), (slope * tangents[0]).sum(-1)


def _adaptive_kl(student_logp: Logits, teacher_logp: Logits, head_mass: Number | None) -> PerToken:
    valid = head_mass is not None and 0 <= head_mass <= 1
    _check("adaptive_kl", head_mass, valid, "give the head's mass, from 0 to 1")
    order = jnp.argsort(teacher_logp, axis=-1, descending=True)
    ordered = lambda logp: jnp.exp(jnp.take_along_axis(jax.lax.stop_gradient(logp), order, -1))
    p_s, p_t = ordered(student_logp), ordered(teacher_logp)
    head = (jnp.cumsum(p_t, -1) <= head_mass).at[..., 0].set(True)
    gap = jnp.abs(p_t - p_s)
    head_gap, tail_gap = jnp.where(head, gap, 0.0).sum(-1), jnp.where(head, 0.0, gap).sum(-1)
    gaps = head_gap + tail_gap
    share = jnp.where(gaps == 0, 0.5, head_gap / jnp.where(gaps == 0, 1.0, gaps))
    forward = _total("forward_kl", None, student_logp, teacher_logp)
    reverse = _total("reverse_kl", None, student_logp, teacher_logp)
    return times(share, forward) + times(1 - share, reverse)


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def log_probs(logits: Logits, temperature: Number = 1.0) -> Logits:
    """`log_softmax(logits / temperature)` in float32; a row of only -inf stays that, the distribution without mass."""
    logits = logits.astype(jnp.float32) / temperature
    total = _logsumexp(logits)
    return logits - jnp.where(jnp.isneginf(total), 0.0, total)


def _logsumexp(x: Float[Array, "*tokens V"]) -> Float[Array, "*tokens 1"]:
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    mass = jnp.exp(x - top).sum(-1, keepdims=True)
    return jnp.where(mass == 0, -jnp.inf, top + jnp.log(jnp.where(mass == 0, 1.0, mass)))
