# SPDX-License-Identifier: Apache-2.0
"""RoboTwin 2.0's tasks of two arms (arXiv:2506.18088) as simulators on the host, over its own functions. No JAX here.

    make = functools.partial(robotwin.RoboTwin, root="/data/RoboTwin")   # make(task), for `host_pool.Pool`

**Untested with RoboTwin itself**: its renderer (SAPIEN, Vulkan with ray tracing) needs a GPU, its assets and cuRobo are
fetched by its own scripts. Written after its `script/eval_policy.py` and `envs/_base_task.py`; what was run is a
stand-in with their functions, and the errors where something is missing. RoboTwin is not a package: `root`, or
ROBOTWIN_PATH, is a checkout of github.com/RoboTwin-Platform/RoboTwin that its installation has made ready.

Where this departs from RoboTwin's evaluation: seeds are not first tried by its planner, only those are passed over
whose objects do not lie still; and the instruction is a task's `full_description`, not one of its paraphrases, which
name objects that only the planner's episode tells. There is no expert: its planner needs the whole episode.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from opd_jax.sampling.host_simulator import refused, split_seed

TASKS = (  # of VLA-OPD and SimpleVLA-RL; any module of `envs` may be given
    "pick_dual_bottles", "place_empty_cup", "handover_block", "stack_bowls_two", "beat_block_hammer",
)  # fmt: skip
LIMITS = dict(zip(TASKS, (100, 200, 400, 400, 200)))  # steps, SimpleVLA-RL's; of other tasks RoboTwin's own
ACTION_DIMS = 14  # six joints and the gripper of the left arm, then of the right; joints in radians, absolute
CAMERAS = ("head_camera", "left_camera", "right_camera")
TRIES = 50  # scenes until one lies still
INSTALL = "clone github.com/RoboTwin-Platform/RoboTwin, run its script/_install.sh and script/_download_assets.sh"


class RoboTwin:
    """One task, as `host_simulator.Simulator`. Its process works in the checkout's folder from then on.

    Args:
        task: a module of `envs`, or a place in `TASKS`.
        root: the checkout; None: ROBOTWIN_PATH.
        settings: a file of its `task_config`, without the ending.
        cameras: of `CAMERAS`.

    Raises:
        ConfigError: no such task or camera; the checkout, its assets or what it needs is missing.
    """

    def __init__(
        self,
        task: int | str,
        *,
        root: str | None = None,
        settings: str = "demo_clean",
        cameras: Sequence[str] = ("head_camera",),
    ):
        if not isinstance(task, str) and not 0 <= task < len(TASKS):
            raise refused(f"task={task}: give 0 to {len(TASKS) - 1}, or a name, such as {TASKS[0]!r}")
        if unknown := set(cameras) - set(CAMERAS):
            raise refused(f"cameras={tuple(cameras)}: no {', '.join(unknown)}; choose of {', '.join(CAMERAS)}")
        self.name, self._cameras = task if isinstance(task, str) else TASKS[task], tuple(cameras)
        folder = checkout(root)
        os.chdir(folder)  # RoboTwin's paths are relative to it
        sys.path[:0] = [str(folder)] if str(folder) not in sys.path else []
        module, self._unstable = _module(self.name)
        self._arguments = arguments(folder, self.name, settings)
        described = json.loads((folder / "description" / "task_instruction" / f"{self.name}.json").read_text())
        self.instruction, self.horizon = described["full_description"], LIMITS.get(self.name, 0)
        self._environment, self._started = getattr(module, self.name)(), False

    def reset(self, seed: int, split: str) -> None:
        for attempt in range(TRIES):
            self._end()
            try:
                own = split_seed(seed, split) + 2 * 10**6 * attempt  # even, so that it stays in its split
                self._environment.setup_demo(now_ep_num=0, seed=own, is_test=True, **self._arguments)
                self._started = True
                break
            except self._unstable:
                self._started = True
        else:
            raise RuntimeError(f"{self.name}: objects do not lie still in {TRIES} scenes from seed {seed} on")
        self._environment.set_instruction(instruction=self.instruction)
        self.horizon = self.horizon or int(self._environment.step_lim)
        self._environment.step_lim = self.horizon + 10**6  # the horizon is the caller's
        self.idle = self._felt(self._environment.get_obs())  # joints stay where they are

    def observe(self) -> dict[str, np.ndarray]:
        """`images` [C, H, W, 3] uint8 and `proprioception` [14]: joints and grippers, as an action has them."""
        seen = self._environment.get_obs()
        pictures = [np.asarray(seen["observation"][name]["rgb"], np.uint8) for name in self._cameras]
        return {"images": np.stack(pictures), "proprioception": self._felt(seen)}

    def _felt(self, seen: dict[str, Any]) -> Float[np.ndarray, "14"]:
        return np.asarray(seen["joint_action"]["vector"], np.float32)

    def step(self, action: Float[np.ndarray, "14"]) -> None:
        self._environment.take_action(np.asarray(action, np.float64), action_type="qpos")

    def success(self) -> bool:
        return bool(self._environment.eval_success)

    def _end(self) -> None:
        if self._started:
            self._environment.close_env(clear_cache=False)
        self._started = False

    def close(self) -> None:
        self._end()


def checkout(root: str | None = None) -> Path:
    """The folder of RoboTwin.

    Raises:
        ConfigError: it is not given, or is none, or has no assets.
    """
    given = root or os.environ.get("ROBOTWIN_PATH", "")
    if not given or not (Path(given) / "envs" / "_base_task.py").is_file():
        what = f"{given}: no checkout of RoboTwin" if given else "RoboTwin is not found: ROBOTWIN_PATH is not set"
        raise refused(f"{what}; {INSTALL}, and set ROBOTWIN_PATH to it")
    folder = Path(given).resolve()
    if not (folder / "assets" / "embodiments").is_dir():
        raise refused(f"RoboTwin's assets are not in {folder / 'assets'}; run its script/_download_assets.sh")
    return folder


def arguments(folder: Path, task: str, settings: str) -> dict[str, Any]:
    """What `setup_demo` is given, of the checkout's files.

    Raises:
        ConfigError: there are no such settings, or they name a robot or camera that is not there.
    """
    import yaml

    def read(path: Path) -> dict[str, Any]:
        try:
            return yaml.safe_load(path.read_text())
        except OSError as error:
            raise refused(f"RoboTwin's {path} cannot be read ({error.strerror}); update the checkout") from error

    def robot(name: str) -> tuple[str, dict[str, Any]]:
        if name not in robots:
            raise refused(f"embodiment {name!r} of {settings}.yml: choose of {', '.join(robots)}")
        path = robots[name]["file_path"]
        return path, read(folder / path / "config.yml")

    files = folder / "task_config"
    robots, cameras = read(files / "_embodiment_config.yml"), read(files / "_camera_config.yml")
    found = read(files / f"{settings}.yml")
    left, *rest = found["embodiment"]
    head = found["camera"]["head_camera_type"]
    if head not in cameras:
        raise refused(f"camera {head!r} of {settings}.yml: choose of {', '.join(cameras)}")
    (left_path, left_about), (right_path, right_about) = robot(left), robot(rest[0] if rest else left)
    return found | {
        "task_name": task,
        "task_config": settings,
        "head_camera_h": cameras[head]["h"],
        "head_camera_w": cameras[head]["w"],
        "left_robot_file": left_path,
        "right_robot_file": right_path,
        "left_embodiment_config": left_about,
        "right_embodiment_config": right_about,
        "dual_arm_embodied": not rest,
        **({"embodiment_dis": rest[1]} if rest else {}),
        "render_freq": 0,
        "eval_mode": True,
    }


def _module(task: str) -> tuple[Any, type[Exception]]:
    """The task's module, and the error of a scene that does not lie still."""
    try:
        module = importlib.import_module(f"envs.{task}")
        return module, importlib.import_module("envs.utils.create_actor").UnStableError
    except ModuleNotFoundError as error:
        if error.name == f"envs.{task}":
            raise refused(f"task={task!r}: RoboTwin has no such task; see the files of its envs") from error
        raise refused(f"RoboTwin cannot be imported ({error}); {INSTALL}") from error
    except ImportError as error:
        raise refused(f"RoboTwin cannot be imported ({error}); {INSTALL}") from error
