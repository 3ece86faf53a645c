"""The plan of Uni-OPD: answers in groups, each read by the teacher of its domain, and an update of several widths."""

import functools

import jax
import jax.numpy as jnp

from configs import domains_models as models_config
from experiments import domains, plan_models, plan_steps, token_methods, uni_methods, uni_setup
from experiments.plan_steps import KEY, Places, Step, bytes_of, lowering, result
from experiments.reasoning_stages import sampling_params
from experiments.recipes import arm_recipe
from experiments.uni_methods import Judged
from experiments.uni_setup import Model
from opd_jax import sharding
from opd_jax.models import vlm
from opd_jax.models.decoder import partition_rules
from opd_jax.models.images import ImageBank
from opd_jax.models.vlm import VLM

NOT_PLANNED = "how often the student solves a problem; verifiers; margins, which are sums over a batch; evaluation"
METHODS = ("uni_opd",)


class Setup:
    """Models as shapes on a mesh; a teacher is loaded once, whatever the domains that it teaches."""

    def __init__(self, config, mesh):
        self.config, self.places = config, Places(mesh, partition_rules(mesh, vlm.RULES))
        self.embedded = not config.problems.path
        self.bank = None
        self.student = self.model("student", trained=True)
        self.vocab_size = self.student.module.vocab_size
        self.teacher = functools.cache(self.model)

    def model(self, name: str, trained: bool = False) -> Model:
        config = self.config
        if self.embedded:
            module = domains.module_of(models_config.get_config().models[name].model)
        else:
            part = config.student if name == "student" else config.teachers[name]
            module = uni_setup.computing(
                plan_models.language_model_of(part.path, f"--{'student' if trained else 'teacher'}"),
                config.problems.images, config.compute, trained,
            )  # fmt: skip
        if isinstance(module, VLM) and self.bank is None:
            self.bank = self.places.whole(self.pictures(module))
        arguments = (jax.ShapeDtypeStruct((1, 2), jnp.int32), *([self.bank] if isinstance(module, VLM) else []))
        kept = jnp.float32 if trained or self.embedded else jnp.bfloat16
        params = self.places.params(plan_steps.shapes_of(module, kept, *arguments))
        functions = domains.functions(module, self.bank, module.vocab_size, config.compute.sampling_copy)
        return Model(functions, params, "", module)

    def pictures(self, module: VLM) -> ImageBank:
        """Of every problem whose domain has pictures; of a user's problems, of as many as `problems.count`."""
        vision, part = module.vision, self.config.problems
        if self.embedded:
            count = (part.count + self.config.eval.problems) * len(domains.PICTURED)
            patches = 4 * domains.VISUAL_TOKENS
        else:
            count, patches = max(part.count, 1) * part.images, part.max_pixels // vision.patch_size**2
        return ImageBank(
            jax.ShapeDtypeStruct((max(count, 1), patches, vision.patch_dim), jnp.float32),
            jax.ShapeDtypeStruct((max(count, 1), 2), jnp.int32),
        )

    def teachers(self, setting: str) -> dict[int, Model]:
        """By the number of the domain; those behind a server are left out, for their machine labels."""
        pairs = enumerate(self.config.settings[setting].values())
        served = lambda name: self.config.teachers.get(name, {}).get("url", "")
        return {task: self.teacher(name) for task, name in pairs if not served(name)}


def axes(config) -> tuple[str, ...]:
    """Models that read pictures keep rows whole."""
    path = config.student.path
    pictured = not config.problems.path or isinstance(plan_models.language_model_of(path, "--student"), VLM)
    return tuple(axis for axis in sharding.AXES if axis != "sequence" or not pictured)


def names(config) -> list[str]:
    return list(config.arms)


def heading(config, mesh) -> list[str]:
    setup = Setup(config, mesh)
    lines = [plan_steps.described("student", setup.student.params)]
    chosen = dict.fromkeys(arm_recipe(config, name).setting for name in config.arms)
    for name in dict.fromkeys(name for setting in chosen for name in config.settings[setting].values()):
        lines.append(plan_steps.described(f"teacher {name}", setup.teacher(name).params))
    lines.append(f"products in {config.compute.dtype}, remat {config.compute.remat}")
    room, longest = _lengths(config)
    return [*lines, f"prompts of {room} tokens, answers of {longest}: the most there can be, whatever the widths"]


def _lengths(config) -> tuple[int, int]:
    room = config.problems.prompt_tokens if config.problems.path else domains.ROOM
    return room, config.sampler.max_new_tokens


def records(config, name: str) -> int:
    """Of an update."""
    recipe = arm_recipe(config, name)
    return recipe.batch_size * recipe.group


def parts(config, name: str) -> list[int]:
    return plan_steps.divisors(records(config, name))


def with_parts(config, name: str, parts: int) -> None:
    with config.unlocked():
        config.arms[name].micro_batches = parts


def steps(config, mesh, name: str) -> list[Step]:
    recipe, count = arm_recipe(config, name), records(config, name)
    if recipe.method not in METHODS:
        raise plan_steps.unknown(name, recipe.method, METHODS)
    plan_steps.check_parts(mesh, name, count, recipe.micro_batches, recipe.batch_size)
    setup, (room, longest) = Setup(config, mesh), _lengths(config)
    plan_steps.check_tokens(mesh, name, room + longest, "a prompt and sampler.max_new_tokens together")
    places, student, taught = setup.places, setup.student, setup.teachers(recipe.setting)
    exact = recipe.divergence != "sampled"
    how = sampling_params(config.sampler, longest, (0,), 0)
    one = functools.partial(Step, unit="tokens", float32=config.compute.dtype == "float32", times=recipe.steps)

    answer = token_methods.answer(student.functions, how, recipe.group)
    asked = (places.prompts(recipe.batch_size, room), KEY)
    rollout = places.rows(result(answer, student.params, *asked))
    heads = places.whole(_heads(taught)) if exact else None
    calibrate, update, optimizer = uni_methods.parts_of(student.functions, recipe, heads)
    state = places.state(student.params, optimizer, config.compute.offload)
    loaded = {id(model): model.params for model in taught.values()}
    everyone = bytes_of(list(loaded.values()), setup.bank)
    held = everyone + bytes_of(heads)

    resting = bytes_of(state) - bytes_of(student.params)
    made = [one("sample", lowering(answer, student.params, *asked), held + resting, count=count * longest)]
    made[0] = made[0]._replace(trips=longest)
    teach = functools.partial(one, count=count // len(config.settings[recipe.setting]) * longest)
    said = _label_steps(setup, recipe, taught, rollout, exact, teach, held + bytes_of(state))
    judged = _judged(setup, taught, rollout, exact)
    labels = places.rows(result(calibrate, rollout, rollout.behavior_logp, judged, KEY))
    learn = lowering(update, state, rollout, labels, KEY)
    return [*made, *said, one("update", learn, everyone, count=count * longest)]


def _label_steps(setup: Setup, recipe, taught: dict[int, Model], rollout, exact: bool, one, held: int) -> list[Step]:
    """One for each teacher: its reading of the answers of a domain, as often as it has domains."""
    chosen = list(setup.config.settings[recipe.setting].values())
    part = setup.places.rows(rollout, rollout.length.shape[0] // len(chosen))
    found: dict[str, Step] = {}
    for number, teacher in taught.items():
        name = chosen[number]
        read = lowering(uni_methods.reading(teacher, exact, recipe.label_parts), part)
        again = found[name].times if name in found else 0
        found[name] = one(f"{name}: label", read, held - bytes_of(teacher.params), times=again + recipe.steps)
    return list(found.values())


def _heads(taught: dict[int, Model]):
    """As `uni_methods.heads_of`: of the largest teacher's sizes."""
    shape = lambda teacher: jax.eval_shape(lambda params: teacher.functions.whole_head(params), teacher.params)
    heads = [shape(teacher) for teacher in taught.values()]
    return jax.ShapeDtypeStruct((len(heads), *map(max, zip(*(head.shape for head in heads)))), heads[0].dtype)


def _judged(setup: Setup, taught: dict[int, Model], rollout, exact: bool) -> Judged:
    size = rollout.tokens.shape
    hidden = jax.ShapeDtypeStruct((*size, _heads(taught).shape[1]), jnp.float32) if exact else None
    one, number = (jax.ShapeDtypeStruct(size[:1], dtype) for dtype in (jnp.float32, jnp.int32))
    logp = jax.ShapeDtypeStruct(size, jnp.float32)
    return setup.places.rows(Judged(logp, one, hidden, number if exact else None))
