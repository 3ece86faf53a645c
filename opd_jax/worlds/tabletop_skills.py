# SPDX-License-Identifier: Apache-2.0
"""What a hand may have practised on the table before it is shown a task: to grasp what is named, to put it down.

A moment of practice is one observation and the next actions: some scene of the training split, the hand anywhere, empty
or holding something, and a sentence such as "pick up the red cube", "place it in the basket", "put the can on the box".
No sentence of a task of `tabletop_tasks` is among them, no thing is told by where it lies, no drawer is moved and
nothing is pushed.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax.worlds import tabletop_bodies as bodies
from opd_jax.worlds import tabletop_tasks as tasks
from opd_jax.worlds.tabletop_bodies import (
    ABSENT,
    BASKET,
    BOWL,
    BOX,
    COLORS,
    HEIGHT,
    KINDS,
    MOVABLE,
    PLATE,
    RADIUS,
    SEAT,
    STOVE,
    N,
    State,
    of,
)  # fmt: skip
from opd_jax.worlds.tabletop_expert import REACH, fetch, let_go, place_it
from opd_jax.worlds.tabletop_physics import resting_on, step, undisturbed
from opd_jax.worlds.tabletop_render import locate

PLACES = {PLATE: "on the plate", BASKET: "in the basket", STOVE: "on the stove", BOWL: "in the bowl", BOX: "on the box"}
PICKED = ("cube", "can", "bottle", "bowl")
PICK_UP, PICK_AND_PLACE, PUT, PLACE_IT = range(4)
FORMS = (
    "pick up the {thing}",
    "pick up the {thing} and place it {where}",
    "put the {thing} {where}",
    "place it {where}",
)
EMPTY, HOLDING = np.log([0.3, 0.4, 0.3, 1e-9]), np.log([1e-9, 0.4, 0.3, 0.3])  # of the forms
CLOSE_BY = 0.12  # half the side of the square about a thing over which every second hand is
UNNAMED = len(COLORS)  # in the place of a colour
NOWHERE = 9.0  # outside of every picture


def _sentences() -> tuple[np.ndarray, np.ndarray]:
    """Token ids of every sentence, by form, kind and colour of the thing, kind of the place, `[4, kinds, colors + 1,
    kinds, L]`, zeros where there is none; and which of them are a task's."""
    ids = np.zeros((len(FORMS), len(KINDS), len(COLORS) + 1, len(KINDS), tasks.INSTRUCTION_LENGTH), np.int32)
    of_tasks = np.zeros(ids.shape[:-1], bool)
    told = {task.instruction for task in tasks.TASKS}
    shades = [color for color in COLORS if color in tasks.VOCABULARY]
    for form, sentence in enumerate(FORMS):
        for kind, color, place in itertools.product(PICKED, [*shades, ""], range(len(KINDS))):
            words = sentence.format(thing=f"{color} {kind}".strip(), where=PLACES.get(place, ""))
            if place in PLACES or form == PICK_UP:
                index = form, KINDS.index(kind), COLORS.index(color) if color else UNNAMED, place
                ids[index], of_tasks[index] = tasks.encode(words), words in told
    return ids, of_tasks


SENTENCES, OF_TASKS = _sentences()
CAN_PICK, CAN_PLACE = SENTENCES[PICK_UP, :, :UNNAMED, 0].any(-1), SENTENCES[PLACE_IT].any((0, 1, 3))


class Moment(NamedTuple):
    """Something to practise."""

    state: State
    subject: Int[Array, ""]  # the body to pick up or that is held
    place: Int[Array, ""]  # the body to place it at, -1: it is to be picked up
    named: Bool[Array, ""]  # whether the sentence says what the subject is
    instruction: Int[Array, "L"]


def moment(key: Key[Array, ""], closed: Float[Array, ""] | float | int = 0.0) -> Moment:
    """A random one. Two equal things are never what is named.

    Args:
        closed: share of empty hands whose fingers are not open, as after a grasp that has missed.
    """
    keys = jax.random.split(key, 8)
    state = tasks.reset(keys[0], jax.random.randint(keys[1], (), 0, len(tasks.TASKS)))
    same_kind = state.kind[:, None] == state.kind[None]
    same = same_kind & (state.color[:, None] == state.color[None])
    there, alone = state.kind != ABSENT, same_kind.sum(1) == 1
    movable = jnp.arange(N) < MOVABLE
    subject = _one_of(keys[2], there & (same.sum(1) == 1) & movable & of(CAN_PICK, (state.kind, state.color)))
    goals = there & alone & of(CAN_PLACE, state.kind) & (jnp.arange(N) != subject)
    goals &= jnp.arange(N) != resting_on(state)[subject]
    place = jnp.where(goals.any(), _one_of(keys[3], goals), -1)
    holds = jax.random.bernoulli(keys[4], 0.45) & (place >= 0)

    bare = alone[subject] & jax.random.bernoulli(keys[5])
    thing, where = (state.kind[subject], jnp.where(bare, UNNAMED, state.color[subject])), state.kind[place]
    form = jax.random.categorical(keys[6], jnp.where(holds, HOLDING, EMPTY))
    shortest = jnp.where(holds, PLACE_IT, PICK_UP)
    form = jnp.where((place < 0) | of(OF_TASKS, (form, *thing, where)), shortest, form)
    place = jnp.where(form == PICK_UP, -1, place)
    state = _with_hand(keys[7], state, subject, place, holds)
    missed, gap = jax.random.uniform(jax.random.fold_in(keys[7], 1), (2,))
    gap = jnp.where(gap < 0.5, bodies.GAP_MIN, bodies.GAP_MIN + (2 * gap - 1) * (bodies.GAP_MAX - bodies.GAP_MIN))
    state = state._replace(gap=jnp.where(~holds & (missed < closed), gap, state.gap))
    return Moment(state, subject, place, form != PLACE_IT, of(SENTENCES, (form, *thing, where)))


def _one_of(key: Key[Array, ""], allowed: Array) -> Int[Array, ""]:
    return jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf)).astype(jnp.int32)


def _with_hand(key: Key[Array, ""], state: State, subject, place, holds) -> State:
    """The hand anywhere, or close to what it is to go to; holding `subject`, or not, perhaps where that has lain."""
    keys = jax.random.split(key, 5)
    origin, aim = state.position[subject], state.position[jnp.where(holds, place, subject)]
    anywhere = jax.random.uniform(keys[0], (3,), minval=jnp.array([-0.8, -0.9, 0.3]), maxval=jnp.array([0.8, 0.8, 0.6]))
    beside = aim[:2] + jax.random.uniform(keys[1], (2,), minval=-CLOSE_BY, maxval=CLOSE_BY)
    height = of(HEIGHT, state.kind[subject])
    lowest = aim[2] + REACH * height
    above = lowest + jax.random.uniform(keys[2]) * jnp.maximum(bodies.CEILING - lowest, 0)
    hand = jnp.where(jax.random.bernoulli(keys[3]), jnp.append(beside, above), anywhere)
    rise, just_grasped = jax.random.uniform(keys[4], (2,))
    lifted = origin + jnp.array([0.0, 0.0, 1.0]) * (REACH * height + 0.3 * rise)
    hand = jnp.where(holds & (just_grasped < 0.25), lifted, hand)
    hand = jnp.clip(hand, -1, jnp.array([1, 1, bodies.CEILING]))
    grip = jnp.array([0.0, 0.0, -1.0]) * REACH * height
    return state._replace(
        gripper=hand,
        gap=jnp.where(holds, of(RADIUS, state.kind[subject]), state.gap),
        held=jnp.where(holds, subject, -1),
        grip=jnp.where(holds, grip, 0),
        position=jnp.where(holds, state.position.at[subject].set(hand + grip), state.position),
    )


def aim(practised: Moment) -> Float[Array, "C 2 2"]:
    """Row and column, as of `tabletop_render.locate`, of the middle of the thing and of the place, where named."""
    state = practised.state

    def middle(body, named):
        where = locate(state, state.position[body].at[2].add(of(HEIGHT, state.kind[body]) / 2))
        return jnp.where(named, where, NOWHERE)

    places = middle(practised.subject, practised.named), middle(practised.place, practised.place >= 0)
    return jnp.stack(places, 1)


def done(state: State, subject: Int[Array, ""], place: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the thing is in the hand, or at its place and let go."""
    held = state.held == subject
    return jnp.where(place < 0, held, ~held & (resting_on(state)[subject] == place))


def chunk(practised: Moment, steps: int) -> Float[Array, "H 4"]:
    """The next actions, if nothing goes wrong: to the thing, around it and up; or to the place, down and open."""
    subject, place = practised.subject, practised.place

    def act(state, _):
        where = state.position[place].at[2].add(of(SEAT, state.kind[place]))
        carry = jnp.where(place < 0, jnp.array([0.0, 0.0, 1.0, 1.0]), place_it(state, subject, where))
        action = jnp.where(state.held == subject, carry, fetch(state, subject))
        action = jnp.where((place >= 0) & done(state, subject, place), let_go(), action)
        return step(state, action), action

    return jax.lax.scan(act, undisturbed(practised.state), None, length=steps)[1]
