"""Vision-language models of the Qwen3-VL family: a tower in front of a `Decoder`, for the same samplers and losses.

Images are part of a prompt through token ids, which point into an `images.ImageBank` (how, is said there). The bank is
an argument beside the parameters: what takes a decoder's functions takes those of `functions(module, bank)`.

From the ids alone the model finds which images a row holds and where: it gathers their pixels, runs the tower on them,
and puts the tokens that come out in the place of embeddings. A call with one token a row, a step of decoding, has
text only, and no tower in its program; a call with more has it, also where no row holds an image.

Rotary positions are three (M-RoPE, arXiv 2409.12191): time, row and column. A text token has the same three, one more
than the largest before it; a token of an image adds its row and column to the position at which the image begins. So
after an image positions lag behind slots of the cache, and the cache keeps what follows each token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from opd_jax import sharding
from opd_jax.models import attention, decoder, vision
from opd_jax.models.attention import write_slots
from opd_jax.models.decoder import Decoder, places_in
from opd_jax.models.images import ImageBank
from opd_jax.models.vision import Vision, VisionTower

RULES = vision.RULES + decoder.RULES  # for `decoder.partition_rules`


class Marks(NamedTuple):
    """Token ids with a meaning in prompts; the defaults are Qwen3-VL's. The model itself reads none of them."""

    vision_start: int = 151_652  # before the tokens of an image
    vision_end: int = 151_653  # after them
    image: int = 151_655  # what transformers has in the place of every token of an image; never in prompts here
    video: int = 151_656


class Cache(NamedTuple):
    """An `attention.Cache`, and where its tokens are for the rope."""

    text: attention.Cache
    following: Int[Array, "1 B length"]  # the rope position of a text token that comes after the token in a slot


class VLM(nn.Module):
    """Next-token logits of text and images. Weights come from `opd_jax.models.hf.load_vlm`.

    `module.apply({"params": params}, tokens, bank, segment_ids=None) -> logits`; `hidden` and `decode` are as those of
    `Decoder`, with the bank; `vocab_size` is the decoder's, and ids from there on are tokens of images. The decoder's
    `dtype`, `remat` and `attention` are the tower's too, but the attention, which there is XLA's.

    | case | result |
    | --- | --- |
    | the same image in several rows, or twice in one | as if there were two |
    | NaN in images, or in patches, that no row holds | changes nothing |
    | images without text between them | are told apart, which transformers does not |
    | more images in a row than `images_per_row` | NaN, as a token beyond the vocabulary gives |
    | an id beyond the bank, or beyond the tokens of its image | NaN |
    | a call with S = 1 (or images_per_row=0) whose token is an image's | NaN: a prompt must end with text |

    NaN is in the states of the token, and by attention in all logits of its row (with "splash" in those from it on);
    other rows are as they would be.
    """

    vision: Vision
    language_model: Decoder
    rope_sections: tuple[int, int, int] = (24, 20, 20)  # pairs of a head that turn by time, row and column; interleaved
    images_per_row: int = 1  # M; of a packed row, all its segments' together. The tower runs on M images a row
    marks: Marks = Marks()

    @property
    def vocab_size(self) -> int:
        return self.language_model.vocab_size

    def setup(self):
        text = self.language_model
        _check(self)
        self.visual = VisionTower(self.vision, text.width, text.dtype, text.remat)

    def __call__(
        self, tokens: Int[Array, "B S"], bank: ImageBank, segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        return self.language_model.logits(self.hidden(tokens, bank, segment_ids))

    def hidden(
        self, tokens: Int[Array, "B S"], bank: ImageBank, segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """The states after the final norm, in `dtype`: `logits = hidden @ head(params)`, for losses without logits."""
        positions = places_in(tokens, segment_ids)
        seen = _look(tokens, bank, self.vocab_size, self.vision.merge_size)
        first = jnp.arange(tokens.shape[1])[None] - positions  # of each token's segment
        start = -jnp.take_along_axis(seen.before, first, axis=1)
        x, added = self._embed(tokens, bank, seen)
        return self.language_model.states(x, self._places(seen, start), positions, segment_ids, added=added)[0]

    def decode(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], cache: Cache, bank: ImageBank
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """Logits of further tokens, and the cache with them in it; see `Decoder.decode`.

        Args:
          tokens: a prompt, a part of one, also one that begins within an image; or S = 1 token of each row.
          positions: slots of the cache, consecutive in a row. What slots beyond a row's first hold is not read.
        """
        seen = _look(tokens, bank, self.vocab_size, self.vision.merge_size)
        slot = positions[:, :1]
        before = jnp.take_along_axis(cache.following[0], jnp.maximum(slot - 1, 0), axis=1)
        start = jnp.where(slot > 0, before, 0)
        x, added = self._embed(tokens, bank, seen)
        hidden, text = self.language_model.states(
            x, self._places(seen, start), positions, cache=cache.text, added=added
        )
        following = write_slots(cache.following, 0, positions, start + seen.before + seen.advance)
        return self.language_model.logits(hidden), Cache(text, following)

    @nn.nowrap
    def head(self, params: Any) -> Float[Array, "D V"]:
        """The kernel of the output projection, a plain function of `params`."""
        return self.language_model.head(params["language_model"])

    @nn.nowrap
    def sampling_copy(self, params: Any) -> Any:
        """`params` as decoding reads them, a plain function of a tree that holds them: `sharding.gathered`."""
        return sharding.gathered(params, RULES, decoder.NARROWED, self.language_model.dtype)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of up to `length` tokens, images and prompt included."""
        return Cache(self.language_model.init_cache(batch, length), jnp.zeros((1, batch, length), jnp.int32))

    def _places(self, seen: "_Seen", start: Int[Array, "B #S"]) -> Int[Array, "B S half"]:
        """The rope position by which each pair of a head turns: time, row, column, time, ... while sections last."""
        pair = np.arange(self.language_model.head_dim // 2)
        axis = np.where(pair < 3 * np.asarray(self.rope_sections)[pair % 3], pair % 3, 0)
        return (start + seen.before)[..., None] + seen.offset[..., axis]

    def _embed(self, tokens: Array, bank: ImageBank, seen: "_Seen"):
        """Embeddings, of images where there are, flat, and what DeepStack adds to the first layers, `[n, N, D]`."""
        text, runs = self.language_model, max(self.images_per_row, int(self.is_initializing()))
        if runs == 0 or (tokens.shape[1] == 1 and not self.is_initializing()):
            return text.embed(tokens), None
        if bank.patches.shape[2] != self.vision.patch_dim or bank.patches.shape[1] % self.vision.merge_size**2:
            raise ValueError(f"a bank of {bank.patches.shape} is not for patches of {self.vision}; cut images for it")
        outputs = self.visual(*_held(seen, bank, runs))  # [1 + n, B * M, room, D]
        room, visual = outputs.shape[2], seen.image >= 0
        index = jnp.clip(seen.run * room + seen.token, 0, runs * room - 1)
        pick = lambda output: jnp.take_along_axis(output.reshape(len(tokens), -1, text.width), index[..., None], axis=1)
        shown = jnp.where(visual[None, ..., None], jax.vmap(pick)(outputs), 0)
        wrong = visual & ~(seen.known & (seen.run < runs))
        x = text.embed(jnp.where(visual, 0, tokens)).reshape(shown.shape[1:])
        x = jnp.where(visual[..., None], jnp.where(wrong[..., None], jnp.nan, shown[0]), x)
        flat = lambda a: a.reshape(*a.shape[:-3], -1, text.width)
        return flat(x), flat(shown[1:]) if self.vision.deepstack else None


class Functions(NamedTuple):
    """A model with a bank, as samplers and losses take it."""

    hidden: Partial  # (params, tokens, segment_ids) -> [B, S, D]
    head: Callable[[Any], Array]  # params -> [D, vocab_size]
    decode: Partial  # (params, tokens, positions, cache) -> ([B, S, vocab_size], cache)
    init_cache: Callable[[int, int], Cache]


def functions(module: VLM, bank: ImageBank, vocab_size: int | None = None) -> Functions:
    """The model's functions, which carry `bank` as an argument: another bank of the same shapes compiles nothing.

    Args:
      bank: arrays, or their shapes, to compile with.
      vocab_size: logits are cut to it, where the tokenizer has fewer ids than the embedding rows. Images' ids begin at
        `module.vocab_size` all the same.
    """
    bank = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf), bank)
    width = module.vocab_size if vocab_size is None else vocab_size
    return Functions(
        Partial(_Hidden(module), bank), _Head(module, width), Partial(_Decode(module, width), bank), module.init_cache
    )


class _Hidden(NamedTuple):  # these three are equal where their fields are: so jit knows them again
    module: VLM

    def __call__(self, bank, params, tokens, segment_ids):
        return self.module.apply({"params": params}, tokens, bank, segment_ids, method="hidden")


class _Head(NamedTuple):
    module: VLM
    vocab_size: int

    def __call__(self, params):
        return self.module.head(params)[:, : self.vocab_size]


class _Decode(NamedTuple):
    module: VLM
    vocab_size: int

    def __call__(self, bank, params, tokens, positions, cache):
        logits, cache = self.module.apply({"params": params}, tokens, positions, cache, bank, method="decode")
        return logits[..., : self.vocab_size], cache


class _Seen(NamedTuple):
    """What the ids of a batch say."""

    image: Int[Array, "B S"]  # of the bank; -1 for text
    token: Int[Array, "B S"]  # of the image
    known: Bool[Array, "B S"]  # the bank has such an image, and it such a token
    opens: Bool[Array, "B S"]  # here an image begins, or goes on from an earlier call
    run: Int[Array, "B S"]  # which of its row's images, for its tokens
    before: Int[Array, "B S"]  # rope positions that the tokens before it, of this call, took up
    advance: Int[Array, "B S"]  # rope positions it takes up: 1, of an image the last token the longer side, others none
    offset: Int[Array, "B S 3"]  # time, row and column within the image; 0 for text


def _look(tokens: Int[Array, "B S"], bank: ImageBank, vocab_size: int, merge: int) -> _Seen:
    visual = tokens >= vocab_size
    image, token = jnp.divmod(tokens - vocab_size, bank.room(merge))
    image = jnp.where(visual, image, -1)
    previous = jnp.pad(image[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    opens = visual & (image != previous)
    rows, columns = jnp.moveaxis(jnp.asarray(bank.grid)[image] // merge, -1, 0)
    known = (image < len(bank.grid)) & (token < rows * columns)
    columns = jnp.maximum(columns, 1)
    advance = jnp.where(visual, jnp.where(token == rows * columns - 1, jnp.maximum(rows, columns), 0), 1)
    offset = jnp.stack([jnp.zeros_like(token), token // columns, token % columns], axis=-1)
    return _Seen(
        image=image,
        token=token,
        known=known,
        opens=opens,
        run=jnp.cumsum(opens, axis=1) - 1,
        before=jnp.cumsum(advance, axis=1) - advance,
        advance=advance,
        offset=jnp.where(visual[..., None], offset, 0),
    )


def _held(seen: _Seen, bank: ImageBank, runs: int) -> ImageBank:
    """The first `runs` images of every row, row by row; zeros where there are fewer, and beyond an image's patches."""
    here = seen.opens[..., None] & (seen.run[..., None] == jnp.arange(runs)[None, None])
    image = jnp.where(here, seen.image[..., None], -1).max(axis=1).reshape(-1)
    found = (image >= 0) & (image < len(bank.grid))
    grid = jnp.where(found[:, None], jnp.asarray(bank.grid)[image], 0)
    inside = jnp.arange(bank.patches.shape[1])[None] < grid.prod(axis=1)[:, None]
    return ImageBank(jnp.where(inside[..., None], jnp.asarray(bank.patches)[image], 0), grid)


def _check(module: VLM) -> None:
    if module.images_per_row < 0:
        raise ValueError(f"images_per_row={module.images_per_row}; give 0 or more")
