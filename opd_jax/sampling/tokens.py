"""Sampling a language model with a key-value cache: one prefill of the prompts, then one token per record and step.

`generate` is a pure function: prefill, then a `while_loop` that ends with the last record. `stream` sends any number of
prompts through a fixed number of slots and fills a slot again as soon as its record is done, so that one long answer
does not hold a batch. Both draw the same tokens, for a record's draws depend on its own key and positions alone.

The model is `decode_fn(params, tokens[B,S], positions[B,S], cache) -> (logits[B,S,V], cache)`: it writes the keys and
values of every token at the slot of its position, and a query at position p attends to slots 0..p. Prompts are padded
on the right and need no mask: what padding wrote is overwritten by the record's own tokens before it can be seen.

A prefill's logits are not used. The first step decodes the last token of the prompt once more and draws from that, so
there is one place that draws, and under jit the `[B, P, V]` logits are never computed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from opd_jax import hosts, sharding
from opd_jax.rng import per_record
from opd_jax.sampling.token_filters import SamplingParams, check_ids, check_params, filter_logits
from opd_jax.types import PyTree, TokenRollout, as_partial

__all__ = [
    "Prompts",
    "SamplingParams",
    "as_prompts",
    "draw",
    "filter_logits",
    "generate",
    "generate_in_slots",
    "log_probs",
    "rollout_log_probs",
    "stream",
]

DecodeFn = Callable[[PyTree, Int[Array, "B S"], Int[Array, "B S"], PyTree], tuple[Float[Array, "B S V"], PyTree]]
InitCache = Callable[[int, int], PyTree]
"""`init_cache(batch, length)`: an empty cache, every leaf `[layers, batch, length, ...]`."""


class Prompts(NamedTuple):
    """What to answer, one row per answer; every leaf begins with the record axis."""

    tokens: Int[Array, "B P"]  # padded on the right; what the padding holds does not matter
    length: Int[Array, "B"]  # 1..P
    keys: Key[Array, "B"]  # a record's draws depend on its own key alone
    group: Int[Array, "B"]  # index of the prompt
    task: Int[Array, "B"]


class _Slots(NamedTuple):
    """The state of decoding: rows of the rollout being written."""

    rollout: TokenRollout
    keys: Key[Array, "B"]
    left: Int[Array, "B"]  # tokens a record may still draw; 0 once it is done, or the slot empty
    cache: PyTree


def as_prompts(
    ids: Sequence[Sequence[int] | np.ndarray],
    room: int,
    key: Key[Array, ""],
    task: Sequence[int] | np.ndarray | None = None,
    samples: int = 1,
) -> Prompts:
    """Ragged prompts as one array, each repeated for `samples` answers in a row.

    Args:
        ids: the token ids of every prompt.
        room: `P`, the same for all batches, so that nothing is compiled twice.
        key: split over the records by index.
        task: of every prompt; 0 unless given.

    Raises:
        ValueError: a prompt that is empty or longer than `room`, or fewer than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: give at least 1 per prompt")
    for i, prompt in enumerate(ids):
        if not 1 <= len(prompt) <= room:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; give 1 to {room}, or a larger room")
    tokens = np.zeros((len(ids), room), np.int32)
    for row, prompt in zip(tokens, ids):
        row[: len(prompt)] = prompt
    group = np.repeat(np.arange(len(ids), dtype=np.int32), samples)
    length = np.asarray([len(prompt) for prompt in ids], np.int32)
    task = np.zeros(len(ids), np.int32) if task is None else np.asarray(task, np.int32)
    columns = (jnp.asarray(column) for column in (tokens[group], length[group], group, task[group]))
    tokens, length, group, task = columns
    return Prompts(tokens, length, per_record(key, len(group)), group, task)


def log_probs(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Log-probability in nats of each token under the softmax of its logits, in float32; differentiable in `logits`."""
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))  # taken from both, so that none loses digits
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1) - top
    return chosen[..., 0] - jnp.log(jnp.exp(logits - top).sum(axis=-1))


def rollout_log_probs(logits: Float[Array, "B S V"], rollout: TokenRollout) -> Float[Array, "B S"]:
    """Log-probabilities of the sampled tokens under logits of the whole rollout, placed as `behavior_logp` is.

    `logits[:, s - 1]` predicts `tokens[:, s]`. 0 where not `response`, whatever the logits there, and no gradient. With
    the parameters that sampled, the difference to `behavior_logp` is the mismatch of sampler and trainer.
    """
    counts = rollout.response[:, 1:]
    logp = log_probs(jnp.where(counts[..., None], logits[:, :-1], 0), rollout.tokens[:, 1:])
    return jnp.pad(jnp.where(counts, logp, 0), ((0, 0), (1, 0)))


def draw(
    keys: Key[Array, "B"], positions: Int[Array, "B"], logits: Float[Array, "B V"], sampling: SamplingParams
) -> tuple[Int[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """One token per record, drawn with `fold_in(key, position)`: the position is that of the token drawn.

    The Gumbel noise has the long tail (`mode="high"`): with the short one no draw exceeds 16 nats, and tokens less
    likely than about 1e-7, many of them in a large vocabulary, would come too rarely for their log-probability.

    Returns:
        The token; its log-probability under `softmax(logits)`, the unmodified policy; and that under the distribution
        drawn from, `softmax(filter_logits(logits, sampling))`. Both in nats, float32; the latter is 0 when greedy.
    """
    kept = filter_logits(logits, sampling)
    if sampling.temperature == 0:
        token = jnp.argmax(kept, axis=-1)
    else:
        one = lambda key, p, row: jax.random.categorical(jax.random.fold_in(key, p), row, mode="high")
        token = jax.vmap(one)(keys, positions, kept)
    token = token.astype(jnp.int32)
    return token, log_probs(logits, token), log_probs(kept, token)


def generate(
    decode_fn: DecodeFn,
    init_cache: InitCache,
    params: PyTree,
    prompts: Prompts,
    sampling: SamplingParams,
    samples: int = 1,
) -> TokenRollout:
    """Answers all prompts in one batch. Jit it, with the functions and `sampling` static or bound; no gradient.

    The result has the width `S = P + max_new_tokens`. It ends with the step that ends the last record.

    Args:
        decode_fn: the student's, as the module describes.
        init_cache: called with `(B, P)`; prefill attends to no more than that.
        prompts: a record's answer does not depend on `P`, on its padding, nor on the batch and the devices, but by the
            rounding of the logits.
        sampling: static: another value compiles anew.
        samples: rows in a row that ask the same; a prompt is prefilled once for all of them.

    | case | result |
    |---|---|
    | the last token allowed is a stop id | ended, not truncated |
    | no stop ids | every answer has `max_new_tokens` tokens and is truncated |
    | a stop id in the prompt | has no effect |

    Raises:
        ValueError: bad sampling parameters, ids outside the vocabulary, a cache of another shape, or rows that are not
            a multiple of `samples`.
    """
    check_params(sampling)
    rows, room = prompts.tokens.shape
    if rows % samples:
        raise ValueError(f"{rows} rows are no multiple of samples={samples}; repeat every prompt as often")
    model = _bind(decode_fn, params)
    asked = jax.tree.map(lambda leaf: leaf.reshape(-1, samples, *leaf.shape[1:])[:, 0], prompts)
    cache = _prefill(model, asked, _cache(init_cache, rows // samples, room), sampling).cache
    slots = _open(prompts, jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=1), cache), sampling)
    longer = lambda leaf: jnp.pad(leaf, [(0, sampling.max_new_tokens if axis == 2 else 0) for axis in range(leaf.ndim)])
    slots = slots._replace(cache=jax.tree.map(longer, slots.cache))
    running = lambda slots: (slots.left > 0).any()
    slots = jax.lax.while_loop(running, functools.partial(_step, model, sampling), slots)
    return jax.lax.stop_gradient(slots.rollout)


def stream(
    decode_fn: DecodeFn,
    init_cache: InitCache,
    params: PyTree,
    prompts: Prompts,
    sampling: SamplingParams,
    slots: int,
    admit: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[np.ndarray, TokenRollout]]:
    """Answers `N` prompts through a fixed number of slots, and yields answers as they end. Not to be jitted.

    The compiled function puts up to `admit` prompts into free slots and decodes until as many are free again; at the
    end, until all are. It is compiled once for the shapes, the functions and `sampling`, whatever `N`, keys and
    parameters, so `decode_fn` must be the same object (or an equal `Partial`) every time.

    Args:
        decode_fn, params, prompts, sampling: as in `generate`, and so are the tokens drawn.
        init_cache: called with `(slots, S)`, and with `(admit, P)` for prefill.
        slots: records decoded at a time.
        admit: prompts prefilled at a time, an eighth of the slots unless given. More make fewer, larger prefills; fewer
            leave fewer slots idle.
        mesh: splits slots and prefills as it splits records.

    Yields:
        Indices of records that ended, and their rows in the same order, as numpy arrays.

    Raises:
        ValueError: as `generate`; a prompt's length outside 1..P; or `slots` or `admit` that do not fit.
    """
    total, room = prompts.tokens.shape
    admit = max(1, slots // 8) if admit is None else admit
    _check_stream(prompts, sampling, slots, admit, mesh)
    model, scratch = _bind(decode_fn, params), _cache(init_cache, admit, room)
    width = room + sampling.max_new_tokens
    state = _open(_take(prompts, np.zeros(slots, np.int32)), _cache(init_cache, slots, width), sampling)
    state = _split(state._replace(left=jnp.zeros_like(state.left)), mesh)
    owner, started = np.full(slots, -1), 0  # the record in each slot, -1 for none; records that have had their slot
    while True:
        free = np.flatnonzero(hosts.fetch(state.left) == 0)
        ended = free[owner[free] >= 0]
        if ended.size:
            yield owner[ended], _take(hosts.fetch(state.rollout), ended)
            owner[ended] = -1
        count = min(admit, free.size, total - started)
        if count == 0:
            return
        index = started + np.arange(admit)
        lanes = np.full(admit, slots)  # a slot that does not exist: what is written there is dropped
        lanes[:count], owner[free[:count]] = free[:count], index[:count]
        started += count
        enough = min(admit, total - started) or slots
        lane_prompts = _take(prompts, np.minimum(index, total - 1))
        state = _chunk(model, state, lane_prompts, scratch, lanes, enough, sampling, mesh)


def generate_in_slots(*args, **kwargs) -> TokenRollout:
    """All answers of `stream`, whose arguments it takes, in the order of the prompts: as `generate`, but for memory."""
    indices, rollouts = zip(*stream(*args, **kwargs))
    order = np.argsort(np.concatenate(indices))
    return jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)[order]), *rollouts)


@functools.partial(jax.jit, static_argnames=("sampling", "mesh"), donate_argnames="slots")
def _chunk(model, slots, prompts, scratch, lanes, enough, sampling, mesh):
    """Prompts into the slots `lanes`, then decoding until `enough` slots are free."""
    room = prompts.tokens.shape[1]
    new = _split(_prefill(model, prompts, scratch, sampling), mesh)
    put = lambda old, rows: old.at[lanes].set(rows, mode="drop")
    records = jax.tree.map(put, slots._replace(cache=None), new._replace(cache=None))
    fill = lambda old, rows: old.at[:, lanes, :room].set(rows, mode="drop")
    slots = _split(records._replace(cache=jax.tree.map(fill, slots.cache, new.cache)), mesh)
    running = lambda slots: (slots.left == 0).sum() < enough
    return _split(jax.lax.while_loop(running, functools.partial(_step, model, sampling), slots), mesh)


def _prefill(model, prompts, cache, sampling):
    """The prompts' keys and values, in a cache of exactly their width, and rollouts that hold only them."""
    slots = _open(prompts, cache, sampling)
    b, room = prompts.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(room)[None], (b, room))
    _, cache = model(slots.rollout.tokens[:, :room], positions, cache)
    return slots._replace(cache=cache)


def _open(prompts, cache, sampling):
    """Slots that hold the prompts, nothing decoded. No array twice: `stream` donates them."""
    b, room = prompts.tokens.shape
    length, group, task = (jnp.asarray(leaf, jnp.int32) for leaf in (prompts.length, prompts.group, prompts.task))
    width = room + sampling.max_new_tokens
    tokens = jnp.pad(jnp.asarray(prompts.tokens, jnp.int32), ((0, 0), (0, sampling.max_new_tokens)))
    tokens = jnp.where(jnp.arange(width)[None] < length[:, None], tokens, sampling.pad_id)
    none, zero, also_zero = (jnp.zeros((b, width), kind) for kind in (bool, jnp.float32, jnp.float32))
    rollout = TokenRollout(tokens, none, length, group, task, zero, also_zero, truncated=jnp.zeros(b, bool))
    return _Slots(rollout, prompts.keys, jnp.full(b, sampling.max_new_tokens, jnp.int32), cache)


def _step(model, sampling, slots):
    """Decodes the last token of every slot and appends what is drawn; a record that is done stays as it is."""
    rollout, keys, left, cache = slots
    last = rollout.length[:, None] - 1
    logits, cache = model(jnp.take_along_axis(rollout.tokens, last, axis=1), last, cache)
    check_ids(sampling, logits.shape[-1])
    token, behavior, sampled = draw(keys, rollout.length, logits[:, 0], sampling)
    stop = (token[:, None] == jnp.asarray(sampling.stop_ids, jnp.int32)[None]).any(1)
    active = left > 0
    left = jnp.where(active & ~stop, left - 1, 0)
    here = active[:, None] & (jnp.arange(rollout.tokens.shape[1])[None] == rollout.length[:, None])
    put = lambda row, value: jnp.where(here, value[:, None], row)
    rollout = rollout._replace(
        tokens=put(rollout.tokens, token),
        response=rollout.response | here,
        length=rollout.length + active,
        behavior_logp=put(rollout.behavior_logp, behavior),
        sampling_logp=put(rollout.sampling_logp, sampled),
        truncated=rollout.truncated | (active & ~stop & (left == 0)),
    )
    return _Slots(rollout, keys, left, cache)


def _bind(decode_fn, params):
    """`decode_fn` with its parameters, as a pytree, so that they enter jit as arguments."""
    return Partial(_call, as_partial(decode_fn), params)


def _call(decode_fn, params, *args):
    return decode_fn(params, *args)


def _take(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _cache(init_cache, batch, length):
    cache = init_cache(batch, length)
    for leaf in jax.tree.leaves(cache):
        if leaf.shape[1:3] != (batch, length):
            raise ValueError(
                f"init_cache({batch}, {length}) has a leaf {leaf.shape}; make it [layers, {batch}, {length}, ...]"
            )
    return cache


def _split(slots, mesh):
    """Slots split over the mesh as records are: the first axis of every leaf, the second of the cache's."""
    if mesh is None:
        return slots
    along = lambda *before: functools.partial(
        jax.tree.map,
        lambda leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, sharding.record_spec(mesh, *before))),
    )
    return along()(slots._replace(cache=None))._replace(cache=along(None)(slots.cache))


def _check_stream(prompts, sampling, slots, admit, mesh):
    check_params(sampling)
    n = 1 if mesh is None else sharding.record_parts(mesh)
    if not 1 <= admit <= slots or slots % n or admit % n:
        raise ValueError(f"slots={slots}, admit={admit}: give 1 <= admit <= slots, both multiples of {n} devices")
    length = np.asarray(prompts.length)
    if length.size == 0 or length.min() < 1 or length.max() > prompts.tokens.shape[1]:
        raise ValueError(f"prompt lengths {np.unique(length)}: give prompts of 1 to {prompts.tokens.shape[1]} tokens")
