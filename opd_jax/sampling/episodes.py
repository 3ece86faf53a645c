# SPDX-License-Identifier: Apache-2.0
"""Closed-loop episodes of many environments at once, without leaving the device: one scan over decisions.

A decision is an observation and the chunk of H actions that the policy gives for it; E of them are executed before the
next one. An episode is over with success or after its horizon; then its state stands still and nothing counts. For
simulators on the host see `host_episodes`.

Nothing of an episode depends on the others: it is a function of its first state, its key and the policy, so the same
episodes come out in whatever company, batch or number of devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from opd_jax.types import EpisodeRollout, PyTree


@runtime_checkable
class Environment(Protocol):
    """One environment, as pure functions, of a module or an object; `rollout` maps them over the first axis."""

    def step(self, state: Any, action: Float[Array, "A"]) -> Any: ...

    def observe(self, state: Any) -> Any: ...

    def success(self, state: Any) -> Bool[Array, ""]: ...


class Plan(NamedTuple):
    """How long, and how often the policy looks: static."""

    decisions: int  # T, at most
    executed: int  # E, actions of each chunk
    settle: int = 0  # steps without the policy at first, by `idle`; they count nothing


ActFn = Callable[[PyTree, PyTree, Key[Array, "B"]], tuple[PyTree, Float[Array, "B H A"]]]
"""`act_fn(params, observation [B, ...], keys [B]) -> (drawn [B, ...], actions [B, H, A])`; what was drawn is kept."""


def rollout(
    environment: Environment,
    act_fn: ActFn,
    params: PyTree,
    states: PyTree,
    keys: Key[Array, "B"],
    *,
    plan: Plan,
    horizon: Int[Array, "B"],
    group: Int[Array, "B"],
    task: Int[Array, "B"],
    idle: Float[Array, "A"] | None = None,
) -> EpisodeRollout:
    """Episodes of the policy from given first states.

    Args:
        states: leaves `[B, ...]`.
        keys: of each episode; decision t draws with `fold_in(key, t)`.
        horizon: actions after which an episode is over, at most `plan.decisions * plan.executed`.
        group, task: carried along.
        idle: the action of settling steps; zeros by default.

    Returns:
        An EpisodeRollout. `states` are the environment's at each decision: what a scripted expert labels.

    Raises:
        ValueError: at tracing, where a chunk has fewer actions than are executed.
    """
    step, observe, success = (jax.vmap(getattr(environment, name)) for name in ("step", "observe", "success"))
    batch = group.shape[0]

    def settle(_, states):
        return step(states, jnp.broadcast_to(jnp.zeros(()) if idle is None else idle, (batch, *shape)))

    shape = jax.eval_shape(act_fn, params, jax.eval_shape(observe, states), keys)[1].shape[2:]
    states = jax.lax.fori_loop(0, plan.settle, settle, states)

    def decide(carry, t):
        states, over, length = carry
        observation = observe(states)
        drawn, actions = act_fn(params, observation, jax.vmap(jax.random.fold_in, (0, None))(keys, t))
        if actions.shape[1] < plan.executed:
            raise ValueError(f"executed={plan.executed}: more than the {actions.shape[1]} actions of a chunk; lower it")

        def act(carry, action):
            states, over, length = carry
            live = ~over & (length < horizon)
            new = step(states, action)
            over = over | (live & success(new))
            return (where(live, new, states), over, length + live), live

        carry, live = jax.lax.scan(act, (states, over, length), jnp.moveaxis(actions, 1, 0)[: plan.executed])
        counted = jnp.pad(live.T, ((0, 0), (0, actions.shape[1] - plan.executed)))
        return carry, (states, observation, drawn, counted)

    start = states, success(states), jnp.zeros(batch, jnp.int32)
    (_, over, length), kept = jax.lax.scan(decide, start, jnp.arange(plan.decisions))
    visited, observation, drawn, counted = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), kept)
    return EpisodeRollout(observation, drawn, counted, over.astype(jnp.float32), length, group, task, visited)


def where(chosen: Bool[Array, "B"], new: PyTree, old: PyTree) -> PyTree:
    """Record by record, one tree or the other."""

    def leaf(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(leaf(jax.random.key_data(a), jax.random.key_data(b)))
        return jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(leaf, new, old)


@functools.partial(jax.jit, static_argnames=("environment", "expert", "steps"))
def expert_chunks(
    states: PyTree, *, environment: Environment, expert: Callable[[Any], Array], steps: int
) -> Float[Array, "B T H A"]:
    """What a scripted expert would do from every state that the student came to, H actions each, `[B, T, ...]` leaves.

    The first action is the expert's there; the next ones are those that it would take after its own, in the same
    environment. So a chunk is a plan from that observation, which is what a chunk of the student is. Where chance is a
    function of the state, give states without it: a plan must not know what is going to happen.
    """

    def chunk(state):
        def act(state, _):
            action = expert(state)
            return environment.step(state, action), action

        return jax.lax.scan(act, state, None, length=steps)[1]

    return jax.vmap(jax.vmap(chunk))(states)
