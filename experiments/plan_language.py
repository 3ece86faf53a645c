"""The plan of an arm of a language config: the functions of `token_methods`, for a student and one teacher."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import reasoning_models
from experiments import language, plan_models, plan_steps, token_methods
from experiments.plan_steps import KEY, Places, Step, bytes_of, lowering, result, shapes_of
from experiments.reasoning_stages import sampling_params
from experiments.recipes import arm_recipe
from opd_jax import sharding
from opd_jax.losses.lightning_opd import LightningLabels
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.models.decoder import Decoder, partition_rules

NOT_PLANNED = "SFT before the arms; the refilling of slots, in whose place whole batches of as many are answered"
METHODS = ("online", "lightning", "off_policy", "grpo", "sft")
SAMPLED = ("online", "grpo")  # at every step
LABELLED = ("online", "off_policy")  # by the teacher, at every step


class Setup:
    """Models as shapes on a mesh."""

    def __init__(self, config, mesh, student: Decoder, teacher: Decoder, shipped: bool):
        self.config, self.mesh = config, mesh
        self.places = Places(mesh, partition_rules(mesh))
        self.float32 = config.compute.dtype == "float32"
        modules = {
            "student": language.computing(student, config.compute, trained=True),
            "teacher": language.computing(teacher, config.compute, trained=False),
        }
        kept = {"student": jnp.float32, "teacher": jnp.float32 if shipped else jnp.bfloat16}
        self.params = {name: self.places.params(shapes_of(module, kept[name])) for name, module in modules.items()}
        vocab = min(student.vocab_size, teacher.vocab_size)
        self.student, self.teacher = (
            language.functions(module, vocab, config.compute.sampling_copy) for module in modules.values()
        )
        self.start = 0 if shipped else bytes_of(self.places.params(shapes_of(student, jnp.float32)))
        self.room, self.longest = config.problems.prompt_tokens, config.sampler.max_new_tokens
        self.how = sampling_params(config.sampler, self.longest, (0,), 0)


def setup_of(config, mesh) -> Setup:
    if not config.problems.path and not (config.student.path or config.teachers.own.path):
        models = reasoning_models.get_config().models
        sized = lambda name, layers: Decoder(
            **models[name].model.to_dict() | ({"num_layers": layers} if layers else {})
        )
        modules = sized("student", config.student.layers), sized("teacher", config.teachers.own.layers)
        return Setup(config, mesh, *modules, shipped=True)
    parts = {"student": config.student, "teacher": config.teachers.own}
    modules = (plan_models.decoder_of(part.path, f"--{name}") for name, part in parts.items())
    return Setup(config, mesh, *modules, shipped=False)


def axes(config) -> tuple[str, ...]:
    return tuple(sharding.AXES)


def names(config) -> list[str]:
    return list(config.arms)


def heading(config, mesh) -> list[str]:
    setup = setup_of(config, mesh)
    return [
        *(plan_steps.described(role, params) for role, params in setup.params.items()),
        f"products in {config.compute.dtype}, remat {config.compute.remat}",
        f"prompts of {setup.room} tokens, answers of {setup.longest}: the most there can be",
    ]


def records(config, name: str) -> int:
    """Of an update."""
    recipe = arm_recipe(config, name)
    return recipe.batch_size * (recipe.group if recipe.method in SAMPLED else 1)


def parts(config, name: str) -> list[int]:
    return plan_steps.divisors(records(config, name))


def with_parts(config, name: str, parts: int) -> None:
    with config.unlocked():
        config.arms[name].micro_batches = parts


def stored_problems(config) -> int:
    """Of an offline arm's store: the config's, its file's, else one for each record that is learnt from."""
    path = Path(config.problems.path or ".")
    lines = len(path.read_text().splitlines()) if path.is_file() else 0
    return config.problems.count or lines or config.opd.steps * config.opd.batch_size


def steps(config, mesh, name: str) -> list[Step]:
    recipe = arm_recipe(config, name)
    if recipe.method not in METHODS:
        raise plan_steps.unknown(name, recipe.method, METHODS)
    plan_steps.check_parts(mesh, name, records(config, name), recipe.micro_batches, recipe.batch_size)
    setup = setup_of(config, mesh)
    plan_steps.check_tokens(mesh, name, setup.room + setup.longest, "problems.prompt_tokens + sampler.max_new_tokens")
    if recipe.method == "lightning":
        return _offline(setup, recipe)
    return _stepwise(setup, recipe, records(config, name))


def _stepwise(setup: Setup, recipe, count: int) -> list[Step]:
    """What every step of training runs. Of `off_policy` and `sft` the answers are there; verifiers are on the host."""
    method, update, optimizer = _method(setup, recipe)
    params, taught, places = setup.params["student"], setup.params["teacher"], setup.places
    state = places.state(params, optimizer, setup.config.compute.offload)
    once = functools.partial(
        Step, times=recipe.steps, count=count * setup.longest, unit="tokens", float32=setup.float32
    )
    sampled, labelled = recipe.method in SAMPLED, recipe.method in LABELLED
    answer = method.sample if sampled else token_methods.answer(setup.student, setup.how)
    asked = (setup.places.prompts(recipe.batch_size, setup.room), KEY)
    rollout = places.rows(result(answer, params, *asked), count)
    held, made = bytes_of(taught) + setup.start, []
    if sampled:
        sample = once("sample", lowering(answer, params, *asked), held + bytes_of(state) - bytes_of(params))
        made.append(sample._replace(trips=setup.longest))
    if labelled:
        made.append(once("label", lowering(method.label, taught, rollout), setup.start + bytes_of(state)))
    labels = result(method.label, taught, rollout) if labelled else _rewards(rollout) if sampled else None
    return [*made, once("update", lowering(update, state, rollout, places.rows(labels), KEY), held)]


def _rewards(rollout) -> RewardLabels:
    """Of GRPO, made on the host."""
    one = jax.ShapeDtypeStruct(rollout.length.shape, jnp.float32)
    return RewardLabels(one, None, one)


def _offline(setup: Setup, recipe) -> list[Step]:
    """Writes a store, `sampler.slots` answers at a time, and learns from it."""
    _, update, optimizer = _method(setup, recipe)
    params, taught, places = setup.params["student"], setup.params["teacher"], setup.places
    slots, answer = setup.config.sampler.slots, token_methods.answer(setup.student, setup.how)
    asked = (places.prompts(slots, setup.room), KEY)
    rollout = places.rows(result(answer, params, *asked))
    held = bytes_of(taught) + setup.start
    waves = math.ceil(stored_problems(setup.config) / slots)
    one = functools.partial(Step, count=slots * setup.longest, unit="tokens", float32=setup.float32, times=waves)
    read = lambda who, params: lowering(token_methods.logp_of, who.hidden, params, rollout, head_fn=who.head)
    batch = places.rows(rollout, recipe.batch_size)
    state = places.state(params, optimizer, setup.config.compute.offload)
    logp = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32)
    labels = places.rows(LightningLabels(logp, logp, jax.ShapeDtypeStruct(batch.length.shape, jnp.float32)))
    learn = lowering(update, state, batch, labels, KEY)
    return [
        one("store: sample", lowering(answer, params, *asked), held, trips=setup.longest),
        one("store: label", read(setup.teacher, taught), setup.start + bytes_of(params)),
        one("store: reference", read(setup.student, params), held),
        one("update", learn, held)._replace(times=recipe.steps, count=recipe.batch_size * setup.longest),
    ]


def _method(setup: Setup, recipe) -> tuple:
    """The method of a recipe, its update with the shapes of what it holds frozen (a teacher's head), the optimiser."""
    made = {}

    def make(teacher_params):
        student, teacher = setup.student, setup.teacher
        made["method"], made["optimizer"] = {
            "online": lambda: token_methods.online(student, teacher, teacher_params, setup.how, recipe),
            "lightning": lambda: token_methods.lightning(student, recipe),
            "off_policy": lambda: token_methods.off_policy(student, teacher, teacher_params, recipe),
            "grpo": lambda: token_methods.grpo(student, None, None, setup.how, recipe),  # its verifier is not called
            "sft": lambda: token_methods.sft(student, recipe),
        }[recipe.method]()
        return made["method"].update

    update = jax.eval_shape(make, setup.params["teacher"])
    return made["method"], setup.places.heads(update), made["optimizer"]
