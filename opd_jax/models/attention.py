"""Attention over the tokens of a row, or over a cache of keys and values that decoding extends.

Within a row it is XLA's, which keeps the probabilities, `[B, heads, S, S]`, or one of the kernels `FLASH`.

The heads of a cache lie side by side, `[layers, B, slots, kv_heads * head_dim]`. Where a TPU's program has heads as an
axis of a product, its compiler first copies keys and values of the layer into another order, for every token: three
times the bytes of the cache. So there one query attends to flat heads: it is zero outside its own head, the product
runs over all of them, and of the values only its own head's are kept. That multiplies by zeros, `kv_heads` times the
FLOPs, where decoding waits for memory; elsewhere, and for several queries, it is attention by heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from opd_jax import sharding
from opd_jax.config import ConfigError
from opd_jax.models.flash import flash, same_segment

FLASH = {"tpu": "splash", "gpu": "cudnn"}  # of a platform, the kernel that keeps no probabilities
NAMES = ("", "flash", *FLASH.values())


class Cache(NamedTuple):
    """Rotated keys, and values, of all layers; slot p holds the token at position p."""

    k: Float[Array, "layers B slots kv_heads*head_dim"]
    v: Float[Array, "layers B slots kv_heads*head_dim"]


def empty(layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> Cache:
    """A cache of zeros."""
    shape = layers, batch, slots, kv_heads * head_dim
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def seen_slots(slots: int, positions: Int[Array, "B S"]) -> Bool[Array, "B 1 S slots"]:
    """A query at position p sees the slots 0..p."""
    return jnp.arange(slots)[None, None, None] <= positions[:, None, :, None]


def attend(
    q: Float[Array, "B S heads head_dim"],
    k: Float[Array, "B S kv_heads head_dim"],
    v: Float[Array, "B S kv_heads head_dim"],
    segments: Int[Array, "B S"] | None,
    *,
    causal: bool = True,
    implementation: str | None = None,
    split: bool = False,
) -> Float[Array, "B S heads head_dim"]:
    """Attention within rows. Softmax in float32.

    Args:
        segments: tokens see those of their own segment; None: of the row.
        causal: and of these, those before them and themselves.
        implementation: None is XLA's; "splash" and "cudnn" are kernels of `flash`.
        split: whether the mesh splits the tokens of a row: then queries stay where they are, see whole rows, and
            attention is XLA's.
    """
    if implementation and not split:
        return flash(q, k, v, segments, causal=causal, kernel=implementation)
    if split:
        q, k, v = sharding.over_tokens(q), sharding.whole_rows(k), sharding.whole_rows(v)
    mask = None if segments is None else same_segment(segments)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)


def kernel(name: str, head_dim: int, platform: str | None = None) -> str | None:
    """The implementation of a config's `attention`, on a platform or this process's own: "flash" is what that has.

    Raises: ConfigError: cuDNN's has no such heads.
    """
    chosen = (FLASH.get(platform or jax.default_backend()) if name == "flash" else name) or None
    if chosen == "cudnn" and (head_dim % 8 or head_dim > 128):
        raise ConfigError(f"attention={name!r}: cuDNN's is not for heads of {head_dim}; choose attention=''")
    return chosen


def mistake(name: str, dtype: str, platform: str | None = None) -> str:
    """What is wrong with a config's `attention`, for products in `dtype` on a platform or this process's own; or ""."""
    if name not in NAMES:
        return f"attention={name!r}: choose one of {', '.join(map(repr, NAMES))}"
    here = platform or jax.default_backend()
    chosen = FLASH.get(here) if name == "flash" else name
    if chosen and chosen != FLASH.get(here):
        return f"attention={name!r}: no kernel of {here}; choose 'flash', which is the platform's own, or ''"
    if chosen == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        return f"attention={name!r}: cuDNN's is for types of 16 bits; choose dtype=bfloat16, or attention=''"
    return ""


def extend(
    cache: Cache,
    layer: Int[Array, ""],
    positions: Int[Array, "B S"],
    q: Float[Array, "B S heads head_dim"],
    k: Float[Array, "B S kv_heads head_dim"],
    v: Float[Array, "B S kv_heads head_dim"],
    mask: Bool[Array, "B 1 S slots"],
) -> tuple[Float[Array, "B S heads head_dim"], Cache]:
    """Writes keys and values into their slots of a layer, then attends to all slots that `mask` lets queries see."""
    flat = lambda heads: heads.reshape(*heads.shape[:2], -1)
    cache = Cache(*(write_slots(old, layer, positions, flat(new)) for old, new in zip(cache, (k, v))))
    seen, kv_heads = (q, cache.k[layer], cache.v[layer], mask), k.shape[2]
    default = functools.partial(by_heads, kv_heads)
    if q.shape[1] > 1 or kv_heads == 1:
        return default(*seen), cache
    tpu = functools.partial(by_flat_heads, kv_heads)
    return jax.lax.platform_dependent(*seen, tpu=tpu, default=default), cache


def by_heads(
    kv_heads: int,
    q: Float[Array, "B S heads head_dim"],
    k: Float[Array, "B slots width"],
    v: Float[Array, "B slots width"],
    mask: Bool[Array, "B 1 S slots"],
) -> Float[Array, "B S heads head_dim"]:
    """Attention to heads that lie side by side, as `jax.nn.dot_product_attention` has it."""
    k, v = (one.reshape(*one.shape[:2], kv_heads, -1) for one in (k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def by_flat_heads(
    kv_heads: int,
    q: Float[Array, "B 1 heads head_dim"],
    k: Float[Array, "B slots width"],
    v: Float[Array, "B slots width"],
    mask: Bool[Array, "B 1 1 slots"],
) -> Float[Array, "B 1 heads head_dim"]:
    """One query's attention to heads that lie side by side, as many at a time as are on one device.

    Where heads do not divide over `tensor`, devices share heads and exchange logits.
    """
    batch, _, heads, dim = q.shape
    parts = sharding.head_parts(kv_heads)
    split = lambda one: one.reshape(*one.shape[:2], parts, -1)
    own = jnp.eye(kv_heads // parts, dtype=bool)[:, None, :, None]
    grouped = q.reshape(batch, parts, kv_heads // parts, heads // kv_heads, 1, dim)
    wide = jnp.where(own, grouped, 0).reshape(batch, parts, heads // parts, -1)
    logits = jnp.einsum("bphe,bspe->bphs", wide, split(k), preferred_element_type=jnp.float32) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf)).astype(v.dtype)
    out = jnp.einsum("bphs,bspe->bphe", weights, split(v))
    out = out.reshape(batch, parts, kv_heads // parts, heads // kv_heads, kv_heads // parts, dim)
    return jnp.where(own, out, 0).sum(4).reshape(q.shape)


def write_slots(
    old: Shaped[Array, "L B slots *rest"],
    layer: Array | int,
    positions: Int[Array, "B S"],
    new: Shaped[Array, "B S *rest"],
) -> Shaped[Array, "L B slots *rest"]:
    """A cache with `new` in the slots `positions` of every row; a position beyond the slots is written nowhere.

    Every device writes its own rows: XLA, left to itself, gathers new keys and values of all rows on every device.
    """

    def write(old, layer, positions, new):
        return old.at[layer, jnp.arange(new.shape[0])[:, None], positions].set(new)

    if (axes := sharding.record_axes()) and new.shape[0] % sharding.record_parts() == 0:
        rows, rest = sharding.record_spec(), sharding.record_spec(None, None)
        write = jax.shard_map(write, in_specs=(rest, PartitionSpec(), rows, rows), out_specs=rest, axis_names=set(axes))
    return write(old, jnp.asarray(layer), positions, new)
