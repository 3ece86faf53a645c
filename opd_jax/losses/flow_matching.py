"""Conditional flow matching (arXiv:2210.02747): regression of the velocity noise - data at a noised datum.

The loss of pretraining, of SFT on a teacher's images (cold start) and of offline distillation: the same loop, with data
in the place of the student's own path and the datum itself in the place of the teacher.

| equation | function |
| --- | --- |
| `x_t = (1 - t) x_0 + t x_1`, target `x_1 - x_0` | `noised` |
| `E ||v(x_t, t, c) - (x_1 - x_0)||^2` | `supervise` |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from opd_jax.types import PyTree, Supervise, VelocityFn, Weighted


class Noised(NamedTuple):
    """Data somewhere on the straight path to noise: the rollout of flow matching."""

    condition: PyTree  # leaves [B, ...]
    x: Float[Array, "B H W C"]
    t: Float[Array, "B"]
    velocity: Float[Array, "B H W C"]  # noise - data


def noised(
    data: Float[Array, "B H W C"], condition: PyTree, keys: Key[Array, "B"], center: float = 0.0, spread: float = 1.0
) -> Noised:
    """Noises every datum to a time of its own, logit-normal as in Stable Diffusion 3 (arXiv:2403.03206, section 3.1).

    Args:
        data: clean images or latents.
        keys: one per record.
        center, spread: mean and standard deviation of `logit(t)`; a positive center favours noise.
    """
    t = jax.nn.sigmoid(center + spread * jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0)))(keys))
    noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), data.shape[1:]))(keys)
    w = t[:, None, None, None]
    return Noised(condition, (1 - w) * data + w * noise, t, noise - data)


def supervise(velocity_fn: VelocityFn) -> Supervise:
    """`supervise(params, Noised, velocity, key) -> Weighted`, a `Partial`: mean square error per element, weight 1.

    Exactly 0, with zero gradient, where the model predicts the target; no gradient flows to data or target.
    """
    return Partial(_supervise, velocity_fn if isinstance(velocity_fn, Partial) else Partial(velocity_fn))


def _supervise(velocity_fn, params, rollout: Noised, velocity, key) -> Weighted:
    x, t, target = jax.lax.stop_gradient((rollout.x, rollout.t, velocity))
    predicted = velocity_fn(params, x, t, rollout.condition).astype(jnp.float32)
    error = jnp.square(predicted - target).mean((1, 2, 3))
    return Weighted(error, jnp.ones_like(error))
