"""Robot policies as four functions: episodes of the student, the expert at every state of them, one update."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from experiments import stages
from experiments.recipes import update_of
from opd_jax import optim
from opd_jax.config import ConfigError
from opd_jax.losses import policy_gradient, vla_opd
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.models import action_tokens
from opd_jax.models.vla import Observation
from opd_jax.sampling.episodes import Plan
from opd_jax.types import ActionLabels, ActionTokens, EpisodeRollout, Method, PyTree

EXPERT = "expert"  # a teacher: what the world's own expert does
GIVEN = "given"  # another: the policy of the directory `teacher.path`
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


# ---- policies that act -----------------------------------------------------------------------------------------------


def logits_fn(module: nn.Module) -> Partial:
    """`policy_fn(params, observation) -> logits [B, H, A, K]`. Made once: jit knows a function by identity."""
    return Partial(functools.partial(_logits, module))


def _logits(module, params, observation):
    return module.apply({"params": params}, observation)


def cooled(policy_fn: Partial, temperature: float) -> Partial:
    """The policy with its logits divided by a temperature."""
    return Partial(_cooled, temperature, policy_fn)


def _cooled(temperature, policy_fn, params, observation):
    return policy_fn(params, observation) / temperature


def drawn(policy_fn: Partial) -> Partial:
    """What `episodes.rollout` takes: bins drawn from a policy."""
    return Partial(_drawn, policy_fn)


def greedy(policy_fn: Partial) -> Partial:
    """The same with the most probable bins."""
    return Partial(_greedy, policy_fn)


def _drawn(policy_fn, params, observation, keys):
    logits = policy_fn(params, observation)
    return _taken(logits, jax.vmap(jax.random.categorical)(keys, logits))


def _greedy(policy_fn, params, observation, keys):
    logits = policy_fn(params, observation)
    return _taken(logits, jnp.argmax(logits, -1))


def _taken(logits, tokens):
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return ActionTokens(tokens.astype(jnp.int32), own), action_tokens.decode(tokens)


# ---- labels ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("chunks", "steps", "sigma", "floor"))
def _expert_labels(states, *, chunks: Callable, steps: int, sigma: float, floor: float) -> ActionLabels:
    return ActionLabels(action_tokens.expert_logits(chunks(states, steps), sigma, floor))


def expert_labels(world: World, steps: int, sigma: float, floor: float = 0.0):
    """`Method.label`: the scripted expert's chunk from every state, as a distribution over bins."""
    how = {"chunks": world.chunks, "steps": steps, "sigma": sigma, "floor": floor}
    return lambda _, rollout: _expert_labels(rollout.states, **how)


@functools.partial(jax.jit, static_argnums=0)
def _network_labels(parts, policy_fn, params, rollout) -> ActionLabels:
    decisions = rollout.counted.shape[1]

    def label(observation):
        flat = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * decisions, *leaf.shape[2:]), observation)
        logits = policy_fn(params, flat)
        return logits.reshape(-1, decisions, *logits.shape[1:])

    return ActionLabels(optim.in_parts(label, rollout.observation, parts))


def network_labels(policy_fn: Partial, parts: int = 1):
    """`Method.label`: a teacher that is a policy itself, `(teacher_params, rollout)`; episodes in parts, for memory."""
    return functools.partial(_network_labels, parts, policy_fn)


def reward_labels(_, rollout: EpisodeRollout) -> RewardLabels:
    """`Method.label` of GRPO: success, against the other episodes of the same initial state."""
    count = rollout.group.shape[0]
    advantage = policy_gradient.group_advantages(rollout.success, rollout.group, count, global_std=False)
    return RewardLabels(advantage, reward=rollout.success)


# ---- methods ---------------------------------------------------------------------------------------------------------


def counting(update, of_suites: Mapping[str, np.ndarray]):
    """The update, with what it has cost in every metric line: actions in the environment, decisions labelled, and
    episodes begun again, where simulators can fail; and of every suite its episodes and those that succeeded."""

    def counted(state, rollout, labels, key):
        counts = _cost(rollout) | _by_suite(rollout, of_suites)
        state, metrics = update(state, rollout, labels, key)
        return state, metrics | counts

    return counted


REDONE = ("redone", "redone_beside")  # metrics: episodes begun again that failed; that were beside one that did


@jax.jit
def _cost(rollout: EpisodeRollout) -> dict[str, Array]:
    cost = {"environment_steps": rollout.length.sum(), "decisions": rollout.counted.any(-1).sum()}
    if rollout.redone is not None:
        cost |= dict(zip(REDONE, rollout.redone.sum(0)))
    return {name: value.astype(jnp.float32) for name, value in cost.items()}


def of_suites(world: World, suites: Sequence[str]) -> dict[str, np.ndarray]:
    """Which tasks are of each suite, `[tasks]` bool; nothing where there is but one."""
    return {suite: np.array([task.suite == suite for task in world.tasks]) for suite in suites if len(suites) > 1}


@jax.jit
def _by_suite(rollout: EpisodeRollout, of_suites: dict[str, Array]) -> dict[str, Array]:
    own = {suite: tasks[rollout.task].astype(jnp.float32) for suite, tasks in of_suites.items()}
    episodes = {f"episodes_{suite}": its.sum() for suite, its in own.items()}
    return episodes | {f"succeeded_{suite}": (its * rollout.success).sum() for suite, its in own.items()}


class Policy(NamedTuple):
    """A class of policies, and how one is made: `(Method, optimizer)` for a recipe."""

    init: Callable[..., PyTree]  # (key, observation) -> params
    greedy: Partial  # as it acts in evaluation
    imitation: Callable[..., tuple]
    on_policy: Callable[..., tuple]


def bins(world: World, plan: Plan, sigma: float, floor: float, suites: Sequence[str] = ()) -> Policy:
    """Policies over action bins, the paper's: distilled from the expert's distribution, or trained by success alone.

    Args:
        suites: whose episodes and successes are counted apart, where there are several.
    """
    module = world.module
    policy_fn, label = logits_fn(module), expert_labels(world, module.horizon, sigma, floor)
    count = functools.partial(counting, of_suites=of_suites(world, suites))

    def imitation(recipe):
        update, optimizer = update_of(vla_opd.supervise(policy_fn, "forward_kl"), recipe)
        shown = jax.jit(lambda rollout: ActionLabels(action_tokens.expert_logits(rollout.states, sigma, floor)))
        return Method(lambda _, batch, key: as_rollout(batch), lambda _, rollout: shown(rollout), update), optimizer

    def on_policy(recipe):
        temperatures = {
            "student_temperature": recipe.temperature,
            "teacher_temperature": recipe.teacher_temperature,
            "acting_temperature": recipe.acting_temperature,
        }
        by_success, acting = recipe.method == "grpo", cooled(policy_fn, recipe.acting_temperature)
        supervise = (
            vla_opd.grpo(acting) if by_success else vla_opd.supervise(policy_fn, recipe.objective, **temperatures)
        )
        update, optimizer = update_of(supervise, recipe)
        asked = module.horizon if recipe.teacher == EXPERT and not by_success else 0
        sample = acted(world, drawn(acting), recipe, plan, asked)
        said = label if recipe.teacher == EXPERT else network_labels(policy_fn, recipe.micro_batches)
        return Method(sample, jax.jit(reward_labels) if by_success else said, count(update)), optimizer

    init = lambda key, observation: module.init(key, observation)["params"]
    return Policy(init, greedy(policy_fn), imitation, on_policy)


def acted(world: World, act: Partial, recipe, plan: Plan, asked: int):
    """`Method.sample`: episodes from a batch of initial states, `recipe.group` of each."""

    def sample(params, batch, key):
        acting = Acting(plan._replace(decisions=batch["decisions"]), recipe.group, asked=asked)
        return world.play(act, params, Starts(batch["seed"], batch["task"]), key, acting)

    return sample


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


@jax.jit
def as_rollout(batch: dict[str, Any]) -> EpisodeRollout:
    """Demonstrated steps as episodes of one decision; `states` are the actions."""
    one = lambda leaf: leaf[:, None]
    actions = batch["actions"]
    drawn = ActionTokens(one(action_tokens.encode(actions)), jnp.zeros(one(actions).shape))
    count = batch["counted"].sum(-1).astype(jnp.int32)
    index = jnp.arange(len(count), dtype=jnp.int32)
    success = jnp.ones(len(count), jnp.float32)
    return EpisodeRollout(
        jax.tree.map(one, batch["observation"]), drawn, one(batch["counted"]), success, count, index, batch["task"],
        one(actions),
    )  # fmt: skip
