"""GPT2 against transformers' torch model; packing, the cache and sampling; its files and their errors."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from weight_files import WEIGHTS, edit, tensors_of

from experiments.language import functions
from opd_jax.config import ConfigError
from opd_jax.models.gpt2 import GPT2, RULES
from opd_jax.models.hf import load_gpt2, save_gpt2
from opd_jax.sampling.tokens import SamplingParams, as_prompts, generate
from opd_jax.sharding import make_mesh, param_specs, shard_batch, shard_params

SIZES = {"vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}
SIZES |= {"bos_token_id": 38, "eos_token_id": 39}
TINY = GPT2(vocab_size=24, width=16, num_layers=2, num_heads=4, mlp_width=24, max_positions=12)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NAME = "transformer.h.1.attn.c_attn.weight"


def _reference(directory, max_shard_size="20KB", bare=False, **config):
    """A random model of transformers, norm weights and biases too, saved to `directory`."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | config)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    (model.transformer if bare else model).save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def _params(module=TINY, seed=0):
    """Drawn by numpy, norms and biases too: no kernel to compile for each shape."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)


def _tokens(batch=2, length=72, vocab=40, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def _torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@functools.cache
def _jitted(module, method=None):
    """One function for all tests: those of one shape compile it once."""
    return jax.jit(lambda params, *args: module.apply({"params": params}, *args, method=method))


def _assert_logits(module, params, model, tokens):
    expected = _torch_logits(model, tokens)
    assert np.abs(expected).max() > 1
    actual = _jitted(module)(params, tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _assert_bit_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"n_inner": 48, "layer_norm_epsilon": 1e-2, "reorder_and_upcast_attn": True}])
def test_logits_are_those_of_transformers(tmp_path, config):
    model = _reference(tmp_path, **config)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    _assert_logits(*load_gpt2(tmp_path), model, _tokens())


def test_greedy_answers_are_those_of_transformers(tmp_path):
    model = _reference(tmp_path)
    module, params = load_gpt2(tmp_path)
    ours = functions(module, vocab_size=40)
    prompts = [row[:length].tolist() for row, length in zip(_tokens(4, 11), (11, 1, 6, 8))]
    kwargs = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [torch.tensor([ids]) for ids in prompts]
    free = [model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs) for ids in alone]
    answers = [row[0, len(ids) :].tolist() for ids, row in zip(prompts, free)]
    assert len({tuple(answer) for answer in answers}) == 4
    stop = answers[0][3]  # ends at least that answer
    until = lambda answer: answer[: answer.index(stop) + 1] if stop in answer else answer
    how = SamplingParams(16, stop_ids=(stop,), temperature=0)
    batch = as_prompts(prompts, 11, jax.random.key(0))
    rollout = jax.jit(generate, static_argnums=(1, 4))(ours.decode, ours.init_cache, params, batch, how)
    for row, response, answer in zip(rollout.tokens, rollout.response, answers):
        assert row[response].tolist() == until(answer)


@pytest.mark.parametrize("like", [False, True])
def test_round_trip_is_exact_and_transformers_reads_it(tmp_path, like):
    model = _reference(tmp_path / "a", n_inner=48 if like else None)
    (tmp_path / "a" / "vocab.json").write_text("{}")
    module, params = load_gpt2(tmp_path / "a")
    save_gpt2(module, params, tmp_path / "b", max_shard_bytes=15_000, like=tmp_path / "a" if like else None)
    again, params_again = load_gpt2(tmp_path / "b")
    assert again == module
    _assert_bit_equal(params, params_again)

    before, after = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(after[n].dtype == v.dtype and after[n].tobytes() == v.tobytes() for n, v in before.items())
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert (tmp_path / "b" / "vocab.json").exists() == like

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == ((38, 39) if like else (None, None))
    tokens = _tokens()
    np.testing.assert_array_equal(_torch_logits(theirs.eval(), tokens), _torch_logits(model, tokens))


def test_transformers_reads_a_fresh_bfloat16_model(tmp_path):
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), _params())
    save_gpt2(TINY, params, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    module, loaded = load_gpt2(tmp_path / "model")
    _assert_bit_equal(loaded, params)
    wide = jax.tree.map(lambda x: x.astype(np.float32), params)
    _assert_bit_equal(load_gpt2(tmp_path / "model", dtype=jnp.float32)[1], wide)
    _assert_logits(module, loaded, model.float(), _tokens(5, 12, 24))


def test_old_and_bare_checkpoints_are_the_same(tmp_path):
    """Without the prefix; with the buffers of old files and a copy of the embedding; the config of OpenAI's."""
    _reference(tmp_path / "new")
    _reference(tmp_path / "bare", bare=True)
    _reference(tmp_path / "old", max_shard_size="1GB", bare=True)
    buffers = {f"h.{i}.attn.bias": np.ones((1, 1, 96, 96), bool) for i in range(3)}
    buffers |= {f"h.{i}.attn.masked_bias": np.asarray(-1e4, np.float32) for i in range(3)}
    edit(tmp_path / "old", lambda t: t.update(buffers | {"lm_head.weight": t["wte.weight"].copy()}))
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 96, "resid_pdrop": 0.1}
    config |= {key: SIZES[key] for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    module, params = load_gpt2(tmp_path / "new")
    for name in ("bare", "old"):
        again, loaded = load_gpt2(tmp_path / name)
        assert again == module
        _assert_bit_equal(loaded, params)


def test_needs_no_torch(tmp_path):
    save_gpt2(TINY, _params(), tmp_path / "model")
    code = "import sys; from opd_jax.models.hf import load_gpt2; load_gpt2(sys.argv[1]); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers"} & set(result.stdout.split())


# ---- the module ------------------------------------------------------------------------------------------------------


def test_packed_segments_equal_separate_sequences():
    """In rows longer than `max_positions`, padded by more than that."""
    params, lengths = _params(), [[5, 12, 3], [7, 1]]
    tokens, segments = np.zeros((2, 24), np.int32), np.zeros((2, 24), np.int32)
    for row, sizes in enumerate(lengths):
        ends = np.cumsum(sizes)
        tokens[row, : ends[-1]] = _tokens(1, ends[-1], 24, seed=row)[0]
        segments[row, : ends[-1]] = np.repeat(np.arange(len(sizes)) + 1, sizes)
    packed = _jitted(TINY)(params, tokens, segments)
    assert np.isfinite(packed).all()
    inside = [segments[row] == segment for row in (0, 1) for segment in range(1, len(lengths[row]) + 1)]
    rows = [0, 0, 0, 1, 1]
    alone = np.zeros((5, 12), np.int32)  # padded on the right: one shape to compile
    for i, (row, mask) in enumerate(zip(rows, inside)):
        alone[i, : mask.sum()] = tokens[row, mask]
    separate = _jitted(TINY)(params, alone)
    for i, (row, mask) in enumerate(zip(rows, inside)):
        np.testing.assert_allclose(packed[row, mask], separate[i, : mask.sum()], **CLOSE)


def test_decode_of_ragged_prompts_equals_the_full_forward():
    params, decode = _params(), _jitted(TINY, "decode")
    tokens, prompt, total = _tokens(5, 12, 24), np.array([2, 7, 5, 1, 6]), np.array([9, 12, 10, 8, 12])
    expected = _jitted(TINY)(params, tokens)
    padded = np.where(np.arange(7) < prompt[:, None], tokens[:, :7], 23)  # garbage beyond the prompt
    logits, cache = decode(params, padded, np.broadcast_to(np.arange(7), (5, 7)), TINY.init_cache(5, 12))
    assert cache.k.shape == (2, 5, 12, 16)
    for row in range(5):
        np.testing.assert_allclose(logits[row, : prompt[row]], expected[row, : prompt[row]], **CLOSE)
    for step in range(7):  # each record goes on from its own length; the shorter ones then idle beyond the cache
        position = prompt + step
        now = np.where(position < total, position, 12)
        given = tokens[np.arange(5), np.minimum(position, 11)]
        logits, cache = decode(params, given[:, None], now[:, None], cache)
        for row in np.flatnonzero(position < total):
            np.testing.assert_allclose(logits[row, 0], expected[row, position[row]], **CLOSE)


def test_hidden_times_head_is_the_logits():
    params, tokens, ours = _params(), _tokens(5, 12, 24), functions(TINY, vocab_size=20)
    hidden, logits = jax.jit(ours.hidden)(params, tokens, None), _jitted(TINY)(params, tokens)
    assert hidden.shape == (5, 12, 16) and ours.head(params).shape == (16, 20)
    assert logits.shape == (5, 12, 24) and logits.dtype == jnp.float32
    np.testing.assert_allclose(hidden @ ours.head(params), logits[..., :20], **CLOSE)


def _loss(params, tokens, module=TINY):
    return jnp.square(module.apply({"params": params}, tokens)).mean()


@functools.cache
def _record_gradients():
    """Mapped over records, as private training takes them."""
    one = lambda params, row: jax.grad(_loss)(params, row[None])
    return jax.jit(jax.vmap(one, in_axes=(None, 0)))(_params(), _tokens(8, 12, 24))


def test_gradients_of_records_reach_every_parameter():
    layers = jax.tree.leaves(_record_gradients()["layers"])
    assert all(np.abs(g).max(tuple(range(2, g.ndim))).min() > 0 for g in layers)


def test_a_gradient_on_eight_devices_is_that_of_the_records_on_one(tmp_path):
    """Rematerialised, of a model loaded straight into its shards."""
    params, tokens = _params(), _tokens(8, 12, 24)
    expected = jax.tree.map(lambda g: np.asarray(g).mean(0), _record_gradients())
    save_gpt2(TINY, params, tmp_path / "model")
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    _, sharded = load_gpt2(tmp_path / "model", mesh=mesh)
    _assert_bit_equal(sharded, params)
    places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert places(sharded) == places(shard_params(params, mesh, RULES))
    assert sharded["layers"]["mlp"]["c_fc"]["kernel"].addressable_shards[0].data.shape == (2, 4, 12)
    gradient = jax.jit(lambda params, tokens: jax.grad(_loss)(params, tokens, TINY.clone(remat=True)))
    assert "remat" in str(jax.make_jaxpr(gradient)(params, tokens))
    actual = gradient(sharded, shard_batch(tokens, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)


def test_states_are_the_same_where_devices_split_the_tokens_of_a_row():
    params, tokens = _params(), _tokens(4, 12, 24)
    hidden = jax.jit(lambda params, tokens: TINY.apply({"params": params}, tokens, method="hidden"))
    expected, mesh = hidden(params, tokens), make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
    actual = hidden(shard_params(params, mesh, RULES), shard_batch(tokens, mesh))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_rules_name_every_matrix():
    specs = jax.tree_util.tree_leaves_with_path(param_specs(_params(), RULES))
    unsplit = [jax.tree_util.keystr(path) for path, spec in specs if spec == jax.P()]
    assert all("ln_" in name or "c_proj']['bias" in name for name in unsplit)


def test_bfloat16_computes_nearly_the_same_with_float32_logits():
    params, tokens, half = _params(), _tokens(5, 12, 24), TINY.clone(dtype=jnp.bfloat16)
    exact, rough = (_jitted(module)(params, tokens) for module in (TINY, half))
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)
    copy = half.sampling_copy(params)
    assert copy["layers"]["mlp"]["c_fc"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(_jitted(half)(copy, tokens), rough)
    assert half.init_cache(1, 2).k.dtype == jnp.bfloat16
    assert jax.eval_shape(_jitted(half, "hidden"), params, tokens).dtype == jnp.bfloat16


def test_what_no_embedding_exists_for_shows():
    tokens, segments = _tokens(2, 24, 24), np.repeat([[1, 2]], 12, axis=1).repeat(2, axis=0)
    segments[0, 12] = 1  # the first segment has 13 tokens
    logits = _jitted(TINY)(_params(), tokens, segments)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
    tokens = _tokens(5, 12, 24)
    tokens[1, 2] = 24
    logits = _jitted(TINY)(_params(), tokens)
    assert np.isnan(logits[1]).all() and np.isfinite(logits[0]).all()


def test_start_is_that_of_transformers():
    params = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert params["layers"]["mlp"]["c_fc"]["kernel"].shape == (2, 16, 24)
    module = GPT2(vocab_size=64, width=64, num_layers=8, num_heads=4, max_positions=64)
    start = jax.jit(lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]["layers"]["mlp"])
    mlp = start(jax.random.key(0))
    for name, std in (("c_fc", 0.02), ("c_proj", 0.005)):
        kernel = mlp[name]["kernel"]
        assert kernel.std() == pytest.approx(std, rel=0.05) and not np.array_equal(kernel[0], kernel[1])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_fields_and_lengths_are_refused():
    shapes = lambda module, length: jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, length), jnp.int32))
    with pytest.raises(ValueError, match="width=16 is no multiple of num_heads=3"):
        shapes(TINY.clone(num_heads=3), 1)
    with pytest.raises(ValueError, match="length 13 is beyond the 12 learned positions"):
        shapes(TINY, 13)
    one = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="length 13 is beyond the 12 learned positions"):
        jax.eval_shape(_jitted(TINY, "decode"), _params(), one, one, TINY.init_cache(1, 13))


def test_wrong_tensors_are_named(tmp_path):
    _reference(tmp_path, max_shard_size="1GB")
    good = load_file(tmp_path / WEIGHTS)
    for change, message in [
        ({NAME: good[NAME].T.copy()}, rf"{NAME} has shape \(96, 32\); its config\.json says \(32, 96\)"),
        ({NAME: good[NAME].astype(np.float16)}, f"{NAME} is float16, layers before it float32; load it with a dtype"),
        ({NAME: None, "transformer.stray": good[NAME]}, rf"missing \[{NAME}\], unexpected \[transformer\.stray\]"),
        ({"transformer.h.0.attn.c_attn.bias": None}, r"missing \[transformer\.h\.0\.attn\.c_attn\.bias\]"),
        ({"lm_head.weight": 2 * good["transformer.wte.weight"]}, r"lm_head\.weight differs from the embedding"),
    ]:
        changed = {name: value for name, value in (good | change).items() if value is not None}
        save_file(changed, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            load_gpt2(tmp_path)
    save_file(good, tmp_path / WEIGHTS, metadata={"format": "pt"})
    edit(tmp_path, n_layer=4)
    with pytest.raises(ConfigError, match=r"missing \[transformer\.h\.3\.attn.* and 8 more\], unexpected \[\]"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo' with architectures"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, r"GPT2DoubleHeadsModel.*only GPT2LMHeadModel"),
        ({"n_embd": None, "n_head": None}, "n_embd, n_head missing"),
        ({"activation_function": "gelu"}, "activation_function='gelu' is not supported; only 'gelu_new'"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported; only True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
    ],
)
def test_unsupported_configs_are_refused(tmp_path, change, message):
    config = transformers.GPT2Config(**SIZES, architectures=["GPT2LMHeadModel"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | change))
    with pytest.raises(ConfigError, match=message):
        load_gpt2(tmp_path)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is absent"):
        load_gpt2(tmp_path)
    transformers.GPT2Config(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is absent"):
        load_gpt2(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"short")
    with pytest.raises(ConfigError, match=f"{WEIGHTS} is corrupt"):
        load_gpt2(tmp_path)


def test_save_refuses_what_it_cannot_write(tmp_path):
    params = _params()
    with pytest.raises(ValueError, match=r"ln_f/scale.* are missing, unexpected or of another shape"):
        save_gpt2(TINY, params | {"ln_f": {"scale": np.zeros(15), "bias": np.zeros(16)}}, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    save_gpt2(TINY, params, tmp_path / "model")
    with pytest.raises(ConfigError, match="model is not an empty directory"):
        save_gpt2(TINY, params, tmp_path / "model")
