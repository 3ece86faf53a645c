# SPDX-License-Identifier: Apache-2.0
"""VLA-OPD: Bridging Offline SFT and Online RL for Vision-Language-Action Models via On-Policy Distillation.
arXiv:2603.26666.

The student acts; at every observation that it comes to, the teacher says how it would have acted.

| equation of the paper | function |
| --- | --- |
| objective: `max E_{s ~ d_S} -KL(pi_S(. | s) || pi_T(. | s))` | `supervise`, `reverse_kl`: the method |
| eq. 6, 7: reward `-sg(log pi_S(a) - log pi_T(a))` of the sampled token | `supervise`, `sampled` |
| ablation, `KL(pi_T || pi_S)` | `supervise`, `forward_kl` |
| ablation, `-log pi_S(argmax pi_T)` | `supervise`, `hard_cross_entropy` |
| distill, then GRPO from the sparse reward of success | `grpo` |
| the same objective for flow-matching policies; ours | `supervise_flow` |

Tokens of a chunk are decoded in parallel, so given the observation they are independent, and the divergence of chunks
is exactly the sum of the divergences of tokens: over all bins there is nothing to sample, and eq. 7 only adds noise.
No ratio, no baseline, no whitening: normalising the log-ratio would remove what the teacher says.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from opd_jax.losses import gaussians
from opd_jax.losses.divergences import divergence
from opd_jax.losses.policy_gradient import RewardLabels, clipped_surrogate
from opd_jax.types import EpisodeRollout, PathLabels, PyTree, Supervise, Weighted, as_partial

OBJECTIVES = ("reverse_kl", "forward_kl", "hard_cross_entropy", "sampled")


def supervise(
    policy_fn: Callable[[PyTree, PyTree], Array],
    objective: str = "reverse_kl",
    *,
    student_temperature: float | int = 1,
    teacher_temperature: float | int = 1,
    acting_temperature: float | int | None = None,
) -> Supervise:
    """The divergence from the teacher, summed over the action tokens that were executed, in nats per episode.

    Args:
        policy_fn: `policy_fn(params, observation) -> logits [N, H, A, K]` of N observations, leaves `[N, ...]`.
        objective: one of `OBJECTIVES`; `reverse_kl` is the method. `sampled` has its expected gradient at the visited
            states, while the rollout is the student's own at `student_temperature`.
        student_temperature, teacher_temperature: divide the logits. Where they differ, the target is another policy
            than the teacher.
        acting_temperature: at which the student drew the rollout's tokens; None: it did not draw them.

    Returns:
        `supervise(student_params, EpisodeRollout of ActionTokens, ActionLabels, key) -> Weighted`, a `Partial`; no
        randomness. Weight is the number of counted tokens. Metrics, means over them: `reverse_kl`, `student_entropy`,
        `teacher_entropy` in nats, `agreement` of the two modes, both values of `gradient_moments`, whatever the
        objective; of the rollout's tokens `log_ratio`, teacher - student, with its spread, and, where it is known how
        they were drawn, `logp_diff`, by how much the student's log-probability is off the sampler's: rounding, before
        the first update; and `success` of the episode.

        | case | loss and gradient |
        | --- | --- |
        | student logits = teacher logits at one temperature | exactly 0, but for `hard_cross_entropy` |
        | after the end, settling, chunk steps not executed | count nothing; NaN there changes nothing |
        | no token counts | total and weight 0 |

    Raises:
        ValueError: an unknown objective; at the call, labels of another shape than the student's logits.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    static = functools.partial(_supervise, objective, student_temperature, teacher_temperature, acting_temperature)
    return Partial(static, as_partial(policy_fn))


def _supervise(
    objective, student_temperature, teacher_temperature, acting_temperature, policy_fn, student_params, rollout, labels,
    key,
):  # fmt: skip
    counted = _tokens_counted(rollout)
    tokens = jnp.where(counted, rollout.drawn.tokens, 0)
    student = _logits(policy_fn, student_params, rollout, counted) * (1 / student_temperature)
    if labels.logits.shape != student.shape:
        raise ValueError(f"the teacher's logits {labels.logits.shape} are not of the student's shape {student.shape}")
    teacher = jax.lax.stop_gradient(jnp.where(counted[..., None], labels.logits, 0)) * (1 / teacher_temperature)
    reverse_kl = divergence(student, teacher, "reverse_kl")
    student_logp, teacher_logp = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (student, teacher))
    best, own = jnp.argmax(teacher, -1), _at(student_logp, tokens)
    log_ratio = _at(teacher_logp, tokens) - own
    if objective == "hard_cross_entropy":
        each = -_at(student_logp, best)
    elif objective == "sampled":
        each = jax.lax.stop_gradient(-log_ratio) * own
    else:
        each = reverse_kl if objective == "reverse_kl" else divergence(student, teacher, objective)
    metrics = {
        "reverse_kl": reverse_kl,
        "student_entropy": _entropy(student_logp),
        "teacher_entropy": _entropy(teacher_logp),
        "agreement": (jnp.argmax(student, -1) == best).astype(jnp.float32),
        "log_ratio": log_ratio,
    } | gradient_moments(student_logp, teacher_logp)
    if acting_temperature is not None:
        acting = jax.nn.log_softmax(student.astype(jnp.float32) * (student_temperature / acting_temperature))
        metrics["logp_diff"] = jnp.abs(_at(acting, tokens) - rollout.drawn.behavior_logp)
    metrics = {name: _mean(value, counted) for name, value in metrics.items()} | {"success": rollout.success}
    spread = {"log_ratio": jnp.where(counted, log_ratio, jnp.nan).reshape(len(counted), -1)}
    weight = _sum(jnp.ones_like(each), counted)
    return Weighted(_sum(each, counted), weight, *jax.lax.stop_gradient((metrics, spread)))


def gradient_moments(
    student_logp: Float[Array, "*n K"], teacher_logp: Float[Array, "*n K"]
) -> dict[str, Float[Array, "*n"]]:
    """What sampling adds to the gradient of the reverse KL of a token, by the student's logits.

    With `r = log pi_S - log pi_T` the exact gradient is `g = pi_S (r - KL)`, that of a sampled token a (eq. 6, 7)
    `r_a (e_a - pi_S)`, of mean g. Both values are exact, sums over bins.

    Returns:
        `exact_gradient_square`: `|g|^2`. `sampled_gradient_variance`: `E |r_a (e_a - pi_S) - g|^2`, of one sample.
        Both are 0 where the two are equal; where the teacher excludes what the student may do, both are infinite.
    """
    p, both = jnp.exp(student_logp), (student_logp > -jnp.inf) & (teacher_logp > -jnp.inf)
    r = jnp.where(both, jnp.where(both, student_logp, 0) - jnp.where(both, teacher_logp, 0), 0)
    exact = jnp.square(p * (r - (p * r).sum(-1, keepdims=True))).sum(-1)
    second = (p * jnp.square(r) * (1 - 2 * p + jnp.square(p).sum(-1, keepdims=True))).sum(-1)
    excluded = ((p > 0) & (teacher_logp == -jnp.inf)).any(-1)
    values = {"exact_gradient_square": exact, "sampled_gradient_variance": jnp.maximum(second - exact, 0)}
    return {name: jnp.where(excluded, jnp.inf, value) for name, value in values.items()}


def grpo(policy_fn: Callable[[PyTree, PyTree], Array], *, clip: float = 0.2, clip_high: float = 0.28) -> Supervise:
    """`sum -min(rho A, clip(rho, 1 - clip, 1 + clip_high) A)` over the action tokens that were executed, per episode.

    SimpleVLA-RL (arXiv:2509.09674), without a KL: `rho = pi_S / pi_behavior` of the sampled token and the advantage of
    its episode, from success alone.

    Args:
        policy_fn: as of `supervise`, its logits divided by the temperature at which it acted.
        clip, clip_high: how far below and above 1 the ratio is credited.

    Returns:
        `supervise(student_params, EpisodeRollout of ActionTokens, RewardLabels, key) -> Weighted`. Metrics, means over
        counted tokens: `ratio` (1 before the first update, up to rounding), `clip_fraction`, `student_entropy`; and
        `success`.
    """
    return Partial(functools.partial(_grpo, clip, clip_high), as_partial(policy_fn))


def _grpo(clip, clip_high, policy_fn, student_params, rollout, labels: RewardLabels, key) -> Weighted:
    counted = _tokens_counted(rollout)
    logp = jax.nn.log_softmax(_logits(policy_fn, student_params, rollout, counted).astype(jnp.float32))
    own = _at(logp, jnp.where(counted, rollout.drawn.tokens, 0))
    ratio = jnp.exp(own - jax.lax.stop_gradient(jnp.where(counted, rollout.drawn.behavior_logp, own)))
    advantage = jnp.broadcast_to(labels.advantage[:, None, None, None], ratio.shape)
    loss = clipped_surrogate(ratio, advantage, clip, clip_high)
    metrics = {
        "ratio": ratio,
        "clip_fraction": ((ratio < 1 - clip) | (ratio > 1 + clip_high)).astype(jnp.float32),
        "student_entropy": _entropy(logp),
    }
    metrics = {name: _mean(value, counted) for name, value in metrics.items()} | {"success": rollout.success}
    return Weighted(_sum(loss, counted), _sum(jnp.ones_like(loss), counted), jax.lax.stop_gradient(metrics))


def supervise_flow(
    velocity_fn: Callable[[PyTree, PyTree, Array, Array], Array],
    *,
    kind: str = "sde",
    weighting: str = "kl",
    skip_last: bool = True,
    normalize: bool = True,
) -> Supervise:
    """The same for a flow-matching action head: the reverse KL of the transitions that drew each chunk, per episode.

    `sum_t w_t (v_S - v_T)^2` over the counted elements of a chunk: Flow-OPD's loss (`flow_opd.supervise`), with an
    observation for a prompt and the chunk for an image. Valid for pi0-type policies, whose transitions are these.

    Args:
        velocity_fn: `velocity_fn(params, observation, actions [N, H, A], t [N]) -> velocity [N, H, A]`.
        kind, weighting: of the sampler and of the step, see `gaussians.step_weights`.
        skip_last: leave out the last step, whose weight is extreme.
        normalize: weights average 1 over the counted steps; False keeps nats.

    Returns:
        `supervise(student_params, EpisodeRollout of ActionPaths, PathLabels, key) -> Weighted`. Weight is the number of
        counted elements times steps. Metrics: `reverse_kl`, nats per counted element of a chunk, summed over steps;
        `velocity_error`, the mean square; `success`. Equal velocities give exactly 0; NaN where nothing counts changes
        nothing.
    """
    return Partial(functools.partial(_flow, kind, weighting, skip_last, normalize), as_partial(velocity_fn))


def _flow(kind, weighting, skip_last, normalize, velocity_fn, student_params, rollout, labels: PathLabels, key):
    counted, paths = rollout.counted[:, :, None, :, None], rollout.drawn  # [B T 1 H 1]
    times, levels = paths.times[0, 0], paths.levels[0, 0]
    steps = len(levels)
    kept = jnp.arange(steps) < steps - int(skip_last)
    kl = gaussians.step_weights("kl", kind, times, levels)
    weights = gaussians.step_weights(weighting, kind, times, levels)
    kept &= weights > 0
    weights = gaussians.average_one(weights, kept) if normalize else jnp.where(kept, weights, 0)
    states = jax.lax.stop_gradient(jnp.where(counted, paths.states[:, :, :-1], 0))
    student = jax.vmap(
        lambda x, t: _flat(functools.partial(velocity_fn, student_params), rollout, x, jnp.full(x.shape[:2], t)),
        (2, 0), 2,
    )(states, times[:-1])  # fmt: skip
    teacher = jax.lax.stop_gradient(jnp.where(counted, labels.velocity, 0))
    counted = jnp.broadcast_to(counted & kept[None, None, :, None, None], student.shape)
    error = jnp.where(counted, (student - teacher) ** 2, 0.0)
    along = lambda w: (w[None, None, :, None, None] * error).sum((1, 2, 3, 4))
    count = counted.sum((1, 2, 3, 4)).astype(jnp.float32)
    metrics = {
        "reverse_kl": along(kl) / jnp.maximum(count / jnp.maximum(kept.sum(), 1), 1),
        "velocity_error": along(jnp.ones_like(kl)) / jnp.maximum(count, 1),
        "success": rollout.success,
    }
    return Weighted(along(weights), count, jax.lax.stop_gradient(metrics))


# ---- what they share -------------------------------------------------------------------------------------------------


def _tokens_counted(rollout: EpisodeRollout) -> Bool[Array, "B T H A"]:
    return jnp.broadcast_to(rollout.counted[..., None], rollout.drawn.tokens.shape)


def _flat(function, rollout: EpisodeRollout, *more: Array) -> Array:
    """`function` of every observation of every episode, `[B * T, ...]`, and of more such; shaped `[B, T, ...]` again.

    Observations that no counted step follows are zeros: nothing of them reaches a value or a gradient.
    """
    batch, decisions = rollout.counted.shape[:2]
    seen = rollout.counted.any(-1)
    blank = lambda leaf: jnp.where(seen.reshape(batch, decisions, *[1] * (leaf.ndim - 2)), leaf, jnp.zeros_like(leaf))
    inputs = (jax.tree.map(blank, rollout.observation), *more)
    out = function(*jax.tree.map(lambda leaf: leaf.reshape(batch * decisions, *leaf.shape[2:]), inputs))
    return out.reshape(batch, decisions, *out.shape[1:])


def _logits(policy_fn, params, rollout: EpisodeRollout, counted: Bool[Array, "B T H A"]) -> Float[Array, "B T H A K"]:
    return jnp.where(counted[..., None], _flat(functools.partial(policy_fn, params), rollout), 0)


def _at(logp: Float[Array, "*n K"], index: Array) -> Float[Array, "*n"]:
    return jnp.take_along_axis(logp, index[..., None], -1)[..., 0]


def _entropy(logp: Float[Array, "*n K"]) -> Float[Array, "*n"]:
    return -jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0.0).sum(-1)


def _sum(each: Float[Array, "B T H A"], counted: Bool[Array, "B T H A"]) -> Float[Array, "B"]:
    return jnp.where(counted, each, 0.0).sum((1, 2, 3))


def _mean(each: Float[Array, "B T H A"], counted: Bool[Array, "B T H A"]) -> Float[Array, "B"]:
    return _sum(each, counted) / jnp.maximum(counted.sum((1, 2, 3)), 1)
