"""The world of five domains as language models take it: problems as ids, pictures in one bank, models with it bound."""

from collections.abc import Sequence

import jax
import numpy as np

from experiments import language
from experiments.language import Language, LanguageModel, Problems
from opd_jax.config import fingerprint
from opd_jax.models import vlm
from opd_jax.models.decoder import Decoder
from opd_jax.models.images import ImageBank, image_bank
from opd_jax.models.vision import Vision
from opd_jax.worlds import domains as world

PICTURE = {"patch_size": 4, "temporal_patch_size": 1}
VISUAL_TOKENS = (world.IMAGE_SIZE // (PICTURE["patch_size"] * 2)) ** 2  # of one picture
PICTURED = tuple(dict.fromkeys(kind.domain for kind in world.TABLE.values() if kind.render))
ROOM = world.PROMPT_TOKENS  # a prompt with a picture is short, and fits with what it shows


def world_language() -> Language:
    return Language(
        fingerprint=fingerprint(world.WORDS),
        vocab_size=len(world.WORDS),
        stop_ids=(world.EOS,),
        pad_id=world.PAD,
        decode=world.decode,
        correct=lambda completion, problem: world.verify(problem, completion),
    )


def draw(domain: str, count: int, seed: int, levels: Sequence[int], test: bool = False) -> list[world.Problem]:
    """`count` problems of one split, uniform over levels, fixed by the seed."""
    generator = np.random.default_rng((seed, world.DOMAINS.index(domain)))
    return [world.draw(generator, domain, levels[generator.integers(len(levels))], test) for _ in range(count)]


def bank_of(problems: Sequence[world.Problem]) -> ImageBank:
    """The pictures of problems, in their order; one empty picture where there is none."""
    pictures = [problem.image for problem in problems if problem.domain in PICTURED]
    return image_bank(pictures, count=max(len(pictures), 1), max_patches=4 * VISUAL_TOKENS, **PICTURE)


def encode(problem: world.Problem, picture: int) -> np.ndarray:
    """The ids of a prompt, those of image `picture` of the bank in the place of its mark."""
    ids = world.encode(problem.prompt)
    at = np.flatnonzero(ids == world.IMAGE)
    if not at.size:
        return ids
    visual = np.arange(VISUAL_TOKENS, dtype=np.int32) + len(world.WORDS) + picture * VISUAL_TOKENS
    return np.concatenate([ids[: at[0]], visual, ids[at[0] + 1 :]])


def as_problems(problems: Sequence[world.Problem], first_picture: int = 0) -> Problems:
    """As ids, with the pictures of a bank from `first_picture` on; a problem is its own reference."""
    ids, picture = [], first_picture
    for problem in problems:
        ids.append(encode(problem, picture))
        picture += problem.domain in PICTURED
    return Problems(ids, list(problems), [world.DOMAINS.index(problem.domain) for problem in problems])


def module_of(model, pictures: int = 1) -> Decoder | vlm.VLM:
    """A model from its part of a config: with a vision tower, for so many `pictures` a row, or of text alone."""
    decoder = Decoder(**model.decoder)
    if "vision" not in model:
        return decoder
    return vlm.VLM(Vision(**model.vision), decoder, rope_sections=tuple(model.rope_sections), images_per_row=pictures)


def functions(module: Decoder | vlm.VLM, bank: ImageBank, vocab_size: int, copy: bool = True) -> LanguageModel:
    """Its functions, with the bank where it reads pictures; `copy` as of `language.functions`."""
    if isinstance(module, Decoder):
        return language.functions(module, vocab_size, copy)
    sampling_copy = module.sampling_copy if copy else language.as_they_are
    return LanguageModel(*vlm.functions(module, bank, vocab_size), module.head, vocab_size, sampling_copy)


def init(module: Decoder | vlm.VLM, bank: ImageBank, key) -> dict:
    """Random parameters: kernels at `1 / sqrt(fan in)`, positions at 0.5; the models' own 0.02 is for large widths."""
    arguments = (np.zeros((1, 2), np.int32),) + (() if isinstance(module, Decoder) else (bank,))

    def scaled(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.5 if "pos_embed" in name else 0.02
        return leaf * (size / 0.02) if leaf.ndim > 1 else leaf

    return jax.tree_util.tree_map_with_path(scaled, jax.device_get(jax.jit(module.init)(key, *arguments)["params"]))


def training_row(
    generator: np.random.Generator,
    length: int,
    pictures: int,
    domains: Sequence[str],
    styles: Sequence[str],
    levels: Sequence[int],
    pictured: dict,
) -> dict[str, np.ndarray]:
    """Training problems with their worked solutions, several in a row: tokens, response, segment_ids `[length]`.

    Args:
        pictures: most of one row.
        pictured: by domain, problems with pictures and the index of the first's in the bank.
    """
    row = {"tokens": np.zeros(length, np.int32), "response": np.zeros(length, bool)}
    row["segment_ids"] = np.zeros(length, np.int32)
    pick, used, shown, segment = lambda options: options[generator.integers(len(options))], 0, 0, 1
    while True:
        domain = pick(domains)
        if domain in pictured:
            problems, first = pictured[domain]
            index = int(generator.integers(len(problems)))
            problem, prompt, shown = problems[index], encode(problems[index], first + index), shown + 1
        else:
            problem = world.draw(generator, domain, pick(levels))
            prompt = encode(problem, 0)
        solution = np.append(world.encode(world.solution(problem, pick(styles))), world.EOS)
        end = used + len(prompt) + len(solution)
        if end > length or shown > pictures:
            return row
        row["tokens"][used:end] = np.concatenate([prompt, solution])
        row["response"][used + len(prompt) : end] = True
        row["segment_ids"][used:end] = segment
        used, segment = end, segment + 1
