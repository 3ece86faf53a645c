"""MMDiT against diffusers' SD3Transformer2DModel, its start, its errors and the round trip of its files."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from opd_jax.models.decoder import partition_rules
from opd_jax.models.hf import load_mmdit, save_mmdit
from opd_jax.models.mmdit import RULES, MMDiT
from opd_jax.sharding import make_mesh, shard_params

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_heads": 2, "head_dim": 8}
TINY |= {"joint_attention_dim": 12, "pooled_projection_dim": 6, "pos_embed_max_size": 8}


def _inputs(module, height=8, width=8, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    t = jnp.asarray(rng.uniform(size=batch), jnp.float32)
    context, pooled = normal(batch, 5, module.joint_attention_dim), normal(batch, module.pooled_projection_dim)
    return normal(batch, height, width, module.in_channels), t, context, pooled


def _random_params(module, inputs):
    """Drawn by numpy: no kernel to compile for each shape."""
    rng, shapes = np.random.default_rng(1), jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), shapes)


def _reference(directory, max_shard_size="10GB", **config):
    """A random diffusers model, norm weights and zero layers perturbed too, saved to `directory`."""
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    sizes |= {"num_attention_heads": 3, "attention_head_dim": 8, "joint_attention_dim": 12}
    sizes |= {"caption_projection_dim": 24, "pooled_projection_dim": 20, "pos_embed_max_size": 10}
    model = diffusers.SD3Transformer2DModel(**sizes | config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def _velocity(model, *inputs):
    latents, t, context, pooled = (torch.tensor(np.asarray(x)) for x in inputs)
    with torch.no_grad():
        out = model(latents.permute(0, 3, 1, 2), context, pooled, 1000 * t, return_dict=False)[0]
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "config, size",
    [
        ({}, (16, 16)),
        ({"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, (8, 14)),
        ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 2), "num_layers": 3, "out_channels": 2}, (20, 6)),
        ({"dual_attention_layers": (1,), "patch_size": 4, "sample_size": 40, "in_channels": 3}, (12, 32)),
    ],
)
def test_velocity_is_that_of_diffusers(tmp_path, config, size):
    model = _reference(tmp_path, **config)
    module, params = load_mmdit(tmp_path)
    inputs = _inputs(module, *size)
    expected = _velocity(model, *inputs)
    actual = jax.jit(module.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_start_is_zero_with_the_position_embedding_of_diffusers(tmp_path):
    expected = _reference(tmp_path, num_layers=1).pos_embed.pos_embed.numpy()
    module, _ = load_mmdit(tmp_path)
    inputs = _inputs(module)
    params = jax.jit(module.init)(jax.random.key(0), *inputs)["params"]
    np.testing.assert_allclose(params["pos_embed"], expected, atol=1e-5)
    velocity = jax.jit(lambda p: module.apply({"params": p}, *inputs))
    assert (velocity(params) == 0).all()
    grads = jax.jit(jax.grad(lambda p: jnp.square(velocity(p) - 1).sum()))(params)
    assert np.abs(grads["proj_out"]["kernel"]).max() > 0
    assert (grads["pos_embed"] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_round_trip_is_exact(tmp_path, dtype):
    _reference(tmp_path / "a", qk_norm="rms_norm", dual_attention_layers=(0,))
    tensors = {name: value.astype(dtype) for name, value in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    module, params = load_mmdit(tmp_path / "a")
    save_mmdit(module, params, tmp_path / "b")
    again, params_again = load_mmdit(tmp_path / "b")
    assert again == module
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), params, params_again))
    written = load_file(tmp_path / "b" / WEIGHTS)
    assert written.keys() == tensors.keys()
    assert all(written[n].dtype == v.dtype and written[n].tobytes() == v.tobytes() for n, v in tensors.items())


def test_loads_straight_into_its_shards(tmp_path):
    _reference(tmp_path, qk_norm="rms_norm", dual_attention_layers=(0,))
    mesh = make_mesh({"data": 2, "fsdp": 4})
    (_, params), (_, split) = load_mmdit(tmp_path), load_mmdit(tmp_path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split, params)
    places = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
    assert places(split) == places(shard_params(params, mesh, partition_rules(mesh, RULES)))
    kernel = split["blocks_0"]["attn"]["to_q"]["kernel"]
    assert 4 * kernel.addressable_shards[0].data.size == kernel.size


def test_diffusers_reads_what_we_write(tmp_path):
    module = MMDiT(**TINY, dual_attention_layers=(0,))
    inputs = _inputs(module, 6, 8)
    params = _random_params(module, inputs)
    save_mmdit(module, params, tmp_path)
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path).eval()
    expected = jax.jit(module.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(_velocity(model, *inputs), expected, atol=1e-4 * np.abs(expected).max())


def test_sharded_directory_equals_single_file(tmp_path):
    _reference(tmp_path / "one")
    _reference(tmp_path / "many", max_shard_size="30KB")
    assert not (tmp_path / "many" / WEIGHTS).exists()
    (_, one), (_, many) = load_mmdit(tmp_path / "one"), load_mmdit(tmp_path / "many")
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, many))
    next((tmp_path / "many").glob("*-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="00002"):
        load_mmdit(tmp_path / "many")


def _edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_wrong_tensors_are_named(tmp_path):
    _reference(tmp_path)
    file, name = tmp_path / WEIGHTS, "transformer_blocks.1.attn.to_q.weight"
    _edit(file, lambda tensors: tensors.update({name: np.zeros((24, 23), np.float32)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \(24, 23\); the config says \(24, 24\)"):
        load_mmdit(tmp_path)
    _edit(file, lambda tensors: tensors.update(stray=tensors.pop(name)))
    with pytest.raises(ValueError, match=rf"missing \['{name}'\], unexpected \['stray'\]"):
        load_mmdit(tmp_path)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_mmdit(tmp_path)
    _reference(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"guidance": True}, r"unknown keys \['guidance'\]"),
        ({"caption_projection_dim": 7}, "caption_projection_dim=7"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_mmdit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is corrupt"):
        load_mmdit(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load_mmdit(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_mmdit(tmp_path)


def test_save_refuses_foreign_params(tmp_path):
    module = MMDiT(**TINY)
    params = _random_params(module, _inputs(module))
    with pytest.raises(ValueError, match="norm_out/bias"):
        save_mmdit(module, params | {"norm_out": {"kernel": params["norm_out"]["kernel"]}}, tmp_path)


def test_remat_keeps_the_gradient_and_bfloat16_nearly_the_result():
    module = MMDiT(**TINY | {"num_layers": 1, "dual_attention_layers": (0,)})
    inputs = _inputs(module)
    params = _random_params(module, inputs)
    gradient = lambda m: jax.jit(jax.grad(lambda p: jnp.square(m.apply({"params": p}, *inputs)).sum()))(params)
    expected, actual = gradient(module), gradient(module.clone(remat=True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max()), actual, expected
    )
    exact, rough = (jax.jit(m.apply)({"params": params}, *inputs) for m in (module, module.clone(dtype=jnp.bfloat16)))
    assert rough.dtype == jnp.float32
    assert np.linalg.norm(rough - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "change, size, message",
    [
        ({}, (7, 8, 4), "7x8"),
        ({}, (8, 18, 4), "at most 16"),
        ({}, (8, 8, 3), "3 channels"),
        ({"qk_norm": "layer_norm"}, (8, 8, 4), "qk_norm='layer_norm'"),
    ],
)
def test_wrong_shapes_are_refused(change, size, message):
    module = MMDiT(**TINY | change)
    _, *rest = _inputs(module, 8, 8)
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.zeros((3, *size)), *rest)
