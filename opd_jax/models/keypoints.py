"""Points in a picture that an instruction names: a convolutional tower for small robot policies.

Features on a grid of cells, conditioned on the words by FiLM (Perez et al., arXiv 1709.07871), become K points by
spatial softmax (Levine et al., arXiv 1504.00702): each is the mean place under its softmax over the cells, and carries
the mean of their features. So a policy is given coordinates, which a transformer of a few layers has to find out first,
and where the named thing lies can be taught by itself, as the target of a point's softmax (`pointing_loss`).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

WAVES = 4  # of each coordinate, sine and cosine, from half a wave across the picture to four


class Points(NamedTuple):
    """What the tower has found in every picture."""

    place: Float[Array, "N K 2"]  # row and column, -1 the upper left edge of the picture, 1 the lower right
    feature: Float[Array, "N K F"]
    logits: Float[Array, "N K cells"]  # over the cells, row by row

    @property
    def tokens(self) -> Float[Array, "N K D"]:
        """Features, coordinates and their waves, side by side."""
        angles = self.place[..., None] * (jnp.pi * 2.0 ** jnp.arange(-1, WAVES - 1))[None, None, None]
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*self.place.shape[:2], -1)
        return jnp.concatenate([self.feature, self.place, waves], axis=-1)


class Keypoints(nn.Module):
    """`module.apply({"params": params}, images, words, seen, cameras) -> Points`, images as bytes.

    Row i is of camera `i % cameras`, which each have a learned vector beside the words.

    A cell is a window of twice `patch_size`, centred on its patch; every layer looks at the cells around each. A cell
    may say where in its patch, or up to half a patch beyond, it places itself, so that places are finer than cells.
    Words are read with their positions: "the red cube on the blue cube" is not its converse.

    Raises: ValueError where images have another size than `image_size`, or patches do not divide it evenly.
    """

    points: int  # K
    channels: int  # F
    num_layers: int
    patch_size: int
    image_size: int  # height and width
    dtype: Any = jnp.float32

    @property
    def num_patches(self) -> int:
        """Tokens of a picture: K."""
        return self.points

    @property
    def width(self) -> int:
        """Of a token."""
        return self.channels + 2 + 4 * WAVES

    @nn.compact
    def __call__(
        self,
        images: UInt8[Array, "N height width 3"],
        words: Float[Array, "N L E"],
        seen: Bool[Array, "N L"],
        cameras: int = 1,
    ) -> Points:
        _check(self, images)
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)
        norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
        told = self._told(words, seen, cameras, dense, norm)[:, None, None]
        x = nn.relu(dense(2 * self.channels, "patch_embed")(_windows(images, self.patch_size).astype(self.dtype)))
        x = dense(self.channels, "patch_proj")(x)
        for i in range(self.num_layers + 1):
            scale, shift = jnp.split(dense(2 * self.channels, f"film_{i}")(told), 2, axis=-1)
            conditioned = nn.relu(norm(f"norm_{i}")(x) * (1 + scale) + shift)
            if i < self.num_layers:
                x += dense(self.channels, f"conv_{i}")(_around(conditioned))
        cells = conditioned.reshape(len(images), -1, self.channels)
        logits = 4.0 * dense(self.points, "where")(cells).astype(jnp.float32).swapaxes(1, 2)
        weights, side = jax.nn.softmax(logits), self.image_size // self.patch_size
        middle = (jnp.arange(side) + 0.5) / side * 2 - 1
        grid = jnp.stack(jnp.meshgrid(middle, middle, indexing="ij"), -1).reshape(1, -1, 2)
        own = grid + 2 / side * jnp.tanh(dense(2, "within")(cells).astype(jnp.float32))
        mean = lambda values: jnp.einsum("nkc,ncd->nkd", weights, values.astype(jnp.float32))
        return Points(mean(own), mean(cells), logits)

    def _told(self, words: Array, seen: Array, cameras: int, dense, norm) -> Float[Array, "N F"]:
        """One vector for an instruction, which knows the order of its words, and a camera."""
        order = self.param("word_positions", nn.initializers.normal(0.3), words.shape[1:])
        own = self.param("cameras", nn.initializers.normal(0.3), (cameras, self.channels))
        read = nn.relu(dense(4 * self.channels, "read")(norm("word_norm")(words) + order[None].astype(self.dtype)))
        told = dense(self.channels, "told")(jnp.where(seen[..., None], read, 0).sum(1) / 4)
        return told + jnp.tile(own, (len(words) // cameras, 1)).astype(self.dtype)


def pointing_loss(
    points: Points, target: Float[Array, "N 2"], inside: Bool[Array, "N"], which: int = 0
) -> Float[Array, "N"]:
    """How far point `which` is from a target, per picture; 0 where the target is not `inside`.

    Cross-entropy of its softmax with the target's cell, in nats, and the squared distance, in units of half a picture.
    """
    side = int(points.logits.shape[-1] ** 0.5)
    cell = jnp.clip(jnp.floor((target + 1) / 2 * side), 0, side - 1).astype(jnp.int32)
    logp = jax.nn.log_softmax(points.logits[:, which])
    chosen = jnp.take_along_axis(logp, (cell[:, :1] * side + cell[:, 1:]), axis=1)[:, 0]
    return jnp.where(inside, jnp.square(points.place[:, which] - target).sum(-1) - chosen, 0.0)


def _windows(images: UInt8[Array, "N H W 3"], patch: int) -> Float[Array, "N rows columns features"]:
    """Windows of twice the patch, from -1 to 1, around every patch."""
    edge, side = patch // 2, images.shape[1] // patch
    x = jnp.pad(images.astype(jnp.float32) / 127.5 - 1, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    pixels = lambda i, j: x[:, i : i + side * patch : patch, j : j + side * patch : patch]
    return jnp.concatenate([pixels(i, j) for i in range(2 * patch) for j in range(2 * patch)], axis=-1)


def _around(x: Float[Array, "N rows columns F"]) -> Float[Array, "N rows columns nine"]:
    """The cells around each beside it: a convolution is then a product of matrices, which a CPU is good at."""
    rows, columns = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=-1)


def _check(module: Keypoints, images: Array) -> None:
    if images.shape[1:3] != (module.image_size, module.image_size):
        height, width = images.shape[1:3]
        size = module.image_size
        raise ValueError(f"images are {height}x{width}, the tower is for {size}x{size}; resize")
    if module.image_size % module.patch_size or module.patch_size % 2:
        raise ValueError(
            f"patch_size={module.patch_size}: give an even number that divides image_size={module.image_size}"
        )
