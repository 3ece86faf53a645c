# SPDX-License-Identifier: Apache-2.0
"""What a simulator on the host is, what its expert does from a state on, and simulators made of simulators.

An episode of a simulator must be a function of (seed, split, actions): a reset leaves nothing of the episode before,
and a second one with the same seed is the same to the bit. Then it does not matter which process plays it, nor how
often. Imports no JAX, which the processes that step simulators do without.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

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


def refused(line: str) -> Exception:
    """A `config.ConfigError` of this line; `config` imports JAX, so only where something is wrong."""
    from opd_jax.config import ConfigError

    return ConfigError(line)
