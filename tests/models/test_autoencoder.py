"""Autoencoder against diffusers' AutoencoderKL, its micro-batches, draws and errors, the round trip of its files."""

import functools
import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tiny_sd3 import WEIGHTS, make_autoencoder

from opd_jax.config import ConfigError
from opd_jax.cost import memory_of
from opd_jax.models.autoencoder import Autoencoder, images_to_latents, latents_to_images
from opd_jax.models.hf import load_autoencoder, save_autoencoder

SMALL = {"widths": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
TINY = Autoencoder(latent_channels=4, block_channels=(4, 8), layers_per_block=1, norm_groups=2)


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _params(module, seed=1):
    rng, image = np.random.default_rng(seed), jnp.zeros((1, module.downscale, module.downscale, module.in_channels))
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)


def _apply(module, params, x, method):
    return jax.jit(lambda p, x: module.apply({"params": p}, x, method=method))(params, x)


def _torch(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def _nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def _same_as_diffusers(module, params, model, images):
    with torch.no_grad():
        expected = model.encode(_torch(images)).latent_dist
        decoded = _nhwc(model.decode(expected.mean).sample)
    latents = jnp.asarray(_nhwc(expected.mean))
    run = lambda p, x, z: (module.apply(p, x, method="encode"), module.apply(p, z, method="decode"))
    moments, images = jax.jit(run)({"params": params}, images, latents)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    close(moments.mean, latents)
    close(moments.log_variance, _nhwc(expected.logvar))
    close(images, decoded)
    assert np.ptp(decoded) > 0.1
    assert np.ptp(latents) > 0.1


@pytest.mark.parametrize(
    "config, size",
    [
        ({"widths": (4, 8)}, (8, 4)),
        ({"widths": (8, 12), "layers_per_block": 1, "use_quant_conv": True, "use_post_quant_conv": True}, (6, 10)),
        ({"widths": (4, 4, 8), "layers_per_block": 1, "mid_block_add_attention": False, "in_channels": 1}, (8, 12)),
        ({"widths": (8,), "layers_per_block": 1, "latent_channels": 3, "shift_factor": None}, (5, 7)),
    ],
)
def test_images_and_latents_are_those_of_diffusers(tmp_path, config, size):
    torch.manual_seed(0)
    model = make_autoencoder(**config)
    model.save_pretrained(tmp_path)
    module, params = load_autoencoder(tmp_path)
    _same_as_diffusers(module, params, model, _normal(2, *size, module.in_channels))


def test_defaults_are_sd35_and_its_tensors_those_of_diffusers():
    """The `vae/config.json` of Stable Diffusion 3.5; no parameter is made."""
    config = {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "act_fn": "silu",
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "sample_size": 1024, "force_upcast": True, "mid_block_add_attention": True, "latents_mean": None,
    }  # fmt: skip
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**config)
    shapes = jax.eval_shape(Autoencoder().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    own = sorted(int(np.prod(leaf.shape)) for leaf in flatten_dict(shapes).values())
    assert own == sorted(value.numel() for value in model.parameters())
    assert sum(own) == 83_819_683


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_round_trip_is_exact(tmp_path, dtype):
    make_autoencoder(**SMALL, use_quant_conv=True).save_pretrained(tmp_path / "a")
    tensors = {name: value.astype(dtype) for name, value in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    module, params = load_autoencoder(tmp_path / "a")
    save_autoencoder(module, params, tmp_path / "b")
    again, params_again = load_autoencoder(tmp_path / "b")
    assert again == module
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), params, params_again)
    )
    written = load_file(tmp_path / "b" / WEIGHTS)
    assert written.keys() == tensors.keys()
    assert all(written[n].dtype == v.dtype and written[n].tobytes() == v.tobytes() for n, v in tensors.items())


def test_diffusers_reads_what_we_write(tmp_path):
    module = TINY.clone(use_quant_conv=True, shift_factor=0.3)
    params = _params(module)
    save_autoencoder(module, params, tmp_path)
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
    assert (model.config.shift_factor, model.config.scaling_factor) == (0.3, 1.5305)
    _same_as_diffusers(module, params, model, _normal(1, 6, 4, 3))


def test_latents_and_images_of_a_flow_model():
    """Shifted and scaled there and back as by a diffusers pipeline; a record's draw is its own key's."""
    params, keys = _params(TINY), jax.random.split(jax.random.key(3), 4)
    params["decoder"]["conv_out"]["kernel"] *= 4  # so that some pixels are clipped
    images, latents = 0.5 + 0.2 * _normal(4, 8, 8, 3), _normal(4, 2, 2, 4)

    @jax.jit
    def run(images, keys):
        moments, raw = (
            TINY.apply({"params": params}, x, method=m) for x, m in ((2 * images - 1, "encode"), (latents, "decode"))
        )
        drawn = images_to_latents(TINY, params, images, keys, micro_batches=2)
        scaled = (latents - 0.0609) * 1.5305
        normal = jax.vmap(lambda key: jax.random.normal(key, moments.mean.shape[1:]))(keys)
        own = images_to_latents(TINY, params, images), drawn, latents_to_images(TINY, params, scaled)
        drawn = moments.mean + jnp.exp(moments.log_variance / 2) * normal
        return own, ((moments.mean - 0.0609) * 1.5305, (drawn - 0.0609) * 1.5305, jnp.clip(raw / 2 + 0.5, 0, 1))

    own, expected = run(images, keys)
    for one, other in zip(own, expected):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.abs(own[1] - own[0]).min(axis=(1, 2, 3)).max() > 0
    assert 0 < (own[2] == 0).mean() < 0.5
    assert 0 < (own[2] == 1).mean() < 0.5
    turned, _ = run(images[::-1], keys[::-1])
    np.testing.assert_allclose(turned[1], own[1][::-1], atol=1e-5)


def test_micro_batches_keep_the_result_and_the_sharding_and_save_memory():
    params, latents = _params(TINY), _normal(6, 16, 16, 4)
    decode = lambda parts: jax.jit(lambda p, x: latents_to_images(TINY, p, x, parts)).lower(params, latents).compile()
    whole, parts = decode(1), decode(3)
    np.testing.assert_allclose(parts(params, latents), whole(params, latents), atol=1e-5)
    assert memory_of(parts).temporary < 0.6 * memory_of(whole).temporary
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.device_put(latents, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    on_two = jax.jit(lambda p, x: latents_to_images(TINY, p, x, 3)).lower(params, split).compile()
    np.testing.assert_allclose(on_two(params, split), whole(*jax.device_get((params, latents))), atol=1e-5)
    assert not re.search("all-(gather|reduce|to-all)|collective-permute", on_two.as_text())
    with pytest.raises(ValueError, match="6 records do not divide into 4 parts"):
        latents_to_images(TINY, params, latents, micro_batches=4)


def test_bfloat16_is_nearly_the_result():
    params, latents = _params(TINY), _normal(1, 4, 4, 4)
    exact, rough = (_apply(m, params, latents, "decode") for m in (TINY, TINY.clone(dtype=jnp.bfloat16)))
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "change, shape, method, message",
    [
        ({}, (1, 7, 8, 3), "encode", "images are 7x8; give sides that are multiples of 2"),
        ({}, (1, 8, 8, 4), "encode", "images have 4 channels, not in_channels=3"),
        ({}, (1, 8, 8, 3), "decode", "latents have 3 channels, not latent_channels=4"),
        ({"norm_groups": 8}, (1, 8, 8, 3), "encode", r"widths \[4\] do not divide into norm_groups=8"),
    ],
)
def test_wrong_shapes_are_refused(change, shape, method, message):
    with pytest.raises(ValueError, match=message):
        TINY.clone(**change).apply({"params": {}}, jnp.zeros(shape), method=method)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_autoencoder(tmp_path)
    make_autoencoder(**SMALL).save_pretrained(tmp_path)
    config, name = json.loads((tmp_path / "config.json").read_text()), "decoder.mid_block.attentions.0.to_q.weight"
    for change, message in [
        ({"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        ({"spatial": 3}, r"unknown keys \['spatial'\]"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"latents_mean": [0.0]}, r"latents_mean=\[0.0\]"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "up_block_types=.*only 2 of 'UpDecoderBlock2D'"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types="),
        ({"use_quant_conv": True}, r"missing \['quant_conv.bias', 'quant_conv.weight'\], unexpected \[\]"),
        ({"layers_per_block": 2}, r"missing .*resnets\.2"),
        ({"latent_channels": 5}, r"decoder.conv_in.weight has shape \(8, 4, 3, 3\); the config says \(8, 5, 3, 3\)"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=message):
            load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {"stray": tensors.pop(name)}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=rf"missing \['{name}'\], unexpected \['stray'\]"):
        load_autoencoder(tmp_path)


def test_save_refuses_foreign_params(tmp_path):
    params = _params(TINY)
    with pytest.raises(ValueError, match="decoder/conv_in/bias"):
        save_autoencoder(TINY, params | {"decoder": params["encoder"]}, tmp_path)
