"""Vision-language-action policies: an observation and an instruction to a chunk of actions, in one forward pass.

Images go through one or more towers, their features side by side through a projector, and with the instruction and the
proprioception into a `Decoder`. As OpenVLA-OFT has it (Kim et al., arXiv 2502.19645), attention is bidirectional and
the whole chunk is decoded in parallel. The sequence of B records is that of its code:

    first token of the instruction (BOS) | patches of each camera | proprioception | rest of the instruction | actions |
    end of text

Cameras share the towers and are told apart by their positions. A tower of `Keypoints` reads the instruction and has K
points in the place of patches. Padding of the instruction is seen by itself alone and takes up no position. There are
two heads, by method; a tree of parameters has what the method it was initialised for needs:

| method | action tokens | result |
| --- | --- | --- |
| `__call__` | H * A placeholders, learned or zeros | logits over the bins of `action_tokens`, as OpenVLA |
| `velocity` | H, each the noisy action of a step and the time | velocity of a flow, as pi0 (arXiv 2410.24164) |
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from opd_jax import sharding
from opd_jax.models import decoder, vit
from opd_jax.models.action_tokens import NUM_BINS
from opd_jax.models.decoder import NORMAL, Decoder
from opd_jax.models.keypoints import Keypoints, Points
from opd_jax.models.vit import ViT

# For `decoder.partition_rules`.
RULES = (
    *vit.RULES,
    (r"(projector/fc1|action_time_mlp_in)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"proprioception/fc1/kernel$", PartitionSpec(None, "tensor")),  # P may be any number
    (r"(fc[23]|action_time_mlp_out)/kernel$", PartitionSpec("tensor", "fsdp")),
    *decoder.RULES,
)


class Observation(NamedTuple):
    """What a policy sees at one decision."""

    images: UInt8[Array, "B C height width 3"]  # of C cameras, always in the same order; C = 0: it has none
    proprioception: Float[Array, "B P"]  # normalised; P = 0: the policy has none
    instruction: Int[Array, "B L"]  # token ids, 0 is padding, which no other token sees; the first is BOS, or a word


class Vla(nn.Module):
    """`module.apply({"params": params}, observation) -> logits`, and `method="velocity"` for a flow-matching policy.

    Parts have their own fields, such as `dtype` and `remat`; the projector and the rest follow the decoder's `dtype`.
    Bin k of `action_tokens` is the token `used_vocab_size - 1 - k`, so that the output projection of an OpenVLA
    checkpoint serves unchanged; and as there, a state predicts the token that follows it.

    | case | result |
    | --- | --- |
    | more padding, or padding between the words | changes nothing |
    | a token id of `vocab_size` or more | all results of its row are NaN |
    | placeholders zero, or none: `learned_placeholders=False` | OpenVLA-OFT's parallel decoding of tokens |

    Raises: ValueError where towers differ in the number of patches, images are not of the towers' size, bins do not fit
    into the vocabulary, or actions are not of `horizon` steps of `action_dim`.
    """

    towers: tuple[ViT | Keypoints, ...]
    language_model: Decoder
    horizon: int  # H
    action_dim: int  # A
    used_vocab_size: int  # the last ids below it are the bins; the decoder's vocab_size may be padded beyond
    fused_projector: bool = True  # Prismatic's of fused towers, first 4 times as wide; else one layer less
    end_token: int = 2  # after the actions; Llama's </s>
    learned_placeholders: bool = True  # False: zeros without parameters, as OpenVLA-OFT's

    def setup(self):
        _check(self)
        width, dtype = self.language_model.width, self.language_model.dtype
        features = sum(tower.width for tower in self.towers)
        inner = (4 * features, width) if self.fused_projector else (width,)
        dense = functools.partial(nn.Dense, dtype=dtype, kernel_init=NORMAL)
        self.projector = _Mlp((*inner, width), dense)
        self.proprioception = _Mlp((width, width), dense)
        if self.learned_placeholders:
            self.placeholders = nn.Embed(self.horizon * self.action_dim, width, embedding_init=NORMAL)
        self.action_in_proj = dense(width)
        self.action_time_mlp_in = dense(width)
        self.action_time_mlp_out = dense(width)
        self.action_out_proj = dense(self.action_dim)

    def __call__(self, observation: Observation) -> Float[Array, "B H A K"]:
        """Logits over the bins of every dimension of every step, float32; independent given the observation."""
        batch, count, text = len(observation.images), self.horizon * self.action_dim, self.language_model
        placeholders = jnp.zeros((1, count, text.width), text.dtype)
        if self.learned_placeholders:
            placeholders = self.placeholders(jnp.arange(count))[None].astype(text.dtype)
        before, own = self._states(observation, jnp.broadcast_to(placeholders, (batch, *placeholders.shape[1:])))
        logits = self._bin_logits(jnp.concatenate([before, own[:, :-1]], axis=1))
        return logits.reshape(batch, self.horizon, self.action_dim, NUM_BINS)

    def velocity(
        self, observation: Observation, actions: Float[Array, "B H A"], t: Float[Array, "B"]
    ) -> Float[Array, "B H A"]:
        """Velocity, noise - data, of the flow of chunks at the noisy `actions` and time `t`: 1 noise, 0 data.

        Args:
          actions: normalised, `[B, horizon, action_dim]`.

        Returns:
          Float32.
        """
        if actions.shape[1:] != (self.horizon, self.action_dim):
            expected = f"[B, {self.horizon}, {self.action_dim}]"
            raise ValueError(f"actions are {list(actions.shape)}, not {expected}; give chunks of the policy's shape")
        dtype = self.language_model.dtype
        x = self.action_in_proj(actions.reshape(-1, self.action_dim))
        time = jnp.repeat(_sinusoid(t, x.shape[-1]).astype(dtype), self.horizon, axis=0)
        x = self.action_time_mlp_out(nn.silu(self.action_time_mlp_in(jnp.concatenate([x, time], axis=-1))))
        _, own = self._states(observation, x.reshape(*actions.shape[:2], -1))
        out = self.action_out_proj(own.reshape(-1, own.shape[-1]))
        return out.astype(jnp.float32).reshape(actions.shape)

    @nn.nowrap
    def sampling_copy(self, params: Any) -> Any:
        """`params` as many decisions in a row read them, a plain function of a tree that holds them.

        `sharding.gathered`; in the wider type where a tower computes in another one than the decoder.
        """
        types = (part.dtype for part in (*self.towers, self.language_model))
        return sharding.gathered(params, RULES, decoder.NARROWED, functools.reduce(jnp.promote_types, types))

    def points(self, observation: Observation) -> tuple[Points, ...]:
        """What every tower of `Keypoints` has found, a row for each camera of each record: `[B * C, K, ...]`."""
        return tuple(self._look(tower, observation) for tower in self.towers if isinstance(tower, Keypoints))

    def _states(
        self, observation: Observation, actions: Float[Array, "B n D"]
    ) -> tuple[Float[Array, "B 1 D"], Float[Array, "B n D"]]:
        """The decoder's states of the last token before the actions, and of the actions."""
        text = self.language_model
        tokens = jnp.pad(observation.instruction, ((0, 0), (0, 1)), constant_values=self.end_token)
        words = jnp.where(tokens[..., None] != 0, text.embed(tokens).reshape(*tokens.shape, -1), 0)
        context = self._context(observation)
        arrange = lambda words, *rest: jnp.concatenate(
            [words[:, :1], rest[0], words[:, 1:-1], rest[1], words[:, -1:]], 1
        )
        x = arrange(words, context, actions)
        seen = arrange(tokens != 0, *(jnp.ones(part.shape[:2], bool) for part in (context, actions)))

        positions = jnp.cumsum(seen, axis=1) - 1
        flat, segments = x.reshape(-1, text.width), seen.astype(jnp.int32)
        states, _ = text.states(flat, positions[..., None], positions, segments, causal=False)

        first = seen.shape[1] - 1 - actions.shape[1]
        last = jnp.where(seen[:, :first], jnp.arange(first)[None], 0).max(axis=1)
        return jnp.take_along_axis(states, last[:, None, None], axis=1), states[:, first:-1]

    def _context(self, observation: Observation) -> Float[Array, "B n D"]:
        """Tokens of the patches of each camera, and of the proprioception."""
        if not observation.images.shape[1]:
            return self.proprioception(observation.proprioception)[:, None]
        batch = len(observation.images)
        found = [self._look(tower, observation) for tower in self.towers]
        features = jnp.concatenate([one.tokens if isinstance(one, Points) else one for one in found], axis=-1)
        patches = self.projector(features.reshape(-1, features.shape[-1])).reshape(batch, -1, self.language_model.width)
        if not observation.proprioception.shape[1]:
            return patches
        return jnp.concatenate([patches, self.proprioception(observation.proprioception)[:, None]], axis=1)

    def _look(self, tower: ViT | Keypoints, observation: Observation) -> Float[Array, "N n D"] | Points:
        """A tower's features of every camera's picture."""
        cameras, *picture = observation.images.shape[1:]
        images = observation.images.reshape(-1, *picture)
        if isinstance(tower, ViT):
            return tower(images)
        text, tokens = self.language_model, observation.instruction
        words = jnp.repeat(text.embed(tokens).reshape(*tokens.shape, -1), cameras, axis=0)
        return tower(images, words, jnp.repeat(tokens != 0, cameras, axis=0), cameras)

    def _bin_logits(self, states: Float[Array, "B n D"]) -> Float[Array, "B n K"]:
        """The output projection onto the bins alone, not onto the whole vocabulary."""
        text = self.language_model
        if self.is_initializing():
            text.logits(states[:, :1])
        kernel = text.head(text.variables["params"])[:, self.used_vocab_size - NUM_BINS : self.used_vocab_size]
        flat = states.reshape(-1, text.width)
        logits = jnp.dot(flat, kernel[:, ::-1].astype(flat.dtype), preferred_element_type=jnp.float32)
        return logits.reshape(*states.shape[:2], NUM_BINS)


def with_fields(module: Vla, **fields: Any) -> Vla:
    """The same policy, its towers and its language model with other fields, such as `dtype` and `remat`.

    `attention` is the language model's alone; that of towers is XLA's.
    """
    of_towers = {name: value for name, value in fields.items() if name != "attention"}
    towers = tuple(tower.clone(**of_towers) for tower in module.towers)
    return module.clone(towers=towers, language_model=module.language_model.clone(**fields))


def patch_of(points: int) -> int:
    """Pixels of a patch of `tiny`, which divide its images."""
    return 4 if points else 8


def tiny(
    horizon: int,
    action_dim: int,
    *,
    words: int = 32,
    image_size: int = 40,
    width: int = 96,
    points: int = 0,
    **fields: Any,
) -> Vla:
    """A policy of about half a million parameters, for images of some dozen pixels and a CPU.

    Args:
      words: ids of instructions are below it; it is itself the end of the text, and the bins follow.
      points: of a tower of `Keypoints`; 0: a vision transformer.
      fields: of the `Decoder`, such as `dtype`; of them `dtype` is the tower's too, and a vision transformer's `remat`.
    """
    shared = {name: value for name, value in fields.items() if name in ("dtype", "remat")}
    if points:
        tower = Keypoints(points, 48, 2, patch_of(points), image_size, dtype=fields.get("dtype", jnp.float32))
    else:
        tower = ViT(64, 256, 2, 4, patch_size=patch_of(points), image_size=image_size, feature_layer=-1, **shared)
    sizes = {"mlp_width": 256, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "head_dim": width // 4}
    vocabulary = words + 1 + NUM_BINS
    text = Decoder(vocabulary, width, **sizes | fields)
    return Vla((tower,), text, horizon, action_dim, vocabulary, fused_projector=False, end_token=words)


# OpenVLA's sizes (arXiv 2406.09246), with the chunk of OpenVLA-OFT on LIBERO.
OPENVLA_7B = Vla(
    towers=(vit.DINOV2_LARGE.clone(dtype=jnp.bfloat16), vit.SIGLIP_SO400M.clone(dtype=jnp.bfloat16)),
    language_model=Decoder(
        vocab_size=32_064,
        width=4096,
        mlp_width=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_positions=2048,
        dtype=jnp.bfloat16,
    ),
    horizon=8,
    action_dim=7,
    used_vocab_size=32_000,
    learned_placeholders=False,
)


class _Mlp(nn.Module):
    """Dense layers `fc1`, `fc2`, ... with a gelu between them."""

    widths: tuple[int, ...]
    dense: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N in"]) -> Float[Array, "N out"]:
        for i, width in enumerate(self.widths, 1):
            x = self.dense(width, name=f"fc{i}")(nn.gelu(x, approximate=False) if i > 1 else x)
        return x


def _sinusoid(t: Float[Array, "B"], width: int) -> Float[Array, "B width"]:
    """Sines, then cosines, of `2 pi t / period` at `width / 2` periods from 0.004 to 4, as openpi's."""
    periods = jnp.asarray(np.geomspace(4e-3, 4.0, width // 2), jnp.float32)
    angles = 2 * jnp.pi * t.astype(jnp.float32)[:, None] / periods[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _check(module: Vla) -> None:
    if len({tower.num_patches for tower in module.towers}) != 1:
        raise ValueError(f"towers have {[tower.num_patches for tower in module.towers]} patches; give them one number")
    if not NUM_BINS <= module.used_vocab_size <= module.language_model.vocab_size:
        most = module.language_model.vocab_size
        raise ValueError(f"used_vocab_size={module.used_vocab_size}; give {NUM_BINS}, the bins, to vocab_size={most}")
