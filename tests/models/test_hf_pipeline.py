"""A whole diffusers pipeline of Stable Diffusion 3 against ours: the time grid, and pictures for the same noise."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.tree_util import Partial
from tiny_sd3 import make_pipeline

from opd_jax.config import ConfigError
from opd_jax.models import lora
from opd_jax.models.autoencoder import latents_to_images
from opd_jax.models.hf import load_autoencoder, load_mmdit, load_shift, save_lora, text_embeddings
from opd_jax.sampling import flow


@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_time_grid_is_that_of_the_directory(tmp_path, steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.save_pretrained(tmp_path)
    scheduler.set_timesteps(steps)
    times = flow.time_grid(steps, load_shift(tmp_path), double_shift=True)
    np.testing.assert_allclose(times, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)


def test_other_time_grids_are_refused(tmp_path):
    file = tmp_path / "scheduler_config.json"
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json"):
        load_shift(tmp_path)
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    file.write_text(json.dumps(own | {"_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000}))
    assert load_shift(tmp_path) == 3.0
    for change, message in [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"num_train_timesteps": 500}, "num_train_timesteps=500"),
        ({"shift_terminal": 0.1}, "shift_terminal=0.1"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"sharpness": 2}, r"unknown keys \['sharpness'\]"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
    ]:
        file.write_text(json.dumps(own | change))
        with pytest.raises(ConfigError, match=message):
            load_shift(tmp_path)


class Both:
    """Diffusers' pipeline, and ours from its directory alone: embeddings, guidance, the ODE's steps, the autoencoder.

    Each draws the same two pictures from the same noise.
    """

    def __init__(self, folder):
        self.prompts, self.length, self.guidance, self.steps = ["a red cat", "two blurred cats, blue."], 12, 4.5, 10
        self.peer = make_pipeline(folder / "sd3")
        self.noise = np.random.default_rng(0).standard_normal((2, 4, 6, 4)).astype(np.float32)
        settings = text_embeddings.Settings(self.length, dtype="float32")
        stored = text_embeddings.write(folder / "embeddings", folder / "sd3", self.prompts, settings)
        self.condition = jax.tree.map(jnp.asarray, stored.rows([0, 1]))
        self.transformer, self.params = load_mmdit(folder / "sd3" / "transformer")
        autoencoder, self.autoencoder_params = load_autoencoder(folder / "sd3" / "vae")
        times = flow.time_grid(self.steps, load_shift(folder / "sd3" / "scheduler"), double_shift=True)
        apply = self.transformer.apply
        velocity_fn = Partial(lambda params, x, t, c: apply({"params": params}, x, t, c.context, c.pooled))
        velocity_fn = flow.guided(velocity_fn, stored.null, self.guidance)

        @jax.jit
        def pictures(params, autoencoder_params, condition, noise):
            keys = jax.random.split(jax.random.key(0), len(noise))
            latents = flow.generate(velocity_fn, params, condition, keys, noise.shape[1:], times, x_init=noise)
            return latents_to_images(autoencoder, autoencoder_params, latents, micro_batches=2)

        self.pictures = pictures

    def ours(self, params):
        return self.pictures(params, self.autoencoder_params, self.condition, jnp.asarray(self.noise))

    def theirs(self):
        sizes = {"height": 16, "width": 24, "num_inference_steps": self.steps, "max_sequence_length": self.length}
        latents = torch.tensor(self.noise).permute(0, 3, 1, 2)
        return self.peer(self.prompts, guidance_scale=self.guidance, latents=latents, output_type="np", **sizes).images


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return Both(tmp_path_factory.mktemp("pipeline"))


def test_pictures_are_those_of_diffusers(both):
    expected = both.theirs()
    np.testing.assert_allclose(both.ours(both.params), expected, rtol=0, atol=1e-3)  # measured: 2e-6
    assert expected.std() > 0.05
    assert ((expected > 0) & (expected < 1)).mean() > 0.5


def test_the_whole_pipeline_wears_an_adapter_of_ours(both, tmp_path):
    """`load_lora_weights` of the directory, as its documentation says; pictures are of the merged parameters."""
    adapter = lora.init(jax.random.key(1), both.params, r"attn\d?/(to|add)_\w+/kernel$", 2)
    adapter = jax.tree.map(lambda factor: factor + 0.1, adapter)
    save_lora(both.transformer, adapter, 2.0, tmp_path / "lora")
    before = both.theirs()
    both.peer.load_lora_weights(tmp_path / "lora")
    try:
        worn = both.theirs()
    finally:
        both.peer.unload_lora_weights()
    np.testing.assert_allclose(both.ours(lora.merge(both.params, adapter, 2.0)), worn, rtol=0, atol=1e-3)
    assert np.abs(worn - before).mean() > 0.02 < worn.std()
    np.testing.assert_array_equal(both.theirs(), before)
