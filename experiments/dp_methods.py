"""Private distillation as four functions: a record's own text or the student's, a public teacher, a noised update."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from experiments import dp_records
from experiments.language import LanguageModel
from opd_jax import dp_sgd, ghost_norms, optim, rng
from opd_jax.losses import dp_opd
from opd_jax.losses.dp_opd import PrivateLabels
from opd_jax.models import lora
from opd_jax.privacy import Mechanism
from opd_jax.sampling import tokens as sampling
from opd_jax.sampling.tokens import Prompts, SamplingParams
from opd_jax.types import Method, TokenRollout


@functools.partial(jax.jit, static_argnames=("init_cache", "sampling_copy", "how", "rollouts"))
def continuations(decode_fn, params, batch, key, *, init_cache, sampling_copy, how, rollouts: int = 1) -> TokenRollout:
    """The student's continuations of every record's prompt, `rollouts` next to each other; nobody's are empty.

    A record's are functions of its prompt, the student and a key of its own. Texts are as long as records: of a row's
    tokens, those that `how.max_new_tokens` leaves are the prompt's.
    """
    rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, rollouts, axis=0), batch)
    index = rows["index"]
    keys = rng.per_record(key, len(index))
    room = rows["tokens"].shape[1] - how.max_new_tokens
    prompts = Prompts(rows["tokens"][:, :room], rows["prompt"], keys, index, jnp.zeros_like(index))
    decode_fn, params = sampling_copy((decode_fn, params))
    return without_nobody(sampling.generate(decode_fn, init_cache, params, prompts, how))


def without_nobody(rollout: TokenRollout) -> TokenRollout:
    """Nothing counts where the index is -1."""
    there = rollout.group >= 0
    return rollout._replace(response=rollout.response & there[:, None], length=jnp.where(there, rollout.length, 0))


@functools.partial(jax.jit, static_argnames="rollouts")
def own_text(batch, rollouts: int = 1) -> TokenRollout:
    return dp_records.as_rollout(jax.tree.map(lambda leaf: jnp.repeat(leaf, rollouts, axis=0), batch))


def sample(student: LanguageModel, how: SamplingParams, recipe):
    """`Method.sample`: with probability lambda the student's continuations, else the records' own."""
    continued = functools.partial(
        continuations, init_cache=student.init_cache, sampling_copy=student.sampling_copy, how=how,
        rollouts=recipe.rollouts,
    )  # fmt: skip

    def draw(params, batch, key):
        if dp_opd.on_policy(jax.random.fold_in(key, 0), recipe.on_policy):
            return continued(student.decode, params, batch, jax.random.fold_in(key, 1))
        return own_text(batch, recipe.rollouts)

    return draw


def stored(recipe):
    """`Method.sample` where a batch has both texts, and the teacher's states of them, from before training."""
    plain = lambda batch, name: {key.removeprefix(name): value for key, value in batch.items() if key.startswith(name)}

    def draw(_, batch, key):
        student = bool(dp_opd.on_policy(jax.random.fold_in(key, 0), recipe.on_policy))
        text = plain(batch, "student_" if student else "own_")
        rollout = dp_records.as_rollout({"index": batch["index"]} | text, own=not student)
        return rollout, text["states"]

    return draw


@jax.jit
def label(hidden_fn, params, rollout: TokenRollout) -> PrivateLabels:
    """The teacher's hidden states of every text."""
    return PrivateLabels(hidden_fn(params, rollout.tokens, None), rollout.task == 1)


def adapted(module: nn.Module, vocab_size: int, backbone, scale: float) -> LanguageModel:
    """A model as functions of a LoRA adapter on a frozen `backbone`: far fewer parameters to put noise on."""
    of = lambda function: Partial(functools.partial(function, module, vocab_size, scale), backbone)
    head = of(_frozen_head)
    whole = Partial(functools.partial(_frozen_head, module, None, scale), backbone)
    return LanguageModel(
        of(_adapted_hidden), head, of(_adapted_decode), module.init_cache, whole, vocab_size, module.sampling_copy
    )


def _frozen_head(module, vocab_size, scale, backbone, adapter):
    return module.head(backbone)[:, :vocab_size]


def _adapted_hidden(module, vocab_size, scale, backbone, adapter, tokens, segment_ids):
    return lora.apply(module, backbone, adapter, scale, tokens, segment_ids, method="hidden")


def _adapted_decode(module, vocab_size, scale, backbone, adapter, tokens, positions, cache):
    logits, cache = lora.apply(module, backbone, adapter, scale, tokens, positions, cache, method="decode")
    return logits[..., :vocab_size], cache


def method(
    student: LanguageModel,
    teacher: LanguageModel,
    teacher_params,
    how: SamplingParams,
    recipe,
    mechanism: Mechanism | None,
    expected_batch: float,
) -> tuple:
    """`(Method, optimizer)` of an arm; without a mechanism, nothing is clipped by record and no noise is added."""
    supervise = dp_opd.supervise(
        student.hidden,
        student.head,
        teacher.head(teacher_params),
        beta=recipe.beta,
        temperature=recipe.temperature,
        own_weight=recipe.own_weight,
        train_head=not recipe.lora_rank,
    )
    clip_norm = 1.0 if mechanism is None else math.inf  # of the mean gradient
    optimizer = optim.adamw(
        recipe.learning_rate, warmup=recipe.warmup, weight_decay=recipe.weight_decay, clip_norm=clip_norm
    )
    if mechanism is None:
        update = optim.dense(
            mean_of_records(supervise), optimizer, micro_batches=recipe.micro_batches, ema_decay=recipe.ema_decay
        )
    else:
        update = dp_sgd.private(
            supervise,
            optimizer,
            clip_norm=recipe.clip_norm,
            noise_multiplier=mechanism.noise_multiplier,
            expected_batch=expected_batch,
            rollouts=recipe.rollouts,
            micro_batch=recipe.micro_batch,
            ema_decay=recipe.ema_decay,
            summed=functools.partial(ghost_norms.clipped_sum, head="lm_head/kernel") if recipe.ghost else None,
        )
    if recipe.stored:
        kept = lambda _, drawn: PrivateLabels(drawn[1].astype(jnp.float32), drawn[0].task == 1)
        step = lambda state, drawn, labels, key: update(state, drawn[0], labels, key)
        return Method(stored(recipe), kept, step), optimizer
    said = lambda _, rollout: label(teacher.hidden, teacher_params, rollout)
    return Method(sample(student, how, recipe), said, update), optimizer


def mean_of_records(supervise):
    """The same loss for `optim.dense`: every record counts as one, as in private training."""

    def each(supervise, params, rollout, labels, key):
        result = supervise(params, rollout, labels, key)
        there = (result.weight > 0).astype(jnp.float32)
        return result._replace(total=result.total / jnp.maximum(result.weight, 1), weight=there)

    return jax.tree_util.Partial(each, supervise)
