"""The methods of the flow domain as four functions each: Flow-OPD, Flow-GRPO and distillation on teachers' pictures.

The student is an adapter on a frozen backbone, so are the teachers; every function here takes adapters as parameters.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments.scenes import SHAPE
from opd_jax import hosts, optim, rng
from opd_jax.losses import advantage_matching, flow_matching, flow_opd, policy_gradient
from opd_jax.losses.advantage_matching import SampledAgain
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.models import lora
from opd_jax.sampling import flow
from opd_jax.types import FlowLabels, Method
from opd_jax.worlds import scene_verifiers, scenes


def adapted_velocity(model, scale: float, backbone) -> Partial:
    """`velocity_fn(adapter, x, t, tokens)`: the backbone wearing one adapter."""
    return Partial(functools.partial(_adapted, model, scale), backbone)


def _adapted(model, scale, backbone, adapter, x, t, tokens):
    params = lora.merge(backbone, adapter, scale) if adapter else backbone
    return model.apply({"params": params}, x, t, *scenes.encode(tokens))


def routed_velocity(model, scale: float, backbone) -> Partial:
    """`velocity_fn(adapters, x, t, (tokens, task))`: every record by the teacher of its task, in one forward."""
    return Partial(functools.partial(_routed, model, scale), backbone)


def _routed(model, scale, backbone, adapters, x, t, condition):
    tokens, task = condition
    return lora.routed_apply(model, backbone, adapters, task, scale, x, t, *scenes.encode(tokens))


class Sampling(NamedTuple):
    """How a path is sampled: hashable, so that it can be a static argument."""

    kind: str
    steps: int
    shift: float
    double_shift: bool
    noise_level: float
    group: int  # paths for each prompt
    window: int = 0  # this many consecutive steps of the first half are stochastic, the rest an ODE's; 0: all are
    same_start: bool = False  # all paths of a prompt begin at one noise, and differ by the stochastic steps alone


@functools.partial(jax.jit, static_argnums=0)
def _sample_paths(sampling: Sampling, velocity_fn, params, batch, key):
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, sampling.group, axis=0), batch)
    count = batch["tokens"].shape[0]
    times = flow.time_grid(sampling.steps, sampling.shift, sampling.double_shift)
    levels = jnp.full(sampling.steps, sampling.noise_level)
    if sampling.window:
        levels = flow.sde_window(rng.at_step(key, 1), sampling.steps, sampling.window, sampling.noise_level)
    keys, start = rng.per_record(rng.at_step(key, 0), count), None
    if sampling.same_start:
        prompts = rng.per_record(rng.at_step(key, 2), count // sampling.group)
        start = jnp.repeat(jax.vmap(lambda k: jax.random.normal(k, SHAPE))(prompts), sampling.group, axis=0)
    path = flow.sample(velocity_fn, params, batch["tokens"], keys, SHAPE, times, levels, sampling.kind, start)
    return flow.as_rollout(path, batch["tokens"], batch["task"], jnp.arange(count) // sampling.group, times, levels)


@functools.partial(jax.jit, static_argnums=0)
def _label_states(with_anchor: bool, teachers, anchor, params, rollout):
    adapters, anchor_adapter = params
    states, times = rollout.states[:, :-1], rollout.times[0, :-1]
    routed = flow.velocities(teachers, adapters, (rollout.condition, rollout.task), states, times)
    if not with_anchor:
        return FlowLabels(routed)
    return FlowLabels(routed, flow.velocities(anchor, anchor_adapter, rollout.condition, states, times))


@jax.jit
def _reference_velocities(velocity_fn, params, rollout):
    """What the adapter that a specialist started from would have done at the states that the update visits."""
    if isinstance(rollout, SampledAgain):
        return advantage_matching.copy_velocities(velocity_fn, params, rollout)
    return flow.velocities(velocity_fn, params, rollout.condition, rollout.states[:, :-1], rollout.times[0, :-1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample_again(sampling: Sampling, draws: int, center: float, spread: float, velocity_fn, params, batch, key):
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, sampling.group, axis=0), batch)
    tokens, count = batch["tokens"], batch["tokens"].shape[0]
    times = flow.time_grid(sampling.steps, sampling.shift, sampling.double_shift)
    images = flow.generate(velocity_fn, params, tokens, rng.per_record(rng.at_step(key, 0), count), SHAPE, times)
    group, keys = jnp.arange(count) // sampling.group, rng.per_record(rng.at_step(key, 1), count)
    return advantage_matching.noised_again(images, tokens, batch["task"], group, keys, draws, center, spread)


@functools.partial(jax.jit, static_argnums=0)
def _noise_teacher_pictures(sampling: Sampling, teachers, adapters, _, batch, key):
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, sampling.group, axis=0), batch)
    keys = rng.per_record(rng.at_step(key, 0), batch["tokens"].shape[0])
    times = flow.time_grid(sampling.steps, sampling.shift, sampling.double_shift)
    images = flow.generate(teachers, adapters, (batch["tokens"], batch["task"]), keys, SHAPE, times)
    return flow_matching.noised(images, batch["tokens"], rng.per_record(rng.at_step(key, 1), len(images)))


def opd_update(student: Partial, recipe, config) -> tuple:
    """Flow-OPD's update and its optimiser. `recipe` is an arm: estimator, weighting, anchor weight, sizes."""
    return _update(
        flow_opd.ESTIMATORS[recipe.estimator](
            student, weighting=recipe.weighting, kind=config.sampler.kind, anchor_weight=recipe.anchor_weight
        ),
        recipe,
    )


def opd_method(student: Partial, teachers: Partial, update, config, recipe) -> Method:
    """Flow-OPD. `teacher_params` is `(adapters in the order of the tasks, the anchor's adapter)`."""
    sample = functools.partial(_sample_paths, Sampling(**config.sampler, group=recipe.group), student)
    label = functools.partial(_label_states, recipe.anchor_weight > 0, teachers, student)
    return Method(sample, label, update)


def grpo_update(student: Partial, recipe) -> tuple:
    """The update of a specialist and its optimiser, by either form of group-relative policy optimisation."""
    if recipe.method == "awm":
        return _update(advantage_matching.supervise(student, beta=recipe.awm.beta), recipe)
    own = {name: recipe.flow_grpo[name] for name in ("kind", "clip", "window", "beta", "balanced")}
    return _update(policy_gradient.grpo(student, normalize=False, **own), recipe)


def grpo_method(
    student: Partial, rewards: tuple[str, ...], update, config, recipe, judge=scene_verifiers.reward
) -> Method:
    """A specialist's method: `rewards[task]` judges a record of that task, against its group.

    `judge(name, images, captions)` gives a reward, NaN where it is unknown. `teacher_params` is the adapter it started
    from, to which it is held.
    """

    def judged(images, task, captions):
        reward = np.zeros(len(captions), np.float32)
        for index, name in enumerate(rewards):
            mine = np.flatnonzero(task == index)
            if mine.size:
                reward[mine] = judge(name, images[mine], [captions[i] for i in mine])
        return reward

    def label(start, rollout):
        again = isinstance(rollout, SampledAgain)
        visited = rollout if again else policy_gradient.window_of(rollout, recipe.flow_grpo.window)
        reference = _reference_velocities(student, start, visited) if recipe[recipe.method].beta > 0 else None
        images, task = hosts.fetch((rollout.image if again else rollout.states[:, -1], rollout.task))
        captions = [scenes.caption_of(tokens) for tokens in hosts.fetch(rollout.condition)]
        reward = jnp.asarray(hosts.from_first(lambda: judged(images, task, captions), (len(captions),)))
        group = jnp.asarray(hosts.fetch(rollout.group))  # one device, no collective
        advantage = policy_gradient.group_advantages(reward, group, len(captions) // recipe.group)
        reward = jnp.where(jnp.isnan(reward), jnp.nanmean(reward), reward)  # as it is logged
        advantage, reward = jax.device_put((advantage, reward), rollout.task.sharding)
        return RewardLabels(advantage, reference, reward)

    if recipe.method == "awm":
        own = recipe.awm
        times = own.draws, own.time_center, own.time_spread
        sampling = Sampling(**config.sampler, group=recipe.group)
        return Method(functools.partial(_sample_again, sampling, *times, student), label, update)
    own = {name: recipe.flow_grpo[name] for name in ("kind", "noise_level", "window", "same_start")}
    sampling = Sampling(**(config.sampler.to_dict() | own), group=recipe.group)
    return Method(functools.partial(_sample_paths, sampling, student), label, update)


def offline_update(student: Partial, recipe) -> tuple:
    """The update of SFT on given pictures and its optimiser."""
    return _update(flow_matching.supervise(student), recipe)


def offline_method(teachers: Partial, adapters, update, config, recipe) -> Method:
    """Distillation on the teachers' pictures instead of the student's states: SFT, and the offline baseline."""
    sampling = Sampling(**config.sampler, group=recipe.group)
    sample = functools.partial(_noise_teacher_pictures, sampling, teachers, adapters)
    return Method(sample, lambda _, rollout: rollout.velocity, update)


def pairs_method(update) -> Method:
    """SFT on given pictures with their captions."""
    return Method(_noise_given_pictures, lambda _, rollout: rollout.velocity, update)


@jax.jit
def _noise_given_pictures(_, batch, key):
    return flow_matching.noised(batch["image"], batch["tokens"], rng.per_record(key, batch["image"].shape[0]))


def _update(supervise, recipe) -> tuple:
    decay = (recipe.steps, recipe.decay_steps) if recipe.get("decay_steps") else None
    optimizer = optim.adamw(recipe.learning_rate, warmup=recipe.warmup, decay=decay)
    update = optim.dense(
        supervise,
        optimizer,
        micro_batches=recipe.get("micro_batches", 1),
        updates=recipe.get("updates", 1),
        ema_decay=recipe.ema_decay,
    )
    return update, optimizer
