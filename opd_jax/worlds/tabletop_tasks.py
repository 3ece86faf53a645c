"""What is asked for on the table: tasks and their words, goals and when they hold, and where an episode begins.

A task is one or two goals; it is solved when all of them hold and the hand holds no movable body. The same scene allows
other goals than the one that is asked for, so the instruction is needed, and things lie elsewhere in each episode.

Splits: every coordinate of a body is a node of a lattice of pitch `LATTICE` plus less than half a pitch. The two node
numbers of a movable body add up to an even number in training and to an odd one in test, so no body of a test episode
begins where a body of a training episode can.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax.worlds import tabletop_bodies as bodies
from opd_jax.worlds.tabletop_bodies import (
    ABSENT,
    BASKET,
    BASKET_AT,
    BLUE,
    BOTTLE,
    BOWL,
    BOX,
    CAN,
    CUBE,
    GREEN,
    HANDLE,
    HANDLE_AT,
    MOVABLE,
    PLATE,
    RED,
    STOVE,
    STOVE_AT,
    WHITE,
    YELLOW,
    N,
    State,
    of,
)
from opd_jax.worlds.tabletop_physics import resting_on

SUITES = ("spatial", "object", "goal", "long")
DISTURBANCE = 1.0  # the default strength: the one place where it is set
LATTICE = 0.02
OPEN_AT, CLOSED_AT, FRONT_AT = 0.28, 0.03, -0.5  # drawer out by at least, by at most; the plate's y at most

NOTHING, ON, INSIDE, ON_CABINET, OPEN, CLOSED, IN_FRONT = range(7)  # what a goal can be
Split = Literal["train", "test"]


class Goal(NamedTuple):
    """One thing to bring about: `subject` and `place` are places in the arrays of bodies."""

    relation: int = NOTHING
    subject: int = 0
    place: int = 0  # of ON alone


class Task(NamedTuple):
    name: str
    suite: str
    instruction: str
    horizon: int  # steps
    goals: tuple[Goal, Goal]
    opening: float = 0.12  # how far the drawer is out at first


# Places of the bodies in each scene, and what lies there: some names serve two scenes.
BOWL_A, BOWL_B, THE_CAN, _, _, THE_PLATE = range(MOVABLE)
SPATIAL_SCENE = ((BOWL, RED), (BOWL, RED), (CAN, GREEN), (CUBE, YELLOW), (BOX, BLUE), (PLATE, WHITE))
THE_BOWL, THE_BOTTLE, RED_CUBE, BLUE_CUBE = 0, 1, 3, 4
GOAL_SCENE = ((BOWL, YELLOW), (BOTTLE, GREEN), (CAN, GREEN), (CUBE, RED), (CUBE, BLUE), (PLATE, WHITE))
GOODS = (
    ("red cube", CUBE, RED), ("blue cube", CUBE, BLUE), ("yellow cube", CUBE, YELLOW), ("red can", CAN, RED),
    ("green can", CAN, GREEN), ("yellow can", CAN, YELLOW), ("green bottle", BOTTLE, GREEN),
    ("blue bottle", BOTTLE, BLUE), ("red bowl", BOWL, RED), ("blue bowl", BOWL, BLUE),
)  # fmt: skip
RELATIONS = (
    "left of the plate", "right of the plate", "in front of the plate", "behind the plate", "next to the can",
    "next to the cube", "on the box", "on the stove", "in the drawer", "on the cabinet",
)  # fmt: skip

_GOALS = (
    ("open the drawer", Goal(OPEN)),
    ("close the drawer", Goal(CLOSED)),
    ("push the plate to the front of the table", Goal(IN_FRONT, THE_PLATE)),
    ("put the bowl on the stove", Goal(ON, THE_BOWL, STOVE_AT)),
    ("put the bowl on the plate", Goal(ON, THE_BOWL, THE_PLATE)),
    ("put the red cube in the bowl", Goal(ON, RED_CUBE, THE_BOWL)),
    ("stack the red cube on the blue cube", Goal(ON, RED_CUBE, BLUE_CUBE)),
    ("put the can on the plate", Goal(ON, THE_CAN, THE_PLATE)),
    ("put the can on the cabinet", Goal(ON_CABINET, THE_CAN)),
    ("put the red cube in the drawer", Goal(INSIDE, RED_CUBE)),
)
_LONG = (
    ("put the red cube and the can in the basket", Goal(ON, RED_CUBE, BASKET_AT), Goal(ON, THE_CAN, BASKET_AT)),
    ("put the blue cube and the bottle in the basket", Goal(ON, BLUE_CUBE, BASKET_AT), Goal(ON, THE_BOTTLE, BASKET_AT)),
    ("put the bowl on the stove and the red cube in the bowl", Goal(ON, THE_BOWL, STOVE_AT),
     Goal(ON, RED_CUBE, THE_BOWL)),
    ("put the blue cube in the drawer and close the drawer", Goal(INSIDE, BLUE_CUBE), Goal(CLOSED)),
    ("put the can on the plate and the blue cube in the basket", Goal(ON, THE_CAN, THE_PLATE),
     Goal(ON, BLUE_CUBE, BASKET_AT)),
    ("stack the red cube on the blue cube and put the can on the stove", Goal(ON, RED_CUBE, BLUE_CUBE),
     Goal(ON, THE_CAN, STOVE_AT)),
    ("push the plate to the front of the table and put the bowl on the plate", Goal(IN_FRONT, THE_PLATE),
     Goal(ON, THE_BOWL, THE_PLATE)),
    ("close the drawer and put the bowl on the cabinet", Goal(CLOSED), Goal(ON_CABINET, THE_BOWL)),
    ("open the drawer and put the bottle in the basket", Goal(OPEN), Goal(ON, THE_BOTTLE, BASKET_AT)),
    ("stack the blue cube on the red cube and put the bowl on the plate", Goal(ON, BLUE_CUBE, RED_CUBE),
     Goal(ON, THE_BOWL, THE_PLATE)),
)  # fmt: skip


def _tasks() -> tuple[Task, ...]:
    spatial = [
        Task(f"spatial/{i}", "spatial", f"pick up the bowl {where} and place it on the plate", 70,
             (Goal(ON, BOWL_A, THE_PLATE), Goal()), 0.36) for i, where in enumerate(RELATIONS)
    ]  # fmt: skip
    object_ = [
        Task(f"object/{i}", "object", f"pick up the {name} and place it in the basket", 70,
             (Goal(ON, 0, BASKET_AT), Goal())) for i, (name, _, _) in enumerate(GOODS)
    ]  # fmt: skip
    goal = [
        Task(f"goal/{i}", "goal", words, 150 if what.relation == INSIDE else 70, (what, Goal()))
        for i, (words, what) in enumerate(_GOALS)
    ]
    long = [
        Task(f"long/{i}", "long", words, 150, (one, two), 0.36 if Goal(CLOSED) in (one, two) else 0.12)
        for i, (words, one, two) in enumerate(_LONG)
    ]
    return (*spatial, *object_, *goal, *long)


TASKS = _tasks()
GOALS = np.array([[[*goal] for goal in task.goals] for task in TASKS])  # [task, goal, (relation, subject, place)]
OPENINGS = np.array([task.opening for task in TASKS], np.float32)
VOCABULARY = ("<pad>", *sorted({word for task in TASKS for word in task.instruction.split()}))
INSTRUCTION_LENGTH = max(len(task.instruction.split()) for task in TASKS)


def instruction(task: int | np.integer) -> str:
    """What the task's policy is told."""
    return TASKS[task].instruction


def horizon(task: int | np.integer) -> int:
    """Steps that an episode of the task may take."""
    return TASKS[task].horizon


def encode(text: str) -> np.ndarray:
    """Word indices `[INSTRUCTION_LENGTH]` int32, padded with 0. Raises: ValueError naming what cannot be encoded."""
    words = text.split()
    unknown = [word for word in words if word not in VOCABULARY[1:]]
    if unknown or len(words) > INSTRUCTION_LENGTH:
        problem = f"unknown words {unknown}" if unknown else f"more than {INSTRUCTION_LENGTH} words"
        raise ValueError(f"cannot encode {text!r}: {problem}; known are {', '.join(VOCABULARY[1:])}")
    ids = [VOCABULARY.index(word) for word in words]
    return np.array(ids + [0] * (INSTRUCTION_LENGTH - len(ids)), np.int32)


def decode(tokens: np.ndarray) -> str:
    """The text that `encode` encoded."""
    return " ".join(VOCABULARY[i] for i in tokens if i)


def goals_met(state: State) -> Bool[Array, "2"]:
    """Which of the task's goals hold; a goal that is not there holds. What is held has not been placed."""
    relation, subject, place = of(GOALS, state.task).T
    rests = resting_on(state)[subject]
    where = state.position[subject]  # [2, 3]
    free = state.held != subject
    delta = where[:, :2] - state.position[place, :2]
    kind = state.kind[place]
    inside = bodies.distance(delta) < of(bodies.WELL, kind)
    above = free & inside & (where[:, 2] > state.position[place, 2])  # also on something else in the hollow
    resting = free & (where[:, 2] <= bodies.CABINET_HEIGHT + bodies.TOUCH)
    opening = bodies.drawer_opening(state)
    x, y, z = where.T
    aside = jnp.abs(x - state.position[HANDLE_AT, 0]) < bodies.CABINET_HALF
    holds = jnp.stack([
        jnp.full(2, True),
        free & ((rests == place) | above & (rests >= 0)),
        free & bodies.in_drawer(state, where) & (rests >= 0),
        resting & aside & (y > bodies.CABINET_FRONT) & (jnp.abs(z - bodies.CABINET_HEIGHT) < bodies.TOUCH),
        jnp.full(2, opening >= OPEN_AT),
        jnp.full(2, opening <= CLOSED_AT),
        free & (y < FRONT_AT),
    ])  # fmt: skip
    return jnp.any(holds & (jnp.arange(len(holds))[:, None] == relation[None]), 0)


def success(state: State) -> Bool[Array, ""]:
    """Whether every goal of the task holds and the hand has let go of what it carried."""
    carries = (state.held >= 0) & (state.held != HANDLE_AT)
    return jnp.all(goals_met(state)) & ~carries


class Layout(NamedTuple):
    """Where bodies begin, in lattice units before the split moves them by one, and what they are."""

    node: Int[Array, "N 2"]
    height: Float[Array, "N"]
    kind: Int[Array, "N"]
    color: Int[Array, "N"]


FIXTURES = {  # lattice nodes of basket, stove and handle (of a closed drawer) in each suite; None: not there
    "spatial": (None, (34, 34), (-32, 0)),
    "object": ((0, 33), None, None),
    "goal": (None, (34, 34), (-32, 0)),
    "long": ((5, 35), (34, 34), (-32, 0)),
}
COLUMNS, ROWS = (-30, -10, 10, 30), (-38, -18, 2)
CELLS = np.array([(x, y) for y in ROWS for x in COLUMNS])  # twelve places where a body can lie
FAR = np.array([(200 + 50 * i, 200) for i in range(N)])  # where absent bodies are parked


def _even(key: Key[Array, ""], n: int, most: int) -> Int[Array, "n 2"]:
    """Shifts by an even number of nodes, up to `most`, along each axis."""
    return 2 * jax.random.randint(key, (n, 2), -(most // 2), most // 2 + 1)


def _fixtures(key: Key[Array, ""], suite: str) -> tuple[Int[Array, "3 2"], Int[Array, "3"]]:
    """Nodes and kinds of the fixtures; each lies a little elsewhere in every episode."""
    nodes = FIXTURES[suite]
    there = np.array([node is not None for node in nodes])
    base = np.array([FAR[MOVABLE + i] if node is None else node for i, node in enumerate(nodes)])
    kinds = np.where(there, (BASKET, STOVE, HANDLE), ABSENT)
    spread = np.array([[1, 1], [1, 0], [1, 0]]) * there[:, None] * (5 if suite == "object" else 1)
    spread[:, 1] = np.minimum(spread[:, 1], 1)
    return jnp.asarray(base) + _even(key, 3, 3) * spread, jnp.asarray(kinds)


def _spatial(key: Key[Array, ""], index: Int[Array, ""]) -> Layout:
    """Two equal bowls: the one that is meant stands where the task says, the other at another of the ten places."""
    keys = jax.random.split(key, 4)
    fixed, fixed_kind = _fixtures(keys[0], "spatial")
    plate = jnp.array([0, -14]) + _even(keys[1], 1, 2)[0]
    anchors = jax.random.permutation(keys[2], jnp.array([[-40, -40], [40, -40], [40, 8]]))
    beside = anchors + jnp.concatenate([jnp.where(anchors[:, :1] < 0, 18, -18), jnp.full((3, 1), 6)], 1)
    drawer, cabinet = fixed[2:] * jnp.array([[1, 0]]) + jnp.array([[0, 20], [0, 40]])
    places = jnp.stack([
        plate - jnp.array([20, 0]), plate + jnp.array([20, 0]), plate - jnp.array([0, 20]), plate + jnp.array([0, 20]),
        beside[0], beside[1], anchors[2], fixed[1], drawer, cabinet,
    ])  # fmt: skip
    heights = jnp.array([0, 0, 0, 0, 0, 0, 0.10, 0.05, bodies.DRAWER_SEAT, bodies.CABINET_HEIGHT])
    other = (index + jax.random.randint(keys[3], (), 1, len(RELATIONS))) % len(RELATIONS)
    bowls = jnp.stack([index, other])
    node = jnp.concatenate([places[bowls], anchors, plate[None], fixed])
    height = jnp.concatenate([heights[bowls], jnp.zeros(N - 2)])
    kind, color = (jnp.array(x) for x in zip(*SPATIAL_SCENE))
    return Layout(node, height, jnp.concatenate([kind, fixed_kind]), jnp.concatenate([color, jnp.zeros(3, int)]))


def _scattered(key: Key[Array, ""], count: int, allowed: np.ndarray, last: np.ndarray) -> Int[Array, "count 2"]:
    """Different cells among the `allowed`, the last body's among `last`, all shifted together."""
    place_key, shift_key = jax.random.split(key)
    score = jax.random.uniform(place_key, (len(CELLS),))
    mine = jnp.argmax(jnp.where(last, score, -1))
    score = jnp.where(allowed, score, -1).at[mine].set(-2)
    cells = jnp.concatenate([jnp.argsort(-score)[: count - 1], mine[None]])
    return jnp.asarray(CELLS)[cells] + _even(shift_key, 1, 6)


def _object(key: Key[Array, ""], index: Int[Array, ""]) -> Layout:
    """The body that is meant and five others of the ten, all of them different."""
    keys = jax.random.split(key, 3)
    fixed, fixed_kind = _fixtures(keys[0], "object")
    others = (index + 1 + jax.random.permutation(keys[1], len(GOODS) - 1)[: MOVABLE - 1]) % len(GOODS)
    chosen = jnp.concatenate([index[None], others])
    node = jnp.concatenate([_scattered(keys[2], MOVABLE, CELLS[:, 0] < 99, CELLS[:, 0] < 99), fixed])
    kind, color = (jnp.array([good[i] for good in GOODS])[chosen] for i in (1, 2))
    fixed_color = jnp.zeros(3, int)
    return Layout(node, jnp.zeros(N), jnp.concatenate([kind, fixed_kind]), jnp.concatenate([color, fixed_color]))


def _goal(key: Key[Array, ""], suite: str) -> Layout:
    """One scene for every goal. The plate is not at the front yet, and nothing lies in the drawer's way."""
    keys = jax.random.split(key, 2)
    fixed, fixed_kind = _fixtures(keys[0], suite)
    free = (CELLS[:, 1] < 0) | (CELLS[:, 0] > 0)
    node = jnp.concatenate([_scattered(keys[1], MOVABLE, free, free & (CELLS[:, 1] > -20)), fixed])
    kind, color = (jnp.array(x) for x in zip(*GOAL_SCENE))
    fixed_color = jnp.zeros(3, int)
    return Layout(node, jnp.zeros(N), jnp.concatenate([kind, fixed_kind]), jnp.concatenate([color, fixed_color]))


def reset(
    key: Key[Array, ""],
    task: Int[Array, ""] | int | np.integer,
    split: Split = "train",
    disturbance: Float[Array, ""] | float | int = DISTURBANCE,
) -> State:
    """The beginning of an episode.

    Args:
        key: decides where things lie and which disturbances follow.
        task: index into `TASKS`.
        split: no body of a "test" episode begins where one of a "train" episode can.
        disturbance: strength of what goes wrong, 0 for nothing.
    """
    task = jnp.asarray(task, jnp.int32)
    layout_key, parity_key, fine_key, hand_key, world_key = jax.random.split(key, 5)
    index = task % 10
    layout = jax.lax.switch(
        task // 10,
        [
            lambda: _spatial(layout_key, index),
            lambda: _object(layout_key, index),
            lambda: _goal(layout_key, "goal"),
            lambda: _goal(layout_key, "long"),
        ],
    )
    even = jnp.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    odd = jnp.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    moved = (odd if split == "test" else even)[jax.random.randint(parity_key, (MOVABLE,), 0, 4)]
    node = layout.node.at[:MOVABLE].add(moved)
    fine = jax.random.uniform(fine_key, (N, 2), minval=-0.4, maxval=0.4).at[HANDLE_AT, 1].set(0.0)
    xy = LATTICE * (node + fine)
    handle_y = bodies.CABINET_FRONT - bodies.HANDLE_REACH - of(OPENINGS, task)
    xy = xy.at[HANDLE_AT, 1].set(jnp.where(layout.kind[HANDLE_AT] == ABSENT, 9.0, handle_y))
    hand = jnp.array([0.0, -0.1, 0.5]) + jax.random.uniform(hand_key, (3,), minval=-0.08, maxval=0.08)
    return State(
        task=task,
        time=jnp.zeros((), jnp.int32),
        key=world_key,
        disturbance=jnp.asarray(disturbance, jnp.float32),
        gripper=hand,
        velocity=jnp.zeros(3),
        gap=jnp.full((), bodies.GAP_MAX, jnp.float32),
        held=jnp.asarray(-1, jnp.int32),
        grip=jnp.zeros(3),
        kind=layout.kind.astype(jnp.int32),
        color=layout.color.astype(jnp.int32),
        position=jnp.concatenate([xy, layout.height[:, None]], 1),
    )
