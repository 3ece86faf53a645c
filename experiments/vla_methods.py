"""Robot policies as four functions: episodes of the student, the expert at every state of them, one update."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from experiments.recipes import update_of
from experiments.vla_episodes import acted, counting
from experiments.vla_worlds import World
from opd_jax import optim
from opd_jax.losses import policy_gradient, vla_opd
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.models import action_tokens
from opd_jax.sampling.episodes import Plan
from opd_jax.types import ActionLabels, ActionTokens, EpisodeRollout, Method, PyTree

EXPERT = "expert"  # a teacher: what the world's own expert does
GIVEN = "given"  # another: the policy of the directory `teacher.path`


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
        sample = acted(world, drawn(acting), recipe, plan, asked, suites)
        said = label if recipe.teacher == EXPERT else network_labels(policy_fn, recipe.micro_batches * recipe.updates)
        return Method(sample, jax.jit(reward_labels) if by_success else said, counting(update)), optimizer

    init = lambda key, observation: module.init(key, observation)["params"]
    return Policy(init, greedy(policy_fn), imitation, on_policy)


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
