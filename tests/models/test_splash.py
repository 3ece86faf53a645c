"""TPU attention, interpreted on CPU: against float64, in models, on meshes; compiled for TPUs: what it keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import chips, cost, sharding
from opd_jax.models import attention
from opd_jax.models.decoder import Decoder
from opd_jax.models.mmdit import MMDiT
from opd_jax.models.splash import splash

B, D = 4, 8
CASES = {  # S, heads, heads of keys and values, causal, segments
    "causal": (128, 4, 2, True, False),
    "causal-padded": (130, 2, 1, True, False),
    "packed-padded": (200, 4, 2, True, True),
    "full-padded": (133, 2, 2, False, False),
    "full-segments": (140, 4, 2, False, True),
}


def given(name):
    """Queries, keys, values, the result's gradient, segments; and whether causal."""
    length, heads, kv_heads, causal, packed = CASES[name]
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=(B, length, count, D)) for count in (heads, kv_heads, kv_heads, heads)]
    segments = np.sort(draw.integers(0, 3, (B, length)), axis=1) if packed else None
    return arrays, segments, causal


def by_hand(arrays, segments, causal):
    """The result and the gradients of queries, keys and values, in float64."""
    q, k, v, gradient = (np.swapaxes(x, 1, 2) for x in arrays)
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
    length = q.shape[2]
    seen = np.tri(length, dtype=bool)[None] if causal else np.ones((1, length, length), bool)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])
    logits = np.where(seen[:, None], q @ np.swapaxes(k, 2, 3) / np.sqrt(D), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = gradient @ np.swapaxes(v, 2, 3)
    of_logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True)) / np.sqrt(D)
    of_k, of_v = np.swapaxes(of_logits, 2, 3) @ q, np.swapaxes(weights, 2, 3) @ gradient
    summed = lambda x: x.reshape(B, -1, groups, *x.shape[2:]).sum(2)
    return [np.swapaxes(x, 1, 2) for x in (weights @ v, of_logits @ k, summed(of_k), summed(of_v))]


def found(arrays, segments, causal, dtype=jnp.float32):
    *inputs, gradient = (jnp.asarray(x, dtype) for x in arrays)
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    attend = lambda q, k, v: splash(q, k, v, segments, causal=causal, interpret=True)
    out, pull = jax.jit(lambda *x: jax.vjp(attend, *x))(*inputs)
    assert out.dtype == dtype
    return [out, *pull(gradient)]


@pytest.mark.parametrize("shape", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_attention_in_float64_on_one_device_and_on_meshes(name, shape):
    if shape:
        sharding.make_mesh(shape)
    for one, expected in zip(found(*given(name)), by_hand(*given(name)), strict=True):
        np.testing.assert_allclose(one, expected, atol=3e-6)


def test_16_bits_are_near():
    for one, expected in zip(found(*given("causal"), jnp.bfloat16), by_hand(*given("causal")), strict=True):
        np.testing.assert_allclose(np.float32(one), expected, atol=0.06)


def test_rows_that_are_mapped_over_a_mesh():
    sharding.make_mesh({"data": 4, "tensor": 2})
    arrays, segments, causal = given("causal-padded")
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays[:3])
    alone = lambda q, k, v: splash(q[None], k[None], v[None], None, causal=True, interpret=True)[0]
    mapped = jax.jit(jax.vmap(alone, spmd_axis_name=sharding.mapped_axis(B)))
    np.testing.assert_allclose(mapped(q, k, v), by_hand(arrays, segments, causal)[0], atol=3e-6)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(attention, "splash", functools.partial(splash, interpret=True))


def alike(make, *arguments):
    """Results and gradients of a model with this attention and with XLA's, from the same parameters."""
    params = make(attention=None).init(jax.random.key(0), *arguments)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)

    def run(kernel):
        module = make(attention=kernel)
        total = lambda params: (jnp.square(out := module.apply({"params": params}, *arguments)).mean(), out)
        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    one, other = run("splash"), run(None)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1e-3))


@pytest.mark.parametrize("remat", ["", "nothing"])
def test_a_decoder_of_packed_rows(interpreted, remat):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 140)), jnp.int32)
    segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 0]), jnp.array([60, 71, 9]))[None], tokens.shape)
    alike(functools.partial(Decoder, 32, 16, 32, 2, 4, 2, 8, remat=remat), tokens, segments)


def test_a_transformer_of_flows_whose_heads_are_split(interpreted):
    sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sizes = dict(zip(("patch_size", "in_channels", "out_channels", "num_layers", "num_heads"), (2, 4, 4, 2, 2)))
    sizes |= {"head_dim": 8, "joint_attention_dim": 12, "pooled_projection_dim": 6, "pos_embed_max_size": 8}
    draw = np.random.default_rng(0)
    arrays = [jnp.asarray(draw.normal(size=size), jnp.float32) for size in ((4, 8, 12, 4), (4,), (4, 5, 12), (4, 6))]
    alike(functools.partial(MMDiT, **sizes, dual_attention_layers=(0,)), *arrays)


def test_a_name_of_a_config_is_the_platform_s_kernel():
    assert [attention.kernel("flash", platform) for platform in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", None]
    assert attention.kernel("", "tpu") is None and attention.kernel("splash", "gpu") == "splash"


@pytest.mark.parametrize(
    ("name", "platform", "message"),
    [
        ("flush", "cpu", "attention='flush': choose one of '', 'flash', 'splash', 'cudnn'"),
        ("splash", "cpu", "attention='splash': no kernel of cpu; choose 'flash'"),
        ("cudnn", "tpu", "attention='cudnn': no kernel of tpu"),
        ("flash", "gpu", "attention='flash': cuDNN's is for types of 16 bits; choose dtype=bfloat16"),
        ("flash", "cpu", ""),
        ("flash", "tpu", ""),
    ],
)
def test_a_kernel_that_the_platform_has_not_is_refused(monkeypatch, name, platform, message):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    said = attention.mistake(name, "float32")
    assert said.startswith(message) and bool(said) == bool(message)


@pytest.mark.parametrize("causal", [True, False])
def test_a_tpu_keeps_no_probabilities(causal):
    """Compiled for four chips, records and heads split: products as counted by hand, and memory linear in tokens."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, chips.topology("v5p:2x2x1").devices)
    records, length, heads, kv_heads, dim = 4, 2048, 8, 4, 128
    where = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    shape = lambda heads: jax.ShapeDtypeStruct((records, length, heads, dim), jnp.bfloat16, sharding=where)

    def compiled(implementation):
        attend = functools.partial(attention.attend, segments=None, causal=causal, implementation=implementation)
        total = lambda *x: attend(*x).astype(jnp.float32).sum()
        with jax.set_mesh(mesh):
            done = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape(heads), shape(kv_heads), shape(kv_heads)).compile()
        return done.memory_analysis().temp_size_in_bytes, cost.cost_of(done.as_text(), devices=4)

    (kept, ours), (others, _) = compiled("splash"), compiled(None)
    each = 2 * records * heads * length**2 * dim / 4
    assert ours.flops == 9 * each / (1 + causal) and ours.sent == 0
    probabilities = 4 * records * heads * length**2 / 4
    assert kept < probabilities / 4 < others
