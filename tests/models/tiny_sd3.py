"""A small random Stable Diffusion 3 pipeline with all its parts, tokenizers included, in a diffusers directory."""

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers

WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_pipeline(directory, t5=True, seed=0):
    """Saves it, and returns diffusers' own; without T5, `text_encoder_3` is null, as for a pipeline loaded without."""
    torch.manual_seed(seed)
    tokenizers = clip_tokenizer(), clip_tokenizer(pad_token="!")
    clip = [
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=24, projection_dim=projection,
                num_hidden_layers=3, num_attention_heads=2, hidden_act=activation, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )
        for tokenizer, width, projection, activation in zip(tokenizers, (12, 16), (12, 8), ("quick_gelu", "gelu"))
    ]  # fmt: skip
    t5_config = transformers.T5Config(
        vocab_size=256, d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=3,
        attention_head_dim=8, joint_attention_dim=40, caption_projection_dim=24, pooled_projection_dim=20,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=perturbed(transformer, 0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_autoencoder(layers_per_block=1),
        text_encoder=perturbed(clip[0], 0.1),
        tokenizer=tokenizers[0],
        text_encoder_2=perturbed(clip[1], 0.1),
        tokenizer_2=tokenizers[1],
        text_encoder_3=transformers.T5EncoderModel(t5_config).eval() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(directory)
    return pipeline


def make_autoencoder(widths=(8, 16, 16), **config):
    """Diffusers' own: SD3.5's but for the sizes, where `config` says nothing else."""
    config = {
        "block_out_channels": widths, "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 4,
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    } | config  # fmt: skip
    return perturbed(diffusers.AutoencoderKL(**config), 0.05)


def perturbed(model, size):
    """With noise on every parameter: what starts at 0 or 1 must not hide a mistake."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(size * torch.randn_like(value))
    return model.eval()


def clip_tokenizer(**special):
    """Of bytes, at the end of a word or not, and a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("c", "a"), ("ca", "t</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocabulary, merges, model_max_length=77, **special)


def t5_tokenizer():
    """Unigrams: letters, and a few words."""
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁a", -2.0), ("▁red", -4.0), ("▁cat", -4.0)]
    return transformers.T5TokenizerFast([*pieces, *letters], model_max_length=512)
