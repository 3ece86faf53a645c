"""Stands in for `libero.libero.envs`, whose meshes cannot be had here; a test copies it into a package of that name."""

import mujoco
import numpy as np

XML = """<mujoco>
<visual>
  <quality offsamples="0"/><headlight ambient=".6 .6 .6" diffuse="0 0 0" specular="0 0 0"/>
</visual>
<worldbody>
  <body><joint type="slide" axis="1 0 0"/><geom size=".2" rgba="1 0 0 1" group="1"/></body>
  <geom pos="0 .5 0" size=".2" rgba="0 1 0 1" group="1"/><geom pos=".5 .5 0" size=".2" group="0"/>
  <camera name="agentview" pos="0 0 2"/><camera name="robot0_eye_in_hand" pos="0 -.2 1"/>
</worldbody></mujoco>"""


class Holder:
    pass


class OffScreenRenderEnv:
    """What is asked of robosuite's: a body that moves along x, its place the first number of a state."""

    def __init__(self, **how):
        self.how, self.states, self.closed = how, [], False

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        self.model = mujoco.MjModel.from_xml_string(XML)
        self.data = mujoco.MjData(self.model)
        self.sim = Holder()
        self.sim.model, self.sim.data = Holder(), Holder()
        self.sim.model._model, self.sim.data._data = self.model, self.data
        self.data.qpos[0] = np.random.default_rng(self.seeded).uniform(-0.3, 0.3)
        return self.seen()

    def set_init_state(self, state):
        self.states.append(state)
        self.data.qpos[0] = state[0]
        return self.seen()

    def step(self, action):
        assert action.dtype == np.float64
        self.data.qpos[0] += action[0]
        return self.seen(), 0.0, False, {}

    def check_success(self):
        return np.bool_(self.data.qpos[0] > 0.5)

    def close(self):
        self.closed = True

    def seen(self):
        mujoco.mj_forward(self.model, self.data)
        turn = np.array([0.0, 0, 1, 0])  # by pi about z
        felt = {"robot0_eef_pos": np.array([self.data.qpos[0], 2, 3]), "robot0_eef_quat": turn}
        felt["robot0_gripper_qpos"] = np.array([0.04, -0.04])
        return felt | (self.pictures() if self.how["use_camera_obs"] else {})

    def pictures(self):
        """The lowest row first; what is there for contacts alone is not drawn."""
        option, found = mujoco.MjvOption(), {}
        option.geomgroup[0] = 0
        with mujoco.Renderer(self.model, self.how["camera_heights"], self.how["camera_widths"]) as renderer:
            for name in ("agentview", "robot0_eye_in_hand"):
                renderer.update_scene(self.data, camera=name, scene_option=option)
                found[f"{name}_image"] = renderer.render()[::-1]
        return found
