# SPDX-License-Identifier: Apache-2.0
"""What a step must do, counted by hand from a model's shapes: FLOPs of its products, and what decoding must read.

A program does this and more: recomputed blocks, logits made twice. So these, and not `cost`'s counts of a program, are
what two programs of one step are compared by, and what a share of a device's peak is of. Attention counts all pairs of
tokens, masked or not, as XLA computes it.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from opd_jax.models.decoder import Decoder
from opd_jax.models.mmdit import MMDiT


class Forward(NamedTuple):
    """FLOPs of one forward pass, 2 for a multiplication and an addition; no backward pass costs the same for all."""

    dense: float  # of inputs with kernels
    attention: float  # of queries with keys, and of probabilities with values
    adapter: float = 0.0  # of inputs with the factors of low-rank adapters

    @property
    def total(self) -> float:
        return self.dense + self.attention + self.adapter

    def plus(self, other: "Forward") -> "Forward":
        return Forward(*(a + b for a, b in zip(self, other)))

    def backward(self, frozen: bool = False) -> float:
        """Of the gradient: each product has two, of its factors; a frozen kernel has that of its input alone.

        Gradients of the first layer's input are counted, though nobody needs them: of a kernel that reads data this is
        a little too much.
        """
        return (1 if frozen else 2) * self.dense + 2 * self.attention + 2 * self.adapter


def decoder(module: Decoder, tokens: int, seen: float | int, logits: int) -> Forward:
    """A forward pass of a language model.

    Args:
        tokens: in all records together.
        seen: tokens that each of them attends to, itself included, on average.
        logits: positions, in all records together, whose logits are made.
    """
    dense = 0.0
    for path, shape in _shapes(module, jnp.zeros((1, 1), jnp.int32)).items():
        if re.search(r"^layers/.*kernel$", path):
            used = module.experts_per_token / module.num_experts if "/experts/" in path else 1
            dense += 2 * tokens * used * math.prod(shape)
    head = 2 * logits * module.width * module.vocab_size
    attention = 4 * tokens * seen * module.num_layers * module.num_heads * module.head_dim
    return Forward(dense + head, float(attention))


def answers(module: Decoder, records: int, prompt: int, new: int) -> Forward:
    """Sampling: the prompts at once, with logits of their last position, then `new` - 1 tokens from a cache.

    The last of the `new` tokens is drawn and not read.
    """
    total = decoder(module, records * prompt, prompt, records)
    steps = new - 1
    seen = prompt + (steps + 1) / 2  # on average
    return total.plus(decoder(module, records * steps, seen, records * steps))


def decoding_bytes(module: Decoder, records: int, prompt: int, new: int, itemsize: int) -> float:
    """Bytes that sampling must read from memory: every kernel once a token, and the cache as far as it is written.

    The prompts are one more reading of the kernels.

    Args:
        itemsize: bytes of a number, of kernels and of the cache.

    Raises: ValueError: the model has experts.
    """
    if module.num_experts:
        raise ValueError(f"num_experts={module.num_experts}: which experts are read depends on the data")
    shapes = _shapes(module, jnp.zeros((1, 1), jnp.int32))
    kernels = sum(math.prod(shape) for path, shape in shapes.items() if path.endswith("kernel"))
    kernels += module.vocab_size * module.width if module.tie_embeddings else 0
    slots = 2 * records * module.num_layers * module.num_kv_heads * module.head_dim  # of keys and of values, a token
    steps = new - 1
    return float(itemsize * (kernels * (1 + steps) + slots * steps * (prompt + (steps + 1) / 2)))


def mmdit(module: MMDiT, records: int, side: int, context: int, adapted: str = "", rank: int = 0) -> Forward:
    """A forward pass of the transformer of flows.

    Args:
        side: of a square latent.
        context: tokens of the encoded prompt.
        adapted: a regex that finds the kernels with an adapter of this rank, as `lora.init`'s; "": none.
    """
    image = (side // module.patch_size) ** 2
    latents = jnp.zeros((1, module.patch_size, module.patch_size, module.in_channels))
    text = jnp.zeros((1, 1, module.joint_attention_dim)), jnp.zeros((1, module.pooled_projection_dim))
    dense = adapter = 0.0
    for path, shape in _shapes(module, latents, jnp.zeros(1), *text).items():
        if path.endswith("kernel"):
            rows = records * (1 if re.search(_OF_RECORDS, path) else context if re.search(_OF_TEXT, path) else image)
            dense += 2 * rows * math.prod(shape)
            adapter += 2 * rows * rank * sum(shape) if adapted and re.search(adapted, path) else 0
    pairs = module.num_layers * (image + context) ** 2 + len(module.dual_attention_layers) * image**2
    return Forward(dense, 4.0 * records * pairs * module.width, adapter)


_OF_RECORDS = r"^(timestep|text)_embedder/|/norm1(_context)?/|^norm_out/"  # kernels that see one row a record
_OF_TEXT = r"^context_embedder/|ff_context/|/(add_[qkv]_proj|to_add_out)/"  # and those that see the text's tokens


def _shapes(module: Any, *inputs: Any) -> dict[str, tuple[int, ...]]:
    """Of every parameter, by its path; nothing is made."""
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
