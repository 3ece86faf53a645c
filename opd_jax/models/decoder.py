"""Decoder-only language models: the Qwen3, Qwen2.5 and Llama 3 families, and Qwen3-MoE, by configuration.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU MLP. What the families differ in is a
field: norms of query and key heads, biases, tied embeddings, the scaling of the rotary frequencies, experts. Parameter
names follow transformers', so `self_attn/(q|v)_proj/kernel` names the same layers there and here; but the layers are
one scanned block, and each parameter of a block holds all of them along a leading axis: `[layers, in, out]`.

Inside, tokens are flat, `[B*S, D]`: on CPU XLA's rank-3 matrix products are slower (`benchmarks/flattened_dense.py`).
Where the mesh splits the tokens of a record (`sequence`), they stay `[B, S, D]`, for a flat axis cannot be split in two
ways; then a device has some tokens of its records, and attention gathers their keys and values, and nothing else.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from opd_jax import sharding
from opd_jax.models import attention
from opd_jax.models.attention import Cache
from opd_jax.models.remat import block_of
from opd_jax.models.rope import Rope, rotate
from opd_jax.sharding import Rules

NORMAL = nn.initializers.normal(0.02)
# Widths and the vocabulary over `tensor`, the other axis of a matrix over `fsdp`. Stacked layers come first.
RULES = (
    (r"embed_tokens/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"embed_tokens/embedding$", PartitionSpec(None, "fsdp")),  # a vocabulary that does not divide stays whole
    (r"lm_head/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"lm_head/kernel$", PartitionSpec("fsdp", None)),
    (r"experts/(gate|up)_proj/kernel$", PartitionSpec(None, None, "fsdp", "tensor")),
    (r"experts/down_proj/kernel$", PartitionSpec(None, None, "tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"(o|down)_proj/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/bias$", PartitionSpec(None, "tensor")),
)
NARROWED = r"(kernel|embed_tokens/embedding)$"  # what is cast to `dtype` before all else


def partition_rules(mesh: Mesh, rules: Rules = RULES) -> Rules:
    """`rules` for `sharding.param_specs`, without the axes that `mesh` does not have."""
    return sharding.along(rules, mesh.shape)


class Decoder(nn.Module):
    """Next-token logits. Weights of transformers' checkpoints come from `opd_jax.models.hf.load_decoder`.

    `module.apply({"params": params}, tokens, segment_ids=None) -> logits`: the logits at s predict the token at s + 1.
    `method="hidden"` gives the states before the output projection, `method="decode"` extends a `Cache`.

    Parameters are float32 (or as loaded) and `dtype` is that of matrix products and of the cache; norms, rotations
    and softmax are float32, and so are logits. `attention` is `attention.attend`'s `implementation` within rows: None
    XLA's, whose memory grows with S^2, "splash" and "cudnn" are the flash attention of TPUs and of NVIDIA GPUs.

    | case | result |
    | --- | --- |
    | records padded on the right | `segment_ids=None`: no token sees what follows it, so nothing but padding sees it |
    | several records in a row | `segment_ids` 1, 2, ... in contiguous runs, 0 = padding: as if each were alone |
    | a token id of `vocab_size` or more | all logits of its row are NaN; with "splash" those from it on |

    Raises: ValueError where heads do not divide into groups, `head_dim` is odd, the rope is unknown, or a sequence is
    longer than a `dynamic` rope allows.
    """

    vocab_size: int  # V, as stored; may exceed the tokenizer's
    width: int  # D, of the residual stream
    mlp_width: int  # of the MLP's inside, or of one expert's
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope = Rope()
    norm_epsilon: float = 1e-6
    qk_norm: bool = False  # RMS norm of each query and key head (Qwen3)
    qkv_bias: bool = False  # Qwen2.5; Qwen3 and Llama where the config says attention_bias
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False  # the output projection is the transposed embedding
    num_experts: int = 0  # 0: one dense MLP
    experts_per_token: int = 0
    normalize_experts: bool = False  # weights of a token's experts sum to 1
    max_positions: int = 32_768  # for config.json; no limit here but to a dynamic rope
    dtype: Any = jnp.float32
    remat: bool | str = ""  # what blocks keep for the backward pass (`models.remat`); "": everything
    attention: str | None = None

    def setup(self):
        _check(self)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=NORMAL)
        norm = functools.partial(nn.RMSNorm, epsilon=self.norm_epsilon, dtype=self.dtype)
        attend = functools.partial(
            _Attention,
            heads=(self.num_heads, self.num_kv_heads, self.head_dim),
            project=functools.partial(dense, use_bias=self.qkv_bias),
            project_out=functools.partial(dense, use_bias=self.out_bias),
            norm=norm if self.qk_norm else None,
            implementation=self.attention,
        )
        mlp = functools.partial(_Mlp, self.mlp_width, functools.partial(dense, use_bias=self.mlp_bias))
        if self.num_experts:
            choice = self.num_experts, self.experts_per_token, self.normalize_experts
            mlp = functools.partial(_Experts, self.mlp_width, *choice, dtype=self.dtype)
        block = block_of(_Block, self.remat, prevent_cse=False, static_argnums=(4,))
        scan = {"variable_axes": {"params": 0, "lora": 0}, "split_rngs": {"params": True}}
        scan["in_axes"] = (0, nn.broadcast, nn.broadcast)
        self.embed_tokens = Embed(self.vocab_size, self.width)
        self.layers = nn.scan(block, length=self.num_layers, **scan)(attend, mlp, norm)
        self.norm = norm()
        if not self.tie_embeddings:
            self.lm_head = dense(self.vocab_size, use_bias=False, dot_general=_dot_float32)

    def __call__(
        self, tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(self, tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None) -> Float[Array, "B S D"]:
        """The states after the final norm, in `dtype`: `logits = hidden @ head(params)`, for losses without logits."""
        positions = places_in(tokens, segment_ids)
        split = sharding.token_axis(tokens.shape[1])
        x = self.embed_tokens(sharding.over_tokens(tokens)).astype(self.dtype) if split else self.embed(tokens)
        return self.states(x, positions[..., None], positions, segment_ids)[0]

    def decode(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """Logits of further tokens, and the cache with them in it.

        Key and value of token (b, s) go to slot `positions[b, s]`; then a query at position p sees the slots 0..p. So
        prompts of any lengths are given left-aligned, padded on the right, and need no mask: what padding has written
        is overwritten by the record's own tokens before one of them sees that far.

        Args:
          tokens: a prompt (prefill), or S = 1 token of each record.
          positions: from 0; a token at `length` or beyond is written nowhere, which is how a finished record idles.
          cache: from `init_cache` or the last call. Under jit inside a loop, or donated, it is updated in place.

        Returns:
          Logits, as the full forward gives them to the same prefix, and the new cache.
        """
        hidden, cache = self.decode_hidden(tokens, positions, cache)
        return self.logits(hidden), cache

    def decode_hidden(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """As `decode`, with the states in place of the logits: a prefill needs logits at one position only."""
        return self.states(self.embed(tokens), positions[..., None], positions, cache=cache)

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "N D"]:
        """What the first layer sees of them, flat: N = B * S."""
        return self.embed_tokens(tokens.reshape(-1)).astype(self.dtype)

    def states(
        self,
        x: Float[Array, "*tokens D"],
        places: Int[Array, "B S #half"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None = None,
        cache: Cache | None = None,
        added: Float[Array, "n N D"] | None = None,
        causal: bool = True,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """`hidden` and `decode_hidden` from embeddings: what a model that also embeds other things than tokens calls.

        Args:
          x: embeddings of B * S tokens, flat, or `[B, S, D]`.
          places: where the rope places a token: one position, or one for each pair of a head's dimensions.
          positions: the slots of the cache that tokens are written to, and that queries see up to.
          segments: tokens see those of their own segment; None: of the row. With a cache there are none.
          cache: as in `decode`.
          added: to the states after each of the first n layers (DeepStack, arXiv 2406.04334).
          causal: False, only without a cache: all tokens of a segment see each other.
        """
        length = positions.shape[1] if cache is None else cache.k.shape[2]
        if self.rope.kind == "dynamic" and length > (most := self.rope.original_max_positions):
            says = f"length {length} is beyond the {most} positions of a dynamic rope"
            raise ValueError(f"{says}; use shorter sequences or a yarn rope")
        frequencies, scale = self.rope.frequencies(self.head_dim)
        angles = places.astype(jnp.float32) * frequencies[None, None]
        mask = None if cache is None else attention.seen_slots(length, positions)
        context = _Context(scale * jnp.cos(angles), scale * jnp.sin(angles), positions, segments, mask, added)
        (x, cache), _ = self.layers((x, cache), jnp.arange(self.num_layers), context, causal)
        return self.norm(x).reshape(*positions.shape, self.width), cache

    @nn.nowrap
    def head(self, params: Any) -> Float[Array, "D V"]:
        """The kernel of the output projection, a plain function of `params`; where tied, the embedding transposed."""
        return params["embed_tokens"]["embedding"].T if self.tie_embeddings else params["lm_head"]["kernel"]

    @nn.nowrap
    def sampling_copy(self, params: Any) -> Any:
        """`params` as decoding reads them, a plain function of a tree that holds them: `sharding.gathered`."""
        return sharding.gathered(params, RULES, NARROWED, self.dtype)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` records of up to `length` tokens, prompt included."""
        return attention.empty(self.num_layers, batch, length, self.num_kv_heads, self.head_dim, self.dtype)

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """The output projection of `hidden`, in float32."""
        x = hidden if sharding.token_axis(hidden.shape[1]) else hidden.reshape(-1, self.width)
        if self.tie_embeddings:
            kernel = self.embed_tokens.embedding.astype(self.dtype)
            logits = _dot_float32(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))
        else:
            logits = self.lm_head(x)
        return logits.reshape(*hidden.shape[:2], self.vocab_size)


class Embed(nn.Module):
    """`nn.Embed`, of which devices that split the vocabulary each look up what they have."""

    vocab_size: int
    width: int

    def setup(self):
        self.embedding = self.param("embedding", NORMAL, (self.vocab_size, self.width))

    def __call__(self, inputs: Int[Array, "*tokens"]) -> Float[Array, "*tokens D"]:
        return jnp.take(sharding.over_vocabulary(self.embedding), inputs, axis=0)


class _Context(NamedTuple):
    """What every layer attends by."""

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None  # without a cache
    mask: Bool[Array, "B 1 S slots"] | None  # of a cache's slots; True may be seen
    added: Float[Array, "n N D"] | None  # to the states after each of the first n layers


class _Block(nn.Module):
    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "*tokens D"], Cache | None],
        layer: Int[Array, ""],
        context: _Context,
        causal: bool,
    ):
        x, cache = carry
        x = sharding.over_records(x, context.positions.shape[0])
        normed = self.norm(name="input_layernorm")(x)
        out, cache = self.attention(name="self_attn")(normed, cache, layer, context, causal)
        x += out
        x += self.mlp(name="mlp")(self.norm(name="post_attention_layernorm")(x))
        if context.added is not None:
            x += context.added.at[layer].get(mode="fill", fill_value=0)
        return (x, cache), None


class _Attention(nn.Module):
    heads: tuple[int, int, int]  # of queries, of keys and values; the dimension of each
    project: Callable[..., nn.Module]
    project_out: Callable[..., nn.Module]
    norm: Callable[..., nn.Module] | None  # of query and key heads
    implementation: str | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*tokens D"], cache: Cache | None, layer: Int[Array, ""], context: _Context, causal: bool
    ):
        num_heads, num_kv_heads, _ = self.heads
        q = rotate(self._heads(x, "q", num_heads, context), context.cos, context.sin)
        k = rotate(self._heads(x, "k", num_kv_heads, context), context.cos, context.sin)
        v = self._heads(x, "v", num_kv_heads, context)
        if cache is None:
            how = {"causal": causal, "split": x.ndim == 3, "implementation": self.implementation}
            out = attention.attend(q, k, v, context.segments, **how)
        else:
            out, cache = attention.extend(cache, layer, context.positions, q, k, v, context.mask)
        return self.project_out(x.shape[-1], name="o_proj")(out.reshape(*x.shape[:-1], -1)), cache

    def _heads(self, x: Array, which: str, count: int, context: _Context) -> Float[Array, "B S heads head_dim"]:
        flat = self.project(count * self.heads[2], name=f"{which}_proj")(x)
        heads = flat.reshape(*context.positions.shape, count, self.heads[2])
        return heads if self.norm is None or which == "v" else self.norm(name=f"{which}_norm")(heads)


class _Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    width: int
    dense: Callable[..., Callable[[Array], Array]]

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        hidden = nn.silu(self.dense(self.width, name="gate_proj")(x)) * self.dense(self.width, name="up_proj")(x)
        return self.dense(x.shape[-1], name="down_proj")(hidden)


class _Experts(nn.Module):
    """The `per_token` most probable experts of each token, weighted; no token is dropped. No balancing loss.

    Tokens are sorted by expert and multiplied in groups; XLA has a grouped product on TPU and GPU, on CPU each
    expert costs as much as a dense MLP. Tokens of all devices are sorted together, and move for it.
    """

    width: int
    count: int
    per_token: int
    normalize: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        gate = nn.Dense(self.count, use_bias=False, dtype=self.dtype, kernel_init=NORMAL, name="gate")
        weights, chosen = jax.lax.top_k(jax.nn.softmax(gate(x).astype(jnp.float32)), self.per_token)
        if self.normalize:
            weights /= weights.sum(-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=self.count)
        dense = lambda features, name: functools.partial(
            _GroupedDense(features, self.count, self.dtype, name=name), sizes=sizes
        )
        out = _Mlp(self.width, dense, name="experts")(x[order // self.per_token])
        out = out[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return (out * weights[..., None].astype(out.dtype)).sum(1).reshape(shape)


class _GroupedDense(nn.Module):
    """Rows in groups of `sizes`, each group times a kernel of its own."""

    features: int
    count: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "rows D"], sizes: Int[Array, "count"]) -> Float[Array, "rows features"]:
        kernel = self.param("kernel", NORMAL, (self.count, x.shape[-1], self.features))
        return jax.lax.ragged_dot(x.astype(self.dtype), kernel.astype(self.dtype), sizes)


def _dot_float32(x: Array, y: Array, dimensions: Any, precision: Any = None) -> Array:
    """A product with a float32 result, whatever the type of its factors."""
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def places_in(tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None) -> Int[Array, "B S"]:
    """Positions, which start again with each segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return index - first


def _check(module: Decoder) -> None:
    if module.num_heads % module.num_kv_heads:
        raise ValueError(f"num_heads={module.num_heads} is no multiple of num_kv_heads={module.num_kv_heads}; make it")
    if module.head_dim % 2:
        raise ValueError(f"head_dim={module.head_dim} is odd; rotary positions need pairs")
    if module.num_experts and not 0 < module.experts_per_token <= module.num_experts:
        raise ValueError(f"experts_per_token={module.experts_per_token}; give 1 to num_experts={module.num_experts}")
