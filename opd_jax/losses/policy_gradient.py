"""GRPO for flow-matching models (Flow-GRPO, arXiv:2505.05470) and for language models (arXiv:2402.03300).

Trains the teachers and the baselines of on-policy distillation: a reward for the result, no teacher at every step.

| equation of the paper | function |
| --- | --- |
| group-relative advantage, `(R - mean) / std` | `group_advantages` |
| clipped ratio objective `min(rho A, clip(rho, 1-eps, 1+eps) A)` | `clipped_surrogate` |
| the objective with `- beta KL(student || reference)` | `grpo` |
| the same for tokens, clipped to `[1 - low, 1 + high]` (DAPO, arXiv:2503.14476) | `token_grpo` |
| the SDE step and its density | `gaussians.transition`, `gaussians.log_density` |
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from opd_jax.losses import gaussians
from opd_jax.losses.token_logp import token_logp
from opd_jax.sampling.flow import velocities
from opd_jax.types import FlowRollout, PyTree, Supervise, VelocityFn, Weighted, as_partial


class RewardLabels(NamedTuple):
    """What a reward says about a rollout; no gradient."""

    advantage: Float[Array, "B"]
    reference_velocity: Float[Array, "B N H W C"] | None = None  # frozen model's, at the steps that the loss evaluates
    reward: Float[Array, "B"] | None = None  # what the advantage was made of, to be logged


def group_advantages(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    num_groups: int,
    global_std: bool = True,
    clip: float = 5.0,
) -> Float[Array, "B"]:
    """`(reward - mean of its group) / (std + 1e-4)`, clipped to `+-clip`; no gradient.

    As released by Flow-GRPO: `std` (population) is that of all rewards by default, and of the group with
    `global_std=False`, the paper's form.

    Args:
        rewards: any finite number, or NaN where scoring failed.
        group: index in `0..num_groups - 1` of the prompt a record was sampled for.

    Returns:
        | record | advantage |
        | --- | --- |
        | NaN reward | 0, and it enters no mean and no std |
        | group of equal rewards, or of one | exactly 0 |
    """
    rewards = jax.lax.stop_gradient(rewards)
    valid = ~jnp.isnan(rewards)
    r = jnp.where(valid, rewards, 0.0)
    add = lambda a: jax.ops.segment_sum(jnp.where(valid, a, 0.0), group, num_groups)
    count = jnp.maximum(add(jnp.ones_like(r)), 1)
    centred = r - (add(r) / count)[group]
    if global_std:
        n = jnp.maximum(valid.sum(), 1)
        std = jnp.sqrt(jnp.where(valid, (r - r.sum() / n) ** 2, 0.0).sum() / n)
    else:
        std = jnp.sqrt(add(centred**2) / count)[group]
    highest = jax.ops.segment_max(jnp.where(valid, r, -jnp.inf), group, num_groups)
    lowest = jax.ops.segment_min(jnp.where(valid, r, jnp.inf), group, num_groups)
    informative = valid & (highest > lowest)[group]
    return jnp.where(informative, jnp.clip(centred / (std + 1e-4), -clip, clip), 0.0)


def clipped_surrogate(
    ratio: Float[Array, "B *steps"], advantage: Float[Array, "B *steps"], clip: float, clip_high: float | None = None
) -> Float[Array, "B *steps"]:
    """PPO's loss per step, `-min(ratio A, clip(ratio, 1-clip, 1+clip) A)`, minimised; gradient through `ratio` only.

    `clip_high` is the upper half of the range where it differs. The shapes must be equal: `[B, 1]` against `[B]` would
    average the credit over records in silence.
    """
    advantage = jax.lax.stop_gradient(advantage)
    highest = 1 + (clip if clip_high is None else clip_high)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, highest) * advantage)


def token_grpo(
    apply_fn: Callable[..., Array],
    *,
    head_fn: Callable[[PyTree], Array] | None = None,
    clip: float = 0.2,
    clip_high: float = 0.28,
    block: int = 512,
) -> Supervise:
    """`sum_t -min(rho_t A, clip(rho_t, 1 - clip, 1 + clip_high) A)` over the response, per record; weight: its tokens.

    `rho_t = pi_S / pi_behavior` of the sampled token at temperature 1; no KL to a reference (as DAPO). Every token of
    the batch counts alike (`sum(total) / sum(weight)`), DAPO's form; GRPO divides each answer by its length first.

    Args:
        apply_fn, head_fn, block: as of `token_logp`.
        clip, clip_high: how far below and above 1 the ratio is credited.

    Returns:
        `supervise(student_params, rollout, RewardLabels, key) -> Weighted`; `rollout` is a TokenRollout. Metrics:
        `ratio` (exactly 1 before the first update, up to the rounding of another program), `clip_fraction`,
        `logp_diff`, means over a record's tokens; `reward`, where the labels have it.
    """
    return Partial(functools.partial(_token_grpo, head_fn, clip, clip_high, block), as_partial(apply_fn))


def _token_grpo(head_fn, clip, clip_high, block, apply_fn, student_params, rollout, labels, key) -> Weighted:
    place = jnp.arange(rollout.tokens.shape[1])[None]
    counted = rollout.response & (place > 0)
    tokens = jnp.where(place < rollout.length[:, None], rollout.tokens, 0)
    student = token_logp(apply_fn, student_params, tokens, counted, head_fn=head_fn, block=block)
    behavior = jax.lax.stop_gradient(jnp.where(counted, rollout.behavior_logp, 0.0))
    ratio = jnp.exp(student - behavior)
    loss = clipped_surrogate(ratio, jnp.broadcast_to(labels.advantage[:, None], ratio.shape), clip, clip_high)
    count = counted.sum(1).astype(jnp.float32)
    mean = lambda a: jnp.where(counted, a, 0.0).sum(1) / jnp.maximum(count, 1)
    outside = (ratio < 1 - clip) | (ratio > 1 + clip_high)
    metrics = {"ratio": mean(ratio), "clip_fraction": mean(outside), "logp_diff": mean(jnp.abs(student - behavior))}
    if labels.reward is not None:
        metrics["reward"] = labels.reward
    return Weighted(jnp.where(counted, loss, 0.0).sum(1), count, jax.lax.stop_gradient(metrics))


def grpo(
    velocity_fn: VelocityFn,
    *,
    kind: str = "sde",
    clip: float = 1e-4,
    beta: float = 0.0,
    weighting: str = "kl",
    normalize: bool = True,
    window: int | None = None,
    balanced: bool = False,
) -> Supervise:
    """The Flow-GRPO loss, `sum_t -min(rho_t A, clip(rho_t) A) + beta w_t mean_D (v_S - v_reference)^2`, per record.

    `rho_t = exp(logp_S - logp_behavior)` with the log-densities **averaged** over the `D` elements of the next state,
    as released. Only noisy steps (`rollout.levels > 0` with `std > 0`) count. Before the first update the ratio is 1 up
    to the float32 rounding of a forward pass at another batch size, around 1e-6: keep `clip` well above it.

    Args:
        velocity_fn: the student's; frozen weights within a `Partial` stay arguments under jit.
        kind: transition the rollout was sampled with.
        clip: 1e-4 in Flow-GRPO, 1e-5 in its fast recipe.
        beta: weight of the KL to the reference; 0.04 in Flow-GRPO with `weighting="kl_no_dt", normalize=False`.
        weighting, normalize: of the KL, see `gaussians.step_weights` and `average_one`; the loss per step is in nats
            per element before normalisation, a departure that makes `beta` independent of the schedule.
        window: evaluate the student at this many steps alone, from the first noisy one on (the fast recipe: as
            many as `sde_window` makes noisy). Noisy steps beyond the window are not counted, and the reference is
            wanted at these steps only: those of `window_of(rollout, window)`.

        balanced: weigh the ratio's term of a step by `std / |d mean / d velocity|`. The gradient by the velocity is
            otherwise larger by the inverse, ten times and more for late steps than for the early ones that decide what
            is drawn, and Adam takes its scale from the largest. (Ours; others reweigh by noise level for this reason.)

    Returns:
        `supervise(student_params, rollout, RewardLabels, key) -> Weighted`: weight is the number of counted steps;
        metrics `ratio` and `clip_fraction` are means over them, `reverse_kl` (student || reference) is a sum in nats.

    Raises:
        ValueError: at the call, `beta > 0` without a reference velocity, or one at other steps.
    """
    settings = _Settings(kind, clip, beta, weighting, normalize, window, balanced)
    return Partial(functools.partial(_grpo, settings), as_partial(velocity_fn))


class _Settings(NamedTuple):
    kind: str
    clip: float
    beta: float
    weighting: str
    normalize: bool
    window: int | None
    balanced: bool


def _grpo(s: _Settings, velocity_fn, student_params, rollout: FlowRollout, labels: RewardLabels, key) -> Weighted:
    reference = labels.reference_velocity
    if s.beta > 0 and reference is None:
        raise ValueError(f"beta={s.beta} needs a reference: give RewardLabels.reference_velocity, or set beta=0")
    if s.window is not None:
        rollout = window_of(rollout, s.window)
    if reference is not None and reference.shape != rollout.noise.shape:
        raise ValueError(
            f"reference_velocity {reference.shape} is not of the evaluated steps, {rollout.noise.shape}: "
            "label the states of window_of(rollout, window)"
        )
    times, levels = rollout.times[0], rollout.levels[0]
    step = gaussians.coefficients(s.kind, times[:-1], times[1:], levels)
    counted = step.std > 0
    states, actions = (gaussians.counted_only(a, counted) for a in (rollout.states[:, :-1], rollout.states[:, 1:]))
    student = velocities(velocity_fn, student_params, rollout.condition, states, times[:-1])
    mean, std = gaussians.path_transition(s.kind, states, student, times, levels)
    logp = gaussians.path_log_density(actions, mean, std) / states[0, 0].size
    ratio = jnp.exp(logp - gaussians.counted_only(rollout.logp, counted))
    loss = clipped_surrogate(ratio, jnp.broadcast_to(labels.advantage[:, None], ratio.shape), s.clip)
    if s.balanced:
        loss = loss * jnp.where(step.velocity != 0, step.std / jnp.abs(step.velocity), 0.0)[None]

    count = counted.sum().astype(jnp.float32)
    total = lambda per_step: jnp.where(counted[None], per_step, 0.0).sum(1)
    metrics = {
        "ratio": total(ratio) / jnp.maximum(count, 1),
        "clip_fraction": total((jnp.abs(ratio - 1) > s.clip).astype(jnp.float32)) / jnp.maximum(count, 1),
    }
    if labels.reward is not None:
        metrics["reward"] = labels.reward
    if reference is not None:
        error = ((student - gaussians.counted_only(reference, counted)) ** 2).mean((2, 3, 4))
        weights = gaussians.step_weights(s.weighting, s.kind, times, levels)
        weights = gaussians.average_one(weights, counted) if s.normalize else weights
        loss = loss + s.beta * weights[None] * error
        kl_weights = gaussians.step_weights("kl", s.kind, times, levels) * states[0, 0].size
        metrics["reverse_kl"] = total(kl_weights[None] * error)
    return Weighted(total(loss), jnp.full_like(labels.advantage, count), jax.lax.stop_gradient(metrics))


def window_of(rollout: FlowRollout, size: int) -> FlowRollout:
    """The `size` steps of a rollout from its first noisy one on: those that the fast recipe evaluates."""
    start = jnp.argmax(rollout.levels[0] > 0)
    cut = lambda a, n=size: jax.lax.dynamic_slice_in_dim(a, start, n, axis=1)
    return rollout._replace(
        states=cut(rollout.states, size + 1),
        noise=cut(rollout.noise),
        times=cut(rollout.times, size + 1),
        levels=cut(rollout.levels),
        logp=cut(rollout.logp),
        logp_sum=cut(rollout.logp_sum),
    )
