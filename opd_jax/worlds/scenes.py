"""A small world of captioned pictures: objects that are counted, coloured and placed, and signs with lettering.

A picture is 24 x 24 RGB in [-1, 1] (numpy, `[H, W, 3]`), drawn without anti-aliasing, so every clean pixel is one of
eight colours. A caption is a sentence of a closed grammar:

    two red circles left of a blue square on stripes
    a sign that says "AX" on checks

`parse` and `Scene.caption` are inverse; `draw_scene` draws a random scene of a task; `render` paints one of the many
pictures a scene allows; `web_pair` is what a crawler would find: captions that are sometimes wrong and pictures that
are sometimes damaged, which is what makes a model pretrained on them mediocre. The module knows nothing of training.
"""

import functools
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Int
from PIL import Image, ImageDraw, ImageFont

from opd_jax.types import Condition

SIZE = 24
CELL = 8
COLORS = {
    "red": (0.86, 0.14, 0.16),
    "green": (0.12, 0.68, 0.22),
    "blue": (0.16, 0.32, 0.95),
    "yellow": (0.98, 0.84, 0.10),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("plain", "stripes", "checks")
LETTERS = "ACEHLOTX"
TEXT_LENGTH = 2
GROUND = ((0.36, 0.36, 0.40), (0.58, 0.58, 0.62))  # the two tones a background is made of
PLATE, INK = (0.97, 0.95, 0.90), (0.05, 0.05, 0.08)
PALETTE = np.array([*COLORS.values(), *GROUND, PLATE, INK], np.float32)  # [8, 3] in [0, 1]
FONTS = (("DejaVuSans-Bold.ttf", 10), ("DejaVuSansMono-Bold.ttf", 11))  # shipped with matplotlib
SLOT = (8, 8)  # height and width of the box one letter is drawn in
PLATE_SIZE = (SLOT[0] + 2, TEXT_LENGTH * (SLOT[1] + 1) + 1)
PLATE_ROWS, PLATE_COLUMNS = (1, 7, 13), (0, 2, 4)
HELD_OUT = (("green", "triangle"), ("yellow", "cross"))  # combinations no training caption names

TASKS = ("composition", "ocr")
CATEGORIES = ("single", "colors", "counting", "two", "position", "attribute", "mixed")

WORDS = (
    "<pad>", "a", "two", "three", "four", *COLORS, *SHAPES, *(PLURALS[s] for s in SHAPES), "left", "right", "of",
    "above", "below", "and", "on", *BACKGROUNDS[1:], "sign", "that", "says", '"', *LETTERS,
)  # fmt: skip
CONTEXT_LENGTH = 10
CONTEXT_DIM, POOLED_DIM = len(WORDS) + CONTEXT_LENGTH, len(WORDS)
Task = Literal["composition", "ocr"]


class Group(NamedTuple):
    """`count` objects of one shape; `color` None means any colour."""

    count: int
    color: str | None
    shape: str

    @property
    def phrase(self) -> str:
        noun = self.shape if self.count == 1 else PLURALS[self.shape]
        return " ".join(word for word in (COUNTS[self.count - 1], self.color, noun) if word)


class Scene(NamedTuple):
    """What a caption says: one or two groups and perhaps their relation, or the text of a sign; and the background."""

    groups: tuple[Group, ...] = ()
    relation: str | None = None
    text: str | None = None
    background: str = "plain"

    @property
    def task(self) -> Task:
        return "ocr" if self.text else "composition"

    @property
    def caption(self) -> str:
        if self.text:
            body = f'a sign that says "{self.text}"'
        else:
            body = f" {self.relation or 'and'} ".join(group.phrase for group in self.groups)
        return body if self.background == "plain" else f"{body} on {self.background}"

    @property
    def is_test(self) -> bool:
        """Whether the caption belongs to the test split: one in six by hash, whatever its background, or held out."""
        unseen = any((group.color, group.shape) in HELD_OUT for group in self.groups)
        return unseen or zlib.crc32(self._replace(background="plain").caption.encode()) % 6 == 0


_GROUP = r"(a|two|three|four) (?:(\w+) )?(circle|square|triangle|cross)(?:s|es)?"
_SCENE = re.compile(
    rf'^(?:{_GROUP}(?: (left of|right of|above|below|and) {_GROUP})?|a sign that says "([A-Z]+)")(?: on (\w+))?$'
)


def parse(caption: str) -> Scene:
    """Reads a caption of the grammar. Raises: ValueError that quotes the caption and says what can be written."""
    text = " ".join(caption.split())
    found = _SCENE.match(text)
    if not found:
        raise ValueError(
            f"cannot read the caption {caption!r}: "
            f"write '[a|two|three|four] [{'|'.join(COLORS)}]? [{'|'.join(SHAPES)}]', "
            f"two of these joined by '{' | '.join((*RELATIONS, 'and'))}', or 'a sign that says \"AX\"', "
            f"then optionally 'on {'|'.join(BACKGROUNDS[1:])}'"
        )
    count, color, shape, relation, count2, color2, shape2, letters, background = found.groups()
    groups = tuple(
        Group(COUNTS.index(n) + 1, c, s) for n, c, s in ((count, color, shape), (count2, color2, shape2)) if n
    )
    scene = Scene(groups, None if relation == "and" else relation, letters, background or "plain")
    for value, allowed in (*((g.color, (None, *COLORS)) for g in groups), (scene.background, BACKGROUNDS)):
        if value not in allowed:
            raise ValueError(f"unknown word {value!r} in {caption!r}: known are {', '.join(map(str, allowed))}")
    if letters and (len(letters) != TEXT_LENGTH or set(letters) - set(LETTERS)):
        raise ValueError(f"the sign {letters!r} cannot be drawn: write {TEXT_LENGTH} letters of {LETTERS}")
    if scene.caption != text:
        raise ValueError(f"the caption {caption!r} mixes singular and plural: did you mean {scene.caption!r}?")
    return scene


def tokenize(caption: str) -> np.ndarray:
    """Word indices `[CONTEXT_LENGTH]` int32, padded with 0. Raises: ValueError naming an unknown word."""
    words = [w for part in caption.split() for w in (re.findall(r'"|[A-Z]', part) if '"' in part else [part])]
    unknown = [word for word in words if word not in WORDS]
    if unknown or len(words) > CONTEXT_LENGTH:
        raise ValueError(f"cannot encode {caption!r}: unknown words {unknown} or more than {CONTEXT_LENGTH} words")
    return np.array([WORDS.index(w) for w in words] + [0] * (CONTEXT_LENGTH - len(words)), np.int32)


def _pick(rng: np.random.Generator, options: Sequence):
    """A uniform choice; ten times faster than `rng.choice` on short sequences."""
    return options[rng.integers(len(options))]


def _draw_group(rng: np.random.Generator, category: str, shape: str) -> Group:
    colored = category in ("colors", "attribute", "mixed") or (category != "single" and rng.random() < 0.5)
    most = {"counting": 4, "mixed": 3}.get(category, 1)
    count = int(rng.integers(2 if category == "counting" else 1, most + 1))
    return Group(count, _pick(rng, tuple(COLORS)) if colored else None, shape)


def draw_scene(rng: np.random.Generator, task: Task, test: bool = False) -> Scene:
    """A random scene of a task from the train or the test split, uniform over categories (by rejection)."""
    category = _pick(rng, CATEGORIES)
    while True:
        background = _pick(rng, BACKGROUNDS)
        if task == "ocr":
            scene = Scene(text="".join(_pick(rng, LETTERS) for _ in range(TEXT_LENGTH)), background=background)
        else:
            pair = category in ("two", "position", "attribute", "mixed")
            shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[: 2 if pair else 1]]
            groups = tuple(_draw_group(rng, category, shape) for shape in shapes)
            relation = _pick(rng, RELATIONS) if category in ("position", "mixed") else None
            scene = Scene(groups, relation, None, background)
        if scene.is_test == test:
            return scene


def category(scene: Scene) -> str:
    """The GenEval-like category a scene is reported under."""
    if scene.text:
        return "text"
    if len(scene.groups) == 1:
        group = scene.groups[0]
        return "counting" if group.count > 1 else "colors" if group.color else "single"
    if any(group.count > 1 for group in scene.groups):
        return "mixed"
    if scene.relation:
        return "position"
    return "attribute" if all(group.color for group in scene.groups) else "two"


@functools.cache
def shape_masks() -> np.ndarray:
    """The four shapes as bool masks `[4, 7, 7]`, in the order of SHAPES."""
    y, x = np.mgrid[-3:4, -3:4]
    circle = x**2 + y**2 <= 10
    square = np.ones((7, 7), bool)
    triangle = np.abs(x) <= (y + 3) // 2
    cross = (np.abs(x) <= 1) | (np.abs(y) <= 1)
    return np.stack([circle, square, triangle, cross])


@functools.cache
def glyph_masks() -> np.ndarray:
    """Every letter in every font as bool masks `[fonts, letters, 8, 8]`, centred in its slot."""
    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    masks = np.zeros((len(FONTS), len(LETTERS), *SLOT), bool)
    for f, (name, points) in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / name), points)
        for i, letter in enumerate(LETTERS):
            canvas = Image.new("1", (24, 24))
            pen = ImageDraw.Draw(canvas)
            pen.fontmode = "1"
            pen.text((6, 6), letter, fill=1, font=font)
            ys, xs = np.where(np.array(canvas))
            ink = np.array(canvas)[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            top, left = (SLOT[0] - ink.shape[0]) // 2, (SLOT[1] - ink.shape[1]) // 2
            masks[f, i, top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return masks


@functools.cache
def background_tones() -> np.ndarray:
    """Which of the two ground tones each pixel has, bool `[backgrounds, SIZE, SIZE]`."""
    y, x = np.mgrid[:SIZE, :SIZE] // 4
    return np.stack([np.zeros((SIZE, SIZE), bool), y % 2 == 1, (x + y) % 2 == 1])


def _cells(rng: np.random.Generator, scene: Scene) -> list[tuple[int, int]]:
    """Distinct cells of the 3 x 3 grid, group after group, that honour the scene's relation."""
    n = SIZE // CELL
    axis = 1 if scene.relation in ("left of", "right of") else 0
    counts = [group.count for group in scene.groups]
    while True:
        cells = [(int(c) // n, int(c) % n) for c in rng.permutation(n * n)[: sum(counts)]]
        if scene.relation is None:
            return cells
        first, second = (  # where either group lies along the relation's axis
            [cell[axis] for cell in part] for part in (cells[: counts[0]], cells[counts[0] :])
        )
        before = max(first) < min(second)
        after = min(first) > max(second)
        if before if scene.relation in ("left of", "above") else after:
            return cells


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One of the pictures a scene allows: free positions, free colours where none is named, a random font.

    Returns: float32 `[24, 24, 3]` in [-1, 1].
    """
    tones = background_tones()[BACKGROUNDS.index(scene.background)]
    image = np.where(tones[..., None], GROUND[1], GROUND[0])
    if scene.text:
        top, left = _pick(rng, PLATE_ROWS), _pick(rng, PLATE_COLUMNS)
        image[top : top + PLATE_SIZE[0], left : left + PLATE_SIZE[1]] = PLATE
        font = glyph_masks()[rng.integers(len(FONTS))]
        for i, letter in enumerate(scene.text):
            x = left + 1 + i * (SLOT[1] + 1)
            image[top + 1 : top + 1 + SLOT[0], x : x + SLOT[1]][font[LETTERS.index(letter)]] = INK
    cells = iter(_cells(rng, scene) if scene.groups else ())
    dy, dx = rng.integers(0, 2, 2)
    for group in scene.groups:
        for _ in range(group.count):
            row, column = next(cells)
            y, x = row * CELL + dy, column * CELL + dx
            color = COLORS[group.color or _pick(rng, tuple(COLORS))]
            image[y : y + 7, x : x + 7][shape_masks()[SHAPES.index(group.shape)]] = color
    return (image * 2 - 1).astype(np.float32)


def mistake(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene with one thing drawn again, perhaps the same: a letter, a count, a colour, a shape or the relation."""
    if scene.text:
        letters = list(scene.text)
        letters[rng.integers(len(letters))] = _pick(rng, LETTERS)
        return scene._replace(text="".join(letters))
    i = int(rng.integers(len(scene.groups)))
    group = scene.groups[i]
    kinds = ["shape", "count"] + ["color"] * (group.color is not None) + ["relation"] * (scene.relation is not None)
    match _pick(rng, kinds):
        case "count":
            group = group._replace(count=int(np.clip(group.count + _pick(rng, (-1, 1)), 1, 3)))
        case "color":
            group = group._replace(color=_pick(rng, tuple(COLORS)))
        case "shape":
            taken = {g.shape for g in scene.groups}
            group = group._replace(shape=_pick(rng, [s for s in SHAPES if s not in taken]))
        case "relation":
            scene = scene._replace(relation=_pick(rng, RELATIONS))
    return scene._replace(groups=(*scene.groups[:i], group, *scene.groups[i + 1 :]))


def damage(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A damaged copy of a picture `[H, W, 3]` in [-1, 1]: noise, a smear, speckle, or an erased background."""
    match int(rng.integers(4)):
        case 0:
            image = image + rng.normal(0, rng.uniform(0.15, 0.4), image.shape)
        case 1:
            axis = int(rng.integers(2))
            image = np.mean([np.roll(image, shift, axis) for shift in range(-1, int(rng.integers(1, 3)) + 1)], axis=0)
        case 2:
            where = rng.random(image.shape[:2]) < rng.uniform(0.08, 0.2)
            image = np.where(where[..., None], PALETTE[rng.integers(len(PALETTE), size=where.shape)] * 2 - 1, image)
        case 3:
            colors = np.array(GROUND) * 2 - 1
            ground = np.abs(image[:, :, None] - colors).max(-1).min(-1) < 0.02
            image = np.where(ground[..., None], rng.uniform(-0.9, 0.9), image)
    return np.clip(image, -1, 1).astype(np.float32)


def web_pair(
    rng: np.random.Generator,
    wrong: Mapping[Task, float],
    damaged: float,
    unrelated: Mapping[Task, float] | None = None,
    tasks: Sequence[Task] = TASKS,
) -> tuple[str, np.ndarray]:
    """A training caption of one of `tasks` and a picture, as a crawler finds them.

    With the probability `wrong` of its task one thing is drawn without regard to the caption, with probability
    `damaged` the picture is spoilt, and with the probability `unrelated` of its task it shows another scene altogether.
    """
    scene = draw_scene(rng, tasks[int(rng.integers(len(tasks)))])
    image = render(mistake(scene, rng) if rng.random() < wrong[scene.task] else scene, rng)
    image = damage(image, rng) if rng.random() < damaged else image
    if unrelated and rng.random() < unrelated[scene.task]:
        return draw_scene(rng, scene.task).caption, image
    return scene.caption, image


def caption_of(tokens: np.ndarray) -> str:
    """The caption that `tokenize` encoded."""
    words = " ".join(WORDS[i] for i in tokens if i)
    return re.sub(r'" ([A-Z ]+) "', lambda m: f'"{m[1].replace(" ", "")}"', words)


def encode(tokens: Int[Array, "B L"]) -> Condition:
    """The frozen text encoder: words and their positions, one-hot, at unit scale once a dense layer has summed them.

    Returns: context `[B, L, V + L]` and pooled `[B, V]`, the bag of words; float32.
    """
    words = jax.nn.one_hot(tokens, len(WORDS))
    places = jnp.broadcast_to(jnp.eye(CONTEXT_LENGTH), (tokens.shape[0], CONTEXT_LENGTH, CONTEXT_LENGTH))
    context = jnp.concatenate([words, places], axis=-1) * np.sqrt(CONTEXT_DIM)
    bag = jnp.where((tokens > 0)[..., None], words, 0.0).sum(1)
    return Condition(context, bag * np.sqrt(POOLED_DIM / 6))  # a caption has about six words
