"""Randomness is a function of (seed, stream name, step), so no key is carried, saved or lost on resume."""

import zlib

import jax
from jaxtyping import Array, Key


def stream(seed: int | Key[Array, ""], name: str) -> Key[Array, ""]:
    """The root key of one use of randomness, such as `stream(0, "sample")`. Names, not order, keep streams apart.

    Args:
        seed: an integer, of which 32 bits count, or a key, which has 64.
    """
    root = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
    return jax.random.fold_in(root, zlib.crc32(name.encode()))


def at_step(key: Key[Array, ""], step: int) -> Key[Array, ""]:
    """The key of one step of a stream."""
    return jax.random.fold_in(key, step)


def per_record(key: Key[Array, ""], n: int) -> Key[Array, "n"]:
    """One key per record, a function of the record's index alone: the same on one device and on eight."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jax.numpy.arange(n))
