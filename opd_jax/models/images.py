"""Images as a vision-language model takes them: flattened patches in a bank, and ids of tokens that point into it.

A prompt is token ids alone, also where it holds images. Token k of image i of a bank has the id

    vocab_size + i * room + k,    room = the most tokens an image of the bank may have

and a prompt holds an image as its ids in a row, between the tokens that the model's `marks` say. So samplers, losses
and stores need not know of images, and the pixels travel once, however many records show them.

Pixels and the order of patches are those of transformers' Qwen2-VL image processor, which Qwen3-VL uses too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from opd_jax.config import ConfigError


class ImageBank(NamedTuple):
    """The images of some prompts; an argument of compiled functions, like parameters, and replicated like them."""

    patches: Float[Array | np.ndarray, "N max_patches patch_dim"]  # what is beyond an image's own does not matter
    grid: Int[Array | np.ndarray, "N 2"]  # rows and columns of patches; 0, 0: no image

    def room(self, merge: int = 2) -> int:
        """The ids of one image: as many tokens as its patches make, `merge * merge` each."""
        return self.patches.shape[1] // merge**2


def fitting_size(
    height: int, width: int, *, multiple: int = 32, min_pixels: int = 256 * 256, max_pixels: int = 4096 * 4096
) -> tuple[int, int]:
    """The size an image is resized to, as transformers' `smart_resize`: nearly its shape, and not too many pixels.

    Args:
      height, width: in pixels, whatever they are.
      multiple: both sides of the result are multiples of it: `patch_size * merge_size`.
      min_pixels, max_pixels: of the result, as far as that is possible; the defaults are Qwen3-VL's.

    Raises:
      ConfigError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ConfigError(f"an image of {height}x{width} pixels: no side may be more than 200 times the other; crop it")
    to_multiple = lambda rounding, scale: tuple(
        rounding(side * scale / multiple) * multiple for side in (height, width)
    )
    size = to_multiple(round, 1.0)
    if math.prod(size) > max_pixels:
        return tuple(max(multiple, side) for side in to_multiple(math.floor, math.sqrt(max_pixels / (height * width))))
    if math.prod(size) < min_pixels:
        return to_multiple(math.ceil, math.sqrt(min_pixels / (height * width)))
    return size


def resize(image: UInt8[np.ndarray, "H W 3"], **limits: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image in its `fitting_size`, whose keywords it takes; bicubic, by Pillow."""
    height, width = fitting_size(*image.shape[:2], **limits)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def image_patches(
    image: UInt8[np.ndarray, "H W 3"], patch_size: int = 16, merge_size: int = 2, temporal_patch_size: int = 2
) -> tuple[Float[np.ndarray, "patches patch_dim"], tuple[int, int]]:
    """An image as the tower takes it: normalised from 0..255 to -1..1, cut into patches, each flattened.

    Patches that become one token follow each other: the order is by rows of tokens, then tokens, then by rows of
    patches within a token. A patch is `[3, temporal_patch_size, patch_size, patch_size]`, a still image repeated.

    Returns:
      The patches, float32, and their grid `(rows, columns)`.

    Raises:
      ConfigError: a side that is no multiple of `patch_size * merge_size`.
    """
    height, width, _ = image.shape
    if height % (patch_size * merge_size) or width % (patch_size * merge_size) or not image.size:
        raise ConfigError(
            f"an image of {height}x{width} pixels: its sides must be multiples of {patch_size * merge_size}; resize it"
        )
    rows, columns = height // patch_size, width // patch_size
    pixels = (image.astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)
    blocks = pixels.reshape(
        rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size, 3
    ).transpose(0, 3, 1, 4, 6, 2, 5)
    repeated = np.repeat(blocks[..., None, :, :], temporal_patch_size, axis=5)
    return repeated.reshape(rows * columns, -1), (rows, columns)


def image_bank(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    *,
    count: int | None = None,
    max_patches: int | None = None,
    patch_size: int = 16,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> ImageBank:
    """A bank of images of any sizes, as numpy arrays.

    Args:
      images: resized already, where they have to be.
      count: `N`; beyond the images there are empty ones. Fix it and `max_patches` for banks that come one after the
        other, and nothing is compiled twice.
      max_patches: of one image; those of the largest unless given.

    Raises:
      ConfigError: more images or patches than that, a `max_patches` that makes no whole tokens, or as `image_patches`.
    """
    cut = [image_patches(image, patch_size, merge_size, temporal_patch_size) for image in images]
    count = len(cut) if count is None else count
    largest = max((len(patches) for patches, _ in cut), default=merge_size**2)
    max_patches = largest if max_patches is None else max_patches
    if len(cut) > count or largest > max_patches or max_patches % merge_size**2:
        raise ConfigError(
            f"{len(cut)} images of up to {largest} patches do not fit count={count}, max_patches={max_patches}; give "
            f"more, max_patches a multiple of {merge_size**2}, or smaller images"
        )
    bank = ImageBank(
        np.zeros((count, max_patches, 3 * temporal_patch_size * patch_size**2), np.float32),
        np.zeros((count, 2), np.int32),
    )
    for i, (patches, grid) in enumerate(cut):
        bank.patches[i, : len(patches)] = patches
        bank.grid[i] = grid
    return bank


def visual_ids(bank: ImageBank, index: int, vocab_size: int, merge_size: int = 2) -> Int[np.ndarray, "tokens"]:
    """The ids by which a prompt holds image `index` of a bank.

    Args:
      vocab_size: the model's, that is rows of its embedding, not the tokenizer's.

    Raises:
      ConfigError: the bank has no such image.
    """
    if not 0 <= index < len(bank.grid) or not np.all(bank.grid[index]):
        raise ConfigError(f"image {index} of a bank of {len(bank.grid)} is not there; give the index of one that is")
    count = int(np.prod(bank.grid[index])) // merge_size**2
    first = vocab_size + index * bank.room(merge_size)
    return np.arange(first, first + count, dtype=np.int32)
