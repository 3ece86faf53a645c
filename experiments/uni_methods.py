"""Uni-OPD as four functions: several answers to a prompt, its domain's teacher and verifier, margins, one update."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments import recipes, token_methods
from experiments.language import Language, LanguageModel, Problems, verdicts
from experiments.uni_setup import Model
from opd_jax import data, hosts, sharding
from opd_jax.losses import uni_opd
from opd_jax.losses.linear_divergence import Options
from opd_jax.losses.uni_opd import Calibration
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.teachers import lookup
from opd_jax.teachers.routing import label_by_task
from opd_jax.types import Method


class Judged(NamedTuple):
    """What teachers and verifiers say of a rollout, before any margin."""

    teacher_logp: Float[Array, "B S"]
    outcome: Float[Array, "B"]
    hidden: Float[Array, "B S E"] | None = None  # the teachers' states, for an exact divergence
    teacher: Int[Array, "B"] | None = None  # which of the heads is a record's


def bundles(problems: Problems, chosen: Sequence[Sequence[int]], batch_size: int, room: int, seed: int, mesh):
    """Endless batches with as many prompts of every domain: those of a small domain come round more often.

    Args:
        chosen: of each domain, the problems that it asks, some of them repeatedly.
        batch_size: prompts, a multiple of the domains.
    """
    mixed = [np.random.default_rng((seed, i)).permutation(indices) for i, indices in enumerate(chosen)]

    def record(index: int):
        rows = [token_methods.prompt(problems, room, int(indices[index % len(indices)])) for indices in mixed]
        return data.batch_of(rows)

    def place(batch):
        return sharding.shard_batch({k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items()}, mesh)

    return data.epochs(record, max(map(len, mixed)), batch_size // len(mixed), seed, place)


def reader(teacher: Model, exact: bool, keep: Path, parts: int = 1):
    """`label(rollout)`: a teacher's log-probs of the response, or, if `exact`, a `Reading` with its hidden states.

    Args:
        parts: that answers are read in, one after the other, to bound memory.
        keep: directory for what a server has left unscored, so that it is not lost.
    """
    if teacher.server is not None:
        return lambda rollout: teacher.server.label(rollout, keep).teacher_logp
    return reading(teacher, exact, parts)


def reading(teacher: Model, exact: bool, parts: int):
    """That of a teacher in this process."""
    read, model = token_methods.read if exact else token_methods.logp_of, teacher.functions
    return functools.partial(read, model.hidden, teacher.params, head_fn=model.head, parts=parts)


def judge(said: Mapping[int, Callable], language: Language, problems: Problems, mesh, failures: Counter, exact: bool):
    """`Method.label`: every answer's log-probs under the teacher of its task, and its outcome.

    Args:
        said: the `reader` of each task's teacher.
        failures: counts why outcomes are unknown.
        exact: the teachers' hidden states too.
    """
    place = functools.partial(sharding.shard_batch, mesh=mesh)

    def label(_, rollout):
        found, outcome = label_by_task(said, rollout, place, sharding.record_parts(mesh)), read_verdicts(rollout)
        if not exact:
            return place(Judged(found, outcome))
        number = np.searchsorted(sorted(said), hosts.fetch(rollout.task)).astype(np.int32)
        return place(Judged(found.logp, outcome, found.hidden, number))

    def read_verdicts(rollout):
        found = verdicts(language, problems, rollout)
        failures.update(found.failures)
        return found.outcome

    return label


def heads_of(teachers: Mapping[int, Model]) -> Float[Array, "N E V"]:
    """The output projections of all teachers in the order of their tasks, smaller ones with rows and columns of zeros.

    Made on the devices: a head that is split stays so.
    """
    heads = [teacher.functions.whole_head(teacher.params) for _, teacher in sorted(teachers.items())]
    shape = [max(head.shape[axis] for head in heads) for axis in (0, 1)]

    @jax.jit
    def stacked(heads):
        return jnp.stack([jnp.pad(head, [(0, size - n) for size, n in zip(shape, head.shape)]) for head in heads])

    return stacked(heads)


def calibration_of(recipe) -> Calibration:
    """The settings of `calibrate` in an arm's recipe."""
    names = ("token_gap", "scope", "margin", "delta", "mode", "direction", "retain")
    return Calibration(ratio=recipe.ratio if recipe.balance else None, **{name: recipe[name] for name in names})


@functools.partial(jax.jit, static_argnames=("how", "shuffled"))
def _calibrate(rollout, student_logp, judged: Judged, key, *, how: Calibration, shuffled: bool):
    outcome = jax.random.permutation(jax.random.fold_in(key, 1), judged.outcome) if shuffled else judged.outcome
    counted = rollout.response & (jnp.arange(rollout.tokens.shape[1]) > 0)[None]
    labels = uni_opd.calibrate(student_logp, judged.teacher_logp, counted, outcome, rollout.group, key, how)
    return labels._replace(teacher_hidden=judged.hidden, teacher=judged.teacher)


def parts_of(student: LanguageModel, recipe, heads=None) -> tuple:
    """What an update is made of: `(calibrate, dense, optimizer)`."""
    exact = recipe.divergence != "sampled"
    own = uni_opd.supervise(
        student.hidden,
        head_fn=student.whole_head if exact else student.head,
        divergence=recipe.divergence,
        teacher_heads=heads,
        options=Options(vocab_size=student.vocab_size, axis=sharding.VOCABULARY),
        clip=recipe.clip,
        clip_high=recipe.clip_high,
        reduction=recipe.reduction,
    )
    calibrate = functools.partial(_calibrate, how=calibration_of(recipe), shuffled=recipe.shuffled)
    return calibrate, *recipes.update_of(own, recipe)


def update_of(student: LanguageModel, recipe, heads=None) -> tuple:
    """Calibration of the whole batch, then `dense`, which divides it: `(update, optimizer)`.

    Of the student's own samples the log-probs are those it sampled with; stored answers are scored anew.
    """
    calibrate, dense, optimizer = parts_of(student, recipe, heads)

    def update(state, rollout, judged, key):
        logp = rollout.behavior_logp
        if recipe.method == "offline":
            logp = token_methods.logp_of(student.hidden, state.params, rollout, head_fn=student.head)
        return dense(state, rollout, calibrate(rollout, logp, judged, key), key)

    return update, optimizer


def online(student: LanguageModel, teachers: Mapping[int, Model], label, how: SamplingParams, recipe) -> tuple:
    """Uni-OPD, and plain OPD with margin and balance off."""
    heads = None if recipe.divergence == "sampled" else heads_of(teachers)
    update, optimizer = update_of(student, recipe, heads)
    return Method(token_methods.answer(student, how, recipe.group), label, update), optimizer


def offline(student: LanguageModel, recipe) -> tuple:
    """The same on stored answers, labels and outcomes, whole groups at a time; no teacher."""
    update, optimizer = update_of(student, recipe)
    label = lambda _, rollout: Judged(rollout.teacher_logp, rollout.outcome)
    return Method(lookup.rollout, label, update), optimizer
