"""The vision tower of Qwen3-VL: patches of images of any sizes to tokens in the width of a language model.

Patches are embedded, placed on a learned grid that is stretched to the image, and go through pre-norm blocks of full
attention with rotary positions in two dimensions. Then `merge_size * merge_size` of them become one token; and so do
the states after some inner blocks (DeepStack, arXiv 2406.04334), each by a merger of its own.

Names follow transformers'. As in `decoder`, the blocks are one scanned block, its parameters stacked along a leading
axis, and so are the mergers of DeepStack; patches are flat inside, `[images * patches, width]`.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from opd_jax.models.decoder import NORMAL
from opd_jax.models.remat import block_of
from opd_jax.models.rope import Rope, rotate
from opd_jax.sharding import over_records

# Like `decoder.RULES`: kernels that widen split their output over `tensor`, those that narrow their input.
RULES = (
    (r"blocks/(attn/qkv|mlp/linear_fc1)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/(attn/proj|mlp/linear_fc2)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"deepstack_merger_list/linear_fc1/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"deepstack_merger_list/linear_fc2/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"merger/linear_fc1/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"merger/linear_fc2/kernel$", PartitionSpec("tensor", "fsdp")),
)


class Vision(NamedTuple):
    """The sizes of a tower."""

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    patch_size: int = 16
    merge_size: int = 2  # a token is this many patches high and wide
    temporal_patch_size: int = 2  # frames of a video in a patch; a still image is repeated
    in_channels: int = 3
    num_positions: int = 2304  # of the learned grid, a square
    deepstack: tuple[int, ...] = (8, 16, 24)  # blocks, from 0, whose states go to the first layers of the decoder
    rope_theta: float = 10_000.0

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


class VisionTower(nn.Module):
    """`module.apply({"params": params}, patches, grid) -> tokens`: images do not see each other, nor their padding.

    | case | result |
    | --- | --- |
    | patches beyond `rows * columns` | are not seen, whatever finite values they have; their tokens mean nothing |
    | a grid of 0, 0 | no image; finite tokens that mean nothing |

    Raises: ValueError where the width does not divide into heads whose dimension divides by 4, the learned grid is no
    square, or `deepstack` is not an increasing choice of blocks.
    """

    config: Vision
    out_width: int  # of the language model
    dtype: Any = jnp.float32
    remat: bool | str = ""

    @nn.compact
    def __call__(
        self, patches: Float[Array, "I P patch_dim"], grid: Int[Array, "I 2"]
    ) -> Float[Array, "outputs I tokens D"]:
        """The tokens of every image, then those of each DeepStack block: `outputs = 1 + len(deepstack)`.

        Args:
          patches: in the order of `images.image_patches`, padded to the same number.
          grid: rows and columns of an image's patches, multiples of `merge_size`.
        """
        config, (images, count, _) = self.config, patches.shape
        _check(config)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=NORMAL)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype, use_fast_variance=False)
        place = patch_places(grid, count, config.merge_size)

        x = dense(config.width, name="patch_embed")(patches.reshape(images * count, -1))
        embed = nn.Embed(config.num_positions, config.width, embedding_init=NORMAL, name="pos_embed")
        x += _stretched(embed.embedding, grid, place).astype(self.dtype)

        block = block_of(_Block, self.remat, prevent_cse=False)
        scan = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        blocks = nn.scan(block, length=config.num_layers, **scan)(config, dense, norm, name="blocks")
        x, inner = blocks(x, _context(config, grid, place))

        merge = functools.partial(_Merger, config.merge_size**2, self.out_width, dense, norm)
        tokens = merge(norm_merged=False, name="merger")(x)[None]
        if config.deepstack:
            each = nn.vmap(_Merger, variable_axes={"params": 0}, split_rngs={"params": True})
            merge = functools.partial(each, config.merge_size**2, self.out_width, dense, norm)
            chosen = inner[jnp.asarray(config.deepstack)]
            tokens = jnp.concatenate([tokens, merge(norm_merged=True, name="deepstack_merger_list")(chosen)])
        return tokens.reshape(len(tokens), images, -1, self.out_width)


def patch_places(grid: Int[Array, "I 2"], count: int, merge: int) -> Int[Array, "I count 2"]:
    """Row and column of patch p of every image: tokens by rows, within a token patches by rows. Beyond, no meaning."""
    p = jnp.arange(count)[None]
    token, inner = p // merge**2, p % merge**2
    tokens_wide = jnp.maximum(grid[:, 1:] // merge, 1)
    row = token // tokens_wide * merge + inner // merge
    column = token % tokens_wide * merge + inner % merge
    return jnp.stack([row, column], axis=-1)


class _Context(NamedTuple):
    """What every block attends by."""

    cos: Float[Array, "I P half"]
    sin: Float[Array, "I P half"]
    mask: Bool[Array, "I 1 1 P"]  # True is a patch of the image


def _context(config: Vision, grid: Array, place: Array) -> _Context:
    """Half of a head's pairs turn by a patch's row, half by its column."""
    frequencies, _ = Rope(config.rope_theta).frequencies(config.width // config.num_heads // 2)
    angles = (place[..., None] * frequencies[None, None, None]).reshape(*place.shape[:2], -1)
    mask = jnp.arange(place.shape[1])[None] < grid.prod(axis=1)[:, None]
    return _Context(jnp.cos(angles), jnp.sin(angles), mask[:, None, None])


def _stretched(table: Float[Array, "positions W"], grid: Array, place: Array) -> Float[Array, "N W"]:
    """The learned square grid at every patch, bilinear, corners on corners.

    As a matrix product, whose gradient needs no scatter: the weight of a grid point falls linearly to 0 at the next.
    """
    side = math.isqrt(table.shape[0])
    at = place * (side - 1) / jnp.maximum(grid[:, None] - 1, 1)
    near = jnp.maximum(0.0, 1.0 - jnp.abs(at[..., None] - jnp.arange(side)[None, None, None]))
    weights = near[:, :, 0, :, None] * near[:, :, 1, None]
    return weights.reshape(-1, side**2) @ table.astype(jnp.float32)


class _Block(nn.Module):
    config: Vision
    dense: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N W"], context: _Context):
        x = over_records(x, context.cos.shape[0])
        x += _Attention(self.config.num_heads, self.dense, name="attn")(self.norm(name="norm1")(x), context)
        x += _Mlp(self.config.mlp_width, self.dense, name="mlp")(self.norm(name="norm2")(x))
        return x, x if self.config.deepstack else None


class _Attention(nn.Module):
    num_heads: int
    dense: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N W"], context: _Context) -> Float[Array, "N W"]:
        width = x.shape[-1]
        qkv = self.dense(3 * width, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(*context.cos.shape[:2], 3 * self.num_heads, -1), 3, axis=2)
        q, k = (rotate(heads, context.cos, context.sin) for heads in (q, k))
        out = jax.nn.dot_product_attention(q, k, v, mask=context.mask)
        return self.dense(width, name="proj")(out.reshape(-1, width))


class _Mlp(nn.Module):
    width: int
    dense: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N W"]) -> Float[Array, "N W"]:
        hidden = nn.gelu(self.dense(self.width, name="linear_fc1")(x), approximate=True)
        return self.dense(x.shape[-1], name="linear_fc2")(hidden)


class _Merger(nn.Module):
    """`unit` patches that follow each other, side by side, to one token."""

    unit: int
    out_width: int
    dense: Any
    norm: Any
    norm_merged: bool  # norm of the patches together, or of each

    @nn.compact
    def __call__(self, x: Float[Array, "N W"]) -> Float[Array, "tokens D"]:
        width = self.unit * x.shape[-1]
        norm = self.norm(name="norm")
        x = norm(x.reshape(-1, width)) if self.norm_merged else norm(x).reshape(-1, width)
        x = nn.gelu(self.dense(width, name="linear_fc1")(x), approximate=False)
        return self.dense(self.out_width, name="linear_fc2")(x)


def _check(config: Vision) -> None:
    if config.width % (4 * config.num_heads):
        raise ValueError(f"width={config.width} does not make {config.num_heads} heads of a multiple of 4; change one")
    if math.isqrt(config.num_positions) ** 2 != config.num_positions:
        raise ValueError(f"num_positions={config.num_positions} is no square; the learned grid needs one")
    if list(config.deepstack) != sorted({layer for layer in config.deepstack if 0 <= layer < config.num_layers}):
        raise ValueError(f"deepstack={config.deepstack}: give increasing blocks of 0 to {config.num_layers - 1}")
