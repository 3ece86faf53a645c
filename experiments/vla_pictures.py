"""Films of policies from the same first states, and how far the expert disagrees along their episodes."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from experiments import vla_methods
from experiments.vla_methods import Acting
from experiments.vla_stages import Experiment
from opd_jax import hosts, rng, sharding
from opd_jax.losses import vla_opd
from opd_jax.models import action_tokens
from opd_jax.report import HeatMap, Samples
from opd_jax.sampling import episodes
from opd_jax.types import EpisodeRollout, PyTree
from opd_jax.worlds import tabletop

EVERY = 3  # actions from one frame of a film to the next
EPISODES = 4  # of each shown task, rows of a heat map


def pictures(experiment: Experiment, policies: Mapping[str, PyTree]) -> tuple[Samples, list[HeatMap]]:
    """One task of each suite, scenes of the test split, the most probable bins; the expert beside the policies.

    Args:
        policies: parameters by name.

    Returns: films of the first episode of each task, both cameras side by side, and a map for each policy.
    """
    tasks = [experiment.seen_of(suite)[0] for suite in experiment.config.suites]
    starts = experiment.starts(np.repeat(tasks, EPISODES), experiment.config.eval.seed, pad=True)
    key, first = rng.stream(experiment.config.eval.seed, "eval"), np.arange(len(tasks)) * EPISODES
    steps = int(vla_methods.HORIZONS[tasks].max())
    shown = vla_methods.demonstrate(starts, key, steps, "test")
    films = {"expert": film(shown, shown.drawn, first)}
    policy_fn = vla_methods.logits_fn(experiment.module)
    label = vla_methods.expert_labels(experiment.module.horizon, experiment.config.sigma, experiment.config.floor)
    maps = []
    bins = experiment.policies["bins"]
    plan = experiment.plan._replace(decisions=vla_methods.decisions_of(tasks, experiment.plan.executed))
    for name, params in policies.items():
        params = sharding.replicate(params, experiment.mesh)
        played = vla_methods.play(bins.greedy, params, starts, key, Acting(plan, split="test"))
        films[name] = film(played, executed(played, plan.executed), first)
        values = hosts.fetch(disagreement(policy_fn, params, played, label(None, played)))
        maps.append(HeatMap(name, values[: len(tasks) * EPISODES], "episode", "decision"))
    return Samples("Episodes from the same first states", [instruction(task) for task in tasks], films), maps


def instruction(task: int) -> str:
    return f"{tabletop.TASKS[task].suite}: {tabletop.TASKS[task].instruction}"


def executed(rollout: EpisodeRollout, count: int) -> Float[Array, "B S A"]:
    """The actions of an episode in the order in which they were executed."""
    actions = action_tokens.decode(rollout.drawn.tokens)[:, :, :count]
    return actions.reshape(len(actions), -1, actions.shape[-1])


def film(rollout: EpisodeRollout, actions: Float[Array, "B S A"], chosen: np.ndarray) -> np.ndarray:
    """`[n, T, H, W, 3]` bytes of the chosen episodes, cameras side by side; one that is over stands still."""
    states = jax.tree.map(lambda leaf: leaf[chosen, 0], rollout.states)
    return hosts.fetch(_film(states, actions[chosen], rollout.length[chosen]))


@jax.jit
def _film(states, actions, length):
    def act(states, at):
        action, t = at
        new = jax.vmap(tabletop.step)(states, action)
        states = episodes.where(t < length, new, states)
        return states, jax.vmap(tabletop.render)(states)

    first = jax.vmap(tabletop.render)(states)
    _, frames = jax.lax.scan(act, states, (jnp.moveaxis(actions, 1, 0), jnp.arange(actions.shape[1])))
    frames = jnp.concatenate([first[None], frames[EVERY - 1 :: EVERY]])  # [T, n, C, H, W, 3]
    time, count, _, height, _, _ = frames.shape
    return frames.transpose(1, 0, 3, 2, 4, 5).reshape(count, time, height, -1, 3)


@jax.jit
def disagreement(policy_fn: Partial, params, rollout: EpisodeRollout, labels) -> Float[Array, "B T"]:
    """Reverse KL of each decision, nats per executed token; NaN where nothing was executed."""
    batch, decisions = rollout.counted.shape[:2]
    alone = functools.partial(jax.tree.map, lambda leaf: leaf.reshape(batch * decisions, 1, *leaf.shape[2:]))
    none = jnp.zeros(batch * decisions, jnp.int32)
    each = EpisodeRollout(
        alone(rollout.observation), alone(rollout.drawn), alone(rollout.counted), none.astype(jnp.float32),
        none, none, none,
    )  # fmt: skip
    result = vla_opd.supervise(policy_fn)(params, each, alone(labels), jax.random.key(0))
    return jnp.where(result.weight > 0, result.metrics["reverse_kl"], jnp.nan).reshape(batch, decisions)
