"""Charts of `domains`: bars of different colours, 1 to 9 units high, and questions about them (`domains_readings`).

A picture is 32 x 32 and made of patches of 4 x 4. A bar stands in one column of patches, in its left three pixels, next
to the bar before it; the first is in one of the columns that leave room for the others. A unit is three pixels high and
all bars stand on row 30, so that a height is the number of coloured pixels of a column and no patch has two colours.
Around them vary the background, lines at heights 3, 6 and 9, and an axis.
"""

import numpy as np
from jaxtyping import UInt8

from opd_jax.worlds import domains_readings as readings
from opd_jax.worlds.domains_kinds import Kind
from opd_jax.worlds.domains_readings import CHART, Item, Question

SIZE, PATCH = 32, 4
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 240),
    "yellow": (250, 210, 30),
    "purple": (150, 50, 190),
    "orange": (255, 127, 14),
}
BACKGROUNDS = ((255, 255, 255), (245, 240, 225), (214, 220, 226), (40, 44, 60))
AXIS, LINE = (120, 120, 128), (170, 172, 178)
GROUND, UNIT, WIDTH = 30, 3, 3  # pixels: the row below the bars, a unit's height, a bar's width
BARS = (3, 4, 4, 5)  # by level
HELD_OUT = ("green", "7")  # no training chart has this bar
QUESTIONS = {level: tuple(what for what in CHART if readings.LEVEL[what] == level) for level in (1, 2, 3, 4)}
Look = tuple[int, bool, bool, int]  # background, lines, axis, column of the first bar
Content = tuple[tuple[Item, ...], Question, Look]


def draw_chart(rng: np.random.Generator, level: int) -> Content:
    """Bars of a level and a question that has one answer; no difference is below 0."""
    n = BARS[level - 1]
    names = [tuple(COLORS)[i] for i in rng.permutation(len(COLORS))[:n]]
    which, threshold, background, lines, axis, column = rng.random(6).tolist()
    what = QUESTIONS[level][int(len(QUESTIONS[level]) * which)]
    while True:
        heights = (1 + rng.integers(9, size=n)).tolist()
        asked = {"tallest": max(heights), "shortest": min(heights)}.get(what)
        if heights.count(asked) <= 1:
            break
    items = tuple((name, str(height)) for name, height in zip(names, heights))
    pair = [names[i] for i in rng.permutation(n)[:2]]
    if what == "minus":
        pair.sort(key=dict(items).get, reverse=True)
    arguments = {"value": pair[:1], "plus": pair, "minus": pair, "above": [str(1 + int(8 * threshold))]}
    look = (int(len(BACKGROUNDS) * background), lines < 0.5, axis < 0.5, int((SIZE // PATCH - n + 1) * column))
    return items, Question(what, tuple(arguments.get(what, ()))), look


def render_chart(content: Content) -> UInt8[np.ndarray, "32 32 3"]:
    """The picture of a chart; equal contents give equal pixels."""
    items, _, (background, lines, axis, column) = content
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:] = BACKGROUNDS[background]
    if lines:
        image[GROUND - 9 * UNIT : GROUND : 3 * UNIT] = LINE
    if axis:
        image[GROUND] = AXIS
    for i, (name, height) in enumerate(items):
        left = PATCH * (column + i)
        image[GROUND - UNIT * int(height) : GROUND, left : left + WIDTH] = COLORS[name]
    return image


KINDS = {
    "chart": Kind(
        "charts",
        draw_chart,
        write=lambda content: CHART[content[1].what].format(*content[1].arguments),
        solve=lambda content, style: readings.solve(*content[:2], style),
        level=lambda content: readings.LEVEL[content[1].what],
        identity=lambda content: f"chart {content[0]}",  # without what is asked: the bars of a test problem are new
        is_held_out=lambda content: HELD_OUT in content[0],
        render=render_chart,
    )
}
