"""Methods for language models as four functions each: OPD online and offline, GRPO, SFT, off-policy distillation."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from experiments.language import Language, LanguageModel, Problems, outcomes
from experiments.recipes import update_of
from opd_jax import data, hosts, optim, rng, sharding
from opd_jax.losses import cross_entropy, lightning_opd, opd, policy_gradient
from opd_jax.losses.lightning_opd import LightningLabels
from opd_jax.losses.linear_divergence import Options
from opd_jax.losses.opd import TeacherStates
from opd_jax.losses.policy_gradient import RewardLabels
from opd_jax.losses.token_logp import token_logp
from opd_jax.sampling import tokens as sampling
from opd_jax.sampling.tokens import Prompts, SamplingParams
from opd_jax.teachers import lookup
from opd_jax.types import Method

# ---- prompts, and the student's answers to them ----------------------------------------------------------------------


def prompts(problems: Problems, batch_size: int, room: int, seed: int, mesh):
    """Endless batches of `prompt`s: all problems, then all in another order."""
    record = functools.partial(prompt, problems, room)
    return data.epochs(record, len(problems.ids), batch_size, seed, lambda batch: sharding.shard_batch(batch, mesh))


def prompt(problems: Problems, room: int, index: int) -> dict[str, np.ndarray]:
    """`{"tokens": [room], "length": [], "index": [], "task": []}` of one problem."""
    ids, task = problems.ids[index], problems.tasks[index] if problems.tasks else 0
    whole = {"length": len(ids), "index": index, "task": task}
    return {"tokens": np.pad(ids, (0, room - len(ids)))} | {name: np.int32(value) for name, value in whole.items()}


@functools.partial(jax.jit, static_argnames=("init_cache", "sampling_copy", "how", "group"))
def _answer(decode_fn, params, batch, key, *, init_cache, sampling_copy, how, group):
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=0), batch)
    index = batch["index"]
    asked = Prompts(batch["tokens"], batch["length"], rng.per_record(key, len(index)), index, batch["task"])
    decode_fn, params = sampling_copy((decode_fn, params))
    return sampling.generate(decode_fn, init_cache, params, asked, how, group)


def answer(student: LanguageModel, how: SamplingParams, group: int = 1):
    """`Method.sample`: `group` answers to every prompt of a batch."""
    own = {"init_cache": student.init_cache, "sampling_copy": student.sampling_copy}
    return functools.partial(_answer, student.decode, **own, how=how, group=group)


# ---- labels ----------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What a teacher makes of a rollout."""

    logp: Float[Array, "B S"]  # of the response, as `logp_of`
    hidden: Float[Array, "B S E"]


@functools.partial(jax.jit, static_argnames=("head_fn", "parts"))
def read(hidden_fn: Partial, params, rollout, *, head_fn, parts: int = 1) -> Reading:
    """Log-probabilities and hidden states of a rollout under a model, in one forward pass.

    Args:
        parts: that the records are read in, one after the other, to bound memory.
    """

    def of(rollout) -> Reading:
        place = jnp.arange(rollout.tokens.shape[1])[None]
        tokens = jnp.where(place < jnp.asarray(rollout.length)[:, None], rollout.tokens, 0)
        hidden = hidden_fn(params, tokens, None)
        counted = rollout.response & (place > 0)
        return Reading(token_logp(lambda *_: hidden, params, tokens, counted, head_fn=head_fn), hidden)

    return optim.in_parts(of, rollout, parts)


@functools.partial(jax.jit, static_argnames=("head_fn", "parts"))
def logp_of(hidden_fn: Partial, params, rollout, *, head_fn, parts: int = 1) -> jax.Array:
    """Log-probabilities of a rollout's response under a model, in nats at temperature 1, `[B, S]`."""
    one = lambda rollout: read(hidden_fn, params, rollout, head_fn=head_fn).logp
    return optim.in_parts(one, rollout, parts)


def logp_of_many(model: LanguageModel, params, rollout, slots: int, mesh) -> np.ndarray:
    """`logp_of` of any number of records, `slots` at a time over the mesh, so that memory is bounded.

    Args:
        slots: what the mesh splits; where too few records are left, the last is read again.
    """
    rollout = hosts.fetch(rollout)
    count, parts = len(rollout.length), []
    for first in range(0, count, slots):
        index = np.minimum(np.arange(first, first + slots), count - 1)
        part = sharding.shard_batch(jax.tree.map(lambda leaf, i=index: leaf[i], rollout), mesh)
        parts.append(hosts.fetch(logp_of(model.hidden, params, part, head_fn=model.head)))
    return np.concatenate(parts)[:count]


@functools.partial(jax.jit, static_argnums=0)
def _states(parts, hidden_fn, params, rollout):
    def of(rollout) -> TeacherStates:
        place = jnp.arange(rollout.tokens.shape[1])[None]
        return TeacherStates(hidden_fn(params, jnp.where(place < rollout.length[:, None], rollout.tokens, 0), None))

    return optim.in_parts(of, rollout, parts)


def states_of(teacher: LanguageModel, parts: int = 1):
    """`Method.label`: the teacher's hidden states, `(teacher_params, rollout) -> TeacherStates`; `parts` as `read`."""
    return functools.partial(_states, parts, teacher.hidden)


def _logp_labels(teacher: LanguageModel, parts: int):
    how = {"head_fn": teacher.head, "parts": parts}
    return lambda params, rollout: LightningLabels(logp_of(teacher.hidden, params, rollout, **how))


def _reward_labels(language: Language, problems: Problems, group: int):
    """The outcome of every answer against those of its prompt. Read on the host."""

    def label(_, rollout):
        reward = jnp.asarray(outcomes(language, problems, rollout))
        number = jnp.arange(reward.size) // group
        advantage = policy_gradient.group_advantages(reward, number, reward.size // group, global_std=False)
        reward = jnp.nan_to_num(reward)
        return RewardLabels(*jax.device_put((advantage, None, reward), rollout.task.sharding))

    return label


# ---- the methods -----------------------------------------------------------------------------------------------------


def exact(student: LanguageModel, teacher: LanguageModel, teacher_params, divergence: str, parameter=None):
    """The divergence over the whole vocabulary; where `tensor` splits the heads by columns, each device reads its own.

    Heads are given as stored: to cut off a checkpoint's padding would move columns between devices.
    """
    options = Options(parameter=parameter, vocab_size=student.vocab_size, axis=sharding.VOCABULARY)
    head = teacher.whole_head(teacher_params)
    return opd.supervise(student.hidden, student.whole_head, head, divergence=divergence, options=options)


@jax.jit
def supervised(supervise: Partial, params, rollout, labels):
    """A loss without an update. What it binds is an argument: of several processes none holds all of it."""
    return supervise(params, rollout, labels, None)


def online(student: LanguageModel, teacher: LanguageModel, teacher_params, how: SamplingParams, recipe) -> tuple:
    """Standard OPD: the student's own answers, the teacher's distribution (or log-prob) at every token of them."""
    sample = answer(student, how, recipe.group)
    if recipe.divergence == "sampled":
        own = lightning_opd.supervise(student.hidden, head_fn=student.head, objective="online", clip=recipe.clip)
        label = _logp_labels(teacher, recipe.micro_batches)
    else:
        own = exact(student, teacher, teacher_params, recipe.divergence, recipe.get("parameter"))
        label = states_of(teacher, recipe.micro_batches)
    update, optimizer = update_of(own, recipe)
    return Method(sample, label, update), optimizer


def remote_online(student: LanguageModel, server, keep: Path, how: SamplingParams, recipe) -> tuple:
    """Standard OPD from the sampled tokens' log-probs of a teacher behind a server (`teachers.remote`)."""
    own = lightning_opd.supervise(student.hidden, head_fn=student.head, objective="online", clip=recipe.clip)
    update, optimizer = update_of(own, recipe)
    return Method(answer(student, how, recipe.group), lambda _, rollout: server.label(rollout, keep), update), optimizer


def lightning(student: LanguageModel, recipe) -> tuple:
    """Lightning OPD: stored answers and log-probs; no teacher."""
    own = lightning_opd.supervise(
        student.hidden, head_fn=student.head, objective="offline", weighting=recipe.weighting, clip=recipe.clip
    )
    update, optimizer = update_of(own, recipe)
    return Method(lookup.rollout, lookup.labels, update), optimizer


def off_policy(student: LanguageModel, teacher: LanguageModel, teacher_params, recipe) -> tuple:
    """Distillation on the teacher's own answers: its whole distribution at every token (supervised KD)."""
    own = exact(student, teacher, teacher_params, "forward_kl")
    update, optimizer = update_of(own, recipe)
    return Method(lookup.rollout, states_of(teacher, recipe.micro_batches), update), optimizer


def grpo(student: LanguageModel, language: Language, problems: Problems, how: SamplingParams, recipe) -> tuple:
    """The outcome alone, against the other answers to the same prompt."""
    update, optimizer = update_of(policy_gradient.token_grpo(student.hidden, head_fn=student.head), recipe)
    label = _reward_labels(language, problems, recipe.group)
    return Method(answer(student, how, recipe.group), label, update), optimizer


def sft(student: LanguageModel, recipe) -> tuple:
    """Supervised on stored answers."""
    update, optimizer = update_of(cross_entropy.supervise(student.hidden, head_fn=student.head), recipe)
    return Method(lookup.rollout, lambda _, rollout: None, update), optimizer
