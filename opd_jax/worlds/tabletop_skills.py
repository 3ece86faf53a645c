# SPDX-License-Identifier: Apache-2.0
"""What a hand may have practised on the table before it is shown a task: to grasp what is named, to put it down.

A moment of practice is one observation and the next actions: some scene of the training split, the hand anywhere, empty
with "pick up the red cube", or holding something with "place it in the basket". No task of `tabletop_tasks` is among
them, nothing is carried from one place to another, no drawer is moved and nothing is pushed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

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
from opd_jax.worlds.tabletop_physics import step
from opd_jax.worlds.tabletop_render import locate

PLACES = {PLATE: "on the plate", BASKET: "in the basket", STOVE: "on the stove", BOWL: "in the bowl", BOX: "on the box"}
CLOSE_BY = 0.12  # half the side of the square about a thing over which every second hand is


def _words() -> tuple[np.ndarray, np.ndarray]:
    """Token ids of what to pick up `[kind, color, L]` and of where to place it `[kind, L]`; zeros where nothing is."""
    pick = np.zeros((len(KINDS), len(COLORS), tasks.INSTRUCTION_LENGTH), np.int32)
    for kind, name in enumerate(KINDS):
        for color, shade in enumerate(COLORS):
            if name in tasks.VOCABULARY and shade in tasks.VOCABULARY:
                pick[kind, color] = tasks.encode(f"pick up the {shade} {name}")
    place = np.zeros((len(KINDS), tasks.INSTRUCTION_LENGTH), np.int32)
    for kind, where in PLACES.items():
        place[kind] = tasks.encode(f"place it {where}")
    return pick, place


PICK, PLACE = _words()
CAN_PICK, CAN_PLACE = PICK.any(-1), PLACE.any(-1)


class Moment(NamedTuple):
    """Something to practise."""

    state: State
    subject: Int[Array, ""]  # the body to pick up or that is held
    place: Int[Array, ""]  # the body to place it at, -1: it is to be picked up
    instruction: Int[Array, "L"]


def moment(key: Key[Array, ""]) -> Moment:
    """A random one. Two equal things are never what is named."""
    keys = jax.random.split(key, 7)
    state = tasks.reset(keys[0], jax.random.randint(keys[1], (), 0, len(tasks.TASKS)))
    same = (state.kind[:, None] == state.kind[None]) & (state.color[:, None] == state.color[None])
    named = (state.kind != ABSENT) & (same.sum(1) == 1)
    movable = jnp.arange(N) < MOVABLE
    subject = _one_of(keys[2], named & movable & of(CAN_PICK, (state.kind, state.color)))
    alone = (state.kind[:, None] == state.kind[None]).sum(1) == 1
    goals = named & alone & of(CAN_PLACE, state.kind) & (jnp.arange(N) != subject)
    holds = jax.random.bernoulli(keys[3], 0.4) & goals.any()
    place = jnp.where(holds, _one_of(keys[4], goals), -1)
    aim = jnp.where(holds, place, subject)
    state = _with_hand(keys[5], state, subject, state.position[aim], holds)
    kind, color = state.kind[aim], state.color[aim]
    return Moment(state, subject, place, jnp.where(holds, of(PLACE, kind), of(PICK, (kind, color))))


def _one_of(key: Key[Array, ""], allowed: Array) -> Int[Array, ""]:
    return jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf)).astype(jnp.int32)


def _with_hand(key: Key[Array, ""], state: State, subject, aim: Float[Array, "3"], holds) -> State:
    """The hand anywhere, or close to what it is to go to; with `subject` in it where it holds that."""
    keys = jax.random.split(key, 4)
    anywhere = jax.random.uniform(keys[0], (3,), minval=jnp.array([-0.8, -0.9, 0.3]), maxval=jnp.array([0.8, 0.8, 0.6]))
    beside = aim[:2] + jax.random.uniform(keys[1], (2,), minval=-CLOSE_BY, maxval=CLOSE_BY)
    height = of(HEIGHT, state.kind[subject])
    lowest = aim[2] + REACH * height
    above = lowest + jax.random.uniform(keys[2]) * jnp.maximum(bodies.CEILING - lowest, 0)
    near = jax.random.bernoulli(keys[3])
    hand = jnp.clip(jnp.where(near, jnp.append(beside, above), anywhere), -1, jnp.array([1, 1, bodies.CEILING]))
    grip = jnp.array([0.0, 0.0, -1.0]) * REACH * height
    return state._replace(
        gripper=hand,
        gap=jnp.where(holds, of(RADIUS, state.kind[subject]), state.gap),
        held=jnp.where(holds, subject, -1),
        grip=jnp.where(holds, grip, 0),
        position=jnp.where(holds, state.position.at[subject].set(hand + grip), state.position),
    )


def aim(practised: Moment) -> Float[Array, "C 2"]:
    """Row and column, as of `tabletop_render.locate`, of the middle of what is named."""
    state, named = practised.state, jnp.where(practised.place < 0, practised.subject, practised.place)
    return locate(state, state.position[named].at[2].add(of(HEIGHT, state.kind[named]) / 2))


def chunk(practised: Moment, steps: int) -> Float[Array, "H 4"]:
    """The next actions: to the thing, around it and up; or to the place, down and open."""
    subject, place = practised.subject, practised.place

    def act(state, _):
        held = state.held == subject
        where = state.position[place].at[2].add(of(SEAT, state.kind[place]))
        pick = jnp.where(held, jnp.array([0.0, 0.0, 1.0, 1.0]), fetch(state, subject))
        put = jnp.where(held, place_it(state, subject, where), let_go())
        action = jnp.where(place < 0, pick, put)
        return step(state, action), action

    return jax.lax.scan(act, practised.state, None, length=steps)[1]
