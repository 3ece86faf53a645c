"""Sampling a flow model: the time grid, the path from noise to image by an ODE or an SDE, and guidance.

Time runs from `t = 1` (noise) to `t = 0` (data); velocity = noise - data. The transitions themselves, and their
sources, are in `opd_jax.losses.gaussians` and re-exported here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from opd_jax.losses.gaussians import log_density, mean_velocity_coefficient, transition
from opd_jax.types import FlowRollout, PyTree, VelocityFn, as_partial

__all__ = [
    "Path",
    "as_rollout",
    "generate",
    "guided",
    "mean_velocity_coefficient",
    "sample",
    "sde_window",
    "time_grid",
    "transition",
    "velocities",
]


class Path(NamedTuple):
    """A sampled path; the fields, and their meaning, are those of `FlowRollout`."""

    states: Float[Array, "B T+1 H W C"]
    noise: Float[Array, "B T H W C"]
    logp: Float[Array, "B T"]
    logp_sum: Float[Array, "B T"]


def time_grid(steps: int, shift: float = 1.0, double_shift: bool = False) -> Float[Array, "N"]:
    """`N = steps + 1` times from 1 to 0, spaced evenly and then shifted towards noise.

    The shift `t -> shift t / (1 + (shift - 1) t)` is Stable Diffusion 3's (arXiv:2403.03206, eq. 23). With
    `double_shift` the grid is that of diffusers' `FlowMatchEulerDiscreteScheduler(shift).set_timesteps(steps)`, the
    sampler of Flow-GRPO and Flow-OPD: it shifts its 1000 training times, spaces `steps` times evenly between the ends
    of those, and shifts again, so that the last step before 0 starts at a small positive time (0.009 for shift 3).

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps={steps}, shift={shift}: give at least one step and a positive shift")
    move = lambda t: shift * t / (1 + (shift - 1) * t)
    if double_shift:
        times = np.append(move(np.linspace(1.0, move(1 / 1000), steps)), 0.0)
    else:
        times = move(np.linspace(1.0, 0.0, steps + 1))
    return jnp.asarray(times, jnp.float32)


def sde_window(
    key: Key[Array, ""], steps: int, size: int, noise_level: float, first_fraction: float = 0.5
) -> Float[Array, "T"]:
    """Noise levels of a path that is stochastic on `size` consecutive steps and an ODE elsewhere.

    The fast recipe of Flow-GRPO: only the steps with `levels > 0` are trained. The window's first step is uniform over
    the first `first_fraction` of the steps, where the window fits. (The released code keeps the whole window, not its
    first step, inside the range.)

    Args:
        key: one key for the batch, so that all records share the window.
        size: `size = steps` makes every step stochastic, the last one too: set `levels[-1]` to 0, or skip it in the
            loss, where its noise must not stay in the image.

    Raises:
        ValueError: a size outside 1..steps.
    """
    if not 1 <= size <= steps:
        raise ValueError(f"window size {size} does not fit in {steps} steps; choose 1..{steps}")
    starts = max(1, min(int(first_fraction * steps), steps - size + 1))
    start = jax.random.randint(key, (), 0, starts)
    index = jnp.arange(steps)
    return jnp.where((index >= start) & (index < start + size), jnp.float32(noise_level), 0.0)


def sample(
    velocity_fn: VelocityFn,
    params: PyTree,
    condition: PyTree,
    keys: Key[Array, "B"],
    shape: tuple[int, int, int],
    times: Float[Array, "N"],
    levels: Float[Array, "T"],
    kind: str = "sde",
    x_init: Float[Array, "B H W C"] | None = None,
) -> Path:
    """Samples a path with every state, draw and log-density kept; no gradient.

    `states[:, i+1] = mean_i + std_i noise[:, i]`, with mean and std of `transition(kind, ...)` at the model's velocity.
    `logp_sum` is the log-density of the step taken, in nats, and `logp` its mean over the `D` elements (as Flow-GRPO);
    both are exactly 0 where the step has no noise.

    Args:
        velocity_fn: the student's; called with `[B]` equal times.
        condition: pytree of leaves `[B, ...]`.
        keys: one per record; a record's draws depend on its own key alone, whatever the batch and the devices.
        shape: `(H, W, C)` of one image or latent.
        times, levels, kind: the sampler, `N = T + 1`; a level of 0 makes the step an ODE's.
        x_init: the noise to start from, in place of the key's own.
    """

    def body(x, step):
        x_next, mean, std, noise = _step(velocity_fn, params, condition, keys, kind, x, step)
        return x_next, (x_next, noise, log_density(x_next, mean, std))

    x_init = _initial(keys, shape) if x_init is None else x_init
    _, outputs = jax.lax.scan(body, x_init, _steps(times, levels))
    states, noise, logp_sum = (jnp.moveaxis(leaf, 0, 1) for leaf in outputs)
    states = jnp.concatenate([x_init[:, None], states], axis=1)
    return jax.lax.stop_gradient(Path(states, noise, logp_sum / np.prod(shape), logp_sum))


def as_rollout(
    path: Path,
    condition: PyTree,
    task: Int[Array, "B"],
    group: Int[Array, "B"],
    times: Float[Array, "N"],
    levels: Float[Array, "T"],
) -> FlowRollout:
    """The path with what it was sampled for, and its schedule repeated for every record."""
    times, levels = (jnp.tile(leaf, (task.shape[0], 1)) for leaf in (times, levels))
    return FlowRollout(condition, task, group, times=times, levels=levels, **path._asdict())


def generate(
    velocity_fn: VelocityFn,
    params: PyTree,
    condition: PyTree,
    keys: Key[Array, "B"],
    shape: tuple[int, int, int],
    times: Float[Array, "N"],
    levels: Float[Array, "T"] | None = None,
    kind: str = "ode",
    x_init: Float[Array, "B H W C"] | None = None,
) -> Float[Array, "B H W C"]:
    """The final image of `sample` alone, for evaluation: no path is kept. By the ODE unless told; then no `levels`."""

    def body(x, step):
        return _step(velocity_fn, params, condition, keys, kind, x, step)[0], None

    levels = jnp.zeros_like(times[1:]) if levels is None else levels
    return jax.lax.scan(body, _initial(keys, shape) if x_init is None else x_init, _steps(times, levels))[0]


def velocities(
    velocity_fn: VelocityFn,
    params: PyTree,
    condition: PyTree,
    states: Float[Array, "B T H W C"],
    times: Float[Array, "T"],
) -> Float[Array, "B T H W C"]:
    """The float32 velocity at every given state, in one batch of `B T`: for labels and for losses.

    `condition` has leaves `[B, ...]`, repeated over the steps. Labels and losses that call this with the same shapes
    run the same computation, so that student = teacher gives exactly zero.
    """
    b, n = states.shape[:2]
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), condition)
    velocity = velocity_fn(params, states.reshape(b * n, *states.shape[2:]), jnp.tile(times, b), repeated)
    return velocity.astype(jnp.float32).reshape(states.shape)


def guided(velocity_fn: VelocityFn, null_condition: PyTree, scale: float) -> VelocityFn:
    """Classifier-free guidance (arXiv:2207.12598), `v_u + scale (v_c - v_u)`, with the same signature.

    Both branches run in one batch of `2B`, and gradients flow through both. Scale 1 returns `velocity_fn` unchanged.

    Args:
        null_condition: the condition of the empty prompt; leaves `[1, ...]`, broadcast to the batch.
        scale: 1 is no guidance, Flow-GRPO and Flow-OPD use 4.5.

    Returns:
        A `Partial` that holds `null_condition` and the weights within `velocity_fn`, so they stay arguments under jit.
    """
    return velocity_fn if scale == 1 else Partial(_guided, as_partial(velocity_fn), null_condition, scale)


def _guided(velocity_fn, null_condition, scale, params, x, t, condition):
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape).astype(c.dtype), null_condition, condition)
    double = lambda a, b: jnp.concatenate([a, b])
    v = velocity_fn(params, double(x, x), double(t, t), jax.tree.map(double, null, condition))
    v_u, v_c = jnp.split(v.astype(jnp.float32), 2)
    return v_u + scale * (v_c - v_u)


def _step(velocity_fn, params, condition, keys, kind, x, step):
    """One transition: the next state, and the mean, std and draw it came from."""
    index, t, t_next, level = step
    velocity = velocity_fn(params, x, jnp.full(x.shape[:1], t), condition).astype(jnp.float32)
    mean, std = transition(kind, x, velocity, t, t_next, level)
    noise = _draw(keys, index + 1, x.shape[1:])
    return mean + std * noise, mean, std, noise


def _steps(times, levels):
    return jnp.arange(levels.shape[0]), times[:-1], times[1:], levels


def _initial(keys, shape):
    return _draw(keys, 0, shape)


def _draw(keys, index, shape):
    """Standard normal `[B, *shape]`, each record's from its own key and the number of the draw."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))(keys)
