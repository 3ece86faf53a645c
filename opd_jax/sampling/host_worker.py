# SPDX-License-Identifier: Apache-2.0
"""What a simulator on the host is, and the process that steps some of them for `host_episodes`. Imports no JAX.

An episode of a simulator must be a function of (seed, split, actions): a reset leaves nothing of the episode before,
and a second one with the same seed is the same to the bit. Then it does not matter which process plays it, nor how
often.
"""

import contextlib
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

SPLITS = ("train", "test")


@runtime_checkable
class Simulator(Protocol):
    """One task. Its attributes are read after each reset."""

    instruction: str
    horizon: int  # steps of an episode, at most
    idle: Float[np.ndarray, "A"]  # the action that does nothing, for settling

    def reset(self, seed: int, split: str) -> None: ...

    def observe(self) -> dict[str, np.ndarray]: ...

    def step(self, action: Float[np.ndarray, "A"]) -> None: ...

    def success(self) -> bool: ...

    def close(self) -> None: ...


@runtime_checkable
class ExpertSimulator(Simulator, Protocol):
    """One whose expert knows what to do in every state. `restore(snapshot())` changes nothing, to the bit."""

    def expert(self) -> Float[np.ndarray, "A"]: ...

    def snapshot(self) -> Any: ...

    def restore(self, snapshot: Any) -> None: ...


MakeFn = Callable[[int], Simulator]
"""`make(task) -> Simulator`, of an importable module: what every process is given, pickled."""


def split_seed(seed: int, split: str) -> int:
    """A seed of its own for each (seed, split): even in training, odd in the test, so that no scene is in both.

    Raises:
        ValueError: where there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose {' or '.join(SPLITS)}")
    return 2 * seed + SPLITS.index(split)


def expert_chunk(simulator: ExpertSimulator, steps: int) -> Float[np.ndarray, "H A"]:
    """What the expert does from here on, its own actions executed; the simulator is then as it was. float32."""
    before, actions = simulator.snapshot(), []
    for _ in range(steps):
        actions.append(np.asarray(simulator.expert(), np.float32))
        if len(actions) < steps:
            simulator.step(actions[-1])
    simulator.restore(before)
    return np.stack(actions)


class _Shown:
    """A simulator whose observations hold what its expert does from this state on."""

    def __init__(self, simulator: ExpertSimulator, steps: int):
        self._simulator, self._steps = simulator, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulator, name)

    def observe(self) -> dict[str, np.ndarray]:
        return self._simulator.observe() | {"expert": expert_chunk(self._simulator, self._steps)}


def shown(make: MakeFn, task: int, steps: int = 1) -> Simulator:
    """`functools.partial(shown, make)` makes simulators that also show `expert` [steps, A], a chunk of it, in what is
    observed: a policy that repeats it demonstrates."""
    return _Shown(make(task), steps)


class _Disturbed:
    """A simulator that does not quite do what it is told: `disturbed` has the law."""

    DRIFT, SPREAD = 0.8, 0.6  # how much of it is left a step later; deviation of what is added, at strength 1
    PUSH, STEPS = 0.03, 8  # chance of one at a step, at strength 1; how long it lasts

    def __init__(self, simulator: Simulator):
        self._simulator = simulator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulator, name)

    def reset(self, seed: int, split: str) -> None:
        self._simulator.reset(seed, split)
        self._random = np.random.default_rng(split_seed(seed, split))
        self._strength = self._random.uniform()
        self._drift, self._push, self._left = np.zeros(len(self.idle)), None, 0

    def step(self, action: Float[np.ndarray, "A"]) -> None:
        self._drift = self.DRIFT * self._drift + self.SPREAD * self._strength * self._random.normal(size=len(action))
        if not self._left and self._random.uniform() < self.PUSH * self._strength:
            self._push, self._left = self._random.uniform(-1, 1, len(action)), self.STEPS
        disturbed = self._push if self._left else np.clip(action + self._drift, -1, 1)
        self._left = max(0, self._left - 1)
        self._simulator.step(np.asarray(disturbed, np.float32))


def disturbed(make: MakeFn, task: int) -> Simulator:
    """`functools.partial(disturbed, make)` makes simulators that add a drift to every action, and now and then push.

    An episode has a strength s, even from 0 to 1, of its seed and split alone. Of a told a_t is done
    `clip(a_t + d_t, -1, 1)` with `d_t = .8 d_(t-1) + .6 s n_t`, n standard normal; with chance `.03 s` at a step eight
    steps are one push instead, even in [-1, 1] in each dimension.

    An expert that looks ahead is asked within, undisturbed: `functools.partial(disturbed, functools.partial(shown,
    make))`, not the other way round.
    """
    return _Disturbed(make(task))


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
