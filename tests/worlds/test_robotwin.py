"""RoboTwin's adapter without RoboTwin: what is said where it is missing, and a stand-in with its functions."""

import json
import os
import sys

import numpy as np
import pytest

from opd_jax.config import ConfigError
from opd_jax.sampling import host_simulator
from opd_jax.worlds import robotwin

TASK = """
import numpy as np
from envs.utils.create_actor import UnStableError


class lift_it:
    def setup_demo(self, seed, **settings):
        if seed < 10**6:
            raise UnStableError("it rolls")
        self.seed, self.settings, self.step_lim, self.eval_success = seed, settings, 30, False
        self.at = np.zeros(14)

    def set_instruction(self, instruction):
        self.told = instruction

    def get_obs(self):
        picture = np.full((2, 3, 3), 7, np.uint8)
        return {"observation": {"head_camera": {"rgb": picture}}, "joint_action": {"vector": self.at}}

    def take_action(self, action, action_type):
        assert action_type == "qpos"
        self.at, self.eval_success = action, action[0] > 1

    def close_env(self, clear_cache):
        self.at = None
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The files that the adapter reads."""
    files = {
        "envs/__init__.py": "", "envs/_base_task.py": "", "envs/lift_it.py": TASK, "envs/utils/__init__.py": "",
        "envs/utils/create_actor.py": "class UnStableError(Exception):\n    pass\n",
        "task_config/demo_clean.yml": "embodiment: [arm]\ncamera: {head_camera_type: D435}\nrender_freq: 10\n",
        "task_config/_camera_config.yml": "D435: {fovy: 37, w: 320, h: 240}\n",
        "task_config/_embodiment_config.yml": "arm: {file_path: ./assets/embodiments/arm/}\n",
        "assets/embodiments/arm/config.yml": "planner: curobo\n",
        "description/task_instruction/lift_it.json": json.dumps({"full_description": "lift it"}),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(os.getcwd())
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "envs"]:
        del sys.modules[name]


def test_absence_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("ROBOTWIN_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"ROBOTWIN_PATH is not set; clone .*and set ROBOTWIN_PATH") as caught:
        robotwin.RoboTwin(0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"{tmp_path}: no checkout of RoboTwin"):
        robotwin.RoboTwin(0, root=str(tmp_path))
    with pytest.raises(ConfigError, match="task=9: give 0 to 4"):
        robotwin.RoboTwin(9)
    with pytest.raises(ConfigError, match="no third_view; choose of head_camera"):
        robotwin.RoboTwin(0, cameras=("third_view",))


def test_missing_parts_of_a_checkout_are_named(checkout):
    with pytest.raises(ConfigError, match="task='fold_it': RoboTwin has no such task"):
        robotwin.RoboTwin("fold_it", root=str(checkout))
    with pytest.raises(ConfigError, match=r"wild\.yml cannot be read"):
        robotwin.RoboTwin("lift_it", root=str(checkout), settings="wild")
    (checkout / "envs" / "lift_it.py").write_text("import sapiens\n")
    del sys.modules["envs.lift_it"]
    with pytest.raises(ConfigError, match=r"cannot be imported \(No module named 'sapiens'\); clone"):
        robotwin.RoboTwin("lift_it", root=str(checkout))
    (checkout / "assets" / "embodiments").rename(checkout / "elsewhere")
    with pytest.raises(ConfigError, match=r"assets are not in .*_download_assets\.sh"):
        robotwin.RoboTwin("lift_it", root=str(checkout))


def test_an_episode_of_a_stand_in(checkout):
    simulator = robotwin.RoboTwin("lift_it", root=str(checkout))
    simulator.reset(3, "test")
    inner = simulator._environment
    assert inner.seed == 2_000_007  # the first did not lie still; odd, of the test split
    assert inner.told == simulator.instruction == "lift it" and simulator.horizon == 30
    assert inner.settings["head_camera_w"] == 320 and inner.settings["left_embodiment_config"] == {"planner": "curobo"}
    assert inner.settings["dual_arm_embodied"] and not inner.settings["render_freq"]
    assert isinstance(simulator, host_simulator.Simulator)
    seen = simulator.observe()
    assert seen["images"].shape == (1, 2, 3, 3) and seen["proprioception"].shape == (robotwin.ACTION_DIMS,)
    simulator.step(simulator.idle)
    assert not simulator.success()
    simulator.step(np.full(14, 2, np.float32))
    assert simulator.success()
    simulator.reset(3, "test")
    assert not simulator.success()
    simulator.close()
