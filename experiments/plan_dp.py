"""The plan of private distillation: continuations, a public teacher's states of them, and a noised update."""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from configs import dp_models as models_config
from experiments import dp_methods, dp_records, dp_stages, language, plan_models, plan_steps
from experiments.plan_steps import KEY, Places, Step, bytes_of, lowering, result, shapes_of
from experiments.reasoning_stages import sampling_params
from experiments.recipes import arm_recipe
from opd_jax import privacy, sharding
from opd_jax.models import decoder, gpt2, lora
from opd_jax.models.decoder import Decoder, partition_rules
from opd_jax.privacy import Mechanism
from opd_jax.worlds import functions

NOT_PLANNED = "perplexities; texts that a private teacher writes"
RECORDS = 150_000  # private ones, where the file is not here: those of BigPatent that the baselines learn from


class Model(NamedTuple):
    """As `dp_stages.Model`, of shapes."""

    functions: language.LanguageModel
    params: dict
    module: object


def places_of(mesh) -> Places:
    return Places(mesh, partition_rules(mesh, decoder.RULES + gpt2.RULES))


def model_of(config, role: str, places: Places) -> Model:
    part = config[role]
    if config.data:
        module = plan_models.language_model_of(part.path, f"--{role}")
        vocab_size = module.vocab_size
    else:
        module, vocab_size = Decoder(**models_config.get_config().models[role].model), functions.VOCABULARY
    params = places.params(shapes_of(module, jnp.float32))
    return Model(language.functions(module, vocab_size), params, module)


def count_of(config) -> int:
    """Private records."""
    path = Path(config.data or ".")
    if path.is_file():
        return sum(bool(line.strip()) for line in path.read_text().splitlines())
    return RECORDS if config.data else len(functions.private_records()[: config.records or None])


def axes(config) -> tuple[str, ...]:
    return tuple(sharding.AXES)


def names(config) -> list[str]:
    """Arms, and the private teacher's training where an arm has one."""
    private = any(arm_recipe(config, name).teacher == "private" for name in config.arms)
    return [*(["private_teacher"] if private else []), *config.arms]


def heading(config, mesh) -> list[str]:
    places, count = places_of(mesh), count_of(config)
    return [
        *(plan_steps.described(role, model_of(config, role, places).params) for role in ("student", "teacher")),
        f"{count} private records of {config.tokens} tokens, of which up to {config.prompt_tokens} are the prompt's",
    ]


def recipe_of(config, name: str):
    if name in config.arms:
        return arm_recipe(config, name)
    arms = (arm_recipe(config, arm) for arm in config.arms)
    return dp_stages.teacher_recipe(config, next(arm for arm in arms if arm.teacher == "private"))


def parts(config, name: str) -> list[int]:
    """Of private training by how many records have gradients at once, in the order of many parts last."""
    recipe = recipe_of(config, name)
    return plan_steps.divisors(recipe.batch_size)


def with_parts(config, name: str, parts: int) -> None:
    """A private update goes through `micro_batch` records at a time, whatever the number that comes."""
    recipe = recipe_of(config, name)
    own = config.arms.get(name, config.private_teacher)
    with config.unlocked():
        own.update({"micro_batch": recipe.batch_size // parts} if recipe.private else {"micro_batches": parts})


def rows_of(config, mesh, recipe) -> int:
    """Records of a batch: of a Poisson batch, the room that a run gives it."""
    if not recipe.private:
        return recipe.batch_size
    count = count_of(config)
    return privacy.capacity(count, recipe.batch_size / count, dp_stages.multiple_of(recipe, mesh))


def steps(config, mesh, name: str) -> list[Step]:
    recipe, places, own = recipe_of(config, name), places_of(mesh), "student" if name in config.arms else "teacher"
    student, teacher = model_of(config, own, places), model_of(config, "teacher", places)
    records = rows_of(config, mesh, recipe)
    parts = records // recipe.micro_batch if recipe.private else recipe.micro_batches
    plan_steps.check_parts(mesh, name, records, parts)
    plan_steps.check_tokens(mesh, name, config.tokens, "tokens")
    longest = config.tokens - config.prompt_tokens
    how = sampling_params(config.sampler, longest, (0,), 0)
    one = functools.partial(Step, count=records * recipe.rollouts, unit="texts", float32=True, times=recipe.steps)

    trained, start = _trained(student, recipe, places)
    update, optimizer = _update(trained, teacher, how, recipe, places)
    state = places.state(start, optimizer, config.offload)
    frozen = 0 if start is student.params else bytes_of(student.params)  # an argument of sample and update
    batch = _batch(config, places, records)
    draw = functools.partial(
        dp_methods.continuations, trained.decode, init_cache=trained.init_cache, sampling_copy=trained.sampling_copy,
        how=how, rollouts=recipe.rollouts,
    )  # fmt: skip
    text = places.rows(result(dp_methods.own_text, batch, recipe.rollouts))
    labels = places.rows(result(dp_methods.label, teacher.functions.hidden, teacher.params, text))
    learn = one("update", lowering(update, state, text, labels, KEY), bytes_of(teacher.params))
    if recipe.private and not recipe.ghost:
        learn = learn._replace(trips=parts)  # a loop that ends with the last record that is none of padding
    if recipe.stored:
        return [*_stored(config, student, teacher, how, places), learn]
    held = bytes_of(teacher.params, state) - bytes_of(start)
    sample = one("sample", lowering(draw, start, batch, KEY), held, trips=longest)
    sample = sample._replace(times=recipe.steps * recipe.on_policy)
    read = lowering(dp_methods.label, teacher.functions.hidden, teacher.params, text)
    return [*([sample] if recipe.on_policy else []), one("label", read, bytes_of(state) + frozen), learn]


def _stored(config, student: Model, teacher: Model, how, places: Places) -> list[Step]:
    """What is made once, for all records: the first student's continuations, and the teacher's states of both texts."""
    batch = _batch(config, places, dp_records.BATCH)
    waves = math.ceil(count_of(config) / dp_records.BATCH)
    one = functools.partial(Step, count=dp_records.BATCH, unit="texts", float32=True)
    draw = functools.partial(
        dp_methods.continuations, student.functions.decode, init_cache=student.functions.init_cache,
        sampling_copy=student.functions.sampling_copy, how=how,
    )  # fmt: skip
    read = lowering(dp_records.states, teacher.functions.hidden, teacher.params, batch["tokens"])
    return [
        one("store: sample", lowering(draw, student.params, batch, KEY), bytes_of(teacher.params), waves,
            trips=how.max_new_tokens),
        one("store: label", read, bytes_of(student.params), 2 * waves),
    ]  # fmt: skip


def _batch(config, places: Places, records: int) -> dict:
    one, tokens = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((records,), (records, config.tokens)))
    return places.rows({"tokens": tokens, "prompt": one, "length": one, "index": one})


def _trained(model: Model, recipe, places: Places) -> tuple:
    """As `Experiment.trained`: an adapter, or all of the model."""
    if not recipe.lora_rank:
        return model.functions, model.params
    new = functools.partial(lora.init, pattern=recipe.lora_layers, rank=recipe.lora_rank, scanned=r"^layers/")
    vocab_size = jax.eval_shape(model.functions.head, model.params).shape[1]
    start = places.params(jax.eval_shape(new, KEY, model.params))
    return dp_methods.adapted(model.module, vocab_size, model.params, recipe.lora_scale), start


def _update(trained, teacher: Model, how, recipe, places: Places) -> tuple:
    """The update with the shapes of the teacher's head, and the optimiser. The noise's size changes no figure."""
    made = {}
    mechanism = Mechanism(1.0, 0.0, 1.0, 1.0) if recipe.private else None
    sampled = recipe.copy_and_resolve_references()
    with sampled.unlocked():
        sampled.stored = False  # whose update takes texts and labels apart

    def make(teacher_params):
        method, made["optimizer"] = dp_methods.method(
            trained, teacher.functions, teacher_params, how, sampled, mechanism, recipe.batch_size
        )
        return method.update

    update = jax.eval_shape(make, teacher.params)
    (*_, head), tree = jax.tree.flatten(update)
    frozen = [part for part in (trained.hidden, trained.head) if isinstance(part, Partial)]
    return tree.unflatten([*jax.tree.leaves(frozen), *places.heads([head])]), made["optimizer"]
