# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens under a model, without logits of the whole batch: where token losses begin."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from opd_jax.sampling.tokens import log_probs
from opd_jax.types import PyTree


def token_logp(
    apply_fn: Callable[..., Array],
    params: PyTree,
    tokens: Int[Array, "B S"],
    counted: Bool[Array, "B S"],
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    head_fn: Callable[[PyTree], Array] | None = None,
    block: int = 512,
) -> Float[Array, "B S"]:
    """`log pi(tokens[b, s] | tokens[b, :s])` in nats at temperature 1, float32; 0 where not counted, and at s = 0.

    Student, teacher and reference are scored by this one function, so equal parameters give equal bits. Gradient flows
    into `params`, at counted positions alone.

    Args:
        apply_fn: `apply_fn(params, tokens[B, S], segment_ids) -> logits [B, S, V]`, causal; with a `head_fn` it returns
            hidden states [B, S, D] instead.
        tokens: ids that the model knows, padding included.
        counted: which tokens are wanted; of a packed row no segment's first, which nothing predicts.
        segment_ids: of packed rows, handed to `apply_fn`; None: one record a row, padded on the right.
        head_fn: `head_fn(params) -> [D, V]`, cast to the type of the states; logits, float32, are then made `block`
            positions at a time and made again in the backward pass, so that [B, S, V] is never held.
        block: positions per piece, with `head_fn`.
    """
    counted = following(counted)
    targets = jnp.where(counted, following(tokens), 0)
    out = apply_fn(params, tokens, segment_ids)
    if head_fn is None:
        logp = _pick(out, targets, counted)
    else:
        head = head_fn(params)  # cast piece by piece, so that the sum of its gradients keeps the type of the parameter
        project = lambda h: jnp.einsum("bsd,dv->bsv", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
        pieces = [_pieces(a, block) for a in (out, targets, counted)]
        piece = jax.checkpoint(lambda xs: _pick(project(jnp.where(xs[2][..., None], xs[0], 0)), xs[1], xs[2]))
        logp = jnp.moveaxis(jax.lax.map(piece, tuple(pieces)), 0, 2).reshape(targets.shape[0], -1)
        logp = logp[:, : targets.shape[1]]
    return preceding(logp)


def following(a: Shaped[Array, "B S"]) -> Shaped[Array, "B S"]:
    """Of each token what belongs to the one that it predicts; 0 or False for the last, which predicts none.

    Shifted and not cut: where a mesh splits S it goes on to do so.
    """
    return jnp.pad(a[:, 1:], ((0, 0), (0, 1)))


def preceding(a: Shaped[Array, "B S"]) -> Shaped[Array, "B S"]:
    """The inverse of `following`: 0 for the first token, which nothing predicts."""
    return jnp.pad(a[:, :-1], ((0, 0), (1, 0)))


def _pick(logits: Array, targets: Int[Array, "B S"], counted: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    return jnp.where(counted, log_probs(jnp.where(counted[..., None], logits, 0), targets), 0.0)


def _pieces(a: Array, block: int) -> Array:
    """[B, S, ...] as [n, B, S / n, ...] with n = ceil(S / block), padded with zeros.

    Position s is in piece s % n: so every device that has some of a record's tokens has as many of each piece.
    """
    n = -(-a.shape[1] // block)
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % n), *((0, 0),) * (a.ndim - 2)))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, n, *a.shape[2:]), 2, 0)
