"""Decoder: packing, the cache, gradients, rematerialisation, meshes and its errors; parity is in test_hf_decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from opd_jax.models.attention import write_slots
from opd_jax.models.decoder import RULES, Decoder, Rope, partition_rules
from opd_jax.sharding import make_mesh, param_specs, record_spec, shard_batch, shard_params

TINY = {"vocab_size": 24, "width": 16, "mlp_width": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
QWEN3 = Decoder(**TINY, head_dim=8, qk_norm=True, tie_embeddings=True)
QWEN2 = Decoder(**TINY, head_dim=4, qkv_bias=True, rope=Rope(50.0, "yarn", 4.0, original_max_positions=16))
MOE = QWEN3.clone(num_experts=4, experts_per_token=2, normalize_experts=True)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _params(module, seed=0):
    """Drawn by numpy, norms and biases too: no kernel to compile for each shape."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape) + (x.shape[-1] == 8), x.dtype), shapes)


def _tokens(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 24, (batch, length)), jnp.int32)


def _jitted(module, method=None):
    return jax.jit(lambda params, *args: module.apply({"params": params}, *args, method=method))


def _reference(module, params, tokens):
    """Logits of one record in float64, token by token, head by head; for the dense families."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    norm = lambda x, scale: x / np.sqrt(np.mean(x * x) + module.norm_epsilon) * scale
    frequencies, factor = module.rope.frequencies(module.head_dim)
    half = module.head_dim // 2

    def turn(x, position):
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies.astype(np.float64)) * factor
        return np.concatenate([z.real, z.imag])

    states = [params["embed_tokens"]["embedding"][t] for t in tokens]
    for layer in range(module.num_layers):
        p = jax.tree.map(lambda x, layer=layer: x[layer], params["layers"])
        attention, heads = p["self_attn"], []
        for position, x in enumerate(states):
            x = norm(x, p["input_layernorm"]["scale"])
            parts = {}
            for name in "qkv":
                y = x @ attention[f"{name}_proj"]["kernel"] + attention[f"{name}_proj"].get("bias", 0.0)
                y = list(y.reshape(-1, module.head_dim))
                if module.qk_norm and name != "v":
                    y = [norm(head, attention[f"{name}_norm"]["scale"]) for head in y]
                parts[name] = y if name == "v" else [turn(head, position) for head in y]
            heads.append(parts)
        for position in range(len(states)):
            out = []
            for h in range(module.num_heads):
                g = h * module.num_kv_heads // module.num_heads
                seen = heads[: position + 1]
                scores = np.array([heads[position]["q"][h] @ past["k"][g] for past in seen]) / module.head_dim**0.5
                weights = np.exp(scores - scores.max())
                out.append(sum(w * past["v"][g] for w, past in zip(weights / weights.sum(), seen)))
            x = states[position] + np.concatenate(out) @ attention["o_proj"]["kernel"]
            y = norm(x, p["post_attention_layernorm"]["scale"])
            gate, up = (y @ p["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up"))
            states[position] = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down_proj"]["kernel"]
    head = params["embed_tokens"]["embedding"].T if module.tie_embeddings else params["lm_head"]["kernel"]
    return np.stack([norm(x, params["norm"]["scale"]) @ head for x in states])


@pytest.mark.parametrize("module", [QWEN3, QWEN2])
def test_logits_are_those_of_a_plain_float64_reference(module):
    params, tokens = _params(module), _tokens(2, 9)
    logits = _jitted(module)(params, tokens)
    assert logits.shape == (2, 9, 24) and logits.dtype == jnp.float32
    for record, actual in zip(tokens, logits):
        np.testing.assert_allclose(actual, _reference(module, params, np.asarray(record)), **CLOSE)


@pytest.mark.parametrize("module", [QWEN3, QWEN2, MOE])
def test_packed_segments_equal_separate_sequences(module):
    params, apply = _params(module), _jitted(module)
    lengths = [[5, 6, 3], [13, 1]]
    tokens, segments = np.zeros((2, 16), np.int32), np.zeros((2, 16), np.int32)
    for row, sizes in enumerate(lengths):
        start = 0
        for i, size in enumerate(sizes, 1):
            tokens[row, start : start + size] = _tokens(1, size, seed=10 * row + i)[0]
            segments[row, start : start + size] = i
            start += size
    packed = apply(params, jnp.asarray(tokens), jnp.asarray(segments))
    assert np.isfinite(packed).all()
    which = [(row, segment) for row in (0, 1) for segment in range(1, len(lengths[row]) + 1)]
    alone = np.zeros((5, 16), np.int32)  # padded on the right: one shape to compile
    for i, (row, segment) in enumerate(which):
        alone[i, : lengths[row][segment - 1]] = tokens[row, segments[row] == segment]
    separate = apply(params, jnp.asarray(alone))
    for i, (row, segment) in enumerate(which):
        inside = segments[row] == segment
        np.testing.assert_allclose(packed[row, inside], separate[i, : inside.sum()], **CLOSE)


@pytest.mark.parametrize("module", [QWEN3, QWEN2, MOE])
def test_decode_of_ragged_prompts_equals_the_full_forward(module):
    params, decode = _params(module), _jitted(module, "decode")
    tokens, prompt, total = _tokens(3, 12), np.array([2, 7, 5]), np.array([9, 12, 10])
    expected = _jitted(module)(params, tokens)
    padded = jnp.where(jnp.arange(7)[None] < prompt[:, None], tokens[:, :7], 23)  # garbage beyond the prompt
    index = jnp.broadcast_to(jnp.arange(7)[None], (3, 7))
    logits, cache = decode(params, padded, index, module.init_cache(3, 12))
    assert cache.k.shape == (2, 3, 12, 2 * module.head_dim)
    for row in range(3):
        np.testing.assert_allclose(logits[row, : prompt[row]], expected[row, : prompt[row]], **CLOSE)
    for step in range(7):  # each record goes on from its own length; the shorter ones then idle beyond the cache
        position = prompt + step
        now = np.where(position < total, position, 12)
        given = tokens[np.arange(3), np.minimum(position, 11)]
        logits, cache = decode(params, given[:, None], jnp.asarray(now)[:, None], cache)
        for row in np.flatnonzero(position < total):
            np.testing.assert_allclose(logits[row, 0], expected[row, position[row]], **CLOSE)
    if step:  # all but the slots that were never reached
        again, _ = decode(params, tokens, jnp.broadcast_to(jnp.arange(12)[None], (3, 12)), cache)
        np.testing.assert_allclose(again, expected, **CLOSE)


def test_no_token_sees_what_follows_it_and_padding_changes_nothing():
    params, apply = _params(QWEN3), _jitted(QWEN3)
    tokens = _tokens(2, 8)
    changed = apply(params, tokens.at[:, 5].set((tokens[:, 5] + 1) % 24))
    logits = apply(params, tokens)
    np.testing.assert_array_equal(changed[:, :5], logits[:, :5])
    assert (np.abs(changed[:, 5:] - logits[:, 5:]).max(-1) > 1e-4).all()


def test_hidden_times_head_is_the_logits():
    for module in (QWEN3, QWEN2):
        params, tokens = _params(module), _tokens(2, 8)
        hidden, logits = _jitted(module, "hidden")(params, tokens), _jitted(module)(params, tokens)
        assert hidden.shape == (2, 8, 16) and module.head(params).shape == (16, 24)
        np.testing.assert_allclose(hidden @ module.head(params), logits, **CLOSE)


def test_gradients_reach_every_parameter_and_remat_keeps_them():
    for module in (QWEN2, MOE):
        params, tokens = _params(module), _tokens(2, 8)
        gradient = lambda m, params=params, tokens=tokens: jax.jit(
            jax.grad(lambda p: jnp.square(m.apply({"params": p}, tokens)).mean())
        )(params)
        expected, actual = gradient(module), gradient(module.clone(remat=True))
        assert all(np.abs(g).reshape(len(g), -1).max(1).min() > 0 for g in jax.tree.leaves(expected["layers"]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)
    traced = jax.make_jaxpr(lambda p: QWEN3.clone(remat=True).apply({"params": p}, _tokens(2, 8)))(_params(QWEN3))
    assert "remat" in str(traced) or "checkpoint" in str(traced)


def test_gradient_is_the_slope():
    params, direction, tokens = _params(QWEN3), _params(QWEN3, seed=1), _tokens(2, 8)
    loss = jax.jit(lambda p: jax.nn.log_softmax(QWEN3.apply({"params": p}, tokens))[..., 3].mean())
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), jax.grad(loss)(params), direction)))
    at = lambda step: loss(jax.tree.map(lambda p, d: p + step * d, params, direction))
    assert float(slope) == pytest.approx(float(at(1e-2) - at(-1e-2)) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("module", [QWEN2, MOE])
def test_eight_devices_equal_one(module):
    """Logits, gradients and a decode; parameters are split by the rules, and the batch stays split."""
    params, tokens = _params(module), _tokens(8, 8)

    def everything(params, tokens):
        loss = lambda p: jnp.square(module.apply({"params": p}, tokens)).mean()
        index = jnp.broadcast_to(jnp.arange(8)[None], tokens.shape)
        decoded, _ = module.apply({"params": params}, tokens, index, module.init_cache(8, 9), method="decode")
        return module.apply({"params": params}, tokens), decoded, jax.grad(loss)(params)

    expected = jax.jit(everything)(params, tokens)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    logits, decoded, grads = jax.jit(everything)(shard_params(params, mesh, RULES), shard_batch(tokens, mesh))
    assert logits.sharding.spec[0] == decoded.sharding.spec[0] == ("data", "fsdp")
    for actual, wanted in zip(jax.tree.leaves((logits, decoded, grads)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_decode_on_eight_devices_exchanges_no_keys_and_values(shape):
    mesh = make_mesh(shape)
    cache, positions = QWEN3.init_cache(8, 9), jnp.full((8, 1), 3)

    def decode(params, tokens, positions, cache):
        return QWEN3.apply({"params": params}, tokens, positions, cache, method="decode")[1]

    cache = jax.device_put(cache, NamedSharding(mesh, record_spec(mesh, None)))
    params, (tokens, positions) = shard_params(_params(QWEN3), mesh, ()), shard_batch((_tokens(8, 1), positions), mesh)
    compiled = jax.jit(decode).lower(params, tokens, positions, cache).compile()
    assert "all-gather" not in compiled.as_text()
    assert all(
        leaf.sharding.is_equivalent_to(cache.k.sharding, leaf.ndim)
        for leaf in compiled(params, tokens, positions, cache)
    )


def test_slots_beyond_the_cache_are_written_nowhere():
    old, new = jnp.zeros((2, 8, 3, 1)), jnp.ones((8, 2, 1))
    positions = jnp.array([[0, 1], [2, 3], [5, 6], [1, 0]] * 2)
    alone = write_slots(old, 1, positions, new)
    assert alone[0].sum() == 0 and alone[1, :, :, 0].tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]] * 2
    make_mesh({"data": 8})
    np.testing.assert_array_equal(write_slots(old, 1, positions, new), alone)
    np.testing.assert_array_equal(write_slots(old[:, :3], 1, positions[:3], new[:3]), alone[:, :3])


def test_rules_name_every_matrix_and_leave_out_absent_axes():
    for module in (QWEN2, MOE):
        params = _params(module)
        specs = param_specs(params, RULES)
        unsplit = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, spec in jax.tree_util.tree_leaves_with_path(specs)
            if spec == jax.P()
        }
        assert all(name.endswith(("scale", "mlp/gate/kernel")) for name in unsplit)
    assert dict(partition_rules(make_mesh({"data": 8})))[r"(o|down)_proj/kernel$"] == jax.P(None, None, None)


def test_bfloat16_computes_nearly_the_same_with_float32_logits():
    params, tokens = _params(QWEN2), _tokens(2, 16)
    exact, rough = (_jitted(m)(params, tokens) for m in (QWEN2, QWEN2.clone(dtype=jnp.bfloat16)))
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)
    assert QWEN2.clone(dtype=jnp.bfloat16).init_cache(1, 2).k.dtype == jnp.bfloat16
    hidden = _jitted(QWEN2.clone(dtype=jnp.bfloat16), "hidden")(params, tokens)
    assert hidden.dtype == jnp.bfloat16


def test_tokens_beyond_the_vocabulary_show():
    logits = _jitted(QWEN3)(_params(QWEN3), jnp.array([[1, 2, 24, 3], [1, 2, 23, 3]]))
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


def test_start_is_small_and_nearly_uniform():
    params = jax.jit(QWEN2.init)(jax.random.key(0), _tokens(1, 4))["params"]
    kernel = params["layers"]["mlp"]["gate_proj"]["kernel"]
    assert 0.015 < kernel.std() < 0.025 and not np.array_equal(kernel[0], kernel[1])
    logp = jax.nn.log_softmax(_jitted(QWEN2)(params, _tokens(2, 8)))
    np.testing.assert_allclose(logp, -np.log(24), atol=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rope": Rope(kind="longrope")}, "rope kind 'longrope' is unknown"),
        ({"rope": Rope(kind="dynamic", factor=2.0, original_max_positions=7)}, "length 8 is beyond the 7 positions"),
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token=3"),
    ],
)
def test_wrong_fields_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(QWEN3.clone(**change).init, jax.random.key(0), _tokens(1, 8))


def test_a_dynamic_rope_bounds_the_cache():
    module = QWEN3.clone(rope=Rope(kind="dynamic", factor=2.0, original_max_positions=8))
    cache = module.init_cache(1, 9)
    with pytest.raises(ValueError, match="length 9 is beyond the 8 positions"):
        jax.eval_shape(_jitted(module, "decode"), _params(module), _tokens(1, 1), jnp.zeros((1, 1), jnp.int32), cache)
