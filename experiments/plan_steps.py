"""The compiled steps of an arm of a language config, from shapes alone: the functions that the experiment runs."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments import language, token_methods
from experiments.reasoning_stages import arm_recipe, sampling_params
from opd_jax import optim, sharding
from opd_jax.config import ConfigError
from opd_jax.losses.lightning_opd import LightningLabels
from opd_jax.models.decoder import Decoder, partition_rules
from opd_jax.types import PyTree

PLANNED = ("online", "lightning", "off_policy")


class Step(NamedTuple):
    """One program of an arm."""

    name: str
    lower: Callable[[], jax.stages.Lowered]  # to be called with the mesh set
    trips: int  # of a loop that data end: the most tokens of an answer
    held: int  # bytes of one device that are not among its arguments: what the run holds meanwhile
    times: float  # in the whole arm
    tokens: int  # of answers, that one run samples, reads or learns from: the most there can be
    float32: bool  # whether products are of float32 numbers


class Setup:
    """Models as shapes on a mesh."""

    def __init__(self, config, mesh, student: Decoder, teacher: Decoder, shipped: bool):
        self.config, self.mesh = config, mesh
        self.float32 = config.compute.dtype == "float32"
        self.modules = {
            "student": language.computing(student, config.compute, trained=True),
            "teacher": language.computing(teacher, config.compute, trained=False),
        }
        kept = {"student": jnp.float32, "teacher": jnp.float32 if shipped else jnp.bfloat16}
        self.params = {name: self.place(shapes_of(module, kept[name])) for name, module in self.modules.items()}
        vocab = min(student.vocab_size, teacher.vocab_size)
        self.student, self.teacher = (language.functions(module, vocab) for module in self.modules.values())
        self.start = 0 if shipped else bytes_of(self.place(shapes_of(student, jnp.float32), split=True))
        self.room, self.longest = config.problems.prompt_tokens, config.sampler.max_new_tokens
        self.how = sampling_params(config.sampler, self.longest, (0,), 0)

    def place(self, tree: PyTree, split: bool | None = None) -> PyTree:
        """Shapes with their places, as `Experiment.place` gives them. Raises: ConfigError: an axis does not split."""
        rules = partition_rules(self.mesh) if (self.config.fsdp if split is None else split) else ()

        def leaf(path, shape, spec):
            where = NamedSharding(self.mesh, spec)
            try:
                where.shard_shape(shape.shape)
            except ValueError as error:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                sizes = dict(self.mesh.shape)
                raise ConfigError(f"mesh={sizes}: {name} {shape.shape} does not split by {spec}; resize it") from error
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

        return jax.tree_util.tree_map_with_path(leaf, tree, sharding.param_specs(tree, rules))

    def rows(self, tree: PyTree) -> PyTree:
        """Records split over the devices, as `shard_batch` places them."""
        where = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)

    def prompts(self, count: int) -> PyTree:
        one = jax.ShapeDtypeStruct((count,), jnp.int32)
        tokens = jax.ShapeDtypeStruct((count, self.room), jnp.int32)
        return self.rows({"tokens": tokens, "length": one, "index": one, "task": one})


def shapes_of(module: Decoder, dtype) -> PyTree:
    params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def bytes_of(tree: PyTree) -> int:
    """Of one device."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))


def plan(setup: Setup, name: str, stored: int) -> list[Step]:
    """The steps of an arm.

    Args:
        stored: problems that are answered into a store, for an offline arm.

    Raises: ConfigError: an arm that cannot be planned, or whose batches do not split over the mesh.
    """
    recipe = arm_recipe(setup.config, name)
    if recipe.method not in PLANNED:
        raise ConfigError(f"arm {name}: method {recipe.method!r} cannot be planned yet; choose {', '.join(PLANNED)}")
    records = recipe.batch_size * (recipe.group if recipe.method == "online" else 1)
    check_parts(setup.mesh, name, records, recipe.micro_batches)
    method, update, optimizer = _method(setup, recipe)
    params, taught = setup.params["student"], setup.params["teacher"]
    state = setup.place(jax.eval_shape(lambda params: optim.init_state(params, optimizer), params))
    always, held, own = setup.start, bytes_of(taught) + setup.start, bytes_of(params)  # own: of the student
    answer = method.sample if recipe.method == "online" else token_methods.answer(setup.student, setup.how)
    asked = setup.prompts(recipe.batch_size if recipe.method == "online" else setup.config.sampler.slots)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rollout = jax.eval_shape(answer, params, asked, key)
    step = functools.partial(Step, trips=1, float32=setup.float32)
    sample = functools.partial(jax.jit(answer).lower, params, asked, key)
    tokens = lambda count: count * setup.longest
    sample = step("sample", sample, trips=setup.longest, held=0, times=0, tokens=tokens(len(rollout.length)))
    batch = setup.rows(resized(rollout, records))
    labels = None
    if recipe.method == "lightning":
        slots = setup.rows(rollout)
        read = lambda who, params: functools.partial(
            token_methods.logp_of.lower, who.hidden, params, slots, head_fn=who.head
        )
        waves = math.ceil(stored / len(rollout.length))
        one = functools.partial(step, times=waves, tokens=sample.tokens)
        steps = [
            sample._replace(name="store: sample", held=held, times=waves),
            one("store: label", read(setup.teacher, taught), held=always + own),
            one("store: reference", read(setup.student, params), held=held),
        ]
        logp = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32)
        labels = LightningLabels(logp, logp, jax.ShapeDtypeStruct(batch.length.shape, jnp.float32))
    else:
        state_only = bytes_of(state) - own
        sample = sample._replace(held=held + state_only, times=recipe.steps)
        label = functools.partial(jax.jit(method.label).lower, taught, batch)
        label = step("label", label, held=always + bytes_of(state), times=recipe.steps, tokens=tokens(records))
        steps = [sample, label] if recipe.method == "online" else [label]
        labels = jax.eval_shape(method.label, taught, batch)
    learn = functools.partial(update.func.lower, *update.args, state, batch, setup.rows(labels), key)
    learn = step("update", learn, held=held, times=recipe.steps, tokens=tokens(records))
    return [*steps, learn]


def check_parts(mesh, name: str, records: int, micro_batches: int) -> None:
    """Raises: ConfigError: the records of a micro-batch do not split over the devices, which would repeat work."""
    for count, what in ((records, "records"), (records // micro_batches, "records of a micro-batch")):
        if wrong := sharding.uneven(count, mesh, what):
            settings = f"micro_batches={micro_batches} or mesh={dict(mesh.shape)}"
            raise ConfigError(f"arm {name}: {wrong}, or change {settings}")


def resized(tree: PyTree, count: int) -> PyTree:
    """Shapes of as many records, without a place."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), tree)


def _method(setup: Setup, recipe) -> tuple:
    """The method of a recipe, its update with the shapes of what it holds frozen (a teacher's head), the optimiser."""
    made = {}

    def make(teacher_params):
        student, teacher = setup.student, setup.teacher
        made["method"], made["optimizer"] = {
            "online": lambda: token_methods.online(student, teacher, teacher_params, setup.how, recipe),
            "lightning": lambda: token_methods.lightning(student, recipe),
            "off_policy": lambda: token_methods.off_policy(student, teacher, teacher_params, recipe),
        }[recipe.method]()
        return made["method"].update

    update = jax.eval_shape(make, setup.params["teacher"])
    update = jax.tree.map(lambda head: setup.place({"lm_head": {"kernel": head}})["lm_head"]["kernel"], update)
    return made["method"], update, made["optimizer"]
