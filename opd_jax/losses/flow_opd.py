"""Flow-OPD: On-Policy Distillation for Flow Matching Models. arXiv:2605.08063.

The student samples a path by its SDE; at every visited state the teacher of the prompt's task says which velocity it
would have taken; the loss is the reverse KL of the two Gaussian transitions, a weighted velocity error.

| equation of the paper | function |
| --- | --- |
| reverse KL of a step, `||mu_S - mu_T||^2 / (2 s^2 dt)` | `gaussians.reverse_kl` |
| the same as `w(t) ||v_S - v_T||^2` | `gaussians.velocity_weight` |
| `w(t)` per element, and the weights of the released code | `step_weights` |
| `E[w(t) ||v_S - v_T||^2] + lambda E[w(t) ||v_S - v_A||^2]`, differentiated directly (KL plus MAR) | `supervise` |
| policy gradient with the log-ratio of the sampled action as reward | `log_ratio_policy_gradient` |
| policy gradient as printed, with the state-only reward `-w(t) ||sg(v_S) - v_T||^2` | `state_only_policy_gradient` |

`supervise` is the method. The paper prints the last row, whose expected gradient is zero, but its released code does
not detach the reward and so differentiates the KL, as `supervise` does. The three are built with one signature, by name
in `ESTIMATORS`, and share everything else: states, actions and labels carry no gradient, and weights average 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from opd_jax.losses import gaussians
from opd_jax.losses.gaussians import step_weights
from opd_jax.losses.policy_gradient import clipped_surrogate
from opd_jax.sampling.flow import velocities
from opd_jax.types import FlowLabels, FlowRollout, Supervise, VelocityFn, Weighted, as_partial

__all__ = ["ESTIMATORS", "log_ratio_policy_gradient", "state_only_policy_gradient", "step_weights", "supervise"]


def supervise(
    velocity_fn: VelocityFn,
    *,
    weighting: str = "kl",
    kind: str = "sde",
    anchor_weight: float = 0.0,
    skip_last: bool = True,
    normalize: bool = True,
) -> Supervise:
    """The Flow-OPD loss: exact per-step reverse KL to the teacher, differentiated directly, plus the anchor (MAR).

    `total = sum_t w_t mean_D (v_S - v_T)^2 + anchor_weight sum_t w_t mean_D (v_S - v_A)^2`, per record, over the
    counted steps. No noise from the sampled action. Departure: with `normalize` the weights are divided by their mean
    over the counted steps, so that weightings (and sizes `D`) compare at one learning rate. The MAR of the paper uses
    an aesthetic teacher at 0.02, the released code the base model at 0.04.

    Args:
        velocity_fn: the student's; frozen weights within a `Partial` stay arguments under jit.
        weighting: one of `gaussians.WEIGHTINGS`; `kl` is the paper, `kl_no_dt` its code, see `step_weights`.
        kind: transition the rollout was sampled with, and the one whose KL is taken.
        anchor_weight: lambda of the MAR term; 0 leaves it out, though its error is still reported where labelled.
        skip_last: leave out the last step, whose KL weight is extreme (the reference trains 9 of 10 steps).
        normalize: weights average 1; `False` keeps nats per element.

    Returns:
        `supervise(student_params, FlowRollout, FlowLabels, key) -> Weighted`, a `Partial`; it uses no randomness.
        Weight is the number of counted steps, those of positive weight. Metrics, per record over the counted steps:
        `reverse_kl` (student || teacher) summed over steps and elements in nats, whatever the weighting;
        `velocity_error` and `anchor_error`, mean squares per element. At the sampled actions, over the noisy ones of
        these steps: `log_ratio`, teacher - student in nats, with its spread, and `logp_diff`, by how much the student's
        log-density here and in the sampler differ, per element (float32 rounding, where strictly on-policy).

        | case | loss and gradient |
        | --- | --- |
        | student = teacher (same weights, same batch layout) | exactly 0 |
        | a step without noise, under `kl` or `kl_no_dt` | not counted; NaN there changes nothing |
        | no step counts | total and weight 0 |

    Raises:
        ValueError: at the call, for an anchor weight without anchor labels, or a one-step path with `skip_last`.
    """
    settings = _Settings(weighting, kind, anchor_weight, skip_last, normalize)
    return Partial(functools.partial(_analytic, settings), as_partial(velocity_fn))


def log_ratio_policy_gradient(
    velocity_fn: VelocityFn,
    *,
    weighting: str = "kl",
    kind: str = "sde",
    anchor_weight: float = 0.0,
    skip_last: bool = True,
    normalize: bool = True,
    credit: str = "scalar",
) -> Supervise:
    """The same gradient from the sampled action, `-grad log pi_S(a|s) sg(log pi_T(a|s) - log pi_S(a|s))`; to compare.

    Unbiased for `supervise` at the same settings while the rollout is the student's own (no ratio corrects for an
    older one), for states with noise: other steps never count. The KL is the expectation of the log-ratio; another
    weighting multiplies a step by `w_t / w_t^kl`. Noise against the true gradient, for one sample and a small
    difference: about `sqrt(D + 1)` with `scalar` credit, `sqrt(2)` with `per_dimension`.

    Args:
        credit: `scalar` sums the log-ratio over the `D` elements, `per_dimension` credits each element with its own.
        others: as `supervise`.

    Returns:
        As `supervise`; the value of `total` is the sampled (one draw, may be negative) estimate of its value.

    Raises:
        ValueError: unknown credit; and as `supervise`.
    """
    if credit not in ("scalar", "per_dimension"):
        raise ValueError(f"unknown credit {credit!r}; choose scalar or per_dimension")
    settings = _Settings(weighting, kind, anchor_weight, skip_last, normalize)
    return Partial(functools.partial(_log_ratio, settings, credit), as_partial(velocity_fn))


def state_only_policy_gradient(
    velocity_fn: VelocityFn,
    *,
    weighting: str = "kl",
    kind: str = "sde",
    anchor_weight: float = 0.0,
    skip_last: bool = True,
    normalize: bool = True,
    clip: float = 1e-4,
) -> Supervise:
    """The form as printed, a **negative control**: clipped policy gradient of the detached reward `-w_t mean_D dv^2`.

    The reward depends on the state and not on the action, so `E_a[grad log pi(a|s) r(s)] = r(s) grad E_a[1] = 0`: the
    expected gradient is zero and there is no direction towards the teacher. The ratio is of log-densities averaged
    over elements, against the rollout's, as Flow-GRPO; steps without noise never count.

    Args:
        clip: PPO's range, 1e-4 in the released configs (the paper does not state it).
        others: as `supervise`.

    Returns:
        As `supervise`; before the first update the value of `total` is that of `supervise`, its gradient is not.
    """
    settings = _Settings(weighting, kind, anchor_weight, skip_last, normalize)
    return Partial(functools.partial(_state_only, settings, clip), as_partial(velocity_fn))


ESTIMATORS = {
    "analytic": supervise,
    "log_ratio": log_ratio_policy_gradient,
    "log_ratio_per_dimension": functools.partial(log_ratio_policy_gradient, credit="per_dimension"),
    "state_only": state_only_policy_gradient,
}


class _Settings(NamedTuple):
    weighting: str
    kind: str
    anchor_weight: float
    skip_last: bool
    normalize: bool


class _Visit(NamedTuple):
    """The evaluated steps: the student with gradient; all else detached, and 0 where a step does not count."""

    rollout: FlowRollout  # without its last step if that is skipped
    states: Float[Array, "B T H W C"]
    student: Float[Array, "B T H W C"]
    teacher: Float[Array, "B T H W C"]
    counted: Bool[Array, "T"]
    weights: Float[Array, "T"]
    anchor_loss: Float[Array, "B"]
    metrics: dict[str, Float[Array, "B"]]
    spread: dict[str, Float[Array, "B T"]]


def _analytic(s: _Settings, velocity_fn, student_params, rollout, labels, key) -> Weighted:
    v = _visit(s, velocity_fn, student_params, rollout, labels)
    return _weighted(v, v.weights[None] * _error(v.student, v.teacher))


def _log_ratio(s: _Settings, credit: str, velocity_fn, student_params, rollout, labels, key) -> Weighted:
    v = _visit(s, velocity_fn, student_params, rollout, labels, needs_noise=True)
    times, levels = v.rollout.times[0], v.rollout.levels[0]
    mean, std = gaussians.path_transition(s.kind, v.states, v.student, times, levels)
    teacher_mean, _ = gaussians.path_transition(s.kind, v.states, v.teacher, times, levels)
    actions = gaussians.counted_only(v.rollout.states[:, 1:], v.counted)
    precision = jnp.where(v.counted, 1 / (2 * jnp.where(v.counted, std, 1.0) ** 2), 0.0)[None, :, None, None, None]
    detached = jax.lax.stop_gradient(mean)
    log_ratio = (teacher_mean - detached) * (2 * actions - teacher_mean - detached) * precision  # teacher / student
    score = ((actions - detached) ** 2 - (actions - mean) ** 2) * precision  # value 0, gradient that of log pi_S
    if credit == "scalar":
        score, log_ratio = (a.sum((2, 3, 4), keepdims=True) for a in (score, log_ratio))
    kl_weights = gaussians.step_weights("kl", s.kind, times, levels)
    scale = v.weights / jnp.where(v.counted, kl_weights, 1.0) / v.states[0, 0].size
    return _weighted(v, -(log_ratio * (1 + score)).sum((2, 3, 4)) * scale[None])


def _state_only(s: _Settings, clip: float, velocity_fn, student_params, rollout, labels, key) -> Weighted:
    v = _visit(s, velocity_fn, student_params, rollout, labels, needs_noise=True)
    mean, std = gaussians.path_transition(s.kind, v.states, v.student, v.rollout.times[0], v.rollout.levels[0])
    actions = gaussians.counted_only(v.rollout.states[:, 1:], v.counted)
    logp = gaussians.path_log_density(actions, mean, std) / v.states[0, 0].size
    ratio = jnp.exp(logp - gaussians.counted_only(v.rollout.logp, v.counted))
    reward = -v.weights[None] * _error(v.student, v.teacher)
    return _weighted(v, clipped_surrogate(ratio, reward, clip))


def _visit(s: _Settings, velocity_fn, student_params, rollout, labels, needs_noise=False) -> _Visit:
    """Runs the student at the visited states, weighs the steps and measures the anchor."""
    if s.anchor_weight > 0 and labels.anchor_velocity is None:
        raise ValueError(f"anchor_weight={s.anchor_weight} needs FlowLabels.anchor_velocity; label it or set 0")
    if s.skip_last:
        rollout, labels = _without_last_step(rollout, labels)
    times, levels = rollout.times[0], rollout.levels[0]
    weights = step_weights(s.weighting, s.kind, times, levels)
    kl_weights = step_weights("kl", s.kind, times, levels)
    counted = (weights > 0) & (kl_weights > 0) if needs_noise else weights > 0
    weights = gaussians.average_one(weights, counted) if s.normalize else jnp.where(counted, weights, 0.0)

    states = gaussians.counted_only(rollout.states[:, :-1], counted)
    teacher = gaussians.counted_only(labels.teacher_velocity, counted)
    student = velocities(velocity_fn, student_params, rollout.condition, states, times[:-1])
    total = lambda per_step: jnp.where(counted[None], per_step, 0.0).sum(1)
    error, count = _error(student, teacher), jnp.maximum(counted.sum(), 1)
    metrics = {
        "reverse_kl": total(kl_weights[None] * error) * states[0, 0].size,
        "velocity_error": total(error) / count,
    }
    anchor_loss = jnp.zeros(states.shape[0])
    if labels.anchor_velocity is not None:
        anchor_error = _error(student, gaussians.counted_only(labels.anchor_velocity, counted))
        anchor_loss = s.anchor_weight * total(weights[None] * anchor_error)
        metrics["anchor_error"] = total(anchor_error) / count
    step_metrics, spread = jax.lax.stop_gradient(_at_the_action(s, rollout, states, student, teacher, counted))
    metrics = jax.lax.stop_gradient(metrics) | step_metrics
    return _Visit(rollout, states, student, teacher, counted, weights, anchor_loss, metrics, spread)


def _at_the_action(s: _Settings, rollout, states, student, teacher, counted):
    """What is watched at the state that was sampled next: teacher against student, and student against sampler."""
    times, levels = rollout.times[0], rollout.levels[0]
    actions = gaussians.counted_only(rollout.states[:, 1:], counted)
    mean, std = gaussians.path_transition(s.kind, states, student, times, levels)
    teacher_mean, _ = gaussians.path_transition(s.kind, states, teacher, times, levels)
    noisy = (counted & (std > 0))[None]
    student_logp = gaussians.path_log_density(actions, mean, std)
    log_ratio = gaussians.path_log_density(actions, teacher_mean, std) - student_logp
    drift = jnp.abs(student_logp - rollout.logp_sum) / states[0, 0].size
    mean_of = lambda per_step: jnp.where(noisy, per_step, 0.0).sum(1) / jnp.maximum(noisy.sum(), 1)
    metrics = {"logp_diff": mean_of(drift), "log_ratio": mean_of(log_ratio)}
    return metrics, {"log_ratio": jnp.where(noisy, log_ratio, jnp.nan)}


def _weighted(v: _Visit, loss: Float[Array, "B T"]) -> Weighted:
    total = jnp.where(v.counted[None], loss, 0.0).sum(1) + v.anchor_loss
    return Weighted(total, jnp.full_like(total, v.counted.sum()), v.metrics, v.spread)


def _error(a: Float[Array, "B T H W C"], b: Float[Array, "B T H W C"]) -> Float[Array, "B T"]:
    return ((a - b) ** 2).mean((2, 3, 4))


def _without_last_step(rollout: FlowRollout, labels: FlowLabels) -> tuple[FlowRollout, FlowLabels]:
    if rollout.levels.shape[1] < 2:
        raise ValueError("a path of 1 step has none left with skip_last=True; sample more steps or set skip_last=False")
    fields = ("states", "noise", "times", "levels", "logp", "logp_sum")
    cut = {name: getattr(rollout, name)[:, :-1] for name in fields}
    return rollout._replace(**cut), jax.tree.map(lambda a: a[:, :-1], labels)
