"""Films of policies from the same first states, and how far the expert disagrees along their episodes."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from experiments import vla_methods, vla_worlds
from experiments.vla_stages import Experiment
from experiments.vla_worlds import Acting, Task
from opd_jax import hosts, rng
from opd_jax.losses import vla_opd
from opd_jax.models import action_tokens
from opd_jax.report import HeatMap, Samples
from opd_jax.types import ActionTokens, EpisodeRollout, PyTree

EPISODES = 4  # of each shown task, rows of a heat map


def pictures(experiment: Experiment, policies: Mapping[str, PyTree], head: str) -> tuple[Samples, list[HeatMap]]:
    """One task of each suite, scenes of the test split, as policies act in evaluation; the expert beside them.

    Args:
        policies: parameters by name, all with this head.

    Returns: films of the first episode of each task, both cameras side by side, and a map for each policy over bins.
    """
    tasks = [experiment.seen_of(suite)[0] for suite in experiment.config.suites]
    world = experiment.world
    starts = world.starts(np.repeat(tasks, EPISODES), experiment.config.eval.seed, "test", pad=True)
    key, first = rng.stream(experiment.config.eval.seed, "eval"), np.arange(len(tasks)) * EPISODES
    plan = experiment.plan._replace(decisions=vla_worlds.decisions_of(world, tasks, experiment.plan.executed))
    films = {"expert": world.expert_film(tasks, starts, key, first, plan.executed)} if world.expert else {}
    policy_fn, horizon = vla_methods.logits_fn(experiment.module), experiment.module.horizon
    label, taught, maps = vla_methods.network_labels(policy_fn, len(starts.task)), None, []
    if head != "bins":
        label = None
    elif world.expert:
        label = vla_methods.expert_labels(world, horizon, experiment.config.sigma, experiment.config.floor)
    elif world.teacher:
        taught = experiment.put(world.teacher.params)
    else:
        label = None
    for name, params in policies.items():
        params = experiment.put(params)
        asked = horizon if world.expert and label else 0
        acting = Acting(plan, split="test", asked=asked)
        played = world.play(experiment.policies[head].greedy, experiment.to_act(params), starts, key, acting)
        films[name] = world.film(played, starts, executed(played, plan.executed), first)
        if label:
            values = hosts.fetch(disagreement(policy_fn, params, played, label(taught, played)))
            maps.append(HeatMap(name, values[: len(tasks) * EPISODES], "episode", "decision"))
    return Samples(
        "Episodes from the same first states", [instruction(world.tasks[task]) for task in tasks], films
    ), maps


def instruction(task: Task) -> str:
    return f"{task.suite}: {task.instruction}"


def executed(rollout: EpisodeRollout, count: int) -> Float[Array, "B S A"]:
    """The actions of an episode in the order in which they were executed."""
    drawn = rollout.drawn
    of_bins = isinstance(drawn, ActionTokens)
    actions = action_tokens.decode(drawn.tokens) if of_bins else jnp.clip(drawn.states[:, :, -1], -1, 1)
    actions = actions[:, :, :count]
    return actions.reshape(len(actions), -1, actions.shape[-1])


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
