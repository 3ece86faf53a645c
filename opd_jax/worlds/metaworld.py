# SPDX-License-Identifier: Apache-2.0
"""Meta-World's fifty tasks of a Sawyer arm (arXiv:1910.10897), told in words, with pictures and experts. No JAX here.

    make = functools.partial(metaworld.MetaWorld, size=128)   # make(task), for `host_pool.Pool`

An optional extra: `pip install 'opd_jax[metaworld]'`. The package's scripted experts are functions of what it observes,
goal included, and so label any state. The policy sees the cameras and the hand; the goal is in the picture or nowhere,
for Meta-World has no language of its own and `TASKS` is ours. An action is the hand's step along x, y, z and the force
that closes the fingers, each in [-1, 1]; there are 80 a second.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from opd_jax.sampling.host_simulator import refused, split_seed
from opd_jax.worlds import mujoco_gl

TASKS = {
    "assembly-v3": "put the ring over the peg",
    "basketball-v3": "drop the ball into the basket",
    "bin-picking-v3": "move the block from one bin to the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "push the button down from above",
    "button-press-topdown-wall-v3": "reach over the wall and push the button down from above",
    "button-press-v3": "push the button on the front of the box",
    "button-press-wall-v3": "go around the wall and push the button",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial half a turn",
    "disassemble-v3": "take the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door by turning its knob",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door by turning its knob",
    "drawer-close-v3": "push the drawer shut",
    "drawer-open-v3": "pull the drawer open",
    "faucet-close-v3": "turn the faucet off",
    "faucet-open-v3": "turn the faucet on",
    "hammer-v3": "drive the nail into the wall with the hammer",
    "hand-insert-v3": "put the hand into the hole in the table",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "swing the lever upright",
    "peg-insert-side-v3": "insert the peg into the hole in the side of the box",
    "peg-unplug-side-v3": "pull the plug out of its socket",
    "pick-out-of-hole-v3": "lift the puck out of the hole and take it to the goal",
    "pick-place-v3": "pick the puck up and take it to the goal",
    "pick-place-wall-v3": "pick the puck up and lift it over the wall to the goal",
    "plate-slide-back-side-v3": "slide the plate out of the net to the side",
    "plate-slide-back-v3": "slide the plate back out of the net",
    "plate-slide-side-v3": "slide the plate sideways into the net",
    "plate-slide-v3": "slide the plate into the net",
    "push-back-v3": "pull the block back to the goal",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "reach-v3": "move the hand to the goal",
    "reach-wall-v3": "move the hand past the wall to the goal",
    "shelf-place-v3": "place the block on the shelf",
    "soccer-v3": "push the ball into the soccer goal",
    "stick-pull-v3": "pull the thermos by its handle with the stick",
    "stick-push-v3": "push the thermos with the stick",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-close-v3": "slide the window shut",
    "window-open-v3": "slide the window open",
}
NAMES = tuple(TASKS)
MT10 = (  # the package's own
    "reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
    "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3",
)  # fmt: skip
TEN = (  # whose goals are seen from above, and whose experts are through in a hundred steps
    "button-press-topdown-v3", "drawer-close-v3", "drawer-open-v3", "faucet-close-v3", "faucet-open-v3",
    "plate-slide-v3", "push-v3", "reach-v3", "window-close-v3", "window-open-v3",
)  # fmt: skip
SUITES = {"two": ("plate-slide-v3", "reach-v3"), "ten": TEN, "mt10": MT10, "mt50": NAMES}
HAND = np.array([[-0.5, 0.4, 0.05, 0], [0.5, 1, 0.5, 1]], np.float32)  # least and most of `proprioception`
THING = np.array([[-0.5, 0.4, 0, *[-1] * 4], [0.5, 1, 0.5, *[1] * 4]], np.float32)  # where it is, and its quaternion
STATE = np.concatenate([HAND, THING, THING, THING[:, :3]], 1)  # least and most of a state: hand, two things, the goal
ACTION_DIMS = 4
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
UPSIDE_DOWN = "corner2"
REMEDY = "pip install 'opd_jax[metaworld]'"


class MetaWorld:
    """One task, as `host_simulator.ExpertSimulator`.

    Args:
        task: a name of `TASKS`, or its place there.
        cameras: of `CAMERAS`; none for a policy that needs no pictures.
        state: `proprioception` is all that the expert goes by, `STATE`.
        size: of the pictures, in pixels.
        horizon: steps of an episode; experts need 31 to 216.
        fast: pictures without shadows, reflections and multisampling, several times as quick.

    Raises:
        ConfigError: no such task or camera, the package is not installed, or MuJoCo cannot draw here.
    """

    idle = np.zeros(4, np.float32)

    def __init__(
        self,
        task: int | str,
        *,
        cameras: Sequence[str] = ("corner2",),
        size: int = 128,
        horizon: int = 500,
        fast: bool = True,
        state: bool = False,
    ):
        self.name, self.horizon, self._state = _name(task), horizon, state
        self.instruction = TASKS[self.name]
        if unknown := set(cameras) - set(CAMERAS):
            raise refused(f"cameras={tuple(cameras)}: no {', '.join(unknown)}; choose of {', '.join(CAMERAS)}")
        if cameras:
            mujoco_gl.choose()
        environments, policies, self._mujoco = _packages()
        self._environment, self._policy = environments[self.name](), policies[self.name]()
        self._environment._partially_observable = False  # the expert sees the goal
        vars(self._environment).pop("sawyer_observation_space", None)  # cached bounds that clip the goal to zero
        self._environment._freeze_rand_vec, self._environment.seeded_rand_vec = False, True
        self._environment._set_task_called = True
        self._cameras = tuple(cameras)
        self._camera = mujoco_gl.Camera(self._environment.model, size, fast) if cameras else None

    def reset(self, seed: int, split: str) -> None:
        self._environment.seed(split_seed(seed, split))
        self._observed, self._success = self._environment.reset()[0], False

    def observe(self) -> dict[str, np.ndarray]:
        """`images` [C, size, size, 3] uint8, where there are cameras, and `proprioception` [4]: x, y, z, opening; or
        [21], the state."""
        felt = self._observed[[*range(18), 36, 37, 38]] if self._state else self._observed[:4]
        felt = {"proprioception": felt.astype(np.float32)}
        return felt | {"images": np.stack([self._picture(name) for name in self._cameras])} if self._cameras else felt

    def _picture(self, name: str) -> np.ndarray:
        picture = self._camera.picture(self._environment.data, name)
        return picture[::-1, ::-1] if name == UPSIDE_DOWN else picture

    def step(self, action: Float[np.ndarray, "4"]) -> None:
        self._environment.curr_path_length = 0  # the horizon is the caller's
        action = np.clip(np.asarray(action, np.float32), -1, 1)
        self._observed, _, _, _, about = self._environment.step(action)
        self._success = bool(about["success"])

    def success(self) -> bool:
        return self._success

    def expert(self) -> Float[np.ndarray, "4"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that actions above 1 are clipped
            return np.clip(self._policy.get_action(self._observed), -1, 1)

    def snapshot(self) -> Any:
        """All that steps depend on."""
        environment, spec = self._environment, self._mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(self._mujoco.mj_stateSize(environment.model, spec))
        self._mujoco.mj_getState(environment.model, environment.data, state, spec)
        plain = {name: (value, copy.deepcopy(value)) for name, value in vars(environment).items() if _is_plain(value)}
        return state, plain, self._observed, self._success

    def restore(self, snapshot: Any) -> None:
        environment, spec = self._environment, self._mujoco.mjtState.mjSTATE_INTEGRATION
        state, plain, self._observed, self._success = snapshot
        self._mujoco.mj_setState(environment.model, environment.data, state, spec)
        self._mujoco.mj_forward(environment.model, environment.data)  # what is derived from the state
        self._mujoco.mj_setState(environment.model, environment.data, state, spec)  # the solver's first guess again
        for name, (value, content) in plain.items():
            if isinstance(value, np.ndarray):
                value[...] = content  # in place, for some are views of MuJoCo's own arrays
            setattr(environment, name, value if isinstance(value, np.ndarray) else copy.deepcopy(content))

    def close(self) -> None:
        if self._camera:
            self._camera.close()
        self._environment.close()


def _name(task: int | str) -> str:
    if isinstance(task, str) and task in TASKS:
        return task
    if not isinstance(task, str) and 0 <= task < len(NAMES):
        return NAMES[task]
    raise refused(f"task={task!r}: give 0 to {len(NAMES) - 1}, or one of {', '.join(NAMES)}")


def check() -> None:
    """Raises: ConfigError where the package is not installed."""
    _packages()


def _packages() -> tuple[Any, Any, Any]:
    try:
        import mujoco
        from metaworld.env_dict import ENV_CLS_MAP
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise refused(f"Meta-World cannot be imported ({error}): {REMEDY}") from error
    return ENV_CLS_MAP, ENV_POLICY_MAP, mujoco


def _is_plain(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic | bool | int | float | str | list | tuple | type(None))
