# SPDX-License-Identifier: Apache-2.0
"""Closed-loop episodes in simulators on the host: processes step them, the policy acts for all of them at once.

    with Pool(make, workers=2, batch=8) as pool:
        rollout, redone = host_episodes.rollout(pool, act_fn, params, starts, keys, plan=Plan(decisions=25, executed=8))

The counterpart of `episodes` for simulators that are not JAX (`host_simulator.Simulator`). `batch` of them are played
at once, whatever the number of processes. Episode i has row `i % batch` in every call of the policy, and every call has
`batch` rows. So nothing recompiles, and the same episodes come out, to the bit, of any number of processes and after
any number of their crashes: an episode is a function of its start, its key, the policy and `batch`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Int, Key

from opd_jax.sampling.episodes import ActFn, Plan
from opd_jax.sampling.host_pool import Pool, SimulatorError
from opd_jax.sampling.host_worker import Act, Begin, Failed, Turn
from opd_jax.types import EpisodeRollout, PyTree

Prepare = Callable[[dict[str, np.ndarray], str], PyTree]
"""`prepare(observation, instruction)`: one decision's as the policy takes it, but without the batch axis; numpy."""


class Starts(NamedTuple):
    """Where episodes begin; the same (task, seed) is the same scene within a split."""

    task: Int[np.ndarray, "N"]
    seed: Int[np.ndarray, "N"]


class Redone(NamedTuple):
    """An episode that was begun again."""

    episode: int
    decision: int  # at which it was lost
    reason: str  # a traceback, or how its process ended; empty: another episode of its process was to blame


def rollout(
    pool: Pool,
    act_fn: ActFn,
    params: PyTree,
    starts: Starts,
    keys: Key[Array, "B"],
    *,
    plan: Plan,
    split: str = "train",
    group: int = 1,
    expert_steps: int = 0,
    prepare: Prepare = lambda observation, instruction: observation,
) -> tuple[EpisodeRollout, list[Redone]]:
    """Episodes of the policy from given starts, as `episodes.rollout` plays them on the device.

    Args:
        act_fn: called with `pool.batch` rows; what it makes of a row must not depend on the others.
        starts: N initial states.
        keys: of each episode, B = N * group; decision t draws with `fold_in(key, t)`.
        plan: an episode has `decisions * executed` actions at most, or fewer by its simulator's horizon.
        split: `train` or `test`, whose initial states differ.
        group: episodes of each initial state, side by side.
        expert_steps: length of the expert's chunks; 0: it is not asked.

    Returns:
        An EpisodeRollout with leaves of numpy, and what had to be begun again. `states` are the expert's chunks at each
        decision, `[B, T, expert_steps, A]` float32, or None. What follows an episode's last decision repeats it, and
        does not count.

    Raises:
        SimulatorError: naming task and seed, with the last traceback, where an episode failed too often.
        ValueError: keys of another number, or a chunk shorter than what is executed.
    """
    if len(keys) != len(starts.task) * group or not len(keys):
        raise ValueError(f"{len(keys)} keys for {len(starts.task)} starts, {group} episodes each: give one per episode")
    limit = plan.decisions * plan.executed
    begins = [
        Begin(int(task), int(seed), split, limit, plan.settle, expert_steps)
        for task, seed in zip(starts.task, starts.seed)
        for _ in range(group)
    ]
    run = _Run(begins, plan, pool, prepare)
    act = functools.partial(_act, act_fn if isinstance(act_fn, Partial) else Partial(act_fn), params, keys)
    try:
        messages = run.begin()
        while messages:
            messages = run.answer(pool.exchange(messages), act)
    except BaseException:
        pool.close()  # replies may be under way
        raise
    return run.result(group), run.redone


class _Run:
    """The record of one rollout, and what is to be sent next."""

    def __init__(self, begins: list[Begin], plan: Plan, pool: Pool, prepare: Prepare):
        self._begins, self._plan, self._prepare = begins, plan, prepare
        self._batch, self._retries = pool.batch, pool.retries
        self._episode = list(range(pool.batch))  # what each slot plays, or played last
        self._decisions = np.zeros(len(begins), np.int32)
        self._failures = np.zeros(len(begins), np.int32)
        self._executed = np.zeros((len(begins), plan.decisions), np.int32)
        self._success = np.zeros(len(begins), np.float32)
        self._kept: PyTree = None  # (observation, drawn, expert), leaves [B, T, ...], made when their shapes are known
        self._chunk = 0
        self.redone: list[Redone] = []

    def begin(self) -> dict[int, Begin]:
        return dict(enumerate(self._begins[: self._batch]))

    def _next(self, slot: int) -> Begin | None:
        """The slot's next episode; None where there is none."""
        self._episode[slot] += self._batch
        return self._begins[self._episode[slot]] if self._episode[slot] < len(self._begins) else None

    def answer(self, replies: dict[int, Turn | Failed], act) -> dict[int, Begin | Act]:
        """Takes down what came of the last messages, lets the policy act, and says what is to be sent next."""
        messages: dict[int, Begin | Act | None] = {}
        waiting: dict[int, Turn] = {}
        for slot, reply in replies.items():
            if isinstance(reply, Failed):
                messages[slot] = self._again(self._episode[slot], reply)
            elif self._over(self._episode[slot], reply):
                messages[slot] = self._next(slot)
            else:
                waiting[slot] = reply
        if waiting:
            messages |= self._decide(waiting, act)
        return {slot: message for slot, message in messages.items() if message is not None}

    def _over(self, episode: int, turn: Turn) -> bool:
        t = self._decisions[episode]
        if t:
            self._executed[episode, t - 1] = turn.executed
        self._success[episode] = turn.success
        return bool(t) and turn.over

    def _again(self, episode: int, failed: Failed) -> Begin:
        begin = self._begins[episode]
        self._failures[episode] += bool(failed.reason)
        if failed.final or self._failures[episode] > self._retries:
            often = "cannot be made" if failed.final else f"failed {self._failures[episode]} times"
            where = f"task {begin.task}, seed {begin.seed}, {begin.split}: the simulator {often}"
            raise SimulatorError(f"{where}, last at decision {self._decisions[episode]}:\n{failed.reason}")
        self.redone.append(Redone(int(episode), int(self._decisions[episode]), failed.reason))
        self._decisions[episode], self._executed[episode] = 0, 0
        return begin

    def _decide(self, waiting: dict[int, Turn], act) -> dict[int, Act]:
        """One call of the policy; rows where nobody waits are copies of one where somebody does."""
        seen = {slot: self._prepare(turn.observation, turn.instruction) for slot, turn in waiting.items()}
        rows = [slot if slot in waiting else next(iter(waiting)) for slot in range(self._batch)]
        observation = jax.tree.map(lambda *leaves: np.stack(leaves), *(seen[slot] for slot in rows))
        index = np.array([self._episode[slot] for slot in rows], np.int32)
        drawn, actions = jax.device_get(act(observation, index, self._decisions[index]))
        if actions.shape[1] < self._plan.executed:
            few = f"more than the {actions.shape[1]} actions of a chunk; lower it"
            raise ValueError(f"executed={self._plan.executed}: {few}")
        self._chunk = actions.shape[1]
        for slot, turn in waiting.items():
            own = jax.tree.map(lambda leaf, slot=slot: np.asarray(leaf[slot]), drawn)
            self._keep(self._episode[slot], (seen[slot], own, turn.expert))
        return {slot: Act(actions[slot, : self._plan.executed]) for slot in waiting}

    def _keep(self, episode: int, values: PyTree) -> None:
        if self._kept is None:
            shape = len(self._begins), self._plan.decisions
            empty = lambda leaf: np.zeros((*shape, *np.shape(leaf)), np.asarray(leaf).dtype)
            self._kept = jax.tree.map(empty, values)
        t = int(self._decisions[episode])

        def put(kept, leaf):
            kept[episode, t] = leaf

        jax.tree.map(put, self._kept, values)
        self._decisions[episode] += 1

    def result(self, group: int) -> EpisodeRollout:
        for leaf in jax.tree.leaves(self._kept):
            for episode, t in enumerate(self._decisions):
                leaf[episode, t:] = leaf[episode, t - 1]
        observation, drawn, expert = self._kept
        counted = np.arange(self._chunk) < self._executed[..., None]
        index = np.repeat(np.arange(len(self._begins) // group, dtype=np.int32), group)
        task = np.array([begin.task for begin in self._begins], np.int32)
        length = self._executed.sum(1, dtype=np.int32)
        return EpisodeRollout(observation, drawn, counted, self._success, length, index, task, expert)


@jax.jit
def _act(
    act_fn: Partial, params: PyTree, keys: Array, observation: PyTree, index: Array, t: Array
) -> tuple[Any, Array]:
    return act_fn(params, observation, jax.vmap(jax.random.fold_in)(keys[index], t))
