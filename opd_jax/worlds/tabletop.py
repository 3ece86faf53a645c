"""A robot on a table: forty tasks told in words, two cameras, an expert for every state. Pure JAX; callers vmap.

It stands in for LIBERO (arXiv:2306.03310) where a policy that sees pictures and words is distilled on the states that
it reaches itself, and has LIBERO's four suites of ten tasks: "spatial" (which of two equal bowls), "object" (which
thing goes into the basket), "goal" (one scene, ten goals), "long" (two goals). The scene always allows more than the
instruction asks for. Where it departs: a hand without rotation on round footprints instead of a seven-joint arm and
meshes, 40 x 40 pictures, no demonstrations (there is the expert).

    state = reset(key, task)
    while not success(state) and state.time < horizon(task):
        seen, words = observe(state), encode(instruction(task))
        state = step(state, policy(seen, words))          # and expert(state) is the label

An episode is a function of the key of its `reset` and of the actions. Bodies and their geometry are in
`tabletop_bodies`, contacts and disturbances in `tabletop_physics`, goals, words and first states in `tabletop_tasks`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from opd_jax.worlds.tabletop_bodies import CEILING, GAP_MAX, State
from opd_jax.worlds.tabletop_expert import expert
from opd_jax.worlds.tabletop_physics import ACTION_DIMS, step, undisturbed
from opd_jax.worlds.tabletop_render import CAMERAS, IMAGE_SIZE, render
from opd_jax.worlds.tabletop_tasks import (
    DISTURBANCE,
    INSTRUCTION_LENGTH,
    SUITES,
    TASKS,
    VOCABULARY,
    Task,
    decode,
    encode,
    horizon,
    instruction,
    reset,
    success,
)

__all__ = [
    "ACTION_DIMS", "CAMERAS", "DISTURBANCE", "IMAGE_SIZE", "INSTRUCTION_LENGTH", "PROPRIOCEPTION_DIMS", "SUITES",
    "TASKS", "VOCABULARY", "Observation", "State", "Task", "decode", "encode", "expert", "horizon", "instruction",
    "observe", "render", "reset", "step", "success", "undisturbed",
]  # fmt: skip

PROPRIOCEPTION_DIMS = 7


class Observation(NamedTuple):
    """What a policy may see."""

    images: UInt8[Array, "C H W 3"]  # the table from above; the hand from the front, closer
    proprioception: Float[Array, "P"]  # hand's x, y, z, opening of the fingers, lagged velocity; each in [-1, 1]


def observe(state: State) -> Observation:
    """Both pictures, and what the robot feels of itself."""
    x, y, z = state.gripper
    hand = jnp.stack([x, y, 2 * z / CEILING - 1, 2 * state.gap / GAP_MAX - 1])
    return Observation(render(state), jnp.clip(jnp.concatenate([hand, state.velocity]), -1, 1))
