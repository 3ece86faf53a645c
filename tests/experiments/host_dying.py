"""Meta-World's simulators whose process dies, for as long as a file is there; importable by other processes."""

import os
import pathlib

from opd_jax.worlds.metaworld import MetaWorld


class Dying(MetaWorld):
    def __init__(self, task: int, *, mark: str, **how):
        super().__init__(task, **how)
        self._mark = pathlib.Path(mark)

    def step(self, action) -> None:
        if self._mark.exists():
            self._mark.unlink()
            os._exit(3)
        super().step(action)
