"""Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models. arXiv:2509.25050.

Group-relative policy optimisation of a flow, as Flow-GRPO (`policy_gradient`), with another estimate of a picture's
log-likelihood: minus the flow-matching loss on the picture that was sampled, in place of the density of noisy steps on
the way to it. What was drawn is noised again and regressed, forward where it was better than its group, backward where
it was worse. Any sampler will do, an ODE too, and the noise of a path does not enter the gradient.

| equation of the paper | function |
| --- | --- |
| the sampled picture, noised anew at several times | `noised_again` |
| `A mean_D (v_S(x_t, t) - (x_1 - x_0))^2 + beta mean_D (v_S - v_reference)^2` | `supervise` |
| group-relative advantage | `policy_gradient.group_advantages` |
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from opd_jax.losses import flow_matching
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.types import PyTree, Supervise, VelocityFn, Weighted, as_partial


class SampledAgain(NamedTuple):
    """Pictures of the student, and `K` noised copies of each; nothing here carries a gradient."""

    condition: PyTree  # leaves [B, ...]
    task: Int[Array, "B"]
    group: Int[Array, "B"]
    image: Float[Array, "B H W C"]
    x: Float[Array, "B K H W C"]
    t: Float[Array, "B K"]
    velocity: Float[Array, "B K H W C"]  # noise - image


def noised_again(
    image: Float[Array, "B H W C"],
    condition: PyTree,
    task: Int[Array, "B"],
    group: Int[Array, "B"],
    keys: Key[Array, "B"],
    draws: int,
    center: float = 0.0,
    spread: float = 1.0,
) -> SampledAgain:
    """Every picture noised `draws` times, each at a logit-normal time of its own (`flow_matching.noised`)."""
    keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(draws)))(keys)
    each = lambda column: flow_matching.noised(image, None, column, center, spread)
    copies = jax.vmap(each, in_axes=1, out_axes=1)(keys)
    return jax.lax.stop_gradient(SampledAgain(condition, task, group, image, copies.x, copies.t, copies.velocity))


def copy_velocities(velocity_fn: VelocityFn, params: PyTree, rollout: SampledAgain) -> Float[Array, "B K H W C"]:
    """The float32 velocity at every noised copy: the student's in the loss, the reference's for the labels."""
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, rollout.t.shape[1], axis=0), rollout.condition)
    flat = rollout.x.reshape(-1, *rollout.x.shape[2:])
    return velocity_fn(params, flat, rollout.t.reshape(-1), repeated).astype(jnp.float32).reshape(rollout.x.shape)


def supervise(velocity_fn: VelocityFn, *, beta: float = 0.0) -> Supervise:
    """The loss `sum_k A mean_D (v_S - target)^2 + beta mean_D (v_S - v_reference)^2`, per record.

    In its strictly on-policy form, one update per rollout: the paper's ratio of likelihoods is then 1 and its clip
    never binds. Without `beta` nothing bounds how far a bad picture pushes the student away, so keep it positive.

    Args:
        velocity_fn: the student's; frozen weights within a `Partial` stay arguments under jit.
        beta: weight of the mean square velocity difference from the reference.

    Returns:
        `supervise(student_params, SampledAgain, RewardLabels, key) -> Weighted`, a `Partial`; it uses no randomness.
        Weight is `K`. Metrics, means over copies: `matching_error`, the flow-matching loss on the student's own
        pictures, `reference_error`, and the `reward`. A record of advantage 0 has no gradient but the reference's.

    Raises:
        ValueError: at the call, `beta > 0` without a reference velocity.
    """
    return Partial(functools.partial(_supervise, beta), as_partial(velocity_fn))


def _supervise(beta, velocity_fn, student_params, rollout: SampledAgain, labels: RewardLabels, key) -> Weighted:
    if beta > 0 and labels.reference_velocity is None:
        raise ValueError(f"beta={beta} needs a reference: give RewardLabels.reference_velocity, or set beta=0")
    rollout, labels = jax.lax.stop_gradient((rollout, labels))
    student = copy_velocities(velocity_fn, student_params, rollout)
    square = lambda other: ((student - other) ** 2).mean((2, 3, 4)).sum(1)
    copies, matching = rollout.t.shape[1], square(rollout.velocity)
    total, metrics = labels.advantage * matching, {"matching_error": matching / copies}
    if labels.reference_velocity is not None:
        reference = square(labels.reference_velocity)
        total, metrics["reference_error"] = total + beta * reference, reference / copies
    if labels.reward is not None:
        metrics["reward"] = labels.reward
    return Weighted(total, jnp.full_like(total, copies), jax.lax.stop_gradient(metrics))
