# SPDX-License-Identifier: Apache-2.0
"""LIBERO's suites of a Panda arm (arXiv:2306.03310) as simulators on the host, with its evaluation's protocol. No JAX.

    make = functools.partial(libero.Libero, suite="spatial")      # make(task), for `host_pool.Pool`
    plan = Plan(decisions=28, executed=8, settle=libero.SETTLE)   # 220 steps in chunks of 8

An optional extra, whose package declares an older numpy than JAX needs but works with the newer one:

    pip install 'opd_jax[libero]' && pip install --no-deps rlinf-libero==0.1.3 && libero-download-assets

or, in place of the last, LIBERO_ASSET_PATH=DIRECTORY for meshes and textures that are there already. The package looks
for them in its own folder: a link is left there, as by `libero-download-assets --link DIRECTORY`. MuJoCo must be older
than 3.4: from there on a bowl of the fixed states slides off.

Test scenes are the 50 fixed initial states of each task, and nothing else is; training scenes are sampled anew, so that
no policy is trained on what it is measured by. There is no scripted expert: a teacher is a policy.
"""

import contextlib
import importlib.util
import os
import pickle
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from opd_jax.sampling.host_simulator import refused, split_seed
from opd_jax.worlds import mujoco_gl

HORIZONS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}  # steps, of OpenVLA's evaluation
SETTLE = 10  # steps before the policy acts, until what was dropped lies still
STATES = 50  # fixed initial states of each task
SUITES = tuple(HORIZONS)
ACTION_DIMS, PROPRIOCEPTION_DIMS = 7, 8
# OpenVLA's data have the gripper as 1 open and 0 closed, the robot as -1 and 1: `SCALE * a + SHIFT` is the robot's.
SCALE, SHIFT = np.array([1, 1, 1, 1, 1, 1, -2], np.float32), np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
CONTACTS = (0,)  # robosuite's group of geometries that are not drawn
CAMERAS = ("agentview", "robot0_eye_in_hand")
INSTALL = "pip install 'opd_jax[libero]' && pip install --no-deps rlinf-libero==0.1.3"
ASSETS = "run libero-download-assets (400 MB), or set LIBERO_ASSET_PATH to a folder that has them"


class Protocol(NamedTuple):
    """How scenes are drawn."""

    size: int
    fast: bool  # without shadows, reflections and multisampling, and only where the policy looks


OFFICIAL, FAST = Protocol(256, False), Protocol(128, True)  # published numbers are those of the first


class Libero:
    """One task of a suite, as `host_simulator.Simulator`.

    Args:
        task: its place in the suite.
        suite: of `HORIZONS`.
        protocol: OFFICIAL or FAST.

    Raises:
        ConfigError: no such suite or task; the package, its assets or its files are missing; MuJoCo cannot draw here.
    """

    idle = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)  # the hand open

    def __init__(self, task: int, *, suite: str = "spatial", protocol: Protocol = OFFICIAL):
        names = tasks(suite)
        if not 0 <= task < len(names):
            raise refused(f"task={task}: libero_{suite} has {len(names)}; give 0 to {len(names) - 1}")
        self.instruction, self.horizon = instruction(names[task]), HORIZONS[suite]
        root = _package()
        _check_assets(root)
        folder, file = f"libero_{suite}", names[task]
        self._states = read_initial_states(root / "init_files" / folder / f"{file}.pruned_init")
        mujoco_gl.choose()
        self._protocol, self._camera = protocol, None
        self._environment = _environments().OffScreenRenderEnv(
            bddl_file_name=str(root / "bddl_files" / folder / f"{file}.bddl"),
            camera_heights=protocol.size,
            camera_widths=protocol.size,
            use_camera_obs=not protocol.fast,
        )

    def reset(self, seed: int, split: str) -> None:
        if split == "test" and not 0 <= seed < len(self._states):
            raise refused(f"seed={seed}: a task has {len(self._states)} test scenes; give 0 to {len(self._states) - 1}")
        self._environment.seed(split_seed(seed, split))
        self._observed = self._environment.reset()
        if split == "test":
            self._observed = self._environment.set_init_state(self._states[seed])
        if self._protocol.fast:  # a reset makes a new model
            self.close_camera()
            model = self._environment.sim.model._model
            self._camera = mujoco_gl.Camera(model, self._protocol.size, hidden=CONTACTS)

    def observe(self) -> dict[str, np.ndarray]:
        """`images` [2, size, size, 3], mirrored as in OpenVLA's data; `proprioception` [8]: hand, turn, fingers."""
        seen = self._observed
        turn = axis_angle(seen["robot0_eef_quat"])
        hand = np.concatenate([seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]]).astype(np.float32)
        return {"images": np.stack([self._picture(name) for name in CAMERAS]), "proprioception": hand}

    def _picture(self, name: str) -> np.ndarray:
        if self._camera:
            return self._camera.picture(self._environment.sim.data._data, name)[:, ::-1]
        return self._observed[f"{name}_image"][::-1, ::-1]  # robosuite's first row is the lowest

    def step(self, action: Float[np.ndarray, "7"]) -> None:
        self._observed = self._environment.step(np.asarray(action, np.float64))[0]

    def success(self) -> bool:
        return bool(self._environment.check_success())

    def close_camera(self) -> None:
        if self._camera:
            self._camera.close()

    def close(self) -> None:
        self.close_camera()
        self._environment.close()


def numbered(task: int, *, protocol: Protocol = OFFICIAL) -> Libero:
    """The task with a number among those of all suites, in the order of `SUITES`.

    Raises:
        ConfigError: as `Libero`; or there is no such number.
    """
    for suite in SUITES:
        count = len(tasks(suite))
        if 0 <= task < count:
            return Libero(task, suite=suite, protocol=protocol)
        task -= count
    raise refused(f"task: {task} more than LIBERO has; give one of its suites'")


def check() -> None:
    """Raises: ConfigError where the package or its assets are missing."""
    _check_assets(_package())


def tasks(suite: str) -> tuple[str, ...]:
    """Names of a suite's tasks, in its own order.

    Raises:
        ConfigError: no such suite, or the package is not installed.
    """
    if suite not in HORIZONS:
        raise refused(f"suite={suite!r}: choose {', '.join(HORIZONS)}")
    path = _package() / "benchmark" / "libero_suite_task_map.py"  # alone: the folder's __init__ needs torch
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.libero_task_map[f"libero_{suite}"])


def instruction(name: str) -> str:
    """The words of a task: its name, without the scene."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def axis_angle(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """Axis times angle in radians, 0 to 2 pi, of a rotation (x, y, z, w), as robosuite has it."""
    w = np.clip(quaternion[3], -1, 1)
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if np.isclose(sine, 0) else quaternion[:3] / sine * 2 * np.arccos(w)


# ---- initial states --------------------------------------------------------------------------------------------------

_NUMPY = {
    (module, name): (module.replace("numpy.core", "numpy._core"), name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("_reconstruct", "scalar")
} | {pair: pair for pair in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"))}


class _Arrays(pickle.Unpickler):
    """Arrays of numpy and nothing else: a pickle may otherwise call any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(*_NUMPY[module, name])


def read_initial_states(path: str | Path) -> Float[np.ndarray, "N D"]:
    """States of MuJoCo from a file of `torch.save`, without torch.

    Raises:
        ConfigError: the file is missing, is another, or holds anything but an array of numpy.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (inner,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(inner) as file:
                states = _Arrays(file).load()
    except (OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise refused(f"initial states {path}: {error}; install them again: {INSTALL}") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2 or states.dtype != np.float64:
        raise refused(f"initial states {path}: not one float64 array of rows; install them again: {INSTALL}")
    return states


# ---- the package -----------------------------------------------------------------------------------------------------


def _package() -> Path:
    """The folder of `libero.libero`."""
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise refused(f"LIBERO is not installed: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def _environments() -> Any:
    try:
        import mujoco

        if tuple(map(int, mujoco.__version__.split(".")[:2])) >= (3, 4):
            raise refused(
                f"mujoco {mujoco.__version__}: LIBERO's states need one before 3.4: pip install mujoco==3.3.0"
            )
        from libero.libero import envs
    except ImportError as error:
        raise refused(f"LIBERO cannot be imported ({error}): {INSTALL}") from error
    return envs


def _check_assets(root: Path) -> None:
    """Meshes and textures, which the package looks for in its own folder; LIBERO_ASSET_PATH is linked there."""
    given, own = os.environ.get("LIBERO_ASSET_PATH", ""), root / "assets"
    if given:
        there = Path(given).expanduser().resolve()
        if not (there / "scenes").is_dir():
            raise refused(f"LIBERO_ASSET_PATH={given}: has no folder scenes; give one with LIBERO's assets")
        if own.resolve() != there:
            _link(own, there)
    if not (own / "scenes").is_dir():
        raise refused(f"LIBERO's assets are not in {own}: {ASSETS}")


def _link(own: Path, there: Path) -> None:
    """Makes `own` a link to `there`, whatever other processes do meanwhile; a folder with something in it stays."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if not own.is_symlink():
                own.rmdir()  # refused where there is something in it
        with tempfile.TemporaryDirectory(dir=own.parent) as folder:
            made = Path(folder) / "assets"
            made.symlink_to(there)
            made.replace(own)
    except OSError as error:
        if own.resolve() != there:
            remedy = f"move {own} away and link it to {there}, or unset LIBERO_ASSET_PATH"
            raise refused(f"LIBERO's {own} cannot become a link to {there} ({error.strerror}): {remedy}") from error
