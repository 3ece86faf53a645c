"""How the table moves: one step of quasi-static, 2.5-dimensional contact.

Nothing has inertia: a body moves while something moves it, and falls at a constant speed. In each of the two substeps
of a step

1. the fingers and what they hold move, and are blocked by the fixtures (basket, stove, handle, cabinet, drawer);
2. the fingers close. A body is grasped when they touch it from both sides: it must be between them (nearer to their
   line than `PAD`) and they must reach `DEPTH` below its top. On the way they push it to their centre. Anything else
   that they meet they push away;
3. what is carried takes along what rests on it, and the handle takes along the drawer and what lies in it;
4. bodies are pushed apart from the fingers, from one another and from the furniture;
5. what is not held falls until something supports it. A body whose centre is not over its support slides off.

The table has a rim, so nothing leaves it. Disturbances, all drawn from the key of the state: noise on the velocity, a
body that slips out of the hand (more likely when it was grasped off its centre), a shove of a body that lies about.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax.worlds import tabletop_bodies as bodies
from opd_jax.worlds.tabletop_bodies import (
    FINGER,
    GAP_MAX,
    GAP_MIN,
    HANDLE_AT,
    HEIGHT,
    MOVABLE,
    RADIUS,
    SEAT,
    TOUCH,
    WELL,
    N,
    State,
    of,
)

ACTION_DIMS = 4
SPEED = 0.10  # of the gripper, a step, at a command of 1
LAG = 0.3  # share of the last velocity that is kept
CLOSING = 0.06  # change of the gap, a step
FALL = 0.10  # a step
SLIDE = 0.08  # of what topples off its support, a step
SUBSTEPS, ITERATIONS = 2, 3
PAD, DEPTH = 0.05, 0.05
FINGER_LENGTH = 0.30
NOISE, SLIP, SHOVE = 0.15, 0.006, 0.012  # at strength 1: deviation of each velocity; probabilities a step
SHOVE_RANGE = (0.04, 0.10)


class Disturbance(NamedTuple):
    """What goes wrong in one step."""

    noise: Float[Array, "3"]  # added to the velocity
    slip: Bool[Array, ""]
    shove: Float[Array, "N 2"]  # displacement of each body


class Discs(NamedTuple):
    """The moving parts of the hand that touch things: left finger, right finger, and what is held."""

    position: Float[Array, "3 3"]  # underside
    radius: Float[Array, "3"]
    top: Float[Array, "3"]
    active: Bool[Array, "3"]


def draw_disturbance(state: State) -> Disturbance:
    """The disturbances of the coming step: what is drawn depends on (key, time) alone, what it hits on the state."""
    noise_key, chance_key = jax.random.split(jax.random.fold_in(state.key, state.time))
    chance = jax.random.uniform(chance_key, (5,))
    strength = state.disturbance
    noise = NOISE * strength * jnp.clip(jax.random.normal(noise_key, (3,)), -3, 3)
    off_centre = jnp.abs(state.grip[1]) / PAD
    slip = chance[0] < SLIP * strength * (1 + 4 * off_centre**2)
    angle = 2 * jnp.pi * chance[1]
    far = SHOVE_RANGE[0] + (SHOVE_RANGE[1] - SHOVE_RANGE[0]) * chance[2]
    which = (chance[3] * MOVABLE).astype(int)
    pushed = (jnp.arange(N) == which) & bodies.is_movable(state) & ~bodies.is_held(state)
    pushed &= chance[4] < SHOVE * strength
    return Disturbance(noise, slip, pushed[:, None] * far * jnp.stack([jnp.cos(angle), jnp.sin(angle)])[None])


def undisturbed(state: State) -> State:
    """The same state where nothing will go wrong: plans begin here, for what will go wrong is not to be foreseen."""
    return state._replace(disturbance=jnp.zeros_like(state.disturbance))


def step(state: State, action: Float[Array, "4"]) -> State:
    """One step of the world.

    Args:
        action: in [-1, 1], clipped: the hand's velocity along x, y and z in units of `SPEED`, of which it takes up
            1 - `LAG` at once, and the command of the fingers, which close above 0 and open otherwise.
    """
    action = jnp.clip(action, -1, 1)
    drawn = draw_disturbance(state)
    velocity = LAG * state.velocity + (1 - LAG) * action[:3]
    slips = drawn.slip & (state.held >= 0) & (state.held != HANDLE_AT)
    state = state._replace(
        time=state.time + 1,
        velocity=velocity,
        held=jnp.where(slips, -1, state.held),
        gap=jnp.where(slips, jnp.minimum(state.gap + FINGER, GAP_MAX), state.gap),
    )
    move = SPEED * (velocity + drawn.noise) / SUBSTEPS
    return jax.lax.fori_loop(
        0, SUBSTEPS, lambda _, s: substep(s, move, action[3] > 0, slips, drawn.shove / SUBSTEPS), state
    )


def substep(
    state: State,
    move: Float[Array, "3"],
    closing: Bool[Array, ""],
    slips: Bool[Array, ""],
    shove: Float[Array, "N 2"],
) -> State:
    before = state.position
    state = close_fingers(move_gripper(state, move), closing, slips)
    rides = above(riders(state._replace(position=before)))
    return fall(push_apart(carry(state, before, rides, shove), rides))


def discs(state: State) -> Discs:
    """The fingers and the held body, where the gripper is now."""
    held = bodies.is_held(state)
    kind = jnp.sum(jnp.where(held, state.kind, 0))
    aside = jnp.stack([state.gap + FINGER, jnp.zeros(()), jnp.zeros(())])
    position = jnp.stack([state.gripper - aside, state.gripper + aside, state.gripper + state.grip])
    radius = jnp.stack([jnp.asarray(FINGER), jnp.asarray(FINGER), of(RADIUS, kind)])
    top = position[:, 2] + jnp.stack([jnp.asarray(FINGER_LENGTH), jnp.asarray(FINGER_LENGTH), of(HEIGHT, kind)])
    carried = (state.held >= 0) & (state.held != HANDLE_AT)
    return Discs(position, radius, top, jnp.stack([jnp.asarray(True), jnp.asarray(True), carried]))


def combined(push: Float[Array, "M K 2"]) -> Float[Array, "M 2"]:
    """The displacement that answers K pushes at once: the longest in each direction of each axis, not their sum."""
    return jnp.maximum(push.max(-2), 0) + jnp.minimum(push.min(-2), 0)


class Contact(NamedTuple):
    """How M columns meet N bodies."""

    out: Float[Array, "M N 2"]  # the displacement of the column that frees it of the body
    confine: Float[Array, "M N 2"]  # the displacement that brings it back within the body's hollow
    inside: Bool[Array, "M N"]  # whether it is in the body's hollow


def contact(point: Float[Array, "M 3"], radius: Float[Array, "M"], top: Float[Array, "M"], state: State) -> Contact:
    delta = point[:, None, :2] - state.position[None, :, :2]
    kind = state.kind[None]
    apart = bodies.distance(delta)
    low = state.position[None, :, 2]
    level = (point[:, None, 2] < low + of(HEIGHT, kind) - TOUCH) & (top[:, None] > low + TOUCH)
    level &= kind != bodies.ABSENT
    radius = radius[:, None]
    inside = bodies.in_well(delta, radius, kind) & (point[:, None, 2] > low + of(SEAT, kind) - TOUCH)
    unit = delta / apart[..., None]
    out = jnp.where(level & ~inside, jnp.maximum(radius + of(RADIUS, kind) - apart, 0), 0)
    confine = jnp.where(level & inside, jnp.maximum(apart - of(WELL, kind) + radius, 0), 0)
    return Contact(out[..., None] * unit, -confine[..., None] * unit, inside)


def walls(state: State, point: Float[Array, "M 3"], radius: Float[Array, "M"]) -> Float[Array, "M 2 2"]:
    """The displacements that free M columns of the cabinet and of the drawer: inwards for what is in the drawer."""
    middle, front = state.position[HANDLE_AT, 0], bodies.drawer_front(state)
    x, y, z = jnp.moveaxis(point, -1, 0)
    inside = bodies.in_drawer(state, point)

    def out(low: Array, high: Array, height: float) -> Float[Array, "M 2"]:
        delta = jnp.stack([x - jnp.clip(x, middle - bodies.CABINET_HALF, middle + bodies.CABINET_HALF),
                           y - jnp.clip(y, low, high)], -1)  # fmt: skip
        apart = bodies.distance(delta)
        deep = apart < 1e-5  # the centre is in the box: leave by the front
        free = jnp.where(deep[:, None], jnp.stack([jnp.zeros_like(y), low - radius - y], -1),
                         delta * jnp.maximum(radius / apart - 1, 0)[:, None])  # fmt: skip
        hit = (z < height - TOUCH) & ~inside & bodies.has_cabinet(state)
        return jnp.where(hit[:, None], free, 0)

    margin = radius + bodies.DRAWER_WALL
    across = jnp.maximum(bodies.CABINET_HALF - margin, 0)
    near, far = front + margin, front + bodies.DRAWER_DEPTH - margin
    home = jnp.stack([jnp.clip(x, middle - across, middle + across), jnp.clip(y, near, jnp.maximum(near, far))], -1)
    inwards = jnp.where(inside[:, None], jnp.clip(home - point[:, :2], -0.05, 0.05), 0)
    cabinet = out(jnp.asarray(bodies.CABINET_FRONT), jnp.asarray(bodies.CABINET_BACK), bodies.CABINET_HEIGHT)
    drawer = out(front, jnp.asarray(bodies.CABINET_FRONT), bodies.DRAWER_HEIGHT)
    return jnp.stack([cabinet, drawer + inwards], -2)


def riders(state: State) -> Bool[Array, "N N"]:
    """[i, j]: body i rests on body j; on the handle if it lies in the drawer."""
    floor = bodies.floor_under(state, state.position, of(RADIUS, state.kind), jnp.eye(N, dtype=bool))
    rests = state.position[:, 2] < floor.height + TOUCH
    on = jax.nn.one_hot(floor.support, N, dtype=bool)  # no support, -1, is a row of False
    return on & (rests & bodies.is_movable(state) & ~bodies.is_held(state))[:, None]


def above(rides: Bool[Array, "N N"]) -> Bool[Array, "N N"]:
    """[i, j]: body i rests on body j, or on what rests on it, and so on: four storeys."""
    for _ in range(2):
        rides = rides | jnp.any(rides[:, :, None] & rides[None], 1)
    return rides


def with_riders(shift: Float[Array, "N D"], rides: Bool[Array, "N N"]) -> Float[Array, "N D"]:
    """Each body's own displacement and those of all that it rests on."""
    return shift + jnp.sum(jnp.where(rides[:, :, None], shift[None], 0), 1)


def blocked(state: State) -> Float[Array, "2"]:
    """The displacement that takes the hand out of the fixtures."""
    hand = discs(state)
    out, confine, _ = contact(hand.position, hand.radius, hand.top, state)
    fixed = (~bodies.is_movable(state) & ~bodies.is_held(state))[None, :, None]
    push = jnp.concatenate([jnp.where(fixed, out + confine, 0), walls(state, hand.position, hand.radius)], 1)
    push = jnp.where(hand.active[:, None, None], push, 0)
    return combined(push.reshape(1, -1, 2))[0]


def move_gripper(state: State, move: Float[Array, "3"]) -> State:
    """The hand after a displacement, held back by fixtures, by what is below, and by the drawer if it holds that."""
    drags = state.held == HANDLE_AT
    opening = bodies.drawer_opening(state)
    pull = jnp.clip(move[1], opening - bodies.DRAWER_MAX, opening)
    dragged = state.gripper.at[1].add(pull)

    rim = 1 - jnp.where(state.held >= 0, of(RADIUS, state.kind[state.held]), 0.0)
    xy = jnp.clip(state.gripper[:2] + move[:2], -rim - state.grip[:2], rim - state.grip[:2])
    xy += blocked(state._replace(gripper=state.gripper.at[:2].set(xy)))
    hand = discs(state._replace(gripper=state.gripper.at[:2].set(xy)))
    own = jnp.broadcast_to(bodies.is_held(state), (3, N))
    under = bodies.floor_under(state, hand.position, hand.radius, own).height
    lowest = state.gripper[2] + jnp.max(jnp.where(hand.active, under - hand.position[:, 2], -1.0))
    z = jnp.maximum(jnp.clip(state.gripper[2] + move[2], 0, bodies.CEILING), lowest)
    return state._replace(gripper=jnp.where(drags, dragged, jnp.append(xy, z)))


def close_fingers(state: State, closing: Bool[Array, ""], slips: Bool[Array, ""]) -> State:
    """Moves the fingers, centres what is between them, and grasps the widest body that they touch from both sides."""
    radius, top = of(RADIUS, state.kind), state.position[:, 2] + of(HEIGHT, state.kind)
    dx, dy, _ = (state.position - state.gripper[None]).T
    tip = state.gripper[2]
    movable = bodies.is_movable(state)
    low = state.position[:, 2]
    between = (jnp.abs(dx) < state.gap) & (jnp.abs(dy) < PAD) & (tip < top - DEPTH) & (tip + FINGER_LENGTH > low)
    between &= (movable | (jnp.arange(N) == HANDLE_AT)) & (state.kind != bodies.ABSENT) & (radius < state.gap + 1e-3)
    width = jnp.where(between, radius + jnp.where(movable, 0, jnp.abs(dx)), 0)
    widest = jnp.max(width)

    wanted = state.gap + jnp.where(slips, 0, jnp.where(closing, -1, 1)) * CLOSING / SUBSTEPS
    gap = jnp.clip(wanted, jnp.maximum(GAP_MIN, jnp.minimum(widest, GAP_MAX)), GAP_MAX)
    grasps = closing & ~slips & (widest > 0) & (gap < widest + 1e-4)
    held = jnp.where(closing, jnp.where(state.held >= 0, state.held, jnp.where(grasps, jnp.argmax(width), -1)), -1)
    gap = jnp.where(state.held >= 0, jnp.where(closing, state.gap, gap), gap)

    room = jnp.maximum(gap - radius, 0)
    shift = jnp.where(between & movable & ~bodies.is_held(state), jnp.clip(dx, -room, room) - dx, 0)
    position = state.position.at[:, 0].add(shift)
    taken = jnp.sum(jnp.where((jnp.arange(N) == held)[:, None], position - state.gripper[None], 0), 0)
    fresh = (held >= 0) & (state.held < 0)
    grip = jnp.where(fresh, taken, jnp.where(held >= 0, state.grip, 0.0))
    return state._replace(gap=gap, held=held, grip=grip, position=position)


def carry(state: State, before: Float[Array, "N 3"], rides: Bool[Array, "N N"], shove: Float[Array, "N 2"]) -> State:
    """The held body follows the hand, riders follow what they rest on."""
    held = bodies.is_held(state)[:, None]
    new = jnp.where(held, (state.gripper + state.grip)[None], state.position)
    shift = (new - before).at[:, :2].add(jnp.where(held, 0, shove))
    return state._replace(position=before + with_riders(shift, rides))


def within_rim(xy: Float[Array, "N 2"], radius: Float[Array, "N"]) -> Float[Array, "N 2"]:
    """Bodies stay on the table with their whole footprint."""
    rim = 1 - radius[:, None]
    return jnp.clip(xy, -rim, rim)


def push_apart(state: State, rides: Bool[Array, "N N"]) -> State:
    """Frees the movable bodies from the hand, from one another and from the furniture; then the hand from them."""
    radius, height = of(RADIUS, state.kind), of(HEIGHT, state.kind)
    loose = bodies.is_movable(state) & ~bodies.is_held(state)
    share = loose[:, None] * jnp.where(loose[None, :], 0.5, 1.0)
    hand = discs(state)

    def relax(_: Int[Array, ""] | int, position: Float[Array, "N 3"]) -> Float[Array, "N 3"]:
        here = state._replace(position=position)
        out, confine, inside = contact(position, radius, position[:, 2] + height, here)
        out = jnp.where((inside | inside.T)[..., None], 0, out)
        push = (out + confine - jnp.swapaxes(confine, 0, 1)) * share[..., None]
        pressed = contact(hand.position[:2], hand.radius[:2], hand.top[:2], here)  # the held body is one of the bodies
        pressed = -jnp.swapaxes(pressed.out + pressed.confine, 0, 1)
        pressed = jnp.where(loose[:, None, None], pressed, 0)
        wall = jnp.where(loose[:, None, None], walls(here, position, radius), 0)
        xy = position[:, :2] + with_riders(combined(jnp.concatenate([push, pressed, wall], 1)), rides)
        return position.at[:, :2].set(jnp.where(loose[:, None], within_rim(xy, radius), xy))

    state = state._replace(position=jax.lax.fori_loop(0, ITERATIONS, relax, state.position))
    out, confine, _ = contact(hand.position, hand.radius, hand.top, state)
    rests = (jnp.arange(3) == 2)[:, None] & rides[:, state.held][None]  # on or in what is held: no reason to stop
    stuck = jnp.where((hand.active[:, None] & loose[None] & ~rests)[..., None], out + confine, 0)
    back = jnp.where(state.held == HANDLE_AT, 0, combined(stuck.reshape(1, -1, 2))[0])
    held = bodies.is_held(state)
    return state._replace(
        gripper=state.gripper.at[:2].add(back), position=state.position.at[:, :2].add(held[:, None] * back[None])
    )


def fall(state: State) -> State:
    """Lowers what is not held on to its support, and slides off it what is not balanced."""
    floor = bodies.floor_under(state, state.position, of(RADIUS, state.kind), jnp.eye(N, dtype=bool))
    loose = bodies.is_movable(state) & ~bodies.is_held(state)
    z = jnp.maximum(floor.height, state.position[:, 2] - FALL / SUBSTEPS)
    away = state.position[:, :2] - state.position[floor.support, :2] + jnp.array([[1e-6, 0.0]])
    topples = loose & ~floor.stable & (z < floor.height + TOUCH)
    slide = jnp.where(topples[:, None], away / bodies.distance(away)[:, None] * SLIDE / SUBSTEPS, 0)
    xy = within_rim(state.position[:, :2] + slide, of(RADIUS, state.kind))
    lowered = jnp.concatenate([xy, z[:, None]], -1)
    return state._replace(position=jnp.where(loose[:, None], lowered, state.position))


def resting_on(state: State) -> Int[Array, "N"]:
    """The body that each movable body lies on, HANDLE_AT for the drawer; -1 if none, or if it is held or falling."""
    rides = riders(state)
    return jnp.where(jnp.any(rides, -1), jnp.argmax(rides, -1), -1)
