"""The episodes of an update: played from a batch of initial states, refilled where they teach nothing, and counted."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from experiments.vla_worlds import Acting, Starts, World
from opd_jax.sampling import refill
from opd_jax.sampling.episodes import Plan
from opd_jax.types import EpisodeRollout

REDONE = ("redone", "redone_beside")  # metrics: episodes begun again that failed; that were beside one that did
_REFILLS = 2**30  # where the keys of refills begin: above the number of any episode or decision


def acted(world: World, act: Partial, recipe, plan: Plan, asked: int, suites: Sequence[str] = ()):
    """`Method.sample`: episodes from a batch of initial states, `recipe.group` of each.

    Args:
        asked: as of `Acting`.
        suites: whose episodes and successes are counted apart, where there are several.

    Returns:
        `sample(params, batch, key)`; `batch` has `Starts`' fields, `decisions`, and in `more` those that are played in
        place of groups that have nothing to teach, if it is there.
    """
    of = of_suites(world, suites)

    def sample(params, batch, key):
        acting = Acting(plan._replace(decisions=batch["decisions"]), recipe.group, asked=asked)

        def play(starts: Starts, key) -> EpisodeRollout:
            rollout = world.play(act, params, starts, key, acting)
            return rollout._replace(played=counts(rollout, of))

        rollout = play(Starts(batch["seed"], batch["task"]), key)
        if "more" not in batch:
            return rollout
        keys = (jax.random.fold_in(key, _REFILLS + number) for number in range(len(batch["more"])))
        low, high = recipe.kept
        return refill.fill(rollout, map(play, batch["more"], keys), size=recipe.group, low=low, high=high)

    return sample


def of_suites(world: World, suites: Sequence[str]) -> dict[str, np.ndarray]:
    """Which tasks are of each suite, `[tasks]` bool; nothing where there is but one."""
    return {suite: np.array([task.suite == suite for task in world.tasks]) for suite in suites if len(suites) > 1}


@jax.jit
def counts(rollout: EpisodeRollout, of_suites: Mapping[str, Array]) -> dict[str, Array]:
    """By episode `[B]`: itself, success, actions in the environment, decisions; how often it was begun again, where
    simulators can fail; and for every suite whether it is of it, and a success."""
    found = {
        "episodes": jnp.ones_like(rollout.success),
        "succeeded": rollout.success,
        "environment_steps": rollout.length,
        "decisions": rollout.counted.any(-1).sum(1),
    }
    if rollout.redone is not None:
        found |= dict(zip(REDONE, rollout.redone.T))
    for suite, tasks in of_suites.items():
        own = tasks[rollout.task].astype(jnp.float32)
        found |= {f"episodes_{suite}": own, f"succeeded_{suite}": own * rollout.success}
    return {name: value.astype(jnp.float32) for name, value in found.items()}


def counting(update):
    """The update, with sums of `played` in every metric line; `success` is that of all that was played."""

    def counted(state, rollout, labels, key):
        cost = _cost(rollout.played) if rollout.played else {}
        state, metrics = update(state, rollout._replace(played=None), labels, key)
        return state, metrics | cost

    return counted


@jax.jit
def _cost(played: dict[str, Array]) -> dict[str, Array]:
    sums = {name: value.sum() for name, value in played.items()}
    return sums | {"success": sums["succeeded"] / sums["episodes"]}
