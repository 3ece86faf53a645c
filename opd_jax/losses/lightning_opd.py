# SPDX-License-Identifier: Apache-2.0
"""Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline On-Policy Distillation.

arXiv:2604.13010.

The SFT'd student `pi_ref` answers once, the teacher scores the answers once, and the student is trained on that fixed
set by the log-ratio of each sampled token, `A_t = log pi_T(a_t|s_t) - log pi_S(a_t|s_t)`. The online form of the same
loss, on the student's own samples, is standard OPD with sampled tokens.

| equation | function |
| --- | --- |
| `A_t`, clipped to `[-tau, tau]` (eq. 2, alg. 1) | `supervise` |
| `grad J_off = E_ref[ sum_t sg(A_t) grad log pi_S ]` (eq. 4) | `supervise(objective="offline")` |
| `grad J_on`, the same under `pi_S` (eq. 3) | `supervise(objective="online")` |
| either with `rho_t = pi_S / pi_ref` per token (not in the paper) | `supervise(weighting=...)` |
| `(log pi_T - b) - log pi_S`, `b = m_tok / 2 + m_ctx / 2` (2.0, arXiv:2607.28449) | `residual_teacher_logp` |

The paper writes an update, not a loss. Because `sg(A) grad log pi_S = -grad(A^2 / 2)`, its offline update is exactly
gradient descent on `1/2 E_ref[sum_t A_t^2]`, a regression of log-probs on fixed data, and on the Huber loss of `A_t`
where the advantage is clipped. That is what `supervise` returns: a value to watch, to stop on and to test. Nothing in
it is a policy gradient any more: a constant added to `A` changes the optimum, so it is never whitened or centred.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from opd_jax.losses.outcomes import order_violation, sides
from opd_jax.losses.token_logp import token_logp
from opd_jax.types import PyTree, Supervise, Weighted

OBJECTIVES = ("offline", "online", "k1_direct")
WEIGHTINGS = ("unit", "reference", "sampling")


class LightningLabels(NamedTuple):
    """What is known of a rollout's tokens; no gradient. Log-probs are at temperature 1, whatever the sampler's was."""

    teacher_logp: Float[Array, "B S"]  # of tokens[b, s] given those before it, in nats; 0 where not `response`
    reference_logp: Float[Array, "B S"] | None = None  # of the SFT'd student; None: the rollout's behavior_logp
    outcome: Float[Array, "B"] | None = None  # 1 correct, 0 incorrect, NaN unknown; only for `order_violation`


def supervise(
    apply_fn: Callable[..., Array],
    *,
    head_fn: Callable[[PyTree], Array] | None = None,
    objective: str = "offline",
    weighting: str = "unit",
    clip: float = 10.0,
    max_ratio: float = 2.0,
    reduction: str = "token",
    block: int = 512,
) -> Supervise:
    """Sampled-token distillation: pulls `log pi_S` of the stored tokens to `log pi_T`, in nats; see the module's table.

    `total = sum_t rho_t l(A_t)` over the response, per record. `l` is `A^2 / 2` (Huber beyond `clip`) for `offline`.
    For `online` its value is `-A`, the k1 estimate of the reverse KL, and its gradient `-sg(clip(A)) grad log pi_S`:
    the same gradient as `offline`, of another expectation. It holds the visited states fixed (no reward-to-go), so at
    every state it is the gradient of `reverse_kl`, and not that of the KL of whole sequences.
    `rho_t` is 1, or `pi_S / pi_ref` without gradient, cut at `max_ratio`: with it the offline gradient is that of
    `reverse_kl` at the stored states, up to the cut. (Were `rho_t` differentiated, the loss would be `E_S[A^2 / 2]`.)
    The released code has no clip, divides each record by its length (`reduction="record"`), and scores the two arms at
    two temperatures; here every log-prob is at temperature 1.

    Args:
        apply_fn: `apply_fn(params, tokens[B, S], None) -> logits [B, S, V]`, causal. None are the segment ids: padding
            is on the right, so no token attends to it. With a `head_fn` it returns hidden states [B, S, D] instead.
        head_fn: `head_fn(params) -> [D, V]`; logits are then made `block` positions at a time and made again in the
            backward pass, so that [B, S, V] is never held.
        objective: `offline`; `online` (standard OPD); `k1_direct`, a **negative control**: `-A` differentiated, whose
            gradient `grad log pi_S` does not depend on the teacher.
        weighting: `unit` is the paper; `reference` is rho against `reference_logp`; `sampling` against
            `rollout.sampling_logp`, exact also for a sampler's temperature other than 1 (not for top-k or top-p, which
            never visit some actions), and the correction for several updates per rollout.
        clip: tau, in nats; `math.inf` for none.
        max_ratio: rho is cut here (biased, bounded variance).
        reduction: `token`, or `record`: mean over the record's tokens, weight 1.
        block: positions per piece, with `head_fn`.

    Returns:
        `supervise(student_params, rollout, LightningLabels, key) -> Weighted`, a `Partial`; it uses no randomness.
        `rollout` is a TokenRollout, or anything with its fields. Weight is the number of counted tokens. Metrics, means
        over them per record: `importance_ratio`, `pi_S / pi_ref` (1 at the start; in expectation 1 ever after if the
        rollouts are of `pi_ref` at temperature 1); `half_squared_advantage`, the objective of `offline` without its
        clip; `clip_fraction`; `reverse_kl_k1`, `-A`, an estimate of KL(student || teacher) while the student is the
        sampler; `logp_diff`, |student - behavior_logp|, rounding where strictly on-policy; `sampling_gap`,
        sampling_logp - reference_logp, an estimate of KL(sampler || reference), 0 for samples of the reference at
        temperature 1; `ratio_clip_fraction`, where weighted; and `order_violation`, where outcomes are known: 1 for a
        record whose group has, in this batch, a correct answer with a lower mean A than an incorrect one (a negative
        margin in Uni-OPD's terms; always 0 with one answer per prompt).
        Spread: `log_ratio`, A per token.

        | case | loss and gradient |
        | --- | --- |
        | student = teacher | exactly 0 (`k1_direct`: value 0) |
        | NaN in labels or log-probs outside the response, any id in padding | changes nothing |
        | a token at position 0 | has no predictor, never counts |
        | teacher_logp = -inf at a counted token | value infinite, gradient finite |
        | no token counts | total and weight 0 |

    Raises:
        ValueError: unknown objective, weighting or reduction; a clip, ratio or block that is not positive.
    """
    for name, value, choices in (
        ("objective", objective, OBJECTIVES),
        ("weighting", weighting, WEIGHTINGS),
        ("reduction", reduction, ("token", "record")),
    ):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}; choose {', '.join(choices)}")
    for name, value in (("clip", clip), ("max_ratio", max_ratio), ("block", block)):
        if not value > 0:
            raise ValueError(f"{name}={value}: must be positive")
    settings = _Settings(head_fn, objective, weighting, clip, max_ratio, reduction, block)
    return Partial(
        functools.partial(_supervise, settings), apply_fn if isinstance(apply_fn, Partial) else Partial(apply_fn)
    )


class _Settings(NamedTuple):
    head_fn: Callable[[PyTree], Array] | None
    objective: str
    weighting: str
    clip: float
    max_ratio: float
    reduction: str
    block: int


def _supervise(s: _Settings, apply_fn, student_params, rollout, labels: LightningLabels, key) -> Weighted:
    place = jnp.arange(rollout.tokens.shape[1])[None]
    counted = rollout.response & (place > 0)
    tokens = jnp.where(place < rollout.length[:, None], rollout.tokens, 0)  # padding may hold ids that no model knows
    read = lambda logp: jax.lax.stop_gradient(jnp.where(counted, logp, 0.0).astype(jnp.float32))
    teacher, behavior, sampling = map(read, (labels.teacher_logp, rollout.behavior_logp, rollout.sampling_logp))
    reference = behavior if labels.reference_logp is None else read(labels.reference_logp)
    student = token_logp(apply_fn, student_params, tokens, counted, head_fn=s.head_fn, block=s.block)

    advantage = teacher - student
    slope = jax.lax.stop_gradient(jnp.clip(advantage, -s.clip, s.clip))
    if s.objective == "offline":
        loss = slope * advantage - slope**2 / 2  # Huber: the largest line over all slopes, so d loss / dA = slope
    elif s.objective == "online":
        loss = jax.lax.stop_gradient(-advantage) - slope * (student - jax.lax.stop_gradient(student))
    else:
        loss = -advantage
    if s.weighting != "unit":
        ratio = jax.lax.stop_gradient(jnp.exp(student - (reference if s.weighting == "reference" else sampling)))
        loss = jnp.minimum(ratio, s.max_ratio) * loss

    count = counted.sum(1).astype(jnp.float32)
    mean = lambda a: jnp.where(counted, a, 0.0).sum(1) / jnp.maximum(count, 1)
    metrics = {
        "importance_ratio": mean(jnp.exp(student - reference)),
        "half_squared_advantage": mean(advantage**2 / 2),
        "clip_fraction": mean(jnp.abs(advantage) > s.clip),
        "reverse_kl_k1": mean(-advantage),
        "logp_diff": mean(jnp.abs(student - behavior)),
        "sampling_gap": mean(sampling - reference),
    }
    if s.weighting != "unit":
        metrics["ratio_clip_fraction"] = mean(ratio > s.max_ratio)
    if labels.outcome is not None:
        metrics["order_violation"] = order_violation(sides(labels.outcome, rollout.group), mean(advantage))
    total, weight = jnp.where(counted, loss, 0.0).sum(1), count
    if s.reduction == "record":
        total, weight = total / jnp.maximum(count, 1), (count > 0).astype(jnp.float32)
    spread = {"log_ratio": jnp.where(counted, advantage, jnp.nan)}
    return Weighted(total, weight, *jax.lax.stop_gradient((metrics, spread)))


def residual_teacher_logp(
    tokens: Int[np.ndarray, "N S"],
    teacher_logp: Float[np.ndarray, "N S"],
    reference_logp: Float[np.ndarray, "N S"],
    response: Bool[np.ndarray, "N S"],
    group: Int[np.ndarray, "N"],
    *,
    folds: int = 5,
    smoothing: float = 1.0,
    bins: tuple[int, int] = (10, 10),
) -> Float[np.ndarray, "N S"]:
    """`log pi_T - b` in nats: the teacher without what all text of its style shares (Lightning OPD 2.0, 2607.28449).

    For labels of a teacher that did not write the SFT data. `d = log pi_T - log pi_ref` is averaged by token id
    (`m_tok`) and by relative position x surprisal `-log pi_ref` (`m_ctx`), and `b = m_tok / 2 + m_ctx / 2` is taken
    off. Each response has weight 1 in all, shared by its tokens. A prompt's `b` is fitted on the other folds' prompts.
    What we read does not state the bins and the strength of the smoothing: they are ours (quantiles of the surprisal;
    each cell holds `smoothing` responses of the global mean besides its own).

    Args:
        tokens, response: as in a TokenRollout, of a whole store; teacher_logp, reference_logp as in LightningLabels.
        group: prompts; responses of one prompt share a fold.
        folds: K; at most the number of prompts is used.
        bins: of relative position and of surprisal.

    Returns:
        float32, 0 where not `response`: to be stored in place of `teacher_logp`.

        | case | result |
        | --- | --- |
        | teacher = reference + constant | the reference: no advantage at the start |
        | a token id that the other folds never saw | `m_tok` is their global mean |
        | NaN outside the response | changes nothing |

    Raises:
        ValueError: fewer than 2 prompts, since nothing is left to fit on.
    """
    prompts, prompt = np.unique(group, return_inverse=True)
    folds = min(folds, len(prompts))
    if folds < 2:
        raise ValueError(f"{len(prompts)} prompts in {folds} folds; cross-fitting needs at least 2 of each")
    record, where = np.nonzero(response)
    lengths = response.sum(1)
    ids, weight = tokens[record, where], 1.0 / lengths[record]
    surprisal = -reference_logp[record, where].astype(np.float64)
    d = teacher_logp[record, where].astype(np.float64) + surprisal
    order = np.cumsum(response, axis=1)[record, where] - 1  # place within the response
    position = order * bins[0] // lengths[record]
    fold = prompt[record] % folds

    baseline = np.zeros_like(d)
    for k in range(folds):
        fit, use = fold != k, fold == k
        edges = np.quantile(surprisal[fit], np.linspace(0, 1, bins[1] + 1)[1:-1])
        cell = position * bins[1] + np.searchsorted(edges, surprisal)
        for index in (ids, cell):
            baseline[use] += 0.5 * _smoothed_means(index, d, weight, fit, smoothing)[index[use]]
    out = np.zeros(tokens.shape, np.float32)
    out[record, where] = teacher_logp[record, where] - baseline
    return out


def _smoothed_means(index, d, weight, fit, smoothing) -> np.ndarray:
    """The mean of `d` per value of `index` over the tokens of `fit`, each drawn towards the mean of all."""
    overall = np.average(d[fit], weights=weight[fit])
    add = lambda a: np.bincount(index[fit], a[fit], minlength=index.max() + 1)
    return (add(weight * d) + smoothing * overall) / (add(weight) + smoothing)
