"""GPT-2 (Radford et al., 2019): the language models that papers on private training start from.

Pre-norm blocks of full attention with learned positions, LayerNorm and a GELU MLP; the output projection is the
transposed embedding. Used as `decoder.Decoder` is, by the same samplers and losses. Inside a block, parameters have
transformers' names; the layers are one scanned block, each parameter of it `[layers, in, out]`, and tokens are flat.

There is no dropout, which GPT-2 was trained with: sampler, teacher and per-record gradients all see one function.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from opd_jax import sharding
from opd_jax.models import attention
from opd_jax.models.attention import Cache
from opd_jax.models.decoder import NORMAL, Embed, places_in
from opd_jax.models.remat import block_of
from opd_jax.sharding import over_records, over_tokens, token_axis

# Like `decoder.RULES`. The published vocabulary, 50257 tokens, does not split over a power of two and stays whole.
RULES = (
    (r"embed_tokens/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"embed_(tokens|positions)/embedding$", PartitionSpec(None, "fsdp")),
    (r"(c_attn|c_fc)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"c_proj/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(c_attn|c_fc)/bias$", PartitionSpec(None, "tensor")),
)


class GPT2(nn.Module):
    """Next-token logits. Weights of transformers' checkpoints come from `opd_jax.models.hf.load_gpt2`.

    `module.apply({"params": params}, tokens, segment_ids=None) -> logits`: the logits at s predict the token at s + 1.
    `method="hidden"` gives the states before the output projection, `method="decode"` extends a `Cache`.

    Parameters are float32 (or as loaded) and `dtype` is that of matrix products and of the cache; norms and softmax are
    float32, and so are logits. `attention` is as in `Decoder`.

    | case | result |
    | --- | --- |
    | records padded on the right | `segment_ids=None`: no token sees what follows it, so nothing but padding sees it |
    | several records in a row | `segment_ids` 1, 2, ... in contiguous runs, 0 = padding: as if each were alone |
    | a row longer than `max_positions` | only with `segment_ids`; padding may be of any length |
    | a segment longer than that, or a token id of `vocab_size` or more | all logits of its row are NaN |

    Raises: ValueError where the width does not divide into heads, or a sequence or cache is longer than
    `max_positions`.
    """

    vocab_size: int  # V, as stored; may exceed the tokenizer's
    width: int  # D, of the residual stream
    num_layers: int
    num_heads: int
    mlp_width: int = 0  # of the MLP's inside; 0: 4 * width
    max_positions: int = 1024  # learned, one vector each
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    remat: bool | str = ""  # what blocks keep for the backward pass (`models.remat`); "": everything
    attention: str | None = None

    def setup(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is no multiple of num_heads={self.num_heads}; make it")
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=NORMAL)
        out = functools.partial(dense, kernel_init=nn.initializers.normal(0.02 / math.sqrt(2 * self.num_layers)))
        norm = functools.partial(nn.LayerNorm, epsilon=self.norm_epsilon, dtype=self.dtype, use_fast_variance=False)
        attend = functools.partial(_Attention, self.num_heads, dense, out, self.attention)
        mlp = functools.partial(_Mlp, self.mlp_width or 4 * self.width, dense, out)
        block = block_of(_Block, self.remat, prevent_cse=False)
        scan = {"variable_axes": {"params": 0, "lora": 0}, "split_rngs": {"params": True}, "in_axes": (0, nn.broadcast)}
        self.embed_tokens = Embed(self.vocab_size, self.width)
        self.embed_positions = nn.Embed(self.max_positions, self.width, embedding_init=NORMAL)
        self.layers = nn.scan(block, length=self.num_layers, **scan)(attend, mlp, norm)
        self.ln_f = norm()

    def __call__(
        self, tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(self, tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None) -> Float[Array, "B S D"]:
        """The states after the final norm, in `dtype`: `logits = hidden @ head(params)`, for losses without logits."""
        positions = places_in(tokens, segment_ids)
        if segment_ids is None:
            self._check_length(tokens.shape[1])
        else:
            positions = jnp.where(segment_ids == 0, 0, positions)  # of long padding, beyond the learned ones
        return self._states(tokens, _Context(positions, segment_ids, None), None)[0]

    def decode(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """Logits of further tokens, and the cache with them in it; all as in `Decoder.decode`.

        Key and value of token (b, s) go to slot `positions[b, s]`; then a query at position p sees the slots 0..p. A
        token at a position beyond the cache is written nowhere, and its logits mean nothing.
        """
        length = cache.k.shape[2]
        self._check_length(length)
        mask = attention.seen_slots(length, positions)
        hidden, cache = self._states(tokens, _Context(positions, None, mask), cache)
        return self.logits(hidden), cache

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """The output projection of `hidden`, in float32."""
        x = hidden if token_axis(hidden.shape[1]) else hidden.reshape(-1, self.width)
        kernel, dimensions = self.embed_tokens.embedding.astype(self.dtype), (((x.ndim - 1,), (1,)), ((), ()))
        logits = jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=jnp.float32)
        return logits.reshape(*hidden.shape[:2], self.vocab_size)

    @nn.nowrap
    def head(self, params: Any) -> Float[Array, "D V"]:
        """The kernel of the output projection, a plain function of `params`: the embedding transposed."""
        return params["embed_tokens"]["embedding"].T

    @nn.nowrap
    def sampling_copy(self, params: Any) -> Any:
        """`params` as decoding reads them, a plain function of a tree that holds them: `sharding.gathered`.

        Embeddings keep their type: those of tokens and of positions are added before the sum is cast.
        """
        return sharding.gathered(params, RULES, r"kernel$", self.dtype)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` records of up to `length` tokens, prompt included."""
        head_dim = self.width // self.num_heads
        return attention.empty(self.num_layers, batch, length, self.num_heads, head_dim, self.dtype)

    def _states(
        self, tokens: Int[Array, "B S"], context: "_Context", cache: Cache | None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        if cache is None and token_axis(tokens.shape[1]):  # not flat, see `decoder`
            tokens, positions = over_tokens(tokens), over_tokens(context.positions)
        else:
            tokens, positions = tokens.reshape(-1), context.positions.reshape(-1)
        x = self.embed_tokens(tokens) + self.embed_positions(positions)
        (x, cache), _ = self.layers((x.astype(self.dtype), cache), jnp.arange(self.num_layers), context)
        return self.ln_f(x).reshape(*context.positions.shape, self.width), cache

    def _check_length(self, length: int) -> None:
        if length > self.max_positions:
            raise ValueError(
                f"length {length} is beyond the {self.max_positions} learned positions; use shorter sequences"
            )


class _Context(NamedTuple):
    """What every layer attends by."""

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None  # without a cache
    mask: Bool[Array, "B 1 S slots"] | None  # of a cache's slots; True may be seen


class _Block(nn.Module):
    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, carry: tuple[Float[Array, "*tokens D"], Cache | None], layer: Int[Array, ""], context: _Context):
        x, cache = carry
        x = over_records(x, context.positions.shape[0])
        out, cache = self.attention(name="attn")(self.norm(name="ln_1")(x), cache, layer, context)
        x += out
        x += self.mlp(name="mlp")(self.norm(name="ln_2")(x))
        return (x, cache), None


class _Attention(nn.Module):
    num_heads: int
    project: Callable[..., nn.Module]
    project_out: Callable[..., nn.Module]
    implementation: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens D"], cache: Cache | None, layer: Int[Array, ""], context: _Context):
        positions, width = context.positions, x.shape[-1]
        qkv = self.project(3 * width, name="c_attn")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*positions.shape, 3, self.num_heads, -1), 2, 0)
        if cache is None:
            how = {"split": x.ndim == 3, "implementation": self.implementation}
            out = attention.attend(q, k, v, context.segments, **how)
        else:
            out, cache = attention.extend(cache, layer, positions, q, k, v, context.mask)
        return self.project_out(width, name="c_proj")(out.reshape(*x.shape[:-1], width)), cache


class _Mlp(nn.Module):
    width: int
    widen: Callable[..., nn.Module]
    narrow: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        hidden = nn.gelu(self.widen(self.width, name="c_fc")(x), approximate=True)  # transformers' gelu_new
        return self.narrow(x.shape[-1], name="c_proj")(hidden)
