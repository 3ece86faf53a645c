"""Attention within rows by kernels that keep no probabilities: jax's splash attention on TPUs, cuDNN's on NVIDIA GPUs.

    flash(q, k, v, segments, causal=True, kernel="splash") -> out

A kernel is nothing that XLA could split, so each device runs it on its own records and heads. What does not split over
the mesh is the same work on all of them, and gradients of it are summed once more than they need to be.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from opd_jax import sharding
from opd_jax.models.remat import ATTENTION

BLOCKS = 512, 256, 128  # tokens, of splash attention; the first that pads a row by no more than a sixteenth
PADDING = -1  # segment of it


def flash(
    q: Float[Array, "B S heads head_dim"],
    k: Float[Array, "B S kv_heads head_dim"],
    v: Float[Array, "B S kv_heads head_dim"],
    segments: Int[Array, "B S"] | None,
    *,
    causal: bool,
    kernel: str,
    interpret: bool = False,
) -> Float[Array, "B S heads head_dim"]:
    """Softmax attention, scaled by the root of `head_dim`; differentiable in reverse. Sums and softmax in float32.

    Args:
        segments: tokens see those of their own segment; None: of the row. cuDNN has a mask, `[B, 1, S, S]`, for them.
        causal: and of these, those before them and themselves.
        kernel: "splash", for TPUs; or "cudnn", for types of 16 bits and heads of at most 128, a multiple of 8.
        interpret: runs splash attention on any device, slowly; for tests.
    """
    parts, kv_heads = sharding.head_parts(q.shape[2]), k.shape[2]
    if kv_heads % parts:  # too few for all devices
        k, v = (jnp.repeat(x, math.lcm(parts, kv_heads) // kv_heads, axis=2) for x in (k, v))
    rows = (sharding.record_axes() if q.shape[0] % sharding.record_parts() == 0 else ()) or None
    spec = PartitionSpec(rows, None, sharding.HEADS if parts > 1 else None, None)
    in_specs = spec, spec, spec, None if segments is None else PartitionSpec(rows, None)
    run = functools.partial(_cudnn, causal) if kernel == "cudnn" else functools.partial(_splash, causal, interpret)
    if axes := sharding.automatic_axes():
        run = jax.shard_map(run, in_specs=in_specs, out_specs=spec, axis_names=axes, check_vma=False)
    return run(q, k, v, segments)


def _padded(added: int, q, k, v, segments):
    """All with so many more tokens, which are a segment of their own where there are segments."""
    if added and segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, added)), constant_values=PADDING)
    return *(jnp.pad(x, ((0, 0), (0, added), (0, 0), (0, 0))) for x in (q, k, v)), segments


def _splash(causal: bool, interpret: bool, q, k, v, segments):
    length, heads, dim = q.shape[1:]
    block = next(size for size in BLOCKS if -length % size <= length // 16 or size == BLOCKS[-1])
    added = -length % block
    if segments is None and added and not causal:
        segments = jnp.zeros(q.shape[:2], jnp.int32)
    q, k, v, segments = _padded(added, (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype), k, v, segments)
    ids = None if segments is None else splash_attention.SegmentIds(segments, segments)
    kernel = _splash_kernel(length + added, block, heads, causal, interpret)
    out = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)), ids)
    return out.swapaxes(1, 2)[:, :length].astype(q.dtype)


def _splash_kernel(length: int, block: int, heads: int, causal: bool, interpret: bool):
    """Of one record. Which blocks see which is worked out on the host, in seconds where rows are long."""
    mask = splash_attention.CausalMask if causal else splash_attention.FullMask
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dq", "block_kv_dq")
    names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask((length, length))] * heads),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def _cudnn(causal: bool, q, k, v, segments):
    """Its gradients are for even numbers of tokens alone."""
    batch, length = q.shape[:2]
    lengths = None
    if segments is None and length % 2 and not causal:
        lengths = jnp.full(batch, length, jnp.int32)
    q, k, v, segments = _padded(length % 2, q, k, v, segments)
    mask = None if segments is None else same_segment(segments)
    how = {"is_causal": causal, "query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn", **how)
    return out[:, :length]


def same_segment(segments: Int[Array, "B S"]) -> Array:
    """The mask of attention, `[B, 1, S, S]`."""
    return segments[:, None, :, None] == segments[:, None, None, :]
