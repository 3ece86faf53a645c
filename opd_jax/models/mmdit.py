"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206, figure 2).

One module, whether 0.5 M parameters on a laptop or 2.5 B: image and text tokens have their own weights and meet in one
joint attention; every block is modulated by the time and the pooled text (adaLN-zero). Parameter names follow those of
diffusers' `SD3Transformer2DModel`: a regex such as `attn/(to_q|to_v)/kernel` names the same layers there and here.

Dense layers see flattened tokens `[B*T, D]`: on CPU XLA's rank-3 form is slower (`benchmarks/flattened_dense.py`).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from opd_jax import sharding
from opd_jax.models import attention
from opd_jax.models.remat import block_of

Tokens = Float[Array, "B T D"]
XAVIER = nn.initializers.xavier_uniform()
# For `decoder.partition_rules`. Over `fsdp` the side of the residual stream where a kernel has one, else what divides;
# over `tensor` the inside of attention and MLPs, and modulations.
WIDENED = r"(to_[qkv]|add_[qkv]_proj|ff/proj_in|ff_context/proj_in|norm1|norm1_context|norm_out)/kernel$"
NARROWED = r"(to_out|to_add_out|ff/proj_out|ff_context/proj_out)/kernel$"
RULES = (
    (NARROWED, PartitionSpec("tensor", "fsdp")),
    (WIDENED, PartitionSpec("fsdp", "tensor")),
    (NARROWED, PartitionSpec(None, "fsdp")),
    (r"kernel$", PartitionSpec("fsdp", None)),
    (r"kernel$", PartitionSpec(None, "fsdp")),
    (r"kernel$", PartitionSpec()),
    (r"bias$", PartitionSpec("fsdp")),
    (r"bias$", PartitionSpec()),
    (r"pos_embed$", PartitionSpec(None, None, "fsdp")),
    (r"pos_embed$", PartitionSpec()),
)


class MMDiT(nn.Module):
    """Velocity of a flow at state `latents` and time `t` (1 noise, 0 data), given an encoded prompt.

    `module.apply({"params": params}, latents, t, context, pooled) -> velocity`. A freshly initialised model returns
    exactly zero: modulation and output projection start at zero (adaLN-zero, arXiv 2212.09748), the rest Xavier.
    The position embedding is stored with the parameters, as checkpoints do, but is fixed: its gradient is zero.
    Parameters are float32 (or as loaded); `dtype` is that of the matrix products. The result has `latents`' dtype.

    Raises: ValueError where the image does not divide into patches, has more patches per side than
    `pos_embed_max_size`, or has another number of channels; or `qk_norm` is unknown.
    """

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    num_heads: int
    head_dim: int
    joint_attention_dim: int  # E, of the context
    pooled_projection_dim: int  # P, of the pooled context
    pos_embed_max_size: int  # in patches per side; smaller images take the centre crop
    dual_attention_layers: tuple[int, ...] = ()  # blocks with a second attention among image tokens only (SD3.5 medium)
    qk_norm: str | None = "rms_norm"  # None for SD3.0
    sample_size: int | None = None  # latent side at which position steps are 1; None: pos_embed_max_size * patch_size
    dtype: Any = jnp.float32
    attention: str | None = None  # `attention.attend`'s implementation; None: plain products
    remat: bool | str = ""  # what blocks keep for the backward pass (`models.remat`); "": everything

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.num_heads * self.head_dim

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B H W C"],
        t: Float[Array, "B"],
        context: Float[Array, "B L E"],
        pooled: Float[Array, "B P"],
    ) -> Float[Array, "B H W Cout"]:
        _check(self, latents)
        batch, height, width, channels = latents.shape
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        patches = latents.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)

        x = _flat(_dense(self, self.width, "patch_embed"), patches.reshape(batch, rows * columns, -1))
        x += self._position(rows, columns).astype(x.dtype)
        c = _flat(_dense(self, self.width, "context_embedder"), context)
        emb = _Embedder(self.width, self.dtype, nn.initializers.normal(0.02), name="timestep_embedder")(_sinusoid(t))
        emb = nn.silu(emb + _Embedder(self.width, self.dtype, name="text_embedder")(pooled))

        block = block_of(_JointBlock, self.remat)
        for i in range(self.num_layers):
            dual, last = i in self.dual_attention_layers, i == self.num_layers - 1
            sizes = self.num_heads, self.head_dim, dual, last, self.qk_norm is not None, self.dtype, self.attention
            x, c = block(*sizes, name=f"blocks_{i}")(x, c, emb)

        scale, shift = _modulation(self, emb, 2, "norm_out")
        out = _dense(self, p * p * self.out_channels, "proj_out", nn.initializers.zeros)
        x = _flat(out, _modulate(x, shift, scale))
        x = x.reshape(batch, rows, columns, p, p, self.out_channels).swapaxes(2, 3)
        return x.reshape(batch, height, width, self.out_channels).astype(latents.dtype)

    def _position(self, rows: int, columns: int) -> Float[Array, "1 T D"]:
        """The centre `rows x columns` of the position embedding, row by row."""
        size, samples = self.pos_embed_max_size, self.sample_size or self.pos_embed_max_size * self.patch_size
        table = self.param("pos_embed", lambda _: _sincos_2d(self.width, size, samples // self.patch_size))
        top, left = (size - rows) // 2, (size - columns) // 2
        grid = table.reshape(size, size, self.width)[top : top + rows, left : left + columns]
        grid = sharding.over_records(grid.reshape(rows * columns, self.width), 1)  # what is split is gathered here
        return jax.lax.stop_gradient(grid[None])


class _JointBlock(nn.Module):
    """One MMDiT block; `last` updates the image tokens only and returns the context as it came."""

    num_heads: int
    head_dim: int
    dual: bool
    last: bool
    qk_norm: bool
    dtype: Any
    attention: str | None

    @nn.compact
    def __call__(self, x: Tokens, c: Float[Array, "B L D"], emb: Float[Array, "B D"]):
        shift, scale, gate, *mlp = _modulation(self, emb, 9 if self.dual else 6, "norm1")
        if self.last:
            c_scale, c_shift = _modulation(self, emb, 2, "norm1_context")
        else:
            c_shift, c_scale, c_gate, *c_mlp = _modulation(self, emb, 6, "norm1_context")

        sizes = self.num_heads, self.head_dim, self.last, self.qk_norm, self.dtype, self.attention
        x_out, c_out = _Attention(*sizes, name="attn")(_modulate(x, shift, scale), _modulate(c, c_shift, c_scale))
        x_out = gate * x_out
        if self.dual:
            shift2, scale2, gate2 = mlp[3:]
            x_out += gate2 * _Attention(*sizes, name="attn2")(_modulate(x, shift2, scale2))[0]
        x += x_out
        x += self._mlp(x, *mlp[:3], "ff")
        if not self.last:
            c += c_gate * c_out
            c += self._mlp(c, *c_mlp, "ff_context")
        return x, c

    def _mlp(self, x: Tokens, shift: Array, scale: Array, gate: Array, name: str) -> Tokens:
        return gate * _Mlp(self.dtype, name=name)(_modulate(x, shift, scale))


class _Attention(nn.Module):
    """Attention over image tokens, or over image and text tokens joined where `c` is given."""

    num_heads: int
    head_dim: int
    last: bool
    qk_norm: bool
    dtype: Any
    attention: str | None

    @nn.compact
    def __call__(self, x: Tokens, c: Float[Array, "B L D"] | None = None):
        length, width = x.shape[1:]
        q, k, v = (self._heads(x, f"to_{n}", f"norm_{n}") for n in "qkv")
        if c is not None:
            added = (self._heads(c, f"add_{n}_proj", f"norm_added_{n}") for n in "qkv")
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip((q, k, v), added))
        attend = functools.partial(attention.attend, segments=None, causal=False, implementation=self.attention)
        out = (attend if self.attention else _attend)(q, k, v).reshape(x.shape[0], -1, width)
        x = _narrowed(_dense(self, width, "to_out"), out[:, :length], self.num_heads)
        if c is not None and not self.last:
            c = _narrowed(_dense(self, width, "to_add_out"), out[:, length:], self.num_heads)
        return x, c

    def _heads(self, x: Tokens, dense: str, norm: str) -> Float[Array, "B T heads head_dim"]:
        heads = _widened(_dense(self, x.shape[-1], dense), x, self.num_heads)
        heads = heads.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        if self.qk_norm and not norm.endswith("v"):
            heads = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=norm)(heads)
        return heads


class _Mlp(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        hidden = nn.gelu(_widened(_dense(self, 4 * width, "proj_in"), x, 4 * width))
        return _narrowed(_dense(self, width, "proj_out"), hidden, 4 * width)


class _Embedder(nn.Module):
    width: int
    dtype: Any
    init: Any = XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "B P"]) -> Float[Array, "B D"]:
        hidden = nn.silu(_dense(self, self.width, "linear_1", self.init)(sharding.over_records(x, len(x))))
        return _dense(self, self.width, "linear_2", self.init)(hidden)


def _dense(module: nn.Module, features: int, name: str, init: Any = XAVIER) -> nn.Dense:
    return nn.Dense(features, kernel_init=init, dtype=module.dtype, name=name)


def _flat(dense: nn.Dense, x: Tokens) -> Float[Array, "B T features"]:
    """`dense` on flattened tokens."""
    return dense(_rows(x)).reshape(*x.shape[:-1], dense.features)


def _widened(dense: nn.Dense, x: Tokens, units: int) -> Float[Array, "B T features"]:
    """From the residual stream into a layer of so many heads or neurons, which `tensor` splits."""
    inside = sharding.over_width(dense(_rows(x)), len(x), units)
    return inside.reshape(*x.shape[:-1], dense.features)


def _narrowed(dense: nn.Dense, x: Tokens, units: int) -> Float[Array, "B T features"]:
    """Back from inside a layer."""
    inside = sharding.over_width(x.reshape(-1, x.shape[-1]), len(x), units)
    return sharding.over_records(dense(inside), len(x)).reshape(*x.shape[:-1], dense.features)


def _rows(x: Tokens) -> Float[Array, "N D"]:
    """Flattened, and split over devices as records are: XLA, left to itself, splits the width as kernels are."""
    return sharding.over_records(x.reshape(-1, x.shape[-1]), len(x))


def _modulation(module: nn.Module, emb: Float[Array, "B D"], n: int, name: str) -> list[Float[Array, "B 1 D"]]:
    """The `n` modulation vectors of a block, all from one zero-initialised layer."""
    dense = _dense(module, n * emb.shape[-1], name, nn.initializers.zeros)
    vectors = sharding.over_records(dense(sharding.over_records(emb, len(emb))), len(emb))
    return jnp.split(vectors[:, None], n, axis=-1)


def _modulate(x: Tokens, shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"]) -> Tokens:
    """Layer norm without weights of its own, then the modulation in its place."""
    mean = x.mean(-1, keepdims=True, dtype=jnp.float32)
    centred = x.astype(jnp.float32) - mean
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    return normed.astype(x.dtype) * (1 + scale) + shift


def _attend(q: Array, k: Array, v: Array) -> Float[Array, "B S heads head_dim"]:
    """Plain products, heads first: on CPU a fifth faster than `jax.nn.dot_product_attention`. Softmax in float32."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = (q @ k.swapaxes(2, 3)).astype(jnp.float32) * q.shape[-1] ** -0.5
    return (jax.nn.softmax(logits).astype(v.dtype) @ v).swapaxes(1, 2)


def _sinusoid(t: Float[Array, "B"], dim: int = 256) -> Float[Array, "B dim"]:
    """Cosines, then sines, of `1000 t` at `dim / 2` frequencies from 1 down to 1e-4."""
    frequencies = jnp.exp(-np.log(10_000.0) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = 1000.0 * t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _sincos_2d(width: int, size: int, base: int) -> Float[Array, "1 N D"]:
    """Sines and cosines of the column (first half of the width) and the row; `size` positions span `base` units."""
    positions = np.arange(size, dtype=np.float32) / (size / base)
    frequencies = 1.0 / 10_000.0 ** (np.arange(width // 4) / (width / 4))
    angles = np.outer(positions, frequencies)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    column, row = (
        np.broadcast_to(axis[None], (size, size, width // 2)),
        np.broadcast_to(axis[:, None], (size, size, width // 2)),
    )
    return jnp.asarray(np.concatenate([column, row], axis=-1).reshape(1, size * size, width), jnp.float32)


def _check(module: MMDiT, latents: Array) -> None:
    height, width, channels = latents.shape[1:]
    p, most = module.patch_size, module.pos_embed_max_size * module.patch_size
    if height % p or width % p or max(height, width) > most:
        raise ValueError(f"latents are {height}x{width}; give sides that are multiples of {p} and at most {most}")
    if channels != module.in_channels:
        raise ValueError(f"latents have {channels} channels, not in_channels={module.in_channels}; are they NHWC?")
    if module.qk_norm not in (None, "rms_norm"):
        raise ValueError(f"qk_norm={module.qk_norm!r} is unknown; use 'rms_norm' or None")
    if module.width % 4:
        raise ValueError(f"num_heads * head_dim = {module.width}; the position embedding needs a multiple of 4")
