"""Pictures of the table: two parallel-projection cameras, drawn in spans.

A camera maps (x, y, z) to a column x and a row `flat * y + steep * z`. Under such a camera everything here, columns
with round or rectangular footprints, covers one interval of rows in each column of pixels for its side and one for its
top. So a layer is two numbers a column and a colour, and a pixel is the last layer that covers it: a chain of
comparisons, with neither scatter nor gather.

Camera 0 looks straight down on the whole table. Camera 1 follows the hand, twice as close, and looks from the front,
45 degrees down: how high the fingers are over what is below them is how far apart they are in it. What is lifted casts
a shadow to its right on the table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from opd_jax.worlds import tabletop_bodies as bodies
from opd_jax.worlds.tabletop_bodies import FINGER, HANDLE_AT, HEIGHT, RADIUS, N, State, of

CAMERAS = 2
IMAGE_SIZE = 40
SHADOW = 0.5  # shift of a shadow to the right, for each unit of height
FINGER_LENGTH, FINGER_WIDTH = 0.24, 0.035
WIDE, CLOSE = 1.02, 0.62  # half the width of what each camera sees

_PAINT = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (48, 84, 220), "yellow": (245, 205, 40),
          "white": (244, 244, 240)}  # fmt: skip
_FLOOR, _TABLE, _SHADE, _CAVITY = (44, 48, 58), (178, 160, 138), (132, 118, 102), (70, 52, 40)
_CABINET, _PANEL, _HAND, _HANDLE = (128, 96, 72), (160, 120, 86), (30, 30, 36), (232, 232, 232)


def _pack(color: tuple[float | int, ...], light: float = 1.0) -> int:
    """A colour as one integer, 0xRRGGBB."""
    red, green, blue = (min(int(channel * light), 255) for channel in color)
    return red << 16 | green << 8 | blue


def _looks(kind: str, color: str) -> tuple[int, int, int]:
    """Packed colours of the side, the top, and the spot in the middle of the top."""
    paint = {"basket": (150, 96, 44), "stove": (58, 58, 66), "handle": _HANDLE}.get(kind, _PAINT[color])
    spot = {
        "can": (200, 204, 210), "bottle": (250, 250, 250), "bowl": tuple(0.45 * c for c in paint),
        "box": (250, 236, 180), "plate": (205, 208, 214), "basket": _CAVITY, "stove": (240, 110, 30),
    }.get(kind, paint)  # fmt: skip
    return _pack(paint, 0.62), _pack(paint), _pack(spot)


LOOKS = np.array([[_looks(kind, color) for color in bodies.COLORS] for kind in bodies.KINDS])
SPOT = np.array([0.0, 0.0, 0.55, 0.40, 0.78, 0.45, 0.62, 0.86, 0.62, 0.0], np.float32)  # radius / body's
SQUARE = np.array([kind in ("cube", "box", "handle") for kind in bodies.KINDS])


class Camera(NamedTuple):
    """Where the pixels of a picture lie: column `x`, row `v = flat * y + steep * z`."""

    x: Float[Array, "W"]
    v: Float[Array, "H"]
    flat: float
    steep: float


class Solids(NamedTuple):
    """Upright columns with round or rectangular footprints."""

    x: Float[Array, "M"]
    y: Float[Array, "M"]
    low: Float[Array, "M"]
    high: Float[Array, "M"]
    half_x: Float[Array, "M"]
    half_y: Float[Array, "M"]
    square: Bool[Array, "M"]


class Layers(NamedTuple):
    """What is painted, first to last: in column w, the rows v with `low <= v < high`."""

    low: Float[Array, "L W"]
    high: Float[Array, "L W"]
    color: Int[Array, "L"]


def _pixels() -> Float[Array, "size"]:
    """The middles of a picture's rows or columns, the picture from -1 to 1."""
    return (jnp.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1


def cameras(state: State) -> tuple[Camera, Camera]:
    pixel = _pixels()
    x, y, _ = state.gripper
    close = Camera(x + CLOSE * pixel, 0.7 * y + 0.24 - CLOSE * pixel, 0.7, 0.7)
    return Camera(WIDE * pixel, -WIDE * pixel, 1.0, 0.0), close


def locate(state: State, point: Float[Array, "3"]) -> Float[Array, "C 2"]:
    """Row and column of a point of space in every picture: -1 is the upper left edge, 1 the lower right."""
    first, last = _pixels()[0], _pixels()[-1]
    along = lambda value, axis: first + (value - axis[0]) / (axis[-1] - axis[0]) * (last - first)
    x, y, z = point
    row = lambda camera: along(camera.flat * y + camera.steep * z, camera.v)
    return jnp.stack([jnp.stack([row(camera), along(x, camera.x)]) for camera in cameras(state)])


def spans(camera: Camera, solid: Solids) -> tuple[Float[Array, "M W"], Float[Array, "M W"], Float[Array, "M W"]]:
    """The rows where side, top, and what lies behind begin, in each column; empty where a column misses the solid."""
    dx = jnp.abs(camera.x[None] - solid.x[:, None])
    half_x, half_y = solid.half_x[:, None], solid.half_y[:, None]
    depth = jnp.where(solid.square[:, None], half_y, jnp.sqrt(jnp.maximum(half_x**2 - dx**2, 0)))
    front = camera.flat * (solid.y[:, None] - depth)
    back = camera.flat * (solid.y[:, None] + depth)
    foot, top = camera.steep * solid.low[:, None], camera.steep * solid.high[:, None]
    seen = dx < half_x
    return (
        jnp.where(seen, front + foot, 99.0),
        jnp.where(seen, front + top, 99.0),
        jnp.where(seen, back + top, 99.0),
    )


def _boxes(*rows: tuple) -> Solids:
    """Rectangular columns from (x, y, low, high, half_x, half_y)."""
    columns = [jnp.stack([jnp.asarray(value, jnp.float32) for value in column]) for column in zip(*rows)]
    return Solids(*columns, jnp.full(len(rows), True))


def solids(state: State) -> Solids:
    """The bodies, then the cabinet and the front of its drawer; what is absent is far outside."""
    kind = state.kind
    x, y, z = state.position.T
    half = of(RADIUS, kind) * jnp.where(of(SQUARE, kind), 0.92, 1.0)
    middle, front = state.position[HANDLE_AT, 0], bodies.drawer_front(state)
    half_depth = (bodies.CABINET_BACK - bodies.CABINET_FRONT) / 2
    furniture = _boxes(
        (middle, bodies.CABINET_FRONT + half_depth, 0, bodies.CABINET_HEIGHT, bodies.CABINET_HALF, half_depth),
        (middle, front + FINGER, 0, bodies.DRAWER_HEIGHT, bodies.CABINET_HALF, FINGER),
    )
    lying = Solids(x, y, z, z + of(HEIGHT, kind), half, half, of(SQUARE, kind))
    return Solids(*(jnp.concatenate(pair) for pair in zip(lying, furniture)))


def painting_order(state: State, solid: Solids) -> Int[Array, "M"]:
    """Far to near: a solid comes after those it lies on or in, else after those whose middle is behind its own."""
    y = solid.y.at[N].set(bodies.CABINET_FRONT)
    above = solid.low[:, None] > solid.high[None] - bodies.TOUCH
    delta = state.position[:, None, :2] - state.position[None, :, :2]
    well = bodies.in_well(delta, of(RADIUS, state.kind)[:, None], state.kind[None])
    above = above.at[:N, :N].set(above[:N, :N] | well)
    later = above | ~above.T & (y[:, None] < y[None])
    return jnp.argsort(later.sum(1))


def body_layers(state: State, camera: Camera, solid: Solids, order: Int[Array, "M"]) -> Layers:
    """Side, top and spot of every solid, in the order of painting."""
    foot, edge, back = spans(camera, solid)
    share = jnp.concatenate([of(SPOT, state.kind), jnp.zeros(2)])
    spot = solid._replace(half_x=solid.half_x * share, half_y=solid.half_y * share)
    _, spot_low, spot_high = spans(camera, spot)
    low, high = jnp.stack([foot, edge, spot_low], 1)[order], jnp.stack([edge, back, spot_high], 1)[order]
    wood = jnp.array([[_pack(_CABINET, 0.75), _pack(_CABINET), 0], [_pack(_PANEL, 0.85), _pack(_PANEL), 0]])
    color = jnp.concatenate([of(LOOKS, (state.kind, state.color)), wood])[order]
    width = camera.x.shape[0]
    return Layers(low.reshape(-1, width), high.reshape(-1, width), color.reshape(-1))


def ground_layers(state: State, camera: Camera, solid: Solids) -> Layers:
    """The table, the open part of the drawer, and the shadows of what is lifted: bodies and fingers."""
    middle, front = state.position[HANDLE_AT, 0], bodies.drawer_front(state)
    half = (bodies.CABINET_FRONT - front) / 2
    far = jnp.where(bodies.has_cabinet(state), 0.0, 9.0)
    flat = _boxes(
        (0, 0, 0, 0, 1, 1),
        (middle + far, front + half, bodies.DRAWER_HEIGHT, bodies.DRAWER_HEIGHT, bodies.CABINET_HALF, half),
        (middle + far, front + half, bodies.DRAWER_SEAT, bodies.DRAWER_SEAT, bodies.CABINET_HALF - 0.06, half),
    )
    x, y, z = state.gripper
    aside = jnp.stack([-1.0, 1.0]) * (state.gap + FINGER_WIDTH)
    shade = Solids(*(leaf[:N] for leaf in solid))
    shade = Solids(*(jnp.concatenate(pair) for pair in zip(shade, _boxes(
        *((x + side, y, z, z, FINGER_WIDTH, FINGER_WIDTH) for side in aside)
    ))))  # fmt: skip
    shade = shade._replace(x=shade.x + SHADOW * shade.low, low=0 * shade.low, high=0 * shade.low)
    _, low, high = spans(camera, Solids(*(jnp.concatenate(pair) for pair in zip(flat, shade))))
    color = jnp.array([_pack(_TABLE), _pack(_PANEL), _pack(_CAVITY)] + [_pack(_SHADE)] * (N + 2))
    return Layers(low, high, color)


def hand_layers(state: State, camera: Camera) -> Layers:
    """Two fingers and the bar that joins them, over everything else."""
    x, y, z = state.gripper
    top = z + FINGER_LENGTH
    aside = state.gap + FINGER_WIDTH
    foot, edge, back = spans(camera, _boxes(
        (x - aside, y, z, top, FINGER_WIDTH, FINGER_WIDTH + 0.02),
        (x + aside, y, z, top, FINGER_WIDTH, FINGER_WIDTH + 0.02),
        (x, y, top, top + 0.06, bodies.GAP_MAX + 2 * FINGER_WIDTH, FINGER_WIDTH),
    ))  # fmt: skip
    side, lit = _pack(_HAND), _pack((92, 92, 104))
    return Layers(
        jnp.concatenate([foot, edge]), jnp.concatenate([edge, back]), jnp.array([side, side, side, lit, lit, lit])
    )


def paint(views: tuple[Camera, ...], layers: tuple[Layers, ...]) -> UInt8[Array, "C H W 3"]:
    """One layer after another, on all pictures at once: unrolled, the loop would be a hundred times slower on a CPU."""
    row = jnp.stack([camera.v for camera in views])[:, :, None]

    def cover(picture: Int[Array, "C H W"], layer: Layers) -> tuple[Int[Array, "C H W"], None]:
        covered = (row >= layer.low[:, None]) & (row < layer.high[:, None])
        return jnp.where(covered, layer.color[:, None, None], picture), None

    stacked = Layers(*(jnp.stack(leaves, 1) for leaves in zip(*layers)))
    ground = jnp.full((*row.shape[:2], row.shape[1]), _pack(_FLOOR))
    color, _ = jax.lax.scan(cover, ground, stacked)
    return jnp.stack([color >> 16 & 255, color >> 8 & 255, color & 255], -1).astype(jnp.uint8)


def render(state: State) -> UInt8[Array, "C H W 3"]:
    """The pictures of both cameras, 8-bit RGB, row 0 at the top."""
    solid = solids(state)
    order = painting_order(state, solid)
    views = cameras(state)
    layers = []
    for camera in views:
        parts = (ground_layers(state, camera, solid), body_layers(state, camera, solid, order),
                 hand_layers(state, camera))  # fmt: skip
        layers.append(Layers(*(jnp.concatenate(leaves) for leaves in zip(*parts))))
    return paint(views, tuple(layers))
