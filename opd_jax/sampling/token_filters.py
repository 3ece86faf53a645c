"""What a sampler does to logits before it draws: temperature, then top-k, top-p and min-p, in transformers' order."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class SamplingParams(NamedTuple):
    """How to sample an answer: hashable, and static under jit, so that what is off costs nothing."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()  # any of them ends the answer, and belongs to it
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    pad_id: int = 0  # fills a row behind its answer


def filter_logits(logits: Float[Array, "*B V"], sampling: SamplingParams) -> Float[Array, "*B V"]:
    """Logits, up to a constant per row, of the distribution that is drawn from: -inf where a token is removed. float32.

    In this order, each on what the one before has left, as transformers' `generate` with the same settings:

    | setting | keeps |
    |---|---|
    | `temperature` | all; `logits / temperature`. 0 keeps the argmax alone, the first of equals, and ends here |
    | `top_k` | the k most likely |
    | `top_p` | the fewest most likely tokens that together have probability `top_p` (arXiv:1904.09751) |
    | `min_p` | tokens at least `min_p` times as likely as the most likely one (arXiv:2407.01082) |

    | case | result |
    |---|---|
    | tokens as likely as the last one kept | kept too, whatever their ids (top-p in transformers keeps some of them) |
    | logits of -inf | stay so: never drawn |
    | `top_k` of the vocabulary or more | off |

    The most likely token is always kept.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return jnp.where(tokens == jnp.argmax(logits, axis=-1, keepdims=True), logits, -jnp.inf)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature  # the top is 0, so none overflows
    keep = lambda lowest: jnp.where(logits < lowest, -jnp.inf, logits)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = keep(jax.lax.top_k(logits, sampling.top_k)[0][..., -1:])
    if sampling.top_p < 1:
        ascending = jnp.sort(logits, axis=-1)
        needed = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) > 1 - sampling.top_p
        needed = needed.at[..., -1].set(True)
        logits = keep(jnp.where(needed, ascending, jnp.inf).min(axis=-1, keepdims=True))
    if sampling.min_p > 0:
        logits = keep(math.log(sampling.min_p))
    return logits


def check_params(sampling: SamplingParams) -> None:
    """Raises a ValueError of one line that names the first setting out of its range."""
    s = sampling
    for name, ok, remedy in (
        ("max_new_tokens", s.max_new_tokens >= 1, "give at least 1"),
        ("stop_ids", isinstance(s.stop_ids, tuple), "give a tuple, which can be static under jit"),
        ("temperature", s.temperature == 0 or 1e-4 <= s.temperature < math.inf, "give 0, for greedy, or at least 1e-4"),
        ("top_k", s.top_k >= 0, "give the number of tokens to keep, or 0 for all"),
        ("top_p", 0 < s.top_p <= 1, "give a probability in (0, 1]; 1 keeps all"),
        ("min_p", 0 <= s.min_p <= 1, "give a ratio in [0, 1]; 0 keeps all"),
    ):
        if not ok:
            raise ValueError(f"{name}={getattr(s, name)}: {remedy}")


def check_ids(sampling: SamplingParams, vocabulary: int) -> None:
    """Raises a ValueError of one line that names a stop or padding id outside 0..vocabulary - 1."""
    for name, ids in (("stop_ids", sampling.stop_ids), ("pad_id", (sampling.pad_id,))):
        for i in ids:
            if not 0 <= i < vocabulary:
                raise ValueError(f"{name} holds {i}; give ids of the model's vocabulary, 0 to {vocabulary - 1}")
