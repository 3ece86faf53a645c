"""Adapters in PEFT's and diffusers' files: both read ours and agree, and ours are read back."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from opd_jax.config import ConfigError
from opd_jax.models import lora
from opd_jax.models.hf import load_lora, load_mmdit, save_lora, save_mmdit
from opd_jax.models.hf.lora import DIFFUSERS, PEFT, PEFT_CONFIG
from opd_jax.models.mmdit import MMDiT

MODULE = MMDiT(
    patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_heads=2, head_dim=8, joint_attention_dim=12,
    pooled_projection_dim=6, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
)  # fmt: skip
PATTERN, SCALE = r"attn\d?/(to|add)_\w+/kernel$", 2.0  # also to_out, which is a list in torch


def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return normal(2, 8, 8, 4), jnp.array([0.3, 0.8]), normal(2, 5, 12), normal(2, 6)


@pytest.fixture(scope="module")
def backbone():
    rng, shapes = np.random.default_rng(1), jax.eval_shape(MODULE.init, jax.random.key(0), *inputs())["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def adapter(backbone):
    made = lora.init(jax.random.key(3), backbone, PATTERN, rank=3)
    return {
        path: pair | {"b": 0.3 * jax.random.normal(jax.random.key(4), pair["b"].shape)} for path, pair in made.items()
    }


def torch_velocity(model):
    latents, t, context, pooled = (torch.tensor(np.asarray(x)) for x in inputs())
    with torch.no_grad():
        out = model(latents.permute(0, 3, 1, 2), context, pooled, 1000 * t, return_dict=False)[0]
    return out.permute(0, 2, 3, 1).numpy()


def velocity(params):
    return jax.jit(MODULE.apply)({"params": params}, *inputs())


def same_update(one, other, scale):
    for path, pair in lora.delta(one).items():
        np.testing.assert_allclose(lora.delta(other)[path] * scale, pair * SCALE, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reader", ["peft", "diffusers"])
def test_others_read_what_we_write_and_agree(backbone, adapter, tmp_path, reader):
    save_mmdit(MODULE, backbone, tmp_path / "transformer")
    save_lora(MODULE, adapter, SCALE, tmp_path / "lora")
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    before = torch_velocity(model)
    if reader == "peft":
        model = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    else:
        model.load_lora_adapter(str(tmp_path / "lora"), weight_name=DIFFUSERS, prefix="transformer")
    expected = np.asarray(velocity(lora.merge(backbone, adapter, SCALE)))
    close = {"rtol": 0, "atol": 1e-4 * np.abs(expected).max()}
    np.testing.assert_allclose(torch_velocity(model), expected, **close)
    assert np.abs(expected - before).max() > 0.1 * np.abs(expected).max()


def test_both_files_come_back(adapter, tmp_path):
    save_lora(MODULE, adapter, SCALE, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_lora(tmp_path, MODULE, SCALE), adapter)
    same_update(adapter, load_lora(tmp_path, MODULE, 0.5), 0.5)
    (tmp_path / PEFT).unlink()
    same_update(adapter, load_lora(tmp_path, MODULE, SCALE), SCALE)


def test_what_peft_and_diffusers_write_is_read(backbone, adapter, tmp_path):
    """The layout of Flow-GRPO's published adapters: PEFT's, Gaussian start, alpha twice the rank."""
    save_mmdit(MODULE, backbone, tmp_path / "transformer")
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    targets = ["attn.add_k_proj", "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets)
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.copy_(0.2 * torch.randn_like(value))
    adapted.save_pretrained(tmp_path / "peft")
    own = velocity(lora.merge(backbone, load_lora(tmp_path / "peft", MODULE, SCALE), SCALE))
    expected = torch_velocity(adapted)
    np.testing.assert_allclose(own, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_what_diffusers_writes_is_read(backbone, adapter, tmp_path):
    save_mmdit(MODULE, backbone, tmp_path / "transformer")
    save_lora(MODULE, adapter, SCALE, tmp_path / "lora")
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    model.load_lora_adapter(str(tmp_path / "lora"), weight_name=DIFFUSERS, prefix="transformer")
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "again", peft.get_peft_model_state_dict(model, adapter_name="default_0")
    )
    same_update(adapter, load_lora(tmp_path / "again", MODULE, SCALE), SCALE)


def test_scales_of_files(adapter, tmp_path):
    save_lora(MODULE, adapter, SCALE, tmp_path)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | {"lora_alpha": 2 * 3**0.5, "use_rslora": True}))
    same_update(adapter, load_lora(tmp_path, MODULE, SCALE), SCALE)  # alpha / sqrt(r) = 2
    (tmp_path / PEFT).unlink()
    tensors = load_file(tmp_path / DIFFUSERS)
    alphas = {key.replace("lora_A.weight", "alpha"): np.float32(6) for key in tensors if "lora_A" in key}
    save_file(tensors | {key: np.asarray(value) for key, value in alphas.items()}, tmp_path / DIFFUSERS)
    same_update(adapter, load_lora(tmp_path, MODULE, 1.0), 0.5)  # twice what it was
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1.5, "transformer.r": 3})}
    save_file(tensors, tmp_path / DIFFUSERS, metadata=header)
    same_update(adapter, load_lora(tmp_path, MODULE, 1.0), 2.0)  # half


def test_files_for_another_model_are_refused(adapter, tmp_path):
    with pytest.raises(ConfigError, match="holds no adapter; give a directory with"):
        load_lora(tmp_path, MODULE, SCALE)
    save_lora(MODULE, adapter, SCALE, tmp_path)
    with pytest.raises(ConfigError, match=r"transformer_blocks\.0\.attn2\.\S+ belongs to no matrix of this model"):
        load_lora(tmp_path, MODULE.clone(dual_attention_layers=()), SCALE)
    with pytest.raises(ConfigError, match="has factors"):
        load_lora(tmp_path, MODULE.clone(num_heads=3), SCALE)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora"):
        load_lora(tmp_path, MODULE, SCALE)
    tensors = load_file(tmp_path / PEFT)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, tmp_path / PEFT)
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has only"):
        load_lora(tmp_path, MODULE, SCALE)


def test_what_no_file_could_hold_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="are no linear layers"):
        save_lora(MODULE, adapter | {"patch_embed/kernel": next(iter(adapter.values()))}, SCALE, tmp_path)
    path = next(iter(adapter))
    with pytest.raises(ValueError, match=r"ranks \[2, 3\]"):
        save_lora(MODULE, adapter | lora.truncate({path: adapter[path]}, 2), SCALE, tmp_path)


def test_a_directory_has_one_model_and_its_adapter(backbone, adapter, tmp_path):
    save_mmdit(MODULE, backbone, tmp_path)
    save_lora(MODULE, adapter, SCALE, tmp_path)
    module, params = load_mmdit(tmp_path)
    assert np.isfinite(velocity(lora.merge(params, load_lora(tmp_path, module, SCALE), SCALE))).all()
