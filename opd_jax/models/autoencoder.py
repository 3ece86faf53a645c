# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of Stable Diffusion 3 and 3.5: images to latents and back (arXiv:2112.10752, 2403.03206).

The transformer sees latents that are shifted and scaled to mean 0 and deviation 1 over the training images, and the
module does not: `encode` and `decode` are those of diffusers' `AutoencoderKL`. `images_to_latents` and
`latents_to_images` join the two, for batches whose activations together would not fit. Parameter names follow
diffusers', a number after an underscore in the place of a list's.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from opd_jax.optim import in_parts

Features = Float[Array, "B H W D"]
PAD_ONE = ((1, 1), (1, 1))
PAD_AFTER = ((0, 1), (0, 1))  # of the convolution that halves the sides: below and to the right alone


class Moments(NamedTuple):
    """The Gaussian of each latent element that an image is encoded to."""

    mean: Float[Array, "B h w c"]
    log_variance: Float[Array, "B h w c"]  # between -30 and 20


class Autoencoder(nn.Module):
    """The defaults are those of SD3.5. Weights come from `opd_jax.models.hf.load_autoencoder`.

    `module.apply({"params": params}, images, method="encode") -> Moments`, and `method="decode"` with latents, neither
    shifted nor scaled. Images are in [-1, 1] and a side is `downscale` (8) times that of a latent.
    Parameters are float32 (or as loaded); `dtype` is that of the convolutions and products, with norms and softmax in
    float32. Results have the dtype of the argument. The published weights overflow in float16, not in bfloat16.

    Raises: ValueError where sides do not divide by `downscale`, channels are others, or widths do not divide into
    `norm_groups`.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_channels: tuple[int, ...] = (128, 256, 512, 512)  # each but the last halves the sides
    layers_per_block: int = 2
    norm_groups: int = 32
    mid_attention: bool = True
    use_quant_conv: bool = False  # a 1x1 convolution after the encoder; SD3 and SD3.5 have neither
    use_post_quant_conv: bool = False  # and before the decoder
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609
    dtype: Any = jnp.float32

    @property
    def downscale(self) -> int:
        """Pixels of an image along the side of a latent's."""
        return 2 ** (len(self.block_channels) - 1)

    def setup(self):
        if odd := [width for width in self.block_channels if width % self.norm_groups]:
            raise ValueError(f"widths {odd} do not divide into norm_groups={self.norm_groups}; choose multiples of it")
        sizes = self.block_channels, self.layers_per_block, self.norm_groups, self.mid_attention, self.dtype
        self.encoder, self.decoder = _Encoder(2 * self.latent_channels, *sizes), _Decoder(self.out_channels, *sizes)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B H W Cout"]:
        """The image that the mean of the latent stands for."""
        return self.decode(self.encode(images).mean)

    def encode(self, images: Float[Array, "B H W C"]) -> Moments:
        """The latents' Gaussians."""
        height, width, channels = images.shape[1:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"images are {height}x{width}; give sides that are multiples of {self.downscale}")
        if channels != self.in_channels:
            raise ValueError(f"images have {channels} channels, not in_channels={self.in_channels}; are they NHWC?")
        out = self.encoder(images.astype(self.dtype))
        out = self.quant_conv(out) if self.use_quant_conv else out
        mean, log_variance = jnp.split(out.astype(images.dtype), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """The images, about in [-1, 1]; not clipped."""
        if latents.shape[-1] != self.latent_channels:
            found, own = latents.shape[-1], self.latent_channels
            raise ValueError(f"latents have {found} channels, not latent_channels={own}; are they NHWC?")
        x = latents.astype(self.dtype)
        return self.decoder(self.post_quant_conv(x) if self.use_post_quant_conv else x).astype(latents.dtype)


def images_to_latents(
    module: Autoencoder,
    params: Any,
    images: Float[Array, "B H W C"],
    keys: Key[Array, "B"] | None = None,
    micro_batches: int = 1,
) -> Float[Array, "B h w c"]:
    """Latents as a flow model is trained on: drawn from their Gaussians where there are `keys`, shifted and scaled.

    Args:
        images: in [0, 1].
        keys: one per record, for the draw; None: the means.
        micro_batches: parts that the batch is encoded in, one after the other, to bound memory.

    Raises:
        ValueError: the batch does not divide into `micro_batches`; and as `Autoencoder`.
    """
    mean, log_variance = _in_parts(module, params, 2 * images - 1, "encode", micro_batches)
    if keys is not None:
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
        mean += jnp.exp(0.5 * log_variance) * noise
    return (mean - module.shift_factor) * module.scaling_factor


def latents_to_images(
    module: Autoencoder, params: Any, latents: Float[Array, "B h w c"], micro_batches: int = 1
) -> Float[Array, "B H W C"]:
    """Images in [0, 1] of a flow model's latents, clipped: what a diffusers pipeline returns as `output_type="np"`.

    Args:
        latents: shifted and scaled, as a flow model makes them.
        micro_batches: parts that the batch is decoded in, one after the other, to bound memory. At 512 px every image
            of a part takes 0.9 GiB of temporaries in float32, as compiled for CPUs.

    Raises:
        ValueError: the batch does not divide into `micro_batches`; other channels.
    """
    latents = latents / module.scaling_factor + module.shift_factor
    return jnp.clip(0.5 * _in_parts(module, params, latents, "decode", micro_batches) + 0.5, 0.0, 1.0)


def _in_parts(module: Autoencoder, params: Any, x: Array, method: str, parts: int) -> Any:
    return in_parts(lambda part: module.apply({"params": params}, part, method=method), x, parts)


class _Encoder(nn.Module):
    out_channels: int
    block_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    mid_attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "B h w Dout"]:
        x = _conv(self, self.block_channels[0], "conv_in")(x)
        for i, width in enumerate(self.block_channels):
            down = i < len(self.block_channels) - 1
            x = _Block(width, self.layers_per_block, self.groups, self.dtype, down=down, name=f"down_blocks_{i}")(x)
        x = _MidBlock(self.groups, self.mid_attention, self.dtype, name="mid_block")(x)
        return _conv(self, self.out_channels, "conv_out")(nn.silu(_norm(self, "conv_norm_out")(x)))


class _Decoder(nn.Module):
    out_channels: int
    block_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    mid_attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "B h w Dout"]:
        x = _conv(self, self.block_channels[-1], "conv_in")(x)
        x = _MidBlock(self.groups, self.mid_attention, self.dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(self.block_channels)):
            up, layers = i < len(self.block_channels) - 1, self.layers_per_block + 1
            x = _Block(width, layers, self.groups, self.dtype, up=up, name=f"up_blocks_{i}")(x)
        return _conv(self, self.out_channels, "conv_out")(nn.silu(_norm(self, "conv_norm_out")(x)))


class _Block(nn.Module):
    """Residual blocks of one width, then half or twice the sides."""

    width: int
    layers: int
    groups: int
    dtype: Any
    down: bool = False
    up: bool = False

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "B h w Dout"]:
        for i in range(self.layers):
            x = _Residual(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.down:
            x = _Downsample(self.dtype, name="downsamplers_0")(x)
        if self.up:
            x = _Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class _MidBlock(nn.Module):
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        width = x.shape[-1]
        x = _Residual(width, self.groups, self.dtype, name="resnets_0")(x)
        if self.attention:
            x = _Attention(self.groups, self.dtype, name="attentions_0")(x)
        return _Residual(width, self.groups, self.dtype, name="resnets_1")(x)


class _Residual(nn.Module):
    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "B H W Dout"]:
        hidden = _conv(self, self.width, "conv1")(nn.silu(_norm(self, "norm1")(x)))
        hidden = _conv(self, self.width, "conv2")(nn.silu(_norm(self, "norm2")(hidden)))
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + hidden


class _Downsample(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "B H//2 W//2 D"]:
        return nn.Conv(x.shape[-1], (3, 3), 2, padding=PAD_AFTER, dtype=self.dtype, name="conv")(x)


class _Upsample(nn.Module):
    """Every pixel becomes four, which are then convolved."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "B 2*H 2*W D"]:
        return _conv(self, x.shape[-1], "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class _Attention(nn.Module):
    """One head over all positions; softmax in float32."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Features) -> Features:
        dense = lambda name: nn.Dense(x.shape[-1], dtype=self.dtype, name=name)
        flat = _norm(self, "group_norm")(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (dense(f"to_{n}")(flat) for n in "qkv")
        logits = (q @ k.swapaxes(1, 2)).astype(jnp.float32) * x.shape[-1] ** -0.5
        return x + dense("to_out_0")(jax.nn.softmax(logits).astype(v.dtype) @ v).reshape(x.shape)


def _conv(module: nn.Module, width: int, name: str) -> nn.Conv:
    return nn.Conv(width, (3, 3), padding=PAD_ONE, dtype=module.dtype, name=name)


def _norm(module: nn.Module, name: str) -> nn.GroupNorm:
    """Not by the fast variance, `E[x^2] - E[x]^2`, which loses digits where a group's mean is large."""
    return nn.GroupNorm(module.groups, epsilon=1e-6, use_fast_variance=False, dtype=module.dtype, name=name)
