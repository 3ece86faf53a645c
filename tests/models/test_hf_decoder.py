"""Decoder against transformers' torch models, and the round trip and the errors of its files."""

import json
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from weight_files import WEIGHTS, edit, tensors_of

from opd_jax.config import ConfigError
from opd_jax.models.decoder import Decoder, Rope
from opd_jax.models.hf import check_same_tokenizer, load_decoder, save_decoder, tokenizer_fingerprint
from opd_jax.models.hf.decoder import _module
from opd_jax.sharding import make_mesh

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
THETA = {"rope_type": "default", "rope_theta": 700.0}
MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 12}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LINEAR = THETA | {"rope_type": "linear", "factor": 3.0}
DYNAMIC = THETA | {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 32}


def _reference(directory, family="qwen3", max_shard_size="20KB", **config):
    """A random model of transformers, norm weights and biases too, saved to `directory`."""
    torch.manual_seed(0)
    config = SIZES | {"rope_parameters": THETA} | config
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **config)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def _as_transformers_4(directory):
    """Rewrites config.json with the names that transformers 4 used."""
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype"), "transformers_version": "4.51"}
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    (directory / "config.json").write_text(json.dumps(config))


def _zeros(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _tokens(batch=2, length=72, vocab=40):
    return np.random.default_rng(0).integers(0, vocab, (batch, length)).astype(np.int32)


def _torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def _logits(module, params, tokens):
    return np.asarray(jax.jit(module.apply)({"params": params}, tokens))


def _assert_bit_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", {"head_dim": 12, "rms_norm_eps": 1e-3}),
        ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": YARN}),
        ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 3}),
        ("qwen2", {"num_key_value_heads": 1, "rope_parameters": YARN | {"attention_factor": 1.7, "truncate": False}}),
        ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
        (
            "llama",
            {
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": LINEAR,
            },
        ),
        ("llama", {"num_key_value_heads": 4, "rope_parameters": DYNAMIC}),
        ("qwen3_moe", MOE | {"norm_topk_prob": True}),
        ("qwen3_moe", MOE | {"norm_topk_prob": False, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, family, config):
    model = _reference(tmp_path, family, **config)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    module, params = load_decoder(tmp_path)
    _as_transformers_4(tmp_path)
    assert load_decoder(tmp_path)[0] == module
    tokens = _tokens()
    expected = _torch_logits(model, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(_logits(module, params, tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "rope",
    [
        YARN | {"factor": 8.0, "beta_fast": 8, "beta_slow": 2, "mscale": 1.3, "mscale_all_dim": 0.7},
        YARN | {"original_max_position_embeddings": 2048, "rope_theta": 1e6, "truncate": False},
        LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192, "factor": 32.0},
        LINEAR,
    ],
)
def test_rope_frequencies_are_those_of_transformers(tmp_path, rope):
    sizes = SIZES | {"max_position_embeddings": 16384, "head_dim": 64}
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    frequencies, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    ours, our_scale = _module(tmp_path / "config.json").rope.frequencies(64)
    np.testing.assert_allclose(ours, frequencies.numpy(), rtol=1e-6)
    assert our_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", {"head_dim": 12, "rope_parameters": YARN}),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": DYNAMIC}),
        ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
        ("qwen3_moe", MOE),
    ],
)
def test_round_trip_is_exact_and_transformers_reads_it(tmp_path, family, config):
    model = _reference(tmp_path / "a", family, **config)
    module, params = load_decoder(tmp_path / "a")
    save_decoder(module, params, tmp_path / "b", max_shard_bytes=15_000)
    again, params_again = load_decoder(tmp_path / "b")
    assert again == module
    _assert_bit_equal(params, params_again)

    before, after = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(after[n].dtype == v.dtype and after[n].tobytes() == v.tobytes() for n, v in before.items())
    files = list((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 20_000 for file in files)

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = _tokens()
    np.testing.assert_array_equal(_torch_logits(theirs.eval(), tokens), _torch_logits(model, tokens))


def test_transformers_reads_a_fresh_bfloat16_decoder(tmp_path):
    module, rng = Decoder(40, 32, 48, 2, 4, 2, 12, rope=Rope(700.0), qk_norm=True), np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.bfloat16), _zeros(module))
    save_decoder(module, params, tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", WEIGHTS]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    again, loaded = load_decoder(tmp_path / "model")
    _assert_bit_equal(loaded, params)
    tokens = _tokens()
    expected = _torch_logits(model.float(), tokens)
    np.testing.assert_allclose(_logits(again, loaded, tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_dtype_is_that_asked_for(tmp_path):
    _reference(tmp_path)
    _, stored = load_decoder(tmp_path)
    _, cast = load_decoder(tmp_path, dtype=jnp.bfloat16)
    _assert_bit_equal(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), stored))


def test_loads_straight_into_its_shards(tmp_path):
    _reference(tmp_path, "qwen2", tie_word_embeddings=True)
    module, params = load_decoder(tmp_path)
    _, sharded = load_decoder(tmp_path, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    _assert_bit_equal(params, sharded)
    attention = sharded["layers"]["self_attn"]
    assert attention["q_proj"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    assert attention["q_proj"]["kernel"].addressable_shards[0].data.shape == (3, 8, 16)
    assert attention["q_proj"]["bias"].addressable_shards[0].data.shape == (3, 16)
    assert sharded["embed_tokens"]["embedding"].addressable_shards[0].data.shape == (20, 8)
    save_decoder(module, sharded, tmp_path / "again")
    _assert_bit_equal(load_decoder(tmp_path / "again")[1], params)
    _, only_fsdp = load_decoder(tmp_path, mesh=make_mesh({"fsdp": 8}))
    assert only_fsdp["layers"]["mlp"]["down_proj"]["kernel"].sharding.spec == jax.P(None, None, "fsdp")
    _reference(tmp_path / "odd", "qwen2", vocab_size=42)
    _, odd = load_decoder(tmp_path / "odd", mesh=make_mesh({"fsdp": 2, "tensor": 4}))
    assert odd["embed_tokens"]["embedding"].sharding.spec == jax.P(None, "fsdp"), "a vocabulary may stay whole"
    _reference(tmp_path / "wide", "qwen2", intermediate_size=36)
    with pytest.raises(ConfigError, match="mlp/down_proj/kernel: an axis of 36 does not split over tensor=8"):
        load_decoder(tmp_path / "wide", mesh=make_mesh({"tensor": 8}))


def test_loading_holds_one_copy_on_the_host(tmp_path):
    module = Decoder(64, 128, 512, 8, 4, 2, 32)
    save_decoder(module, _zeros(module), tmp_path / "model")
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(_zeros(module)))
    tracemalloc.start()
    load_decoder(tmp_path / "model")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.4 * total


def test_needs_no_torch(tmp_path):
    _reference(tmp_path)
    code = "import sys; from opd_jax.models.hf import load_decoder; load_decoder(sys.argv[1]); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(result.stdout.split())


# ---- what is refused -------------------------------------------------------------------------------------------------

NAME = "model.layers.1.self_attn.q_proj.weight"


def test_wrong_tensors_are_named(tmp_path):
    _reference(tmp_path, max_shard_size="1GB", head_dim=8)
    edit(tmp_path, lambda tensors: tensors.update({NAME: np.zeros((32, 31), np.float32)}))
    with pytest.raises(ConfigError, match=rf"{NAME} has shape \(32, 31\); its config\.json says \(32, 32\)"):
        load_decoder(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({NAME: np.zeros((32, 32), np.float16)}))
    with pytest.raises(ConfigError, match=f"{NAME} is float16, layers before it float32; load it with a dtype"):
        load_decoder(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update(stray=tensors.pop(NAME)))
    with pytest.raises(ConfigError, match=rf"missing \[{NAME}\], unexpected \[stray\]"):
        load_decoder(tmp_path)
    edit(tmp_path, num_hidden_layers=4)
    with pytest.raises(ConfigError, match=r"missing \[.*1\.self_attn\.q_proj.* and 8 more\], unexpected \[stray"):
        load_decoder(tmp_path)


def test_a_stored_copy_of_tied_embeddings_must_be_one(tmp_path):
    model = _reference(tmp_path, max_shard_size="1GB", tie_word_embeddings=True)
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit(tmp_path, lambda t: t.update(inverse | {"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    module, params = load_decoder(tmp_path)
    expected = _torch_logits(model, _tokens())
    np.testing.assert_allclose(_logits(module, params, _tokens()), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": np.zeros((40, 32), np.float32)}))
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from the embedding"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type='gemma3' with architectures"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, r"Qwen3ForSequenceClassification.*use one of Llama"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no sliding windows"),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "no sliding"),
        ({"model_type": "qwen3_moe", "architectures": None}, "moe_intermediate_size, num_experts, num_experts_per_tok"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": THETA}}, "rope type 'per layer type'"),
        ({"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
    ],
)
def test_unsupported_configs_are_refused(tmp_path, change, message):
    config = transformers.Qwen3Config(**SIZES, architectures=["Qwen3ForCausalLM"], rope_parameters=THETA)
    config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        load_decoder(tmp_path)


def test_unsupported_experts_are_refused(tmp_path):
    config = transformers.Qwen3MoeConfig(**SIZES | MOE, rope_parameters=THETA)
    for change, message in [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | change))
        with pytest.raises(ConfigError, match=message):
            load_decoder(tmp_path)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is absent"):
        load_decoder(tmp_path)
    _reference(tmp_path)
    shard = next(tmp_path.glob("model-00002-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(ConfigError, match=r"model-00002.* is corrupt"):
        load_decoder(tmp_path)
    shard.write_bytes(next(tmp_path.glob("model-00001-*")).read_bytes())
    with pytest.raises(ConfigError, match=r"model-00002.* does not hold model"):
        load_decoder(tmp_path)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"model-00002.* is absent"):
        load_decoder(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is absent"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        load_decoder(tmp_path)


def test_save_refuses_what_it_cannot_write(tmp_path):
    module = Decoder(40, 32, 48, 2, 4, 2, 12)
    params = _zeros(module)
    with pytest.raises(ValueError, match="norm/scale"):
        save_decoder(module, params | {"norm": {"scale": np.zeros(31)}}, tmp_path / "model")
    odd = module.clone(qk_norm=True, mlp_bias=True)
    with pytest.raises(ValueError, match=r"no family of .* has qk_norm=True"):
        save_decoder(odd, _zeros(odd), tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    save_decoder(module, params, tmp_path / "model")
    with pytest.raises(ConfigError, match="model is not an empty directory"):
        save_decoder(module, params, tmp_path / "model")


def test_a_killed_save_leaves_nothing(tmp_path, monkeypatch):
    module = Decoder(40, 32, 48, 2, 4, 2, 12)
    params = _zeros(module)
    code = """
import os, sys, opd_jax.models.hf as hf, opd_jax.models.hf.stacks as stacks, opd_jax.tensors as tensors
count = 0
def write(path, leaves, arrays, about):
    global count
    count += 1
    def until_killed():
        yield next(arrays)
        os._exit(9)
    tensors.write_tensors(path, leaves, until_killed() if count == 3 else arrays, about)
stacks.write_tensors = write
module, params = hf.load_decoder(sys.argv[1])
hf.save_decoder(module, params, sys.argv[2], max_shard_bytes=10_000)
"""
    save_decoder(module, params, tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "whole", tmp_path / "killed"])
    assert killed.returncode == 9
    assert not (tmp_path / "killed").exists() and (tmp_path / ".killed.tmp").exists()
    save_decoder(module, params, tmp_path / "killed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["config.json", WEIGHTS]


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def _tokenizer(directory, text="the cat sat on the mat, the dog sat on the log", special=("<|end|>",)):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.save_pretrained(directory)
    return fast


def test_fingerprint_is_that_of_tokens_and_merges_in_any_format(tmp_path):
    fast = _tokenizer(tmp_path / "json")
    print_of_json = tokenizer_fingerprint(tmp_path / "json")
    assert len(print_of_json) == 64

    model = json.loads(fast.backend_tokenizer.to_str())["model"]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (tmp_path / "files" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    assert tokenizer_fingerprint(tmp_path / "files") != print_of_json  # the special token is not there yet
    (tmp_path / "files" / "added_tokens.json").write_text(json.dumps({"<|end|>": len(fast) - 1}))
    assert tokenizer_fingerprint(tmp_path / "files") == print_of_json

    file = tmp_path / "json" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]  # as before tokenizers 0.20
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    file.write_text(json.dumps(content, indent=4))
    assert check_same_tokenizer(tmp_path / "json", tmp_path / "files") == print_of_json


def test_other_tokens_merges_or_ids_are_another_tokenizer(tmp_path):
    _tokenizer(tmp_path / "student")
    reference = tokenizer_fingerprint(tmp_path / "student")
    _tokenizer(tmp_path / "special", special=("<|stop|>",))
    file = tmp_path / "student" / "tokenizer.json"
    for name, change in {
        "merges": lambda model: model["merges"].reverse(),
        "ids": lambda model: model["vocab"].update({"a": model["vocab"]["b"], "b": model["vocab"]["a"]}),
    }.items():
        content = json.loads(file.read_text())
        change(content["model"])
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    for name in ("special", "merges", "ids"):
        other = tokenizer_fingerprint(tmp_path / name)
        with pytest.raises(ConfigError, match=f"student .*{name}.* different tokenizers .*{reference} and {other}"):
            check_same_tokenizer(tmp_path / "student", tmp_path / name)


def test_unigram_vocabularies_have_fingerprints(tmp_path):
    for name, pieces in {"a": [["x", -1.0], ["y", -2.0]], "b": [["y", -1.0], ["x", -2.0]]}.items():
        (tmp_path / name).mkdir()
        Tokenizer(models.Unigram([tuple(piece) for piece in pieces])).save(str(tmp_path / name / "tokenizer.json"))
    assert tokenizer_fingerprint(tmp_path / "a") != tokenizer_fingerprint(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        tokenizer_fingerprint(tmp_path)


def test_padded_vocabularies_of_one_tokenizer_and_the_files_that_travel(tmp_path):
    """Teacher and student with the same tokenizer and other numbers of rows; the student is saved like the teacher."""
    _reference(tmp_path / "teacher", vocab_size=296, eos_token_id=257)
    fast = _tokenizer(tmp_path / "teacher")
    teacher, _ = load_decoder(tmp_path / "teacher")
    student = teacher.clone(vocab_size=288)
    params = _zeros(student)
    save_decoder(student, params, tmp_path / "student", like=tmp_path / "teacher")
    assert check_same_tokenizer(tmp_path / "student", tmp_path / "teacher")
    travelled = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    assert travelled("the cat")["input_ids"] == fast("the cat")["input_ids"]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.eos_token_id == 257
    assert load_decoder(tmp_path / "student")[0] == student
