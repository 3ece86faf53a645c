"""Attention over a cache: flat heads beside heads, on meshes, and what a TPU's program reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import chips, cost
from opd_jax.models import attention
from opd_jax.sharding import make_mesh

B, SLOTS, DIM = 4, 7, 8


def draw(seed: int, *shape: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def seen(heads: int, kv_heads: int, dtype=jnp.float32):
    """One query of each row at positions 0 to 6, and keys and values of which later slots hold anything."""
    mask = attention.seen_slots(SLOTS, jnp.array([[0], [3], [5], [6]]))
    flat = (draw(seed, B, SLOTS, kv_heads * DIM, dtype=dtype) for seed in (1, 2))
    return draw(0, B, 1, heads, DIM, dtype=dtype), *flat, mask


def by_hand(q, k, v, mask, kv_heads: int) -> np.ndarray:
    """Float64, row by row and head by head."""
    q, k, v = (np.float64(leaf) for leaf in (q, k, v))
    out, heads = np.zeros(q.shape), q.shape[2]
    for row in range(B):
        for head in range(heads):
            own = slice(DIM * (head * kv_heads // heads), DIM * (head * kv_heads // heads + 1))
            reads = np.asarray(mask)[row, 0, 0]
            logits = k[row, reads, own] @ q[row, 0, head] / np.sqrt(DIM)
            weights = np.exp(logits - logits.max())
            out[row, 0, head] = weights / weights.sum() @ v[row, reads, own]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (4, 4), (6, 2)])
def test_flat_heads_are_heads(heads, kv_heads):
    given = seen(heads, kv_heads)
    expected = by_hand(*given, kv_heads)
    np.testing.assert_allclose(attention.by_flat_heads(kv_heads, *given), expected, atol=1e-6)
    np.testing.assert_allclose(attention.by_heads(kv_heads, *given), expected, atol=1e-6)


def test_what_is_not_seen_changes_nothing_and_16_bits_are_near():
    q, k, v, mask = given = seen(8, 4)
    hidden = ~mask[:, 0, 0, :, None]
    other = q, jnp.where(hidden, 99.0, k), jnp.where(hidden, -99.0, v), mask
    np.testing.assert_array_equal(attention.by_flat_heads(4, *other), attention.by_flat_heads(4, *given))
    narrow = attention.by_flat_heads(4, *seen(8, 4, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(narrow), by_hand(*given, 4), atol=0.03)


@pytest.mark.parametrize("shape", [{"data": 2, "tensor": 4}, {"tensor": 8}])
def test_devices_that_split_the_heads_exchange_nothing_where_they_divide(shape):
    given = seen(8, 4)
    expected, mesh = attention.by_flat_heads(4, *given), make_mesh(shape)
    whole = PartitionSpec("data" if "data" in shape else None, None, "tensor")
    placed = [jax.device_put(leaf, NamedSharding(mesh, whole)) for leaf in given[:3]]
    placed.append(jax.device_put(given[3], NamedSharding(mesh, PartitionSpec(*whole[:1]))))
    compiled = jax.jit(functools.partial(attention.by_flat_heads, 4)).lower(*placed).compile()
    np.testing.assert_allclose(compiled(*placed), expected, atol=1e-6)
    sent = cost.cost_of(compiled.as_text(), devices=8).sent
    assert sent == 0 if shape["tensor"] == 4 else sent < 5 * given[0].nbytes  # eight devices share four heads: logits


def test_a_tpu_reads_the_cache_once_for_a_token():
    """With heads as an axis the same program moves 2.6 times the cache."""
    pytest.importorskip("libtpu")
    rows, slots, kv_heads, heads, dim, layers = 64, 512, 2, 8, 128, 2
    mesh = jax.sharding.Mesh(chips.topology("v5p:2x2x1").devices[:1], ("data",))
    where = NamedSharding(mesh, PartitionSpec())
    shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(size, dtype, sharding=where)
    cache = jax.eval_shape(lambda: attention.empty(layers, rows, slots, kv_heads, dim, jnp.bfloat16))
    cache = jax.tree.map(lambda leaf: shape(*leaf.shape), cache)
    new = shape(rows, 1, kv_heads, dim)

    def token(cache, q, k, v, positions):
        mask = attention.seen_slots(slots, positions)

        def layer(carry, index):
            q, cache = carry
            return attention.extend(cache, index, positions, q, k, v, mask), None

        return jax.lax.scan(layer, (q, cache), jnp.arange(layers))[0]

    lowered = jax.jit(token, donate_argnums=0).lower(
        cache, shape(rows, 1, heads, dim), new, new, shape(rows, 1, dtype=jnp.int32)
    )
    read = cost.cost_of(lowered.compile().as_text()).bytes
    whole = sum(leaf.size * 2 for leaf in cache)
    assert read < 1.3 * whole, read / whole
