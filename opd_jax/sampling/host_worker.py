# SPDX-License-Identifier: Apache-2.0
"""The process that steps some simulators for `host_episodes`, and what is said to it. Imports no JAX."""

import contextlib
import os
import pickle
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from opd_jax.sampling.host_simulator import MakeFn, Simulator, expert_chunk

# ---- messages --------------------------------------------------------------------------------------------------------


class Begin(NamedTuple):
    """An episode, from its start."""

    task: int
    seed: int
    split: str
    limit: int  # steps at most, beside the simulator's horizon
    settle: int  # steps of the idle action at first, which count nothing
    expert_steps: int  # of each chunk; 0: the expert is not asked


class Act(NamedTuple):
    """The actions of one decision, `[E, A]`."""

    actions: np.ndarray


class Turn(NamedTuple):
    """Where an episode stands after a message; with what the next decision needs, if there is one."""

    executed: int  # of the actions sent
    over: bool
    success: bool
    instruction: str
    observation: dict[str, np.ndarray] | None
    expert: np.ndarray | None  # [expert_steps, A]


class Failed(NamedTuple):
    """An episode that came to no end: its simulator raised, or the process was lost."""

    reason: str
    final: bool = False  # trying again is no use: the simulator could not be made


# ---- the process -----------------------------------------------------------------------------------------------------


class _Episode:
    """A simulator that is played, from one `Begin` to the next."""

    def __init__(self, simulator: Simulator, begin: Begin):
        self.simulator, self.begin, self.length = simulator, begin, 0
        simulator.reset(begin.seed, begin.split)
        for _ in range(begin.settle):
            simulator.step(simulator.idle)
        self.limit = min(begin.limit, simulator.horizon)
        self.success = bool(simulator.success())

    @property
    def over(self) -> bool:
        return self.success or self.length >= self.limit

    def act(self, actions: Float[np.ndarray, "E A"]) -> Turn:
        before = self.length
        for action in actions:
            if self.over:
                break
            self.simulator.step(action)
            self.length += 1
            self.success = bool(self.simulator.success())
        return self.turn(self.length - before, look=not self.over)

    def turn(self, executed: int = 0, look: bool = True) -> Turn:
        """`look` at the start too where that is a success: every episode has one decision at least."""
        seen = self.simulator.observe() if look else None
        steps = self.begin.expert_steps if look else 0
        plan = expert_chunk(self.simulator, steps) if steps else None
        return Turn(executed, self.over, self.success, self.simulator.instruction, seen, plan)


class _Slots:
    """The simulators of this process by slot; each is kept while the slot's task is the same, and `spare` of others."""

    def __init__(self, make: MakeFn, spare: int = 0):
        self._make, self._episodes = make, {}
        self._spare, self._idle = spare, []  # (task, simulator), the longest idle first

    def answer(self, slot: int, message: Begin | Act) -> Turn | Failed:
        try:
            if isinstance(message, Act):
                return self._episodes[slot].act(message.actions)
            simulator = self._simulator(slot, message.task)
        except Exception:
            self._drop(slot)
            return Failed(traceback.format_exc(), final=isinstance(message, Begin))
        try:
            self._episodes[slot] = _Episode(simulator, message)
            return self._episodes[slot].turn()
        except Exception:
            self._episodes.pop(slot, None)
            _close(simulator)
            return Failed(traceback.format_exc())

    def _simulator(self, slot: int, task: int) -> Simulator:
        episode = self._episodes.pop(slot, None)
        if episode:
            self._idle.append((episode.begin.task, episode.simulator))
        fits = [at for at, (idle, _) in enumerate(self._idle) if idle == task]
        simulator = self._idle.pop(fits[-1])[1] if fits else None
        while len(self._idle) > self._spare:
            _close(self._idle.pop(0)[1])
        return simulator if fits else self._make(task)

    def _drop(self, slot: int) -> None:
        episode = self._episodes.pop(slot, None)
        if episode:
            _close(episode.simulator)

    def close(self) -> None:
        for slot in list(self._episodes):
            self._drop(slot)
        while self._idle:
            _close(self._idle.pop()[1])


def _close(simulator: Simulator) -> None:
    with contextlib.suppress(Exception):
        simulator.close()


def _end_with(parent: int) -> None:
    """Ends this process, whatever it is doing, soon after its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """Answers lists of `(slot, message)`, one reply a message, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pickled = connection.recv_bytes()
        try:
            slots = _Slots(*pickle.loads(pickled))
        except Exception:
            connection.send((None, Failed(traceback.format_exc(), final=True)))
            return
        connection.send((None, None))
        with contextlib.closing(slots):
            while True:
                for slot, message in connection.recv():
                    connection.send((slot, slots.answer(slot, message)))
