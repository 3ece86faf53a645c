"""Three rewards for pictures of `scenes`, each in [0, 1] and each computed from pixels and the caption alone.

| reward | question | idea |
| --- | --- | --- |
| `composition` | the right objects, so many, so coloured, so placed, and nothing else? | GenEval, arXiv:2310.11513 |
| `ocr` | 1 - edit distance / length of the sign read from the picture | Flow-GRPO, arXiv:2505.05470 |
| `quality` | near the clean pictures? noise, smears, debris, an erased background cost | |

Images are float `[B, 24, 24, 3]` in [-1, 1], clipped first. Everything is plain numpy on the host: about a millisecond
for four images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from opd_jax.worlds import scenes
from opd_jax.worlds.scenes import COLORS, LETTERS, PALETTE, RELATIONS, SHAPES, SIZE, SLOT, Scene

NEAR = 0.1  # distance in RGB, 0 to 1 a channel, at which a pixel counts exp(-1/2)
SMALLEST = 12  # pixels of the smallest object that is recognised
SHAPE_MATCH = 0.65  # intersection over union from which an object has a shape
GLYPH_SEEN, GLYPH_SURE = 0.6, 0.85  # normalised correlation at which a letter is noticed, and fully credited
GLYPH_CONTRAST = 0.15  # standard deviation of luminance (0 to 1) that ink on a plate has at least
LEAST_GROUND = 0.4  # share of a picture that is background however much is drawn on it
_GROUND = len(COLORS)  # palette indices: colours, then two ground tones, then plate, then ink


class Object(NamedTuple):
    """One recognised object."""

    color: str
    shape: str
    y: float
    x: float


class Seen(NamedTuple):
    """What a batch of pictures shows, pixel by pixel and object by object."""

    label: np.ndarray  # [B, H, W] index of the nearest palette colour
    near: np.ndarray  # [B, H, W] exp(-d^2 / 2 NEAR^2) of the distance d to it
    fit: np.ndarray  # [B, H, W] how well a foreground pixel's object fits a clean shape; 1 elsewhere
    objects: list[list[Object]]


def look(images: np.ndarray) -> Seen:
    """Recognises palette colours and, as connected parts of one colour, objects."""
    pixels = (np.clip(np.asarray(images, np.float32), -1, 1) + 1) / 2
    distance = np.square(pixels[..., None, :] - PALETTE).sum(-1)
    label = distance.argmin(-1)
    near = np.exp(-distance.min(-1) / (2 * NEAR**2))
    crisp = np.where(near > 0.05, label, -1)  # a pixel of no palette colour belongs to no object
    planes = crisp[:, None] == np.arange(len(COLORS))[:, None, None]  # [B, colours, H, W]
    structure = np.zeros((3, 3, 3, 3), bool)
    structure[1, 1] = scipy.ndimage.generate_binary_structure(2, 1)
    parts, count = scipy.ndimage.label(planes, structure)
    fit = np.ones(label.shape, np.float32)
    objects: list[list[Object]] = [[] for _ in label]
    slices = scipy.ndimage.find_objects(parts)
    matches = _match_shapes(parts, slices, count)
    for number, (b, color, ys, xs) in enumerate(slices):
        mask = parts[b.start, color.start, ys, xs] == number + 1
        best = int(matches[number].argmax())
        match = float(matches[number, best]) if mask.sum() >= SMALLEST else 0.0
        fit[b.start, ys, xs][mask] = match
        if match >= SHAPE_MATCH:
            y, x = (ys.start + ys.stop - 1) / 2, (xs.start + xs.stop - 1) / 2
            objects[b.start].append(Object(tuple(COLORS)[color.start], SHAPES[best], y, x))
    return Seen(label, near, fit, objects)


def _match_shapes(parts: np.ndarray, slices: list, count: int) -> np.ndarray:
    """Intersection over union of every part with every shape, the best of 25 placements: `[parts, shapes]`."""
    windows = np.zeros((count, 11, 11), np.float32)
    for number, (b, color, ys, xs) in enumerate(slices):
        mask = parts[b.start, color.start, ys, xs] == number + 1
        top, left = max(0, (11 - mask.shape[0]) // 2), max(0, (11 - mask.shape[1]) // 2)
        cut = mask[:11, :11]
        windows[number, top : top + cut.shape[0], left : left + cut.shape[1]] = cut
        windows[number] *= cut.sum() == mask.sum()  # larger than any object
    shapes = np.zeros((len(SHAPES), 5, 5, 11, 11), np.float32)
    for dy in range(5):
        for dx in range(5):
            shapes[:, dy, dx, dy : dy + 7, dx : dx + 7] = scenes.shape_masks()
    inside = windows.reshape(count, 121) @ shapes.reshape(len(SHAPES) * 25, 121).T
    inside = inside.reshape(count, len(SHAPES), 25).max(-1)
    union = windows.sum((1, 2))[:, None] + scenes.shape_masks().sum((1, 2)) - inside
    return inside / union


def composition(images: np.ndarray, captions: Sequence[str], strict: bool = True) -> np.ndarray:
    """Whether the picture shows what the caption counts, colours and places. float32 `[B]`.

    `strict` is the benchmark: 1 where every group has its exact count (and colour), the relation holds between all
    pairs and no other object is there, else 0. Otherwise the mean of the parts, to learn from: per group
    `1 - |n - n_seen| / n` (not below 0) for shape and again for shape and colour, the relation 0 or 1, and one part for
    the absence of other objects. A caption without objects scores 0.
    """
    seen = look(images).objects
    return np.array([_score(scenes.parse(c), objects, strict) for c, objects in zip(captions, seen)], np.float32)


def _score(scene: Scene, objects: list[Object], strict: bool) -> float:
    if not scene.groups:
        return 0.0
    parts, members = [], []
    for group in scene.groups:
        shaped = [o for o in objects if o.shape == group.shape]
        right = [o for o in shaped if group.color in (None, o.color)]
        parts += [max(0.0, 1 - abs(group.count - len(some)) / group.count) for some in (shaped, right)]
        members.append(right)
    if scene.relation:
        parts.append(float(all(members) and _holds(scene.relation, *members)))
    wanted = sum(group.count for group in scene.groups)
    parts.append(max(0.0, 1 - max(0, len(objects) - wanted) / wanted) if objects else 0.0)
    return float(min(parts) == 1.0) if strict else float(np.mean(parts))


def _holds(relation: str, first: list[Object], second: list[Object]) -> bool:
    axis = "x" if relation in RELATIONS[:2] else "y"
    a, b = ([getattr(o, axis) for o in part] for part in (first, second))
    return max(a) < min(b) if relation in ("left of", "above") else min(a) > max(b)


def ocr(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """1 - edit distance / length of the sign against the caption's text, float32 `[B]`; 0 where the caption has none.

    A letter that is seen but unclear is credited in part (`GLYPH_SEEN` to `GLYPH_SURE`), so a noisy glyph is no cliff.
    """
    texts = [scenes.parse(caption).text or "" for caption in captions]
    return np.array([_likeness(target, found) for target, found in zip(texts, read(images))], np.float32)


def read(images: np.ndarray) -> list[list[tuple[str, float]]]:
    """The letters in every picture from left to right, each with its credit in (0, 1]."""
    luminance = (np.clip(np.asarray(images, np.float32), -1, 1).mean(-1) + 1) / 2
    height, width = SLOT[0] + 2, SLOT[1] + 2  # a letter and one pixel of plate around it
    patches = np.lib.stride_tricks.sliding_window_view(luminance, (height, width), axis=(1, 2))
    batch, rows, columns = patches.shape[:3]
    patches = patches.reshape(batch, rows, columns, -1)
    centred = patches - patches.mean(-1, keepdims=True)
    spread = centred.std(-1)
    glyphs = -np.pad(scenes.glyph_masks().astype(np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)))
    glyphs = glyphs.reshape(-1, height * width)
    glyphs = (glyphs - glyphs.mean(-1, keepdims=True)) / glyphs.std(-1, keepdims=True)
    score = centred @ glyphs.T / (height * width * np.maximum(spread, 1e-6)[..., None])
    score = np.where((spread > GLYPH_CONTRAST)[..., None], score, 0.0)
    score = score.reshape(batch, rows, columns, -1, len(LETTERS)).max(3)
    found: list[list[tuple[int, str, float]]] = [[] for _ in range(batch)]
    for _ in range(2 * scenes.TEXT_LENGTH):  # the best glyph, then the best that does not overlap it, and so on
        best = score.reshape(batch, -1).argmax(-1)
        for b, (y, x, letter) in enumerate(zip(*np.unravel_index(best, score.shape[1:]))):
            if (value := score[b, y, x, letter]) >= GLYPH_SEEN:
                credit = min(1.0, 0.1 + 0.9 * (value - GLYPH_SEEN) / (GLYPH_SURE - GLYPH_SEEN))
                found[b].append((int(x), LETTERS[letter], float(credit)))
                score[b, max(0, y - 7) : y + 8, max(0, x - 6) : x + 7] = 0.0
    return [[(letter, credit) for _, letter, credit in sorted(letters)] for letters in found]


def _likeness(target: str, found: list[tuple[str, float]]) -> float:
    """1 - weighted edit distance / length, where a right letter of credit c costs 1 - c."""
    if not target:
        return 0.0
    row = np.arange(len(found) + 1.0)
    for letter in target:
        new = [row[0] + 1]
        for j, (other, credit) in enumerate(found):
            change = row[j] + (1 - credit if other == letter else 1)
            new.append(min(change, row[j + 1] + 1, new[-1] + 1))
        row = np.array(new)
    return 1 - min(row[-1], len(target)) / len(target)


def quality(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Nearness to the manifold of clean pictures, float32 `[B]`: the mean over pixels of how clean each is, squared.

    A pixel is as clean as its nearest palette colour is near; a pixel of an object counts as much as the object fits a
    clean shape; a ground pixel counts only where it has the tone of the background that the caption asks for.
    An empty picture scores 0, however clean, and so does one without a background. The square spreads the upper end,
    where pictures differ.
    """
    seen = look(images)
    names = [scenes.BACKGROUNDS.index(scenes.parse(caption).background) for caption in captions]
    tone = scenes.background_tones()[names]
    ground = (seen.label == _GROUND) | (seen.label == _GROUND + 1)
    fits = np.where(ground, seen.label == _GROUND + tone, seen.fit)
    drawn = np.minimum(1.0, (~ground * seen.near).sum((1, 2)) / SMALLEST)
    standing = np.minimum(1.0, (ground * seen.near * fits).sum((1, 2)) / (LEAST_GROUND * SIZE**2))
    clean = (seen.near * fits).sum((1, 2)) / SIZE**2
    return (drawn * standing * clean**2).astype(np.float32)


REWARDS = ("composition", "ocr", "quality")


def reward(name: str, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """The reward to learn from, by name: `composition` with partial credit, the others as they are reported."""
    if name == "composition":
        return composition(images, captions, strict=False)
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}: choose one of {', '.join(REWARDS)}")
    return {"ocr": ocr, "quality": quality}[name](images, captions)
