"""Attention by kernels: TPUs' interpreted on CPU and compiled for TPUs; cuDNN's traced and lowered, without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import flow_opd, lightning_opd
from experiments import language, latents
from opd_jax import chips, cost, hlo, sharding
from opd_jax.config import ConfigError
from opd_jax.models import attention, vla
from opd_jax.models.decoder import Decoder
from opd_jax.models.flash import flash
from opd_jax.models.mmdit import MMDiT

B, D = 4, 8
SPLASH = functools.partial(flash, kernel="splash", interpret=True)
HEADS = {  # of queries, of keys and values, and a mesh
    "one device": (None, None),
    "data2-fsdp2-tensor2": ({"data": 2, "fsdp": 2, "tensor": 2}, None),
    "heads are whole": ({"tensor": 8}, None),
    "fewer of keys than devices": ({"data": 2, "tensor": 4}, (8, 2)),
}
CASES = {  # S, heads, heads of keys and values, causal, segments
    "causal": (128, 4, 2, True, False),
    "causal-padded": (130, 2, 1, True, False),
    "packed-padded": (200, 4, 2, True, True),
    "full-padded": (133, 2, 2, False, False),
    "full-segments": (140, 4, 2, False, True),
}


def given(name, heads_of=None):
    """Queries, keys, values, the result's gradient, segments; and whether causal."""
    length, heads, kv_heads, causal, packed = CASES[name]
    heads, kv_heads = heads_of or (heads, kv_heads)
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
    attend = lambda q, k, v: SPLASH(q, k, v, segments, causal=causal)
    out, pull = jax.jit(lambda *x: jax.vjp(attend, *x))(*inputs)
    assert out.dtype == dtype
    return [out, *pull(gradient)]


@pytest.mark.parametrize("mesh", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_equals_attention_in_float64_on_one_device_and_on_meshes(name, mesh):
    shape, heads = HEADS[mesh]
    if shape:
        sharding.make_mesh(shape)
    for one, expected in zip(found(*given(name, heads)), by_hand(*given(name, heads)), strict=True):
        np.testing.assert_allclose(one, expected, atol=3e-6)


def test_16_bits_are_near():
    for one, expected in zip(found(*given("causal"), jnp.bfloat16), by_hand(*given("causal")), strict=True):
        np.testing.assert_allclose(np.float32(one), expected, atol=0.06)


def test_rows_that_are_mapped_over_a_mesh():
    sharding.make_mesh({"data": 4, "tensor": 2})
    arrays, segments, causal = given("causal-padded")
    q, k, v, gradient = (jnp.asarray(x, jnp.float32) for x in arrays)
    alone = lambda q, k, v: SPLASH(q[None], k[None], v[None], None, causal=True)[0]
    pulled = lambda q, k, v, gradient: (lambda out, pull: (out, *pull(gradient)))(*jax.vjp(alone, q, k, v))
    mapped = jax.jit(jax.vmap(pulled, spmd_axis_name=sharding.mapped_axis(B)))
    for one, expected in zip(mapped(q, k, v, gradient), by_hand(arrays, segments, causal), strict=True):
        np.testing.assert_allclose(one, expected, atol=3e-6)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(attention, "flash", functools.partial(flash, interpret=True))


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


@pytest.mark.parametrize("remat", ["", "dots", "nothing"])
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
    assert [attention.kernel("flash", 64, name) for name in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", None]
    assert attention.kernel("", 64, "tpu") is None
    with pytest.raises(ConfigError, match="attention='flash': cuDNN's is not for heads of 36; choose attention=''"):
        attention.kernel("flash", 36, "gpu")


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
def test_a_kernel_that_the_platform_has_not_is_refused(name, platform, message):
    said = attention.mistake(name, "float32", platform)
    assert said.startswith(message) and bool(said) == bool(message)


@pytest.mark.parametrize("per_device", [1, 2])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_tpu_keeps_no_probabilities(causal, segmented, per_device):
    """Compiled for four chips, records and heads split: products as counted by hand, and memory linear in tokens."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, chips.topology("v5p:2x2x1").devices)
    records, length, heads, kv_heads, dim = 2 * per_device, 2048, 8, 4, 128
    where = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    shape = lambda heads: jax.ShapeDtypeStruct((records, length, heads, dim), jnp.bfloat16, sharding=where)
    arrays = [shape(heads), shape(kv_heads), shape(kv_heads)]
    if segmented:
        rows = NamedSharding(mesh, PartitionSpec("data"))
        arrays.append(jax.ShapeDtypeStruct((records, length), jnp.int32, sharding=rows))

    def compiled(implementation):
        def total(q, k, v, segments=None):
            out = attention.attend(q, k, v, segments, causal=causal, implementation=implementation)
            return out.astype(jnp.float32).sum()

        with jax.set_mesh(mesh):
            done = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile()
        return done.memory_analysis().temp_size_in_bytes, cost.cost_of(done.as_text(), devices=4)

    kept, counted = compiled("splash")
    each = 2 * records * heads * length**2 * dim / 4
    assert counted.flops == 9 * each * (10 / 16 if causal else 1)  # of 4 x 4 blocks 10 are seen
    assert counted.sent == 0
    assert kept < records * heads * length**2 / 4  # a quarter of the probabilities, in float32
    if (per_device, segmented) == (1, False):
        assert compiled(None)[0] > records * heads * length**2


@pytest.mark.parametrize(("remat", "products"), [("", 9), ("dots", 9), ("nothing", 11)])
def test_what_remat_keeps_of_it_on_a_tpu(remat, products):
    pytest.importorskip("libtpu")
    (device,) = chips.topology("v5p:2x2x1").devices[:1]
    place, length, heads, dim = jax.sharding.SingleDeviceSharding(device), 512, 2, 128
    module = Decoder(128, 128, 128, 2, heads, heads, dim, dtype=jnp.bfloat16, attention="splash", remat=remat)
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=place)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params)
    total = lambda params, tokens: module.apply({"params": params}, tokens, method="hidden").astype(jnp.float32).sum()
    text = jax.jit(jax.grad(total)).lower(params, tokens).compile().as_text()
    program, each = hlo.parse(text), 2 * 2 * heads * length**2 * dim
    kernels = [one for part in program.computations.values() for one in part.instructions.values()]
    counts = {"fwd": 2, "dq": 3, "dkv": 4}
    found = [counts[one.name.split("_")[2]] for one in kernels if one.name.startswith("splash_mha_")]
    assert sum(found) == products, (sum(found), each)


@pytest.fixture
def with_cudnn(monkeypatch):
    """As if there were a GPU, as far as tracing asks."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_100)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.mark.parametrize("mesh", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_cudnn_s_is_lowered_for_even_and_odd_rows(with_cudnn, name, mesh):
    shape, heads = HEADS[mesh]
    if shape:
        sharding.make_mesh(shape)
    arrays, segments, causal = given(name, heads)
    q, k, v, gradient = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    attend = lambda q, k, v: attention.attend(q, k, v, segments, causal=causal, implementation="cudnn")
    traced = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1](gradient)).trace(q, k, v)
    assert [leaf.shape for leaf in jax.tree.leaves(traced.out_info)] == [q.shape, k.shape, v.shape]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "fmha" in text and ("Bias" in text) == (segments is not None)


def test_a_config_s_attention_reaches_the_models(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    compute = lightning_opd.get_config("tiny").copy_and_resolve_references().unlock().compute
    compute.attention = "flash"
    small = Decoder(32, 16, 32, 2, 4, 2, 8)
    assert language.computing(small, compute, trained=False).attention == "splash"
    part = flow_opd.get_config("paper").copy_and_resolve_references().unlock().pipeline
    part.attention = "flash"
    flows = MMDiT(2, 4, 4, 1, 2, 8, joint_attention_dim=12, pooled_projection_dim=6, pos_embed_max_size=8)
    assert latents.computing(flows, part).attention == "splash"
    policy = vla.with_fields(vla.OPENVLA_7B, attention="splash")
    assert policy.language_model.attention == "splash"
    assert vla.with_fields(policy, dtype=jnp.float32).language_model.attention == "splash"
