"""A simulator small enough to be followed by hand, importable by other processes; some tasks of it go wrong."""

import functools
import os
import pathlib
import signal
import subprocess
import time

import numpy as np

from opd_jax.sampling.host_simulator import split_seed

FINE, ENDS, KILLED, HANGS, RAISES, ALWAYS_RAISES, SPAWNS = range(7)


class Line:
    """A point on a line, pushed by a noise of its own; done within 1/4 of the goal. float32, as JAX would."""

    idle = np.zeros(1, np.float32)

    def __init__(self, task: int, folder: str):
        self.task, self.folder = task, pathlib.Path(folder)
        self.horizon, self.instruction = 13, f"go to the goal, {task}"

    def reset(self, seed: int, split: str) -> None:
        random = np.random.default_rng(split_seed(seed, split))
        self.place, self.goal = np.float32(0), np.float32(random.uniform(-20, 20))
        self.steps, self.noise = 0, random.normal(0, 0.05, 64).astype(np.float32)

    def observe(self):
        return {"place": np.array([self.place]), "goal": np.array([self.goal]), "imported_jax": np.array(_has_jax())}

    def step(self, action) -> None:
        self._trouble()
        self.place = self.place + np.float32(action[0]) + self.noise[self.steps]
        self.steps += 1

    def success(self) -> bool:
        return bool(abs(self.place - self.goal) < 0.25)

    def expert(self):
        return np.clip([self.goal - self.place], -1, 1)

    def snapshot(self):
        return self.place, self.steps

    def restore(self, snapshot) -> None:
        self.place, self.steps = snapshot

    def close(self) -> None:
        pass

    def _trouble(self) -> None:
        """Once, at the third step, but for the one that always raises."""
        if self.task == ALWAYS_RAISES:
            raise ZeroDivisionError("the arm is off the table")
        mark = self.folder / str(self.task)
        if self.task == FINE or self.steps != 2 or mark.exists():
            return
        mark.touch()
        if self.task == ENDS:
            os._exit(3)
        elif self.task == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.task == HANGS:
            time.sleep(1000)
        elif self.task == RAISES:
            raise ZeroDivisionError("the arm is off the table")
        elif self.task == SPAWNS:
            subprocess.Popen(["sleep", "1000"])


def _has_jax() -> bool:
    import sys

    return "jax" in sys.modules


def maker(folder) -> functools.partial:
    return functools.partial(Line, folder=str(folder))


def unmakable(task: int):
    raise FileNotFoundError("no meshes")
