"""Attention within rows as one kernel of TPUs: jax's splash attention (Pallas), which keeps no matrix of probabilities.

    splash(q, k, v, segments, causal=True) -> out

A kernel is nothing that XLA could split: here it runs on every device's own records and heads. Its blocks of a row are
multiples of 128 tokens, for which rows are padded; where tokens see in both directions, the padding is a segment.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from opd_jax import sharding

BLOCKS = 512, 256, 128  # tokens; the first that pads a row by no more than a sixteenth
PADDING = -1  # segment of it


def splash(
    q: Float[Array, "B S heads head_dim"],
    k: Float[Array, "B S kv_heads head_dim"],
    v: Float[Array, "B S kv_heads head_dim"],
    segments: Int[Array, "B S"] | None,
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B S heads head_dim"]:
    """Softmax attention, scaled by the root of `head_dim`; differentiable. Sums and softmax in float32.

    Args:
        segments: tokens see those of their own segment; None: of the row.
        causal: and of these, those before them and themselves.
        interpret: runs on any device, slowly; for tests.
    """
    records, heads = _split(q.shape[0], k.shape[2])
    spec = PartitionSpec(records, None, heads, None)
    in_specs = spec, spec, spec, None if segments is None else PartitionSpec(records, None)
    kernel = functools.partial(_on_one_device, causal, interpret)
    if axes := sharding.automatic_axes():
        kernel = jax.shard_map(kernel, in_specs=in_specs, out_specs=spec, axis_names=axes, check_vma=False)
    return kernel(q, k, v, segments)


def _split(records: int, kv_heads: int) -> tuple[tuple[str, ...] | None, str | None]:
    """The axes of the mesh along which devices share records and heads; what does not divide they all have."""
    rows = sharding.record_axes() if records % sharding.record_parts() == 0 else ()
    return rows or None, sharding.HEADS if sharding.head_parts(kv_heads) > 1 else None


def _on_one_device(causal: bool, interpret: bool, q, k, v, segments):
    length, heads, dim = q.shape[1:]
    block = next(size for size in BLOCKS if -length % size <= length // 16 or size == BLOCKS[-1])
    added = -length % block
    if segments is None and added and not causal:
        segments = jnp.zeros(q.shape[:2], jnp.int32)
    if added and segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, added)), constant_values=PADDING)
    padded = lambda x: jnp.pad(x, ((0, 0), (0, added), (0, 0), (0, 0))).swapaxes(1, 2)

    size = (length + added,) * 2
    mask = splash_attention.CausalMask(size) if causal else splash_attention.FullMask(size)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dq", "block_kv_dq")
    names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention.BlockSizes(**dict.fromkeys(names, block))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    ids = None if segments is None else splash_attention.SegmentIds(segments, segments)
    scaled = (padded(q).astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    out = jax.vmap(kernel)(scaled, padded(k), padded(v), ids)
    return out.swapaxes(1, 2)[:, :length].astype(q.dtype)
