"""Robot policies with a flow-matching head: a chunk is drawn along a path from noise, and the path is supervised.

A chunk is an image of one channel, `[B, H, A, 1]`, for the sampler and for flow matching.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from experiments.recipes import update_of
from experiments.vla_episodes import acted, counting
from experiments.vla_methods import Policy
from experiments.vla_worlds import World
from opd_jax import rng
from opd_jax.losses import flow_matching, gaussians, vla_opd
from opd_jax.sampling import episodes, flow
from opd_jax.types import ActionPaths, EpisodeRollout, Method, PathLabels


def policy(
    world: World, plan: episodes.Plan, sigma: float, steps: int, noise_level: float, suites: Sequence[str] = ()
) -> Policy:
    """Policies of `steps` steps from noise to a chunk, by the `sde` of Flow-GRPO in training and the ODE after it.

    `suites` as of `vla_methods.bins`.
    """
    module = world.module
    velocity = Partial(functools.partial(_velocity, module))
    act = lambda level: Partial(functools.partial(_act, (module.horizon, module.action_dim, 1), steps, level), velocity)
    label = functools.partial(_labels, chunks=world.chunks, sigma=sigma)

    def init(key, observation):
        chunk = jnp.zeros((1, module.horizon, module.action_dim))
        return module.init(key, observation, chunk, jnp.ones(1), method="velocity")["params"]

    def imitation(recipe):
        update, optimizer = update_of(flow_matching.supervise(velocity), recipe)
        return Method(_noised, lambda _, rollout: rollout.velocity, update), optimizer

    def on_policy(recipe):
        supervise = vla_opd.supervise_flow(Partial(functools.partial(_of_chunks, module)))
        update, optimizer = update_of(supervise, recipe)
        sample = acted(world, act(noise_level), recipe, plan, module.horizon, suites)
        return Method(sample, lambda _, rollout: label(rollout), counting(update)), optimizer

    return Policy(init, act(0.0), imitation, on_policy)


def _velocity(module, params, x, t, observation):
    return _of_chunks(module, params, observation, x[..., 0], t)[..., None]


def _of_chunks(module, params, observation, chunks, t):
    return module.apply({"params": params}, observation, chunks, t, method="velocity")


def _act(shape, steps, level, velocity, params, observation, keys):
    times, levels = flow.time_grid(steps), jnp.full(steps, level)
    states = flow.sample(velocity, params, observation, keys, shape, times, levels).states[..., 0]
    times, levels = (jnp.tile(leaf, (len(states), 1)) for leaf in (times, levels))
    return ActionPaths(states, times, levels), jnp.clip(states[:, -1], -1, 1)


@jax.jit
def _noised(params, batch, key) -> flow_matching.Noised:
    """Demonstrated chunks somewhere on their way from noise; after the end of an episode a chunk stands still."""
    keys = rng.per_record(key, len(batch["actions"]))
    return flow_matching.noised(batch["actions"][..., None], batch["observation"], keys)


@functools.partial(jax.jit, static_argnames=("chunks", "sigma"))
def _labels(rollout: EpisodeRollout, *, chunks: Callable, sigma: float) -> PathLabels:
    """The velocity that leads to the expert's chunk, with the tolerance `sigma`, at every state of every path."""
    paths = rollout.drawn
    plans = chunks(rollout.states, paths.states.shape[-2])
    t = paths.times[:, :, :-1, None, None]
    return PathLabels(gaussians.velocity_of_gaussian(plans[:, :, None], sigma, paths.states[:, :, :-1], t))
