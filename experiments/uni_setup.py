"""What Uni-OPD is run on: the embedded world with its shipped models, or a user's directories and problems."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from configs import domains_models as models_config
from experiments import domains, domains_models, language, multimodal, reasoning_models, stages
from experiments.language import Language, LanguageModel, Problems
from opd_jax import rng, sharding
from opd_jax.checkpoint import params_sha256
from opd_jax.config import ConfigError, fingerprint
from opd_jax.models import vlm
from opd_jax.models.decoder import Decoder, partition_rules
from opd_jax.models.hf import check_same_tokenizer, load_vlm
from opd_jax.models.vlm import VLM
from opd_jax.teachers.remote import RemoteTeacher
from opd_jax.teachers.routing import check_routes
from opd_jax.worlds import domains as world


class Model(NamedTuple):
    """A model with the bank of all pictures bound to it; or a teacher behind a server, then nothing but that."""

    functions: LanguageModel | None
    params: Any
    sha256: str  # of the parameters, or of where it is served
    module: Decoder | VLM | None
    server: RemoteTeacher | None = None


def place(tree, mesh):
    """Parameters of text or vision-language models, or a state that holds trees of them, by their rules."""
    return sharding.shard_params(tree, mesh, partition_rules(mesh, vlm.RULES))


class Setup(NamedTuple):
    """Problems, their language, and models that know it."""

    language: Language
    domains: tuple[str, ...]  # by the task of a problem
    problems: Problems
    held_out: Problems
    room: int  # of a prompt
    student: Model
    load: Callable[[str], Model]  # a teacher by its name


def of_world(config, mesh) -> Setup:
    """The embedded domains; models are shipped, or, where `config.shipped` is False, random ones of their shapes."""
    own, part, models = domains.world_language(), config.problems, models_config.get_config()
    draw = lambda split, test: [
        problem
        for name in world.DOMAINS
        for problem in domains.draw(name, split[0], split[1], part.levels, test)
    ]  # fmt: skip
    asked = draw((part.count, part.seed), False)
    scored = draw((config.eval.problems, config.eval.seed), config.eval.held_out)
    bank = sharding.replicate(domains.bank_of(asked + scored), mesh)

    def load(name: str) -> Model:
        module = domains.module_of(models.models[name].model)
        if config.shipped:
            path = stages.SHIPPED / f"domains_{name}.safetensors"
            params = reasoning_models.load(path, domains_models.recipes(models)[name]).params
        else:
            params = domains.init(module, bank, rng.stream(0, name))
        functions = domains.functions(module, bank, own.vocab_size, config.compute.sampling_copy)
        return Model(functions, place(params, mesh), params_sha256(params), module)

    shown = sum(problem.domain in domains.PICTURED for problem in asked)
    problems, held_out = domains.as_problems(asked), domains.as_problems(scored, shown)
    return Setup(own, world.DOMAINS, problems, held_out, domains.ROOM, load("student"), functools.cache(load))


def of_directories(config, mesh) -> Setup:
    """A user's Hugging Face directories and JSONL files."""
    part, directory = config.problems, config.student.path
    for teacher in config.teachers.values():
        if not teacher.get("url"):
            check_same_tokenizer(directory, teacher.path)
    tokenizer = language.load_tokenizer(directory)
    module, params = load_directory(directory, mesh, part.images, config.compute, trained=True)
    read = multimodal.Reader(tokenizer, module, part, dict(config.verifiers))
    problems = read(part.path, part.count or None)
    held_out = read(config.eval.path, config.eval.problems or None)
    names = tuple(read.domains)
    for setting in config.settings.values():
        check_routes(setting.to_dict(), dict(enumerate(names)))
    own = language.directory_language(directory, tokenizer)
    own = own._replace(correct=multimodal.correct, threads=None)
    bank = sharding.replicate(read.bank(), mesh)

    def bind(module, params) -> Model:
        functions = domains.functions(module, bank, own.vocab_size, config.compute.sampling_copy)
        functions = _with_ids_of(functions, read.vocab_size, getattr(module, "vocab_size", read.vocab_size))
        return Model(functions, params, params_sha256(params), module)

    def load(name: str) -> Model:
        teacher = config.teachers[name]
        if not teacher.get("url"):
            return bind(*load_directory(teacher.path, mesh, part.images, config.compute))
        taught = {domain for setting in config.settings.values() for domain, who in setting.items() if who == name}
        ids = [ids for ids, task in zip(problems.ids, problems.tasks) if names[task] in taught]
        return served(name, teacher, ids, own.vocab_size)

    room = part.prompt_tokens
    return Setup(own, names, problems, held_out, room, bind(module, params), functools.cache(load))


def served(name: str, part, asked: Sequence[np.ndarray], vocab_size: int) -> Model:
    """A teacher behind a server, tried on its first prompt.

    Raises: ConfigError when the server does not answer, or a prompt has pictures: ids of them mean nothing elsewhere.
    """
    if any(ids.max() >= vocab_size for ids in asked):
        raise ConfigError(f"teachers.{name}.url={part.url}: its domain has pictures, and a server is sent text alone")
    server = RemoteTeacher(part.url, api=part.get("api", "vllm"), model=part.get("served_model", ""))
    server.self_test(asked[0], None)
    return Model(None, None, fingerprint({"url": part.url, "model": part.get("served_model", "")}), None, server)


def load_directory(directory: str, mesh, images: int, compute, trained: bool = False):
    """A text or vision-language model, whichever the directory holds, for so many `images` a prompt."""
    kind = json.loads((Path(directory) / "config.json").read_text()).get("model_type")
    if kind != "qwen3_vl":
        return language.load_directory(directory, mesh, compute, trained)
    module, params = load_vlm(directory, mesh=mesh, dtype=language.kept_in(trained))
    return computing(module, images, compute, trained), params


def computing(module: Decoder | VLM, images: int, compute, trained: bool = False) -> Decoder | VLM:
    """The same for so many `images` a prompt, with the config's `compute`; a tower computes as its decoder does."""
    if not isinstance(module, VLM):
        return language.computing(module, compute, trained)
    text = language.computing(module.language_model, compute, trained)
    return module.clone(images_per_row=images, language_model=text)


def _with_ids_of(functions: LanguageModel, ours: int, theirs: int) -> LanguageModel:
    """Ids of images begin behind a model's own vocabulary, which may be padded to another size than the student's."""
    if ours == theirs:
        return functions
    hidden = Partial(functools.partial(_shifted, ours, theirs), functions.hidden)
    return functions._replace(hidden=hidden)


def _shifted(ours, theirs, hidden, params, tokens, segment_ids):
    return hidden(params, jnp.where(tokens >= ours, tokens - ours + theirs, tokens), segment_ids)
