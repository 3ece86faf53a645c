"""A plain vision transformer (Dosovitskiy et al., arXiv 2010.11929): images of one size to features of their patches.

By configuration a small tower of one's own, or one of the two that OpenVLA's features come from: `DINOV2_LARGE`, with
a class token, registers (Darcet et al., arXiv 2309.16588) and a learned scale of each residual, and `SIGLIP_SO400M`,
with none of them. Features are those of an inner block, without a final norm, as Prismatic takes them (Karamcheti et
al., arXiv 2402.07865): the class token and the registers are seen by the patches, and left out at the end.

Names follow timm's. As in `decoder`, the blocks are one scanned block, its parameters stacked along a leading axis, and
tokens are flat inside, `[B*T, width]`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt8

from opd_jax.models.decoder import NORMAL
from opd_jax.models.remat import block_of
from opd_jax.sharding import over_records

# Like `decoder.RULES`: kernels that widen split their output over `tensor`, those that narrow their input.
RULES = (
    (r"blocks/(attn/qkv|mlp/fc1)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/(attn/proj|mlp/fc2)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/(attn/qkv|mlp/fc1)/bias$", PartitionSpec(None, "tensor")),
)


class ViT(nn.Module):
    """`module.apply({"params": params}, images) -> features`, images as bytes: the tower normalises them itself.

    Only the blocks up to `feature_layer` exist, with their parameters: of `num_layers=24` and `feature_layer=-2`, 23.
    Parameters are float32 (or as loaded), `dtype` is that of matrix products and of the features; norms and softmax are
    float32.

    Raises: ValueError where images have another size than `image_size`, which patches do not divide, the width does
    not divide into heads, or there is no such layer.
    """

    width: int
    mlp_width: int
    num_layers: int  # of the whole tower
    num_heads: int
    patch_size: int
    image_size: int  # height and width
    feature_layer: int = -2  # which block's output, from the end: -1 is the last block's
    class_token: bool = False
    num_registers: int = 0
    layer_scale: bool = False  # a learned factor, at first 1e-5, on what a block adds to each feature
    approximate_gelu: bool = False  # by tanh
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of the channels, of values from 0 to 1
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32
    remat: bool | str = ""  # what blocks keep for the backward pass (`models.remat`); "": everything

    @property
    def num_patches(self) -> int:
        """N, of an image."""
        return (self.image_size // self.patch_size) ** 2

    @nn.compact
    def __call__(self, images: UInt8[Array, "B height width 3"]) -> Float[Array, "B N D"]:
        """Features of the patches, row by row, in `dtype`."""
        _check(self, images)
        batch, patch_dim = len(images), 3 * self.patch_size**2
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=NORMAL)
        norm = functools.partial(nn.LayerNorm, epsilon=self.norm_epsilon, dtype=self.dtype, use_fast_variance=False)
        x = dense(self.width, name="patch_embed")(self._patches(images).reshape(-1, patch_dim))
        places = self.param("pos_embed", NORMAL, (1, self.num_patches, self.width))
        x = x.reshape(batch, -1, self.width) + places.astype(self.dtype)
        prefix = [self.param("cls_token", NORMAL, (1, 1, self.width))] if self.class_token else []
        if self.num_registers:
            prefix.append(self.param("reg_token", NORMAL, (1, self.num_registers, self.width)))
        prefix = [jnp.broadcast_to(token, (batch, *token.shape[1:])).astype(self.dtype) for token in prefix]
        x = jnp.concatenate([*prefix, x], axis=1)

        block = block_of(_Block, self.remat, prevent_cse=False, static_argnums=(2,))
        scan = {"variable_axes": {"params": 0, "lora": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        blocks = nn.scan(block, length=self.num_layers + 1 + self.feature_layer, **scan)
        sizes = self.mlp_width, self.num_heads, self.layer_scale, self.approximate_gelu
        flat, _ = blocks(*sizes, dense, norm, name="blocks")(x.reshape(-1, self.width), batch)
        return flat.reshape(x.shape)[:, -self.num_patches :]

    def _patches(self, images: UInt8[Array, "B height width 3"]) -> Float[Array, "B N patch_dim"]:
        """Normalised; within a patch by row, column and channel."""
        mean, std = (jnp.asarray(value, jnp.float32)[None, None, None] for value in (self.mean, self.std))
        x = (images.astype(jnp.float32) / 255 - mean) / std
        p, side = self.patch_size, self.image_size // self.patch_size
        return x.reshape(-1, side, p, side, p, 3).swapaxes(2, 3).reshape(len(images), side**2, -1)


# As timm's vit_large_patch14_reg4_dinov2 and vit_so400m_patch14_siglip_224, at the 224 pixels that OpenVLA gives both.
# timm's gelu of the latter is exact, while transformers' SiglipVisionModel has the approximate one.
DINOV2_LARGE = ViT(
    width=1024,
    mlp_width=4096,
    num_layers=24,
    num_heads=16,
    patch_size=14,
    image_size=224,
    class_token=True,
    num_registers=4,
    layer_scale=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
SIGLIP_SO400M = ViT(width=1152, mlp_width=4304, num_layers=27, num_heads=16, patch_size=14, image_size=224)


class _Block(nn.Module):
    mlp_width: int
    num_heads: int
    layer_scale: bool
    approximate_gelu: bool
    dense: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N W"], records: int):
        x = over_records(x, records)
        attention = _Attention(self.num_heads, self.dense, name="attn")
        x += self._scaled(attention(self.norm(name="norm1")(x), records), "ls1")
        mlp = _Mlp(self.mlp_width, self.approximate_gelu, self.dense, name="mlp")
        x += self._scaled(mlp(self.norm(name="norm2")(x)), "ls2")
        return x, None

    def _scaled(self, x: Float[Array, "N W"], name: str) -> Float[Array, "N W"]:
        if not self.layer_scale:
            return x
        return x * self.param(name, nn.initializers.constant(1e-5), x.shape[-1:])[None].astype(x.dtype)


class _Attention(nn.Module):
    num_heads: int
    dense: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N W"], records: int) -> Float[Array, "N W"]:
        width = x.shape[-1]
        qkv = self.dense(3 * width, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(records, -1, 3 * self.num_heads, width // self.num_heads), 3, axis=2)
        return self.dense(width, name="proj")(jax.nn.dot_product_attention(q, k, v).reshape(-1, width))


class _Mlp(nn.Module):
    width: int
    approximate_gelu: bool
    dense: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N W"]) -> Float[Array, "N W"]:
        hidden = nn.gelu(self.dense(self.width, name="fc1")(x), approximate=self.approximate_gelu)
        return self.dense(x.shape[-1], name="fc2")(hidden)


def _check(module: ViT, images: Array) -> None:
    if images.shape[1:3] != (module.image_size, module.image_size):
        height, width = images.shape[1:3]
        raise ValueError(
            f"images are {height}x{width}, the tower is for {module.image_size}x{module.image_size}; resize"
        )
    if module.image_size % module.patch_size:
        raise ValueError(f"image_size={module.image_size} is no multiple of patch_size={module.patch_size}; make it")
    if module.width % module.num_heads:
        raise ValueError(f"width={module.width} is no multiple of num_heads={module.num_heads}; make it")
    if not -module.num_layers <= module.feature_layer <= -1:
        raise ValueError(f"feature_layer={module.feature_layer}; give -1, the last, to -{module.num_layers}")
