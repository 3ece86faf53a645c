"""Robot policies as four functions: episodes of the student, the expert at every state of them, one update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from opd_jax import optim, rng
from opd_jax.losses import policy_gradient, vla_opd
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.models import action_tokens
from opd_jax.models.vla import Observation
from opd_jax.sampling import episodes
from opd_jax.sampling.episodes import Plan
from opd_jax.types import ActionLabels, ActionTokens, EpisodeRollout, Method, PyTree
from opd_jax.worlds import tabletop

INSTRUCTIONS = jnp.array(np.stack([tabletop.encode(task.instruction) for task in tabletop.TASKS]))
EXPERT = "expert"
HORIZONS = np.array([task.horizon for task in tabletop.TASKS])


class Table:
    """The tabletop as a policy sees it: with its instruction."""

    def step(self, state, action):
        return tabletop.step(state, action)

    def success(self, state):
        return tabletop.success(state)

    def observe(self, state) -> Observation:
        seen = tabletop.observe(state)
        return Observation(seen.images, seen.proprioception, INSTRUCTIONS[state.task])


class Shown(Table):
    """The same with what the expert does: for demonstrations."""

    def observe(self, state):
        return super().observe(state), tabletop.expert(state)


TABLE, SHOWN = Table(), Shown()


class Acting(NamedTuple):
    """How a policy acts: static."""

    plan: Plan
    group: int = 1  # episodes of each initial state
    split: str = "train"


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


# ---- episodes --------------------------------------------------------------------------------------------------------


def decisions_of(tasks, executed: int) -> int:
    """Decisions until the longest of the tasks is over."""
    return -(-int(HORIZONS[np.asarray(tasks)].max()) // executed)


class Starts(NamedTuple):
    """Where episodes begin; the same (seed, task) is the same scene."""

    seed: Array  # [B] uint32
    task: Array  # [B]


@functools.partial(jax.jit, static_argnames=("group", "split"))
def _begin(starts: Starts, key, *, group: int, split: str):
    """First states, the key of each episode, and its scene and task. By itself: it is long in compiling."""
    first = jax.vmap(lambda seed, task: tabletop.reset(jax.random.key(seed), task, split))(*starts)
    scene = jnp.arange(len(starts.task), dtype=jnp.int32)
    first, scene, task = jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=0), (first, scene, starts.task))
    keys = rng.per_record(key, len(scene))
    first = first._replace(key=jax.vmap(jax.random.fold_in, (0, None))(keys, 2**31 - 1))  # disturbances of its own
    return first, keys, scene, task


@functools.partial(jax.jit, static_argnames=("environment", "plan"))
def _go_on(act_fn, params, first, keys, scene, task, *, environment: Table, plan: Plan) -> EpisodeRollout:
    how = {"plan": plan, "horizon": jnp.asarray(HORIZONS)[task], "group": scene, "task": task}
    return episodes.rollout(environment, act_fn, params, first, keys, **how)


def _play(act_fn, params, starts: Starts, key, *, environment: Table, acting: Acting) -> EpisodeRollout:
    begun = _begin(starts, key, group=acting.group, split=acting.split)
    return _go_on(act_fn, params, *begun, environment=environment, plan=acting.plan)


def play(act: Partial, params, starts: Starts, key, acting: Acting) -> EpisodeRollout:
    """Episodes of a policy on the table."""
    return _play(act, params, starts, key, environment=TABLE, acting=acting)


def _shown(params, observation, keys):
    return observation[1], observation[1][:, None]


def demonstrate(starts: Starts, key, steps: int, split: str = "train") -> EpisodeRollout:
    """Episodes of the expert, an observation and an action at every step."""
    return _play(Partial(_shown), None, starts, key, environment=SHOWN, acting=Acting(Plan(steps, 1), split=split))


# ---- labels ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("steps", "sigma", "floor"))
def _expert_labels(states, *, steps: int, sigma: float, floor: float) -> ActionLabels:
    plans = episodes.expert_chunks(states, environment=TABLE, expert=tabletop.expert, steps=steps)
    return ActionLabels(action_tokens.expert_logits(plans, sigma, floor))


def expert_labels(steps: int, sigma: float, floor: float = 0.0):
    """`Method.label`: the scripted expert's chunk from every state, as a distribution over bins."""
    return lambda _, rollout: _expert_labels(rollout.states, steps=steps, sigma=sigma, floor=floor)


@jax.jit
def _network_labels(policy_fn, params, rollout) -> ActionLabels:
    batch, decisions = rollout.counted.shape[:2]
    flat = jax.tree.map(lambda leaf: leaf.reshape(batch * decisions, *leaf.shape[2:]), rollout.observation)
    logits = policy_fn(params, flat)
    return ActionLabels(logits.reshape(batch, decisions, *logits.shape[1:]))


def network_labels(policy_fn: Partial):
    """`Method.label`: a teacher that is a policy itself, `(teacher_params, rollout)`."""
    return functools.partial(_network_labels, policy_fn)


def reward_labels(_, rollout: EpisodeRollout) -> RewardLabels:
    """`Method.label` of GRPO: success, against the other episodes of the same initial state."""
    count = rollout.group.shape[0]
    advantage = policy_gradient.group_advantages(rollout.success, rollout.group, count, global_std=False)
    return RewardLabels(advantage, reward=rollout.success)


# ---- methods ---------------------------------------------------------------------------------------------------------


def counting(update):
    """The update, with what it has cost in every metric line: actions in the environment, decisions labelled."""

    def counted(state, rollout, labels, key):
        cost = _cost(rollout)
        state, metrics = update(state, rollout, labels, key)
        return state, metrics | cost

    return counted


@jax.jit
def _cost(rollout: EpisodeRollout) -> dict[str, Array]:
    return {
        "environment_steps": rollout.length.sum().astype(jnp.float32),
        "decisions": rollout.counted.any(-1).sum().astype(jnp.float32),
    }


class Policy(NamedTuple):
    """A class of policies, and how one is made: `(Method, optimizer)` for a recipe."""

    init: Callable[..., PyTree]  # (key, observation) -> params
    greedy: Partial  # as it acts in evaluation
    imitation: Callable[..., tuple]
    on_policy: Callable[..., tuple]


def bins(module: nn.Module, plan: Plan, sigma: float, floor: float) -> Policy:
    """Policies over action bins, the paper's: distilled from the expert's distribution, or trained by success alone."""
    policy_fn, label = logits_fn(module), expert_labels(module.horizon, sigma, floor)

    def imitation(recipe):
        update, optimizer = update_of(vla_opd.supervise(policy_fn, "forward_kl"), recipe)
        shown = jax.jit(lambda rollout: ActionLabels(action_tokens.expert_logits(rollout.states, sigma, floor)))
        return Method(lambda _, batch, key: as_rollout(batch), lambda _, rollout: shown(rollout), update), optimizer

    def on_policy(recipe):
        temperatures = {"student_temperature": recipe.temperature, "teacher_temperature": recipe.teacher_temperature}
        by_success, acting = recipe.method == "grpo", cooled(policy_fn, recipe.acting_temperature)
        supervise = (
            vla_opd.grpo(acting) if by_success else vla_opd.supervise(policy_fn, recipe.objective, **temperatures)
        )
        update, optimizer = update_of(supervise, recipe)
        sample = acted(drawn(acting), recipe, plan)
        said = label if recipe.teacher == EXPERT else network_labels(policy_fn)
        return Method(sample, jax.jit(reward_labels) if by_success else said, counting(update)), optimizer

    init = lambda key, observation: module.init(key, observation)["params"]
    return Policy(init, greedy(policy_fn), imitation, on_policy)


def acted(act: Partial, recipe, plan: Plan):
    """`Method.sample`: episodes from a batch of initial states, `recipe.group` of each."""

    def sample(params, batch, key):
        acting = Acting(plan._replace(decisions=batch["decisions"]), recipe.group)
        return play(act, params, Starts(batch["seed"], batch["task"]), key, acting)

    return sample


def update_of(supervise, recipe) -> tuple:
    optimizer = optim.adamw(
        recipe.learning_rate,
        warmup=recipe.warmup,
        decay=(recipe.steps, recipe.decay_steps) if recipe.decay_steps else None,
        weight_decay=recipe.weight_decay,
    )
    update = optim.dense(supervise, optimizer, micro_batches=recipe.micro_batches, ema_decay=recipe.ema_decay)
    return update, optimizer


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


def as_demonstrations(rollout: EpisodeRollout, horizon: int) -> Demonstrations:
    """Every executed step of successful episodes, with the `horizon` actions that were executed from it on."""
    good = np.asarray(rollout.success) > 0
    live = np.asarray(rollout.counted)[good, :, 0]
    actions = np.asarray(rollout.drawn)[good]
    windows = lambda array: np.stack(
        [np.pad(array[:, h:], ((0, 0), (0, h)) + ((0, 0),) * (array.ndim - 2)) for h in range(horizon)], 2
    )
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
