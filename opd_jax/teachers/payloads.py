# SPDX-License-Identifier: Apache-2.0
"""More of the teacher than one log-prob per token: optional payloads of a stored record, one row per response token.

A row belongs to the token it predicts: row r of a payload is of the state from which response token r was sampled.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from opd_jax.losses import divergences


def topk_payload(teacher_logits: Float[Array | np.ndarray, "R V"], k: int) -> dict[str, np.ndarray]:
    """The teacher's `k` most probable tokens at each response token, for `divergences.stored_topk`.

    Returns:
        `topk_ids` int32 [R, k]; `topk_logp` float32 [R, k], in nats among the whole vocabulary; `tail_logp` float32
        [R], that of all other tokens together, -inf at `k = V`. The teacher's mass is `1 - exp(tail_logp)`.
    """
    logp = divergences.log_probs(jnp.asarray(teacher_logits))
    top, ids = jax.lax.top_k(logp, k)
    rest = jnp.put_along_axis(logp, ids, -jnp.inf, -1, inplace=False)
    payload = {"topk_ids": ids, "topk_logp": top, "tail_logp": jax.nn.logsumexp(rest, -1)}
    return {name: np.asarray(value) for name, value in payload.items()}


def hidden_payload(teacher_hidden: Float[Array | np.ndarray, "R D"]) -> dict[str, np.ndarray]:
    """Teacher states as int8 with one scale per row: a quarter of float32.

    With the teacher's head they give the whole distribution again; `reproduced_forward_kl` says how well.
    """
    hidden = np.asarray(teacher_hidden, np.float32)
    scale = np.abs(hidden).max(-1) / 127
    levels = np.round(hidden / np.where(scale > 0, scale, 1)[:, None])
    return {"hidden_int8": levels.astype(np.int8), "hidden_scale": scale}


def hidden_of(payload: Mapping[str, Array | np.ndarray]) -> Float[Array, "*R D"]:
    """Float32 states from `hidden_payload`, or from a batch's payload."""
    return jnp.asarray(payload["hidden_int8"], jnp.float32) * jnp.asarray(payload["hidden_scale"])[..., None]


def reproduced_forward_kl(
    teacher_hidden: Float[Array | np.ndarray, "R D"], head: Float[Array | np.ndarray, "D V"], block: int = 256
) -> Float[np.ndarray, "R"]:
    """`KL(teacher || teacher from its int8 states)` in nats, per row: the error, to be far below that to the student.

    Args:
        teacher_hidden: a sample of rows is enough; head: the teacher's output projection.
        block: rows at a time, since logits of both are held.
    """
    logits = lambda hidden: jnp.matmul(jnp.asarray(hidden, jnp.float32), head, precision="highest")
    kl = lambda hidden: divergences.forward_kl(logits(hidden_of(hidden_payload(hidden))), logits(hidden))
    return np.concatenate([np.asarray(kl(teacher_hidden[i : i + block])) for i in range(0, len(teacher_hidden), block)])
