"""Vla: parity with torch, padding, who sees whom, both heads, gradients, meshes, adapters, sizes and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from opd_jax.cost import cost_of
from opd_jax.models import action_tokens, lora, vla
from opd_jax.models.decoder import Decoder, Rope, partition_rules
from opd_jax.models.hf import load_decoder
from opd_jax.models.vit import ViT
from opd_jax.models.vla import OPENVLA_7B, RULES, Observation, Vla
from opd_jax.sharding import make_mesh, param_specs, shard_batch, shard_params

B, H, A, L, WORDS = 8, 2, 3, 6, 20
TOWER = ViT(16, 24, 2, 2, patch_size=4, image_size=8, feature_layer=-1)
TEXT = Decoder(WORDS + 260, 16, 24, 2, 4, 2, 8, rope=Rope(50.0))
MODULE = Vla((TOWER,), TEXT, H, A, used_vocab_size=WORDS + 256, fused_projector=False)
LENGTHS = np.array([6, 4, 1, 2, 6, 5, 3, 1])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _observation(seed=0, cameras=2, image_size=8):
    rng = np.random.default_rng(seed)
    words = np.where(np.arange(L) < LENGTHS[:, None], rng.integers(3, WORDS, (B, L)), 0)
    images = rng.integers(0, 256, (B, cameras, image_size, image_size, 3), dtype=np.uint8)
    return Observation(jnp.asarray(images), jnp.asarray(rng.standard_normal((B, 5)), jnp.float32), jnp.asarray(words))


OBSERVATION = _observation()
NOISY = jnp.asarray(np.random.default_rng(1).standard_normal((B, H, A)), jnp.float32)
TIME = jnp.linspace(0.0, 1.0, B)


def _draw(module, *args, method=None, seed=0):
    """Drawn by numpy, norms and biases too: no kernel to compile for each shape."""
    rng = np.random.default_rng(seed)
    init = lambda key, *args: module.init(key, *args, method=method)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)


PARAMS = _draw(MODULE, OBSERVATION)
FLOW = _draw(MODULE, OBSERVATION, NOISY, TIME, method="velocity")


def _with_gradient(module, method=None):
    """A head's output, and the gradient of its mean square: one program for both."""

    def loss(params, *args):
        out = module.apply({"params": params}, *args, method=method)
        return jnp.square(out).mean(), out

    return jax.jit(jax.grad(loss, has_aux=True))


LOGITS_GRADIENT, VELOCITY_GRADIENT = _with_gradient(MODULE), _with_gradient(MODULE, "velocity")
LOGITS, VELOCITY = (lambda *args: LOGITS_GRADIENT(*args)[1]), (lambda *args: VELOCITY_GRADIENT(*args)[1])


# ---- parity ----------------------------------------------------------------------------------------------------------


def _torch_parts():
    """The parts of an OpenVLA with small sizes, random weights; a used vocabulary of 290 of 296."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4, "image_size": 8}
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, intermediate_size=32))
    config = {"vocab_size": 296, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="eager"))
    projector = torch.nn.Sequential(
        *(torch.nn.Linear(16, 64), torch.nn.GELU()),
        *(torch.nn.Linear(64, 24), torch.nn.GELU()),
        torch.nn.Linear(24, 24),
    )
    proprioception = torch.nn.Sequential(torch.nn.Linear(5, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    parts = siglip.eval(), llama.eval(), projector, proprioception
    with torch.no_grad():
        for part in parts:
            for value in part.parameters():
                value.add_(0.2 * torch.randn_like(value))
    return parts


def _torch_tokens(parts, images, proprioception, words):
    """Token ids of one record without padding, as OpenVLA-OFT's code arranges it: logits over the used vocabulary."""
    siglip, llama, projector, proprioception_projector = parts
    pixels = torch.tensor((np.asarray(images, np.float32) / 127.5 - 1).transpose(0, 3, 1, 2))
    patches = projector(siglip(pixels, output_hidden_states=True).hidden_states[-2])
    embed = llama.get_input_embeddings()
    text, end = embed(torch.tensor(np.asarray(words))), embed(torch.tensor([2]))
    state = proprioception_projector(torch.tensor(np.asarray(proprioception))[None])
    context = torch.cat([text[:1], patches.reshape(-1, 24), state, text[1:]])
    x = torch.cat([context, torch.zeros(H * A, 24), end])[None]
    everywhere = torch.zeros(1, 1, x.shape[1], x.shape[1])  # added to scores: all see all
    logits = llama(inputs_embeds=x, attention_mask=everywhere).logits[0]
    return logits[len(context) - 1 : len(context) - 1 + H * A, :290].numpy()


def _dense(linear):
    return {"kernel": linear.weight.detach().numpy().T, "bias": linear.bias.detach().numpy()}


def _siglip_params(siglip):
    """Of the first two of three blocks."""
    weights = {name.removeprefix("vision_model."): value for name, value in siglip.named_parameters()}
    weights = {name: value.detach().numpy() for name, value in weights.items()}
    layers = [f"encoder.layers.{i}" for i in range(2)]
    stack = lambda name: np.stack([weights[f"{layer}.{name}"] for layer in layers])
    norm = lambda name: {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}
    linear = lambda name: {"kernel": stack(f"{name}.weight").mT, "bias": stack(f"{name}.bias")}
    qkv = [linear(f"self_attn.{name}_proj") for name in "qkv"]
    qkv = {leaf: np.concatenate([one[leaf] for one in qkv], axis=-1) for leaf in ("kernel", "bias")}
    kernel = weights["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0).reshape(-1, 16)
    return {
        "patch_embed": {"kernel": kernel, "bias": weights["embeddings.patch_embedding.bias"]},
        "pos_embed": weights["embeddings.position_embedding.weight"][None],
        "blocks": {
            "norm1": norm("layer_norm1"),
            "norm2": norm("layer_norm2"),
            "attn": {"qkv": qkv, "proj": linear("self_attn.out_proj")},
            "mlp": {"fc1": linear("mlp.fc1"), "fc2": linear("mlp.fc2")},
        },
    }


def test_logits_are_those_of_the_same_parts_in_torch(tmp_path):
    """Record by record without padding there, in one padded batch here; the bins are OpenVLA's tokens."""
    parts = siglip, llama, projector, proprioception = _torch_parts()
    llama.save_pretrained(tmp_path / "llama")
    text, text_params = load_decoder(tmp_path / "llama")
    tower = ViT(16, 32, 3, 2, patch_size=4, image_size=8, approximate_gelu=True)
    module = Vla((tower,), text, H, A, used_vocab_size=290)
    params = {
        "towers_0": _siglip_params(siglip),
        "language_model": text_params,
        "projector": {f"fc{i}": _dense(projector[2 * i - 2]) for i in (1, 2, 3)},
        "proprioception": {f"fc{i}": _dense(proprioception[2 * i - 2]) for i in (1, 2)},
        "placeholders": {"embedding": np.zeros((H * A, 24), np.float32)},
    }
    actual = jax.jit(lambda params: module.apply({"params": params}, OBSERVATION))(params)
    assert actual.shape == (B, H, A, 256)
    for row in range(B):
        with torch.no_grad():
            words = OBSERVATION.instruction[row, : LENGTHS[row]]
            expected = _torch_tokens(parts, OBSERVATION.images[row], OBSERVATION.proprioception[row], words)
        bins = expected[:, 290 - 1 - np.arange(256)].reshape(H, A, 256)
        assert np.linalg.norm(actual[row] - bins) < 1e-5 * np.linalg.norm(bins)
        action = action_tokens.decode(jnp.argmax(actual[row], axis=-1))
        token = 290 - 256 + expected[:, 34:].argmax(-1).reshape(H, A)
        edges = np.linspace(-1, 1, 256)
        centres = (edges[:-1] + edges[1:]) / 2
        np.testing.assert_allclose(action, centres[np.clip(290 - token - 1, 0, 254)], atol=1e-6)


# ---- who sees whom ---------------------------------------------------------------------------------------------------


def test_padding_is_seen_by_nobody():
    expected, flow = LOGITS(PARAMS, OBSERVATION), VELOCITY(FLOW, OBSERVATION, NOISY, TIME)
    assert np.isfinite(expected).all() and np.isfinite(flow).all()
    words = np.asarray(OBSERVATION.instruction)
    spread = np.zeros_like(words)  # the same words, padding between them
    for row, length in enumerate(LENGTHS):
        spread[row, [0, *sorted(range(L - 1, L - length, -1))]] = words[row, :length]
    for tree, function, wanted, rest in ((PARAMS, LOGITS, expected, ()), (FLOW, VELOCITY, flow, (NOISY, TIME))):
        actual = function(tree, OBSERVATION._replace(instruction=jnp.asarray(spread)), *rest)
        np.testing.assert_allclose(actual, wanted, **CLOSE)
        text = tree["language_model"]
        spoiled = text["embed_tokens"]["embedding"].at[0].set(jnp.nan)
        spoiled = tree | {"language_model": text | {"embed_tokens": {"embedding": spoiled}}}
        np.testing.assert_array_equal(function(spoiled, OBSERVATION, *rest), wanted)
    gradient, _ = LOGITS_GRADIENT(PARAMS, OBSERVATION)
    assert not gradient["language_model"]["embed_tokens"]["embedding"][0].any()


def test_every_word_changes_its_record_alone():
    expected = LOGITS(PARAMS, OBSERVATION)
    for column in range(L):
        words = OBSERVATION.instruction.at[:, column].set((OBSERVATION.instruction[:, column] - 2) % (WORDS - 3) + 3)
        words = jnp.where(OBSERVATION.instruction == 0, 0, words)
        moved = np.abs(LOGITS(PARAMS, OBSERVATION._replace(instruction=words)) - expected).max((1, 2, 3))
        np.testing.assert_array_equal(moved > 1e-4, column < LENGTHS)


def test_every_action_token_is_seen_by_every_other():
    """Also by those before it: attention is bidirectional."""
    expected = LOGITS(PARAMS, OBSERVATION)
    for i in range(H * A - 1):  # the states of the last predict what follows the actions
        table = PARAMS["placeholders"]["embedding"].at[i].add(1.0)
        changed = LOGITS(PARAMS | {"placeholders": {"embedding": table}}, OBSERVATION)
        assert (np.abs(changed - expected).max((0, 3)) > 1e-4).all()
    flow = VELOCITY(FLOW, OBSERVATION, NOISY, TIME)
    for step in range(H):
        changed = VELOCITY(FLOW, OBSERVATION, NOISY.at[:, step].add(1.0), TIME)
        assert (np.abs(changed - flow).max(2) > 1e-4).all()


def test_every_camera_and_the_proprioception_count():
    expected = LOGITS(PARAMS, OBSERVATION)
    changes = {
        "cameras in another order": OBSERVATION._replace(images=OBSERVATION.images[:, ::-1]),
        "the last pixel": OBSERVATION._replace(images=OBSERVATION.images.at[:, 1, 7, 7, 2].add(100)),
        "proprioception": OBSERVATION._replace(proprioception=OBSERVATION.proprioception.at[:, 4].add(1.0)),
    }
    for name, changed in changes.items():
        assert (np.abs(LOGITS(PARAMS, changed) - expected).max((1, 2, 3)) > 1e-4).all(), name
    without = OBSERVATION._replace(proprioception=jnp.zeros((B, 0)))
    assert "proprioception" not in jax.eval_shape(MODULE.init, jax.random.key(0), without)["params"]


def test_ids_beyond_the_vocabulary_show_in_their_record_alone():
    words = OBSERVATION.instruction.at[1, 1].set(WORDS + 260)
    logits = LOGITS(PARAMS, OBSERVATION._replace(instruction=words))
    np.testing.assert_array_equal(np.isnan(logits).any((1, 2, 3)), np.arange(B) == 1)


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_bin_k_is_the_token_that_many_below_the_last_used():
    """By hand: of 276 used ids of 280, bin 3 is the id 272, and bin 255 the id 20."""
    for bin_, token in ((0, 275), (3, 272), (255, 20)):
        text = PARAMS["language_model"]
        only = jnp.zeros_like(text["lm_head"]["kernel"]).at[:, token].set(1.0)
        logits = LOGITS(PARAMS | {"language_model": text | {"lm_head": {"kernel": only}}}, OBSERVATION)
        assert logits.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(logits).any((0, 1, 2)), np.arange(256) == bin_)
        action = action_tokens.decode(jnp.array(bin_))
        assert token == 276 - np.digitize(action, np.linspace(-1, 1, 256)) - (bin_ == 255)


def test_velocity_depends_on_time_and_state_and_is_float32():
    """Times go through 1000 periods of the shortest wave: two of them, near each other, are told apart."""
    expected = VELOCITY(FLOW, OBSERVATION, NOISY, TIME)
    assert expected.shape == (B, H, A) and expected.dtype == jnp.float32
    for t in (1 - TIME + 0.07, TIME + 1e-3):
        changed = VELOCITY(FLOW, OBSERVATION, NOISY, t)
        assert (np.abs(changed - expected).max((1, 2)) > 1e-4).all()
    alone = VELOCITY(FLOW, OBSERVATION, NOISY.at[0].add(1.0), TIME.at[0].add(0.5))
    np.testing.assert_array_equal(alone[1:], expected[1:])


# ---- training --------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter_and_remat_keeps_them():
    remat = MODULE.clone(towers=(TOWER.clone(remat=True),), language_model=TEXT.clone(remat=True))
    traced = str(jax.make_jaxpr(lambda p: remat.apply({"params": p}, OBSERVATION))(PARAMS))
    assert traced.count("= remat") + traced.count("= checkpoint") == 2  # in the tower and in the decoder
    expected, _ = LOGITS_GRADIENT(PARAMS, OBSERVATION)
    flow, _ = VELOCITY_GRADIENT(FLOW, OBSERVATION, NOISY, TIME)
    for path, leaf in jax.tree_util.tree_leaves_with_path((expected, flow)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows = np.asarray(leaf).reshape(len(leaf) if "blocks" in name or "layers" in name else 1, -1)
        assert np.isfinite(rows).all() and (np.abs(rows).max(1) > 0).all(), name
    actual, _ = _with_gradient(remat)(PARAMS, OBSERVATION)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), actual, expected)


def test_eight_devices_equal_one():
    """Logits and gradients, and the velocity; parameters are split by the rules, and the batch stays split."""
    expected = LOGITS_GRADIENT(PARAMS, OBSERVATION), VELOCITY(FLOW, OBSERVATION, NOISY, TIME)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    params, flow = (shard_params(tree, mesh, partition_rules(mesh, RULES)) for tree in (PARAMS, FLOW))
    observation, noisy, time = shard_batch((OBSERVATION, NOISY, TIME), mesh)
    velocity = jax.jit(lambda flow, *args: MODULE.apply({"params": flow}, *args, method="velocity"))
    actual = LOGITS_GRADIENT(params, observation), velocity(flow, observation, noisy, time)
    assert actual[0][1].sharding.spec[0] == actual[1].sharding.spec[0] == "fsdp"
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, **CLOSE)


def test_rules_name_every_matrix_but_the_smallest():
    for tree in (PARAMS, FLOW):
        for path, spec in jax.tree_util.tree_leaves_with_path(param_specs(tree, RULES)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            whole = not name.endswith("kernel") or "patch_embed" in name or name.startswith(("action_in", "action_out"))
            assert (spec == jax.P()) <= (whole and "embed_tokens" not in name), name


def test_bfloat16_computes_nearly_the_same():
    low = {"dtype": jnp.bfloat16}
    rough = MODULE.clone(towers=(TOWER.clone(**low),), language_model=TEXT.clone(**low))
    velocity = jax.jit(lambda *args, flow=FLOW: rough.apply({"params": flow}, *args, method="velocity"))
    copied = jax.jit(lambda *args: velocity(*args, flow=rough.sampling_copy(FLOW)))
    exact, actual = (function(OBSERVATION, NOISY, TIME) for function in (functools.partial(VELOCITY, FLOW), velocity))
    assert actual.dtype == jnp.float32
    assert 0 < np.linalg.norm(actual - exact) < 0.1 * np.linalg.norm(exact)
    np.testing.assert_array_equal(copied(OBSERVATION, NOISY, TIME), actual)
    assert jax.eval_shape(lambda params: rough.apply({"params": params}, OBSERVATION), PARAMS).dtype == jnp.float32


def test_decisions_read_a_copy_that_is_not_split_over_fsdp():
    """What is narrowed fits the wider of a policy's types; a decision of the copy gathers no matrix."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    params, observation = shard_params(PARAMS, mesh, partition_rules(mesh, RULES)), shard_batch(OBSERVATION, mesh)
    copy = jax.jit(MODULE.sampling_copy)(params)
    for leaf, spec in zip(jax.tree.leaves(copy), jax.tree.leaves(param_specs(PARAMS, RULES)), strict=True):
        kept = jax.P(*(axis if axis == "tensor" else None for axis in spec))
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, kept), leaf.ndim)
    decide = jax.jit(lambda params: MODULE.apply({"params": params}, observation))
    sent = [cost_of(decide.lower(tree).compile().as_text(), devices=8).collectives for tree in (params, copy)]
    assert sent[0]["all-gather"].bytes > 10_000 and "all-gather" not in sent[1]
    half = MODULE.clone(language_model=TEXT.clone(dtype=jnp.bfloat16))
    mixed = jax.eval_shape(half.sampling_copy, PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed)} == {jnp.dtype("float32")}


def test_an_adapter_applied_is_the_adapter_merged():
    pattern = r"(attn/qkv|self_attn/(q|v)_proj|projector/fc1)/kernel"
    init = lambda key: lora.init(key, PARAMS, pattern, rank=2, scanned=r"(blocks|layers)/")
    shapes, rng = jax.eval_shape(init, jax.random.key(0)), np.random.default_rng(0)
    assert len(shapes) == 4
    adapter = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    expected = LOGITS(lora.merge(PARAMS, adapter, 0.5), OBSERVATION)
    actual = jax.jit(lambda adapter: lora.apply(MODULE, PARAMS, adapter, 0.5, OBSERVATION))(adapter)
    np.testing.assert_allclose(actual, expected, **CLOSE)
    assert np.abs(actual - LOGITS(PARAMS, OBSERVATION)).max() > 1e-2


# ---- sizes and errors ------------------------------------------------------------------------------------------------


def _count(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_openvla_has_the_published_size():
    """The checkpoint has 7,541,237,184 parameters (openvla/openvla-7b), with those that its features do not need.

    Here: no last block, norm after it and pooling head of the towers.
    """
    observation = Observation(jnp.zeros((1, 1, 224, 224, 3), jnp.uint8), jnp.zeros((1, 0)), jnp.ones((1, 4), jnp.int32))
    shapes = jax.eval_shape(OPENVLA_7B.init, jax.random.key(0), observation)["params"]
    dino, siglip = (shapes[name]["blocks"] for name in ("towers_0", "towers_1"))
    last_blocks = _count(dino) // 23 + _count(siglip) // 26
    norms, pooling = 2 * (1024 + 1152), 15_238_352  # timm's attn_pool
    assert _count(shapes["language_model"]) == 6_738_939_904 and _count(shapes["projector"]) == 71_385_600
    assert _count(shapes) + last_blocks + norms + pooling == 7_541_237_184


def test_the_tiny_policy_is_tiny():
    module = vla.tiny(4, 4, dtype=jnp.bfloat16, remat=True)
    assert module.towers[0].remat and module.towers[0].dtype == module.language_model.dtype == jnp.bfloat16
    logits, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), _observation(image_size=40))
    assert 300_000 < _count(variables) < 600_000
    assert logits.shape == (B, 4, 4, 256) and logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"towers": (TOWER, TOWER.clone(patch_size=2))}, r"towers have \[4, 16\] patches; give them one number"),
        ({"used_vocab_size": 281}, "used_vocab_size=281; give 256, the bins, to vocab_size=280"),
        ({"used_vocab_size": 255}, "used_vocab_size=255"),
        ({"towers": (TOWER.clone(image_size=12),)}, "images are 8x8, the tower is for 12x12"),
    ],
)
def test_wrong_fields_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MODULE.clone(**change).init, jax.random.key(0), OBSERVATION)


def test_chunks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"actions are \[8, 3, 3\], not \[B, 2, 3\]"):
        MODULE.apply({"params": FLOW}, OBSERVATION, jnp.zeros((B, 3, A)), TIME, method="velocity")
