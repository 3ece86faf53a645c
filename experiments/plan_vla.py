"""The plan of VLA-OPD: the policy at one decision of all episodes, a teacher that is a policy too, and the update."""

import functools

import jax
import jax.numpy as jnp

from experiments import plan_models, plan_steps, stages, vla_methods, vla_policies, vla_stages, vla_tabletop
from experiments.plan_steps import KEY, Places, Step, bytes_of, lowering, result
from experiments.recipes import arm_recipe, update_of
from opd_jax import sharding
from opd_jax.losses import vla_opd
from opd_jax.models import attention, vla
from opd_jax.models.decoder import partition_rules
from opd_jax.models.vla import Observation
from opd_jax.types import ActionLabels, EpisodeRollout
from opd_jax.worlds import libero, tabletop

NOT_PLANNED = "the simulator, on the host or the devices, and a scripted expert in it; SFT; refills of GRPO; evaluation"
METHODS = ("opd", "grpo")
WORDS = 48  # room of an instruction in OpenVLA's prompt; a run takes that of its longest


class Setup:
    """The policy as shapes on a mesh: that of `student.path`, whose teacher is of its sizes, or a small one."""

    def __init__(self, config, mesh):
        part, world = config.student, vla_stages.WORLDS[config.world]
        self.config, self.published, self.places = (
            config,
            bool(part.path),
            Places(mesh, partition_rules(mesh, vla.RULES)),
        )
        if self.published:
            published = plan_models.policy_of(part.path)
            kernel = attention.kernel(part.attention, published.language_model.head_dim)
            fields = {"dtype": jnp.dtype(part.dtype), "attention": kernel, "remat": part.remat}
            self.module = vla.with_fields(published, **fields)
            side, hand = self.module.towers[0].image_size, libero.PROPRIOCEPTION_DIMS * part.proprioception
            self.example = Observation(
                jax.ShapeDtypeStruct((1, part.cameras, side, side, 3), jnp.uint8),
                jax.ShapeDtypeStruct((1, hand), jnp.float32),
                jax.ShapeDtypeStruct((1, WORDS), jnp.int32),
            )
        elif config.world == "tabletop":
            self.module = vla_tabletop.module_of(config.policy)
            self.example = jax.eval_shape(vla_tabletop.first_observation)
        else:
            own = vla_policies.own(config.policy, world.robot(config))
            self.module, self.example = own.module, own.example
        self.at_once = 0 if config.world == "tabletop" else config.simulators.at_once
        self.float32 = self.module.language_model.dtype == jnp.float32

    def observation(self, *leading: int) -> Observation:
        """What a policy sees, `[*leading, ...]`."""
        along = lambda leaf: jax.ShapeDtypeStruct((*leading, *leaf.shape[1:]), leaf.dtype)
        return jax.tree.map(along, self.example)

    def params(self, trained: bool):
        """Float32 of what is trained; of a published teacher as stored."""
        kept = jnp.float32 if trained or not self.published else jnp.bfloat16
        return self.places.params(plan_steps.shapes_of(self.module, kept, self.example))

    def to_act(self, params):
        """The copy that episodes read."""
        rules = sharding.gathered_rules(self.places.rules, self.places.mesh)
        return self.places.params(jax.eval_shape(self.module.sampling_copy, params), rules)

    @property
    def decisions(self) -> int:
        """Of the longest episode."""
        config = self.config
        longest = {
            "tabletop": lambda: max(task.horizon for task in tabletop.TASKS if task.suite in config.suites),
            "metaworld": lambda: config.simulators.horizon,
            "libero": lambda: max(libero.HORIZONS[suite] for suite in config.suites),
        }[config.world]()
        return -(-longest // config.policy.executed)


def axes(config) -> tuple[str, ...]:
    return "data", "fsdp", "tensor"


def names(config) -> list[str]:
    return [name for name in config.arms if _known(arm_recipe(config, name))]


def _known(recipe) -> bool:
    return recipe.method in METHODS and recipe.get("head", "bins") == "bins"


def heading(config, mesh) -> list[str]:
    setup = Setup(config, mesh)
    return [
        plan_steps.described("policy", setup.params(trained=True)),
        f"products in {jnp.dtype(setup.module.language_model.dtype)}, remat {setup.module.language_model.remat}",
        f"episodes of {setup.decisions} decisions: the most there can be",
    ]


def parts(config, name: str) -> list[int]:
    recipe = arm_recipe(config, name)
    return plan_steps.divisors(recipe.batch_size * recipe.group // recipe.updates)


def with_parts(config, name: str, parts: int) -> None:
    with config.unlocked():
        config.arms[name].micro_batches = parts


def steps(config, mesh, name: str) -> list[Step]:
    recipe, setup = arm_recipe(config, name), Setup(config, mesh)
    if not _known(recipe):
        raise plan_steps.unknown(name, recipe.method, METHODS)
    episodes, places = recipe.batch_size * recipe.group, setup.places
    plan_steps.check_parts(mesh, name, episodes // recipe.updates, recipe.micro_batches)
    one = functools.partial(Step, unit="decisions", float32=setup.float32, times=recipe.steps)

    policy_fn = vla_methods.logits_fn(setup.module)
    acting = vla_methods.cooled(policy_fn, recipe.acting_temperature)
    temperatures = {"student_temperature": recipe.temperature, "teacher_temperature": recipe.teacher_temperature}
    by_success = recipe.method == "grpo"
    supervise = vla_opd.grpo(acting) if by_success else vla_opd.supervise(policy_fn, recipe.objective, **temperatures)
    update, optimizer = update_of(supervise, recipe)
    params = setup.params(trained=True)
    state, taught = places.state(params, optimizer, config.offload), setup.params(trained=False)
    by_policy = not by_success and recipe.teacher != vla_methods.EXPERT
    begun = bytes_of(params) if setup.published else 0  # the student's first parameters, which the world keeps
    frozen = begun + (bytes_of(taught) if by_policy else 0)

    act = vla_methods.drawn(acting)
    acting_at_once = setup.at_once or episodes  # simulators on the host, or all episodes on the devices
    keys = places.rows(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), acting_at_once)))
    seen = places.rows(setup.observation(acting_at_once))
    acts = setup.to_act(params) if config.student.sampling_copy else params
    copied = jax.tree.leaves(acts) != jax.tree.leaves(params)  # else it is the parameters themselves
    drawn, _ = result(act, acts, seen, keys)
    rollout = places.rows(_rollout(setup, episodes, drawn))
    labels = places.rows(_labels(setup, rollout, recipe))

    resting = bytes_of(state) - bytes_of(params)
    held = frozen + resting + (bytes_of(params) if copied else 0)
    acted = one("act", lowering(act, acts, seen, keys), held, count=acting_at_once)
    made, every = [], episodes * setup.decisions
    if copied:
        copy = lowering(stages.copied, setup.module.sampling_copy, params)
        made.append(one("copy", copy, frozen + resting, count=every))
    made.append(acted._replace(times=recipe.steps * setup.decisions * -(-episodes // acting_at_once)))
    if by_policy:
        read = vla_methods.network_labels(policy_fn, recipe.micro_batches * recipe.updates)
        made.append(one("label", lowering(read, taught, rollout), begun + bytes_of(state), count=every))
    return [*made, one("update", lowering(update, state, rollout, labels, KEY), frozen, count=every)]


def _rollout(setup: Setup, episodes: int, drawn) -> EpisodeRollout:
    """Of episodes, from what is drawn at one decision of all of them; without states, which are the simulator's."""
    each = lambda dtype: jax.ShapeDtypeStruct((episodes,), dtype)
    decisions = setup.decisions
    along = lambda leaf: jax.ShapeDtypeStruct((episodes, decisions, *leaf.shape[1:]), leaf.dtype)
    counted = jax.ShapeDtypeStruct((episodes, decisions, setup.module.horizon), bool)
    success, length = each(jnp.float32), each(jnp.int32)
    seen = setup.observation(episodes, decisions)
    return EpisodeRollout(seen, jax.tree.map(along, drawn), counted, success, length, length, length)


def _labels(setup: Setup, rollout: EpisodeRollout, recipe):
    if recipe.method == "grpo":
        return result(vla_methods.reward_labels, None, rollout)
    shape = (*rollout.drawn.tokens.shape, vla.NUM_BINS)
    return ActionLabels(jax.ShapeDtypeStruct(shape, jnp.float32))
