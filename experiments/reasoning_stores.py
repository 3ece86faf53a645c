"""Teachers of language models, and the stores of answers and labels that they and the students fill."""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import reasoning_models as models_config
from experiments import language, reasoning_models, stages, token_methods
from opd_jax import rng
from opd_jax.config import ConfigError, fingerprint
from opd_jax.losses.token_logp import token_logp
from opd_jax.metrics import MetricsWriter, Stopwatch
from opd_jax.models.decoder import Decoder
from opd_jax.teachers import lookup, store
from opd_jax.teachers.remote import RemoteTeacher
from opd_jax.types import PyTree


class Teacher(NamedTuple):
    """Who labels. In this process, behind a server, or both: then the server labels, and the model writes answers."""

    name: str
    identity: str  # hash of the parameters, or of where it is served
    model: language.LanguageModel | None
    params: PyTree
    server: RemoteTeacher | None


def served_teacher(name: str, part, known: Teacher | None, prompt: np.ndarray) -> Teacher:
    """A teacher behind a server, tried on one prompt first; against `known`, the same model in this process, if given.

    Raises: ConfigError when the server does not answer, or says something else.
    """
    server, expected = RemoteTeacher(part.url, api=part.api, model=part.served_model), None
    if known is not None:
        tokens = jnp.asarray(prompt)[None]
        logp = token_logp(known.model.hidden, known.params, tokens, tokens >= 0, head_fn=known.model.head)
        expected = np.asarray(logp[0])
    server.self_test(prompt, expected)
    if known is not None:
        return known._replace(server=server)
    return Teacher(name, fingerprint({"url": part.url, "model": part.served_model}), None, None, server)


def world_module(name: str, part) -> Decoder:
    """Of a shipped model of the reasoning world, or with as many layers as `part.layers` says."""
    models = models_config.get_config().models
    if name not in models:
        raise ConfigError(f"teachers.{name}: no model of that name is shipped; choose own or other, or give a path")
    module = Decoder(**models[name].model)
    return module.clone(num_layers=part.layers) if part.layers else module


def world_model(name: str, part) -> tuple[Decoder, PyTree]:
    """A shipped model of the reasoning world; a random one of another size where `part.layers` says so."""
    module = world_module(name, part)
    if part.layers:
        return module, jax.jit(module.init)(rng.stream(0, name), jnp.zeros((1, 1), jnp.int32))["params"]
    path = stages.SHIPPED / f"reasoning_{name}.safetensors"
    return module, reasoning_models.load(path, reasoning_models.recipes(models_config.get_config())[name]).params


def logp_by(teacher: Teacher, rollout, workdir: Path, slots: int, mesh) -> np.ndarray:
    """The teacher's log-probs of a rollout's response; `slots` records at a time where it is in this process."""
    if teacher.server is not None:
        return teacher.server.label(rollout, workdir / "unscored").teacher_logp
    return token_methods.logp_of_many(teacher.model, teacher.params, rollout, slots, mesh)


def write(
    directory: Path, name: str, about, problems, room: int, size: int, model, params, how, label, seed: int, **where
) -> None:
    """Answers all problems and labels the answers, `size` problems a shard; what is written already is not done again.

    A shard's line in `metrics.jsonl`, under `name`, has the seconds of sampling and labelling and its response tokens.
    """
    count, key = math.ceil(len(problems.ids) / size), rng.stream(seed, name.split("_seed")[0])
    missing = store.Writer(directory, about, count).missing
    if (directory / "manifest.json").exists() and not missing:
        return
    watch, workdir = Stopwatch(), directory.parent.parent
    answer, label = watch.timed("sample", language.answer_all), watch.timed("label", label)
    with MetricsWriter(workdir, count, name, start=missing[0] if missing else count, show=()) as writer:

        def make_shard(index: int):
            part = slice(index * size, (index + 1) * size)
            few = language.Problems(*(column and column[part] for column in problems))
            rollout = answer(model, params, few, room, how, rng.at_step(key, index), **where)
            rollout = rollout._replace(group=rollout.group + index * size)
            records = lookup.records_of(rollout, label(rollout))
            writer.write(index, watch.take() | {"response_tokens": int(rollout.response.sum())})
            return records

        store.write(directory, about, count, make_shard)
