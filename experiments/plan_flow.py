"""The plan of Flow-OPD: adapters on a frozen transformer, on latents of a pipeline or on the embedded scenes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from experiments import flow_methods, flow_opd, latents, plan_models, plan_steps, scenes
from experiments.latents import Prompt
from experiments.plan_steps import KEY, Places, Step, bytes_of, lowering, of_type, result
from experiments.recipes import arm_recipe
from opd_jax import sharding
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.models import lora
from opd_jax.models.decoder import partition_rules
from opd_jax.models.mmdit import RULES, MMDiT
from opd_jax.worlds import scenes as embedded

NOT_PLANNED = "the base; SFT of specialists; text encoders, whose results are stored; judges; evaluation"
CLIP_TOKENS = 77


class World(NamedTuple):
    """What `flow_methods` takes of a `World`, as shapes."""

    model: MMDiT
    shape: tuple[int, int, int]
    velocity: Partial
    routed: Partial
    backbone: Any
    condition: Any  # of one prompt, without a place
    decoding: tuple | None = None  # the autoencoder, its parameters, and pictures that all devices decode at once

    @property
    def frozen(self) -> int:
        """Bytes of one device that no program but decoding has among its arguments."""
        return bytes_of(self.decoding[1]) if self.decoding else 0


def places_of(mesh) -> Places:
    return Places(mesh, partition_rules(mesh, RULES))


def world_of(config, places: Places) -> World:
    inputs = lambda model, side: (
        jax.ShapeDtypeStruct((1, side, side, model.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, model.joint_attention_dim), jnp.float32),
        jax.ShapeDtypeStruct((1, model.pooled_projection_dim), jnp.float32),
    )
    shapes = lambda model, dtype: places.params(
        plan_steps.shapes_of(model, dtype, *inputs(model, model.pos_embed_max_size * model.patch_size))
    )
    if config.world == "scenes":
        model = scenes.module(config)
        backbone = shapes(model, jnp.float32)
        velocity, routed = scenes.velocities(model, config, backbone)
        condition = jax.ShapeDtypeStruct((1, embedded.CONTEXT_LENGTH), jnp.int32)
        return World(model, scenes.SHAPE, velocity, routed, backbone, condition)
    part = config.pipeline
    published, autoencoder = plan_models.pipeline_of(part.path)
    model = latents.computing(published, part)
    shape = latents.shape_of(model, autoencoder, part)
    backbone = shapes(model, jnp.bfloat16)
    tokens = CLIP_TOKENS + part.max_sequence_length
    embedding = lambda *size: jax.ShapeDtypeStruct((1, *size), jnp.dtype(part.encoders.stored))
    condition = Prompt(
        jax.ShapeDtypeStruct((1,), jnp.int32),
        embedding(tokens, model.joint_attention_dim),
        embedding(model.pooled_projection_dim),
    )
    velocity, routed = latents.velocities(model, config, backbone, places.whole(condition))
    latent = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    decode = functools.partial(autoencoder.init, method="decode")
    decoding = of_type(jax.eval_shape(decode, KEY, latent)["params"], jnp.float32)
    at_once = part.pictures * sharding.record_parts(places.mesh)
    return World(model, shape, velocity, routed, backbone, condition, (autoencoder, places.whole(decoding), at_once))


def adapter_of(world: World, config, places: Places, rank: int):
    new = functools.partial(lora.init, pattern=config.lora.pattern, rank=rank)
    return places.whole(jax.eval_shape(new, KEY, world.backbone))


def axes(config) -> tuple[str, ...]:
    return "data", "fsdp", "tensor"


def names(config) -> list[str]:
    """Arms, and the stages of Flow-GRPO; of those that are alike the first stands for all."""
    alike = _stages(config)
    first = {str(recipe): name for name, recipe in reversed(alike.items())}
    return [*[name for name in alike if name in first.values()], *config.arms]


def _stages(config) -> dict[str, dict]:
    """The stages of Flow-GRPO that are to be trained, each with all that its programs and their number depend on."""
    parts = {} if config.shipped else flow_opd.grpo_parts(config)
    return {name: _sizes(flow_opd.grpo_recipe(config, part)) for name, part in parts.items()}


def _sizes(recipe) -> dict:
    held = {name: recipe[name].to_dict() | {"beta": recipe[name].beta > 0} for name in flow_opd.GRPO_METHODS}
    return recipe.to_dict() | {"learning_rate": None} | held


def heading(config, mesh) -> list[str]:
    world = world_of(config, places_of(mesh))
    lines = [plan_steps.described("transformer", world.backbone)]
    sides = "x".join(map(str, world.shape))
    lines.append(f"products in {jnp.dtype(world.model.dtype)}, remat {world.model.remat}; states of {sides}")
    stages = _stages(config)
    for name in (name for name in names(config) if name in stages):
        alike = [other for other, sizes in stages.items() if sizes == stages[name]]
        lines.append(f"{name} stands for {', '.join(alike)}, and counts {len(alike)} times")
    return lines


def recipe_of(config, name: str):
    if name in config.arms:
        return arm_recipe(config, name)
    return flow_opd.grpo_recipe(config, flow_opd.grpo_parts(config)[name])


def parts(config, name: str) -> list[int]:
    recipe = recipe_of(config, name)
    return plan_steps.divisors(recipe.prompts * recipe.group // recipe.get("updates", 1))


def with_parts(config, name: str, parts: int) -> None:
    with config.unlocked():
        config.arms.get(name, config.grpo).micro_batches = parts


def steps(config, mesh, name: str) -> list[Step]:
    recipe, places = recipe_of(config, name), places_of(mesh)
    records = recipe.prompts * recipe.group
    plan_steps.check_parts(mesh, name, records // recipe.get("updates", 1), recipe.micro_batches, recipe.prompts)
    world = world_of(config, places)
    task = jax.ShapeDtypeStruct((recipe.prompts,), jnp.int32)
    batch = places.rows({"condition": world.condition}, recipe.prompts) | {"task": places.rows(task)}
    float32 = jnp.dtype(world.model.dtype) == jnp.float32
    one = functools.partial(Step, times=recipe.steps, count=records, unit="paths", float32=float32)
    made = _specialist if name not in config.arms else _offline if recipe.method == "offline" else _student
    return made(config, world, places, recipe, batch, one)


def _student(config, world: World, places: Places, recipe, batch, one) -> list[Step]:
    """Of Flow-OPD: the student wears an adapter of all teachers' ranks together."""
    update, optimizer = flow_methods.opd_update(world.velocity, recipe, config)
    method = flow_methods.opd_method(world, update, config, recipe)
    student = adapter_of(world, config, places, config.lora.rank * len(config.teachers))
    teachers = _teachers(config, world, places)
    state, taught = places.state(student, optimizer, config.offload), bytes_of(teachers)
    rollout = places.rows(result(method.sample, student, batch, KEY))
    labels = places.rows(result(method.label, teachers, rollout))
    resting = bytes_of(state) - bytes_of(student)
    # the backbone is an argument of both teachers' and anchor's velocity, and on the device once
    twice = bytes_of(world.backbone) if recipe.anchor_weight > 0 else 0
    return [
        one("sample", lowering(method.sample, student, batch, KEY), world.frozen + taught + resting),
        one("label", lowering(method.label, teachers, rollout), world.frozen + bytes_of(state) - twice),
        one("update", lowering(update, state, rollout, labels, KEY), world.frozen + taught),
    ]


def _offline(config, world: World, places: Places, recipe, batch, one) -> list[Step]:
    """SFT on the teachers' pictures."""
    update, optimizer = flow_methods.offline_update(world.velocity, recipe)
    teachers = _teachers(config, world, places)
    method = flow_methods.offline_method(world, teachers[0], update, config, recipe)
    student = adapter_of(world, config, places, config.lora.rank * len(config.teachers))
    state = places.state(student, optimizer, config.offload)
    rollout = places.rows(result(method.sample, None, batch, KEY))
    learn = lowering(update, state, rollout, rollout.velocity, KEY)
    return [
        one("sample", lowering(method.sample, None, batch, KEY), world.frozen + bytes_of(state)),
        one("update", learn, world.frozen + bytes_of(teachers)),
    ]


def _teachers(config, world: World, places: Places) -> tuple:
    """Adapters in the order of the tasks, and the anchor's."""
    adapter = adapter_of(world, config, places, config.lora.rank)
    return [adapter] * len(config.tasks), adapter


def _specialist(config, world: World, places: Places, recipe, batch, one) -> list[Step]:
    """Of Flow-GRPO; what judges say of the pictures comes from the host."""
    count = sum(sizes == _sizes(recipe) for sizes in _stages(config).values())
    one = functools.partial(one, times=recipe.steps * count)
    update, optimizer = flow_methods.grpo_update(world.velocity, recipe)
    method = flow_methods.grpo_method(world, (), update, config, recipe, None)
    own = adapter_of(world, config, places, config.lora.rank)
    state = places.state(own, optimizer, config.offload)
    rollout = places.rows(result(method.sample, own, batch, KEY))
    held = world.frozen + bytes_of(state)
    made = [one("sample", lowering(method.sample, own, batch, KEY), held)]  # the start, and the state but its params
    reference = None
    if read := flow_methods.held_to(world, recipe):
        seen = places.rows(jax.eval_shape(lambda rollout: flow_methods.visited(rollout, recipe), rollout))
        reference = places.rows(result(read, own, seen))
        made.append(one("reference", lowering(read, own, seen), held))
    if world.decoding:
        autoencoder, params, at_once = world.decoding
        x = places.rows(jax.eval_shape(flow_methods.drawn, rollout))
        decode = lowering(latents.decoded, autoencoder, latents.parts_of(x.shape[0], at_once), params, x)
        made.append(one("decode", decode, bytes_of(state, world.backbone, own)))
    each = places.rows(jax.ShapeDtypeStruct((rollout.task.shape[0],), jnp.float32))
    learn = lowering(update, state, rollout, RewardLabels(each, reference, each), KEY)
    return [*made, one("update", learn, world.frozen + bytes_of(own))]
