"""A world of robot policies: tasks, scenes to begin in, episodes of a policy, demonstrations of an expert."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from experiments import stages
from opd_jax.config import ConfigError
from opd_jax.models.vla import Observation
from opd_jax.sampling.episodes import Plan
from opd_jax.types import EpisodeRollout, PyTree

PRACTISED = "practised"  # a `base`: what `practice` of the config makes


class Acting(NamedTuple):
    """How a policy acts: static."""

    plan: Plan
    group: int = 1  # episodes of each initial state
    split: str = "train"
    asked: int = 0  # actions of the expert's chunk at every decision, where it has to be asked at once


class Starts(NamedTuple):
    """Where episodes begin; the same (seed, task) is the same scene."""

    seed: Array  # [B] uint32
    task: Array  # [B]


class Task(Protocol):
    """One task of a world."""

    name: str
    suite: str
    instruction: str
    horizon: int  # steps


class Demonstrations(NamedTuple):
    """Steps of the expert's episodes, a row each: what it saw, and what it did from there on."""

    observation: Any  # leaves [N, ...]
    actions: Float[np.ndarray, "N H A"]
    counted: np.ndarray  # [N, H] bool: before the end of the episode
    task: np.ndarray  # [N]

    def row(self, index: int) -> dict[str, Any]:
        return {
            "observation": jax.tree.map(lambda leaf: leaf[index], self.observation),
            "actions": self.actions[index],
            "counted": self.counted[index],
            "task": self.task[index],
        }


class World(Protocol):
    """What the experiment needs beside its settings: tasks, a policy's module, episodes, and an expert if there is one.

    `vla_tabletop.Tabletop` is the embedded one; `vla_host.MetaWorld` and `vla_host.Libero` are simulators in processes.
    A task's number is its place in `tasks`. Actions are normalised, in [-1, 1], outside a world.
    """

    SUITES: tuple[str, ...]  # that may be chosen
    tasks: Sequence[Task]
    module: nn.Module  # of policies: `vla.Vla`, or one with its `__call__`
    example: Observation  # [1, ...]
    expert: bool  # whether there is one
    goal: str  # when an episode is a success, for the report
    settle: int  # steps without the policy at first
    identity: dict[str, Any]  # what a stage depends on beside its settings and the tasks; {} where nothing else is
    upstream: tuple[str, ...]  # hashes of the parameters that students begin with
    teacher: stages.Made | None  # the policy `GIVEN`
    redone: np.ndarray  # [2], as a rollout's: all episodes beside those of training, which have it in their metrics

    def __init__(self, config, mesh): ...
    @staticmethod
    def catalogue(config) -> Sequence[Task]: ...  # `tasks`, before anything is loaded
    @staticmethod
    def mistakes(config) -> list[str]: ...  # before anything is loaded, a line each

    def first(self, init: Callable, key) -> PyTree: ...  # parameters that a student begins with
    def starts(self, tasks, seed: int, split: str = "train", pad: bool = False) -> Starts:
        """One scene for each entry of `tasks`; padded by repetition to what the devices divide, where asked."""

    def play(self, act: Partial, params, starts: Starts, key, acting: Acting) -> EpisodeRollout: ...
    def chunks(self, states: PyTree, steps: int) -> Array: ...  # of the expert, [B, T, steps, A]; traceable, static
    def demonstrations(self, tasks, count: int, seed: int) -> Demonstrations: ...  # `count` successes of each task
    def practice(self, tasks, count: int, seed: int) -> Demonstrations: ...  # where `base` may be practised
    def expert_success(self, asked, seed: int) -> np.ndarray: ...  # of an episode for each task asked, test scenes
    def expert_film(self, tasks, starts: Starts, key, chosen: np.ndarray, executed: int) -> np.ndarray: ...
    def film(self, rollout: EpisodeRollout, starts: Starts, actions: Array, chosen: np.ndarray) -> np.ndarray:
        """`[n, T, H, W, 3]` bytes of the chosen episodes, cameras side by side; `actions` `[B, S, A]` are all of it."""


def horizons(world: World) -> np.ndarray:
    """Steps of every task."""
    return np.array([task.horizon for task in world.tasks])


def decisions_of(world: World, tasks, executed: int) -> int:
    """Decisions until the longest of the tasks is over."""
    return -(-int(horizons(world)[np.asarray(tasks)].max()) // executed)


PATIENCE = 50  # episodes of a task that an expert may fail in before its first success


def collected(play: Callable, world: World, tasks, count: int, seed: int) -> Demonstrations:
    """`count` successful episodes of each task; where the expert fails, another scene is tried.

    Args:
        play: `(tasks, seed) -> EpisodeRollout` of the expert in as many of these tasks, from the first on, as it likes.

    Raises:
        ConfigError: the expert fails in every one of `PATIENCE` episodes of a task.
    """
    found, missing, tried = [], dict.fromkeys(tasks, count), dict.fromkeys(tasks, 0)
    while any(missing.values()):
        asked = [task for task, left in missing.items() for _ in range(left)]
        rollout = play(asked, seed)
        found.append(as_demonstrations(rollout, world.module.horizon))
        for task, good in zip(asked, rollout.success):
            missing[task] -= int(good)
            tried[task] += 1
        for task, often in tried.items():
            if missing[task] == count and often >= PATIENCE:
                name, steps = world.tasks[task].name, world.tasks[task].horizon
                says = f"{name}: its expert fails in all of {often} episodes of {steps} steps and shows nothing"
                raise ConfigError(f"{says}; give a longer horizon, or leave the task out")
        seed += 1
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def as_demonstrations(rollout: EpisodeRollout, horizon: int) -> Demonstrations:
    """Every executed step of successful episodes, with the `horizon` actions that were executed from it on."""
    good = np.asarray(rollout.success) > 0
    live = np.asarray(rollout.counted)[good, :, 0]
    actions = np.asarray(rollout.drawn)[good]
    steps = actions.shape[1]

    def windows(array):
        padded = np.pad(array, ((0, 0), (0, horizon)) + ((0, 0),) * (array.ndim - 2))
        return np.stack([padded[:, h : h + steps] for h in range(horizon)], 2)

    keep = lambda array: np.asarray(array)[good][live]
    task = np.broadcast_to(np.asarray(rollout.task)[good][:, None], live.shape)
    seen = jax.tree.map(keep, rollout.observation[0])
    return Demonstrations(seen, windows(actions)[live], windows(live)[live], task[live].astype(np.int32))
