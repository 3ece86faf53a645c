"""The methods of the flow domain as four functions each: Flow-OPD, Flow-GRPO and distillation on teachers' pictures.

The student is an adapter on a frozen backbone, so are the teachers; every function here takes adapters as parameters.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments import stages
from experiments.recipes import update_of
from opd_jax import hosts, optim, rng
from opd_jax.losses import advantage_matching, flow_matching, flow_opd, policy_gradient
from opd_jax.losses.advantage_matching import SampledAgain
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.models import lora
from opd_jax.rewards import combination
from opd_jax.sampling import flow
from opd_jax.types import FlowLabels, FlowRollout, Method


class World(Protocol):
    """What the experiment needs beside its settings: a frozen model, prompts, pictures, and what is known of them.

    `scenes.Scenes` is the embedded one, `latents.Pipeline` a Stable Diffusion 3 directory of the user's. A batch is
    `{"condition": leaves [B, ...], "task": [B]}`; a record of the i-th of the tasks asked for has task i.
    """

    base: stages.Made
    identity: str  # hash of all that a stage depends on beside its settings
    model: Any  # the module of the base
    shape: tuple[int, int, int]  # of what flows: a picture, or a latent
    velocity: Partial  # velocity_fn(adapter, x, t, condition): the base wearing one adapter
    routed: Partial  # velocity_fn(adapters, x, t, (condition, task)): every record by the adapter of its task
    own_rewards: tuple[str, ...]  # that need no judge of the config
    splits: tuple[str, ...]  # of prompts that models are judged on
    shown: int  # pictures of each task in the report
    note: str  # under the report's heading
    example: str  # a prompt for experiments/sample.py

    def __init__(self, config, workdir, mesh, about: dict): ...  # about: what is written into the file of a stage
    @staticmethod
    def tasks(config) -> tuple[str, ...]: ...  # that it has prompts of
    @staticmethod
    def mistakes(config) -> list[str]: ...  # before anything is loaded, a line each

    def prompts(self, tasks: Sequence[str], batch_size: int, seed: int) -> Iterator: ...  # endless batches to train on
    def pairs(self, tasks: Sequence[str], batch_size: int, seed: int) -> Iterator: ...  # with clean pictures, if any
    def held_out(self, count: int, seed: int, test: bool = True) -> dict[str, list[str]]: ...
    def texts(self, condition: Any) -> list[str]: ...  # prompts of a batch on the devices
    def metadata(self, texts: Sequence[str]) -> list[dict | None] | None: ...  # for judges
    def decode(self, x: jax.Array) -> jax.Array: ...  # pictures in [-1, 1]
    def pictures(self, adapter: Any, texts: Sequence[str], **sampler: Any) -> np.ndarray: ...
    def reward(self, name: str, images: np.ndarray, texts: Sequence[str]) -> np.ndarray: ...  # one of its own
    def score(self, images: dict, texts: dict, judged: Callable) -> tuple[dict, dict]: ...  # rewards, and what else


def adapted_velocity(model, scale: float, backbone, encode: Callable, merged: bool = True) -> Partial:
    """`velocity_fn(adapter, x, t, condition)`: the backbone wearing one adapter.

    Args:
        encode: what the model is given of a condition, beside state and time.
        merged: whether the adapter is added to the weights, which is faster where they are float32 and few, or is
            computed beside them, which loses nothing where they are bfloat16.
    """
    return Partial(functools.partial(_adapted, model, scale, encode, merged), backbone)


def _adapted(model, scale, encode, merged, backbone, adapter, x, t, condition):
    if adapter and not merged:
        return lora.apply(model, backbone, adapter, scale, x, t, *encode(condition))
    params = lora.merge(backbone, adapter, scale) if adapter else backbone
    return model.apply({"params": params}, x, t, *encode(condition))


def routed_velocity(
    model, scale: float, backbone, encode: Callable, guidance: float = 1.0, null_condition=None
) -> Partial:
    """`velocity_fn(adapters, x, t, (condition, task))`: every record by the teacher of its task, in one forward.

    Guidance is here, as `flow.guided` would give a record's unconditional half the task of the null condition.
    """
    return Partial(functools.partial(_routed, model, scale, encode, guidance), backbone, null_condition)


def _routed(model, scale, encode, guidance, backbone, null_condition, adapters, x, t, condition):
    condition, task = condition

    def velocity(task, x, t, condition):
        return lora.routed_apply(model, backbone, adapters, task, scale, x, t, *encode(condition))

    task = task if guidance == 1 else jnp.concatenate([task, task])
    return flow.guided(velocity, null_condition, guidance)(task, x, t, condition)


class Sampling(NamedTuple):
    """How a path is sampled: hashable, so that it can be a static argument."""

    kind: str
    steps: int
    shift: float
    double_shift: bool
    noise_level: float
    shape: tuple[int, int, int]
    group: int  # paths for each prompt
    parts: int  # that a batch is sampled and labelled in, one after the other, to bound memory
    window: int = 0  # this many consecutive steps of the first half are stochastic, the rest an ODE's; 0: all are
    same_start: bool = False  # all paths of a prompt begin at one noise, and differ by the stochastic steps alone


@functools.partial(jax.jit, static_argnums=0)
def _sample_paths(sampling: Sampling, velocity_fn, params, batch, key):
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, sampling.group, axis=0), batch)
    count, shape = batch["task"].shape[0], sampling.shape
    times = flow.time_grid(sampling.steps, sampling.shift, sampling.double_shift)
    levels = jnp.full(sampling.steps, sampling.noise_level)
    if sampling.window:
        levels = flow.sde_window(rng.at_step(key, 1), sampling.steps, sampling.window, sampling.noise_level)
    keys, start = rng.per_record(rng.at_step(key, 0), count), None
    if sampling.same_start:
        prompts = rng.per_record(rng.at_step(key, 2), count // sampling.group)
        start = jnp.repeat(jax.vmap(lambda k: jax.random.normal(k, shape))(prompts), sampling.group, axis=0)

    def sample(part):
        condition, keys, start = part
        return flow.sample(velocity_fn, params, condition, keys, shape, times, levels, sampling.kind, start)

    path = optim.in_parts(sample, (batch["condition"], keys, start), sampling.parts)
    return flow.as_rollout(path, batch["condition"], batch["task"], jnp.arange(count) // sampling.group, times, levels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _label_states(with_anchor: bool, parts: int, teachers, anchor, params, rollout):
    adapters, anchor_adapter = params
    states, times = rollout.states[:, :-1], rollout.times[0, :-1]

    def label(part):
        condition, task, states = part
        routed = flow.velocities(teachers, adapters, (condition, task), states, times)
        if not with_anchor:
            return FlowLabels(routed)
        return FlowLabels(routed, flow.velocities(anchor, anchor_adapter, condition, states, times))

    return optim.in_parts(label, (rollout.condition, rollout.task, states), parts)


@functools.partial(jax.jit, static_argnums=0)
def _reference_velocities(parts: int, velocity_fn, params, rollout):
    """What the adapter that a specialist started from would have done at the states that the update visits."""

    def reference(part):
        if isinstance(part, SampledAgain):
            return advantage_matching.copy_velocities(velocity_fn, params, part)
        return flow.velocities(velocity_fn, params, part.condition, part.states[:, :-1], part.times[0, :-1])

    return optim.in_parts(reference, rollout, parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample_again(sampling: Sampling, draws: int, center: float, spread: float, velocity_fn, params, batch, key):
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, sampling.group, axis=0), batch)
    condition, count = batch["condition"], batch["task"].shape[0]
    images = _generate(sampling, velocity_fn, params, condition, rng.per_record(rng.at_step(key, 0), count))
    group, keys = jnp.arange(count) // sampling.group, rng.per_record(rng.at_step(key, 1), count)
    return advantage_matching.noised_again(images, condition, batch["task"], group, keys, draws, center, spread)


@functools.partial(jax.jit, static_argnums=0)
def _noise_teacher_pictures(sampling: Sampling, teachers, adapters, _, batch, key):
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, sampling.group, axis=0), batch)
    keys = rng.per_record(rng.at_step(key, 0), batch["task"].shape[0])
    images = _generate(sampling, teachers, adapters, (batch["condition"], batch["task"]), keys)
    return flow_matching.noised(images, batch["condition"], rng.per_record(rng.at_step(key, 1), len(images)))


def _generate(sampling: Sampling, velocity_fn, params, condition, keys):
    times = flow.time_grid(sampling.steps, sampling.shift, sampling.double_shift)
    generate = lambda part: flow.generate(velocity_fn, params, *part, sampling.shape, times)
    return optim.in_parts(generate, (condition, keys), sampling.parts)


def _parts(recipe) -> int:
    """That an update goes through its records in; so do sampling and labels, whose memory is of the same order."""
    return recipe.micro_batches * recipe.get("updates", 1)


def opd_update(student: Partial, recipe, config) -> tuple:
    """Flow-OPD's update and its optimiser. `recipe` is an arm: estimator, weighting, anchor weight, sizes."""
    return update_of(
        flow_opd.ESTIMATORS[recipe.estimator](
            student, weighting=recipe.weighting, kind=config.sampler.kind, anchor_weight=recipe.anchor_weight
        ),
        recipe,
    )


def opd_method(world: World, update, config, recipe) -> Method:
    """Flow-OPD. `teacher_params` is `(adapters in the order of the tasks, the anchor's adapter)`."""
    sampling = Sampling(**config.sampler, shape=world.shape, group=recipe.group, parts=_parts(recipe))
    sample = functools.partial(_sample_paths, sampling, world.velocity)
    label = functools.partial(_label_states, recipe.anchor_weight > 0, sampling.parts, world.routed, world.velocity)
    return Method(sample, label, update)


def grpo_update(student: Partial, recipe) -> tuple:
    """The update of a specialist and its optimiser, by either form of group-relative policy optimisation."""
    if recipe.method == "awm":
        return update_of(advantage_matching.supervise(student, beta=recipe.awm.beta), recipe)
    names = ("kind", "clip", "window", "beta", "balanced", "weighting")
    own = {name: recipe.flow_grpo[name] for name in names if name in recipe.flow_grpo}
    return update_of(policy_gradient.grpo(student, normalize=False, **own), recipe)


class Own(NamedTuple):
    """A reward of the world's own, in the place of a judge at work: it is computed when it is asked for."""

    reward: Callable[..., np.ndarray]
    what: tuple  # its arguments

    def collect(self) -> combination.Combined:
        score = self.reward(*self.what)
        return combination.Combined(score, ~np.isnan(score), {})

    def keep(self) -> None:
        """Nothing: it is computed again."""


def grpo_method(world: World, rewards: Sequence[str], update, config, recipe, judge: Callable) -> Method:
    """A specialist's method: `rewards[task]` judges a record of that task, against its group.

    `judge(name, images, texts)` begins and returns at once; `collect().score` of what it returns is the reward, NaN
    where it is unknown. So the judges of all tasks work side by side. `teacher_params` is the adapter it started from,
    to which it is held.
    """

    def judged(images, task, texts):
        reward, begun = np.zeros(len(texts), np.float32), []
        for index, name in enumerate(rewards):
            mine = np.flatnonzero(task == index)
            if mine.size:
                begun.append((mine, judge(name, images[mine], [texts[i] for i in mine])))
        try:
            for mine, pending in begun:
                reward[mine] = pending.collect().score
        except BaseException:
            for _, pending in begun:
                pending.keep()  # what the others have scored, for the run that is resumed
            raise
        return reward

    def label(start, rollout):
        velocity = reference(start, visited(rollout, recipe)) if reference else None
        images, task = hosts.fetch((world.decode(drawn(rollout)), rollout.task))
        texts = world.texts(rollout.condition)
        reward = jnp.asarray(hosts.from_first(lambda: judged(images, task, texts), (len(texts),)))
        group = jnp.asarray(hosts.fetch(rollout.group))  # one device, no collective
        advantage = policy_gradient.group_advantages(reward, group, len(texts) // recipe.group)
        reward = jnp.where(jnp.isnan(reward), jnp.nanmean(reward), reward)  # as it is logged
        advantage, reward = jax.device_put((advantage, reward), rollout.task.sharding)
        return RewardLabels(advantage, velocity, reward)

    reference = held_to(world, recipe)
    sampling = Sampling(**config.sampler, shape=world.shape, group=recipe.group, parts=_parts(recipe))
    if recipe.method == "awm":
        own = recipe.awm
        times = own.draws, own.time_center, own.time_spread
        return Method(functools.partial(_sample_again, sampling, *times, world.velocity), label, update)
    sampling = sampling._replace(**{name: recipe.flow_grpo[name] for name in ("kind", "noise_level", "same_start")})
    if recipe.flow_grpo.window < sampling.steps - 1:  # else all are stochastic and the first are trained, as published
        sampling = sampling._replace(window=recipe.flow_grpo.window)
    return Method(functools.partial(_sample_paths, sampling, world.velocity), label, update)


def drawn(rollout: FlowRollout | SampledAgain):
    """What is decoded and judged."""
    return rollout.image if isinstance(rollout, SampledAgain) else rollout.states[:, -1]


def visited(rollout: FlowRollout | SampledAgain, recipe):
    """The states that a specialist's update evaluates."""
    if isinstance(rollout, SampledAgain):
        return rollout
    return policy_gradient.window_of(rollout, recipe.flow_grpo.window)


def held_to(world: World, recipe) -> Callable | None:
    """`reference(start, visited states)`: velocities of the adapter that a specialist is held to; None: to nothing."""
    if not recipe[recipe.method].beta > 0:
        return None
    return functools.partial(_reference_velocities, _parts(recipe), world.velocity)


def offline_update(student: Partial, recipe) -> tuple:
    """The update of SFT on given pictures and its optimiser."""
    return update_of(flow_matching.supervise(student), recipe)


def offline_method(world: World, adapters, update, config, recipe) -> Method:
    """Distillation on the teachers' pictures instead of the student's states: SFT, and the offline baseline."""
    sampling = Sampling(**config.sampler, shape=world.shape, group=recipe.group, parts=_parts(recipe))
    sample = functools.partial(_noise_teacher_pictures, sampling, world.routed, adapters)
    return Method(sample, lambda _, rollout: rollout.velocity, update)


def pairs_method(update) -> Method:
    """SFT on given pictures with their captions."""
    return Method(_noise_given_pictures, lambda _, rollout: rollout.velocity, update)


@jax.jit
def _noise_given_pictures(_, batch, key):
    return flow_matching.noised(batch["image"], batch["condition"], rng.per_record(key, batch["image"].shape[0]))
