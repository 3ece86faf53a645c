"""Meta-World as it is: two tasks stepped and drawn, and state put back to the bit."""

import functools
import sys

import drawing
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import ConfigError
from opd_jax.sampling import host_episodes, host_simulator
from opd_jax.sampling.episodes import Plan
from opd_jax.sampling.host_episodes import Starts
from opd_jax.sampling.host_pool import Pool
from opd_jax.worlds import metaworld, mujoco_gl
from opd_jax.worlds.metaworld import MetaWorld

drawing.needed()


def state_of(simulator) -> np.ndarray:
    data = simulator._environment.data
    return np.concatenate([data.qpos, data.qvel, data.xpos.ravel(), simulator._observed, [simulator.success()]])


def played(simulator, seed=3, steps=25, disturb=lambda simulator: None) -> np.ndarray:
    """States of an episode of the expert."""
    simulator.reset(seed, "train")
    states = [state_of(simulator)]
    for _ in range(steps):
        disturb(simulator)
        simulator.step(simulator.expert())
        states.append(state_of(simulator))
    return np.stack(states)


def test_tables_are_complete():
    from metaworld.env_dict import ENV_CLS_MAP
    from metaworld.policies import ENV_POLICY_MAP

    assert set(metaworld.NAMES) == set(ENV_CLS_MAP) == set(ENV_POLICY_MAP)
    sentences = list(metaworld.TASKS.values())
    assert len(set(sentences)) == 50 and all(s == s.lower() and s[-1].isalpha() for s in sentences)


@pytest.mark.parametrize("task", ["drawer-open-v3", "pick-place-v3"])
def test_expert_succeeds_and_is_seen(task):
    simulator = MetaWorld(task, cameras=("corner2", "gripperPOV"), size=64)
    assert isinstance(simulator, host_simulator.ExpertSimulator)
    simulator.reset(0, "test")
    before = simulator.observe()
    while not simulator.success():
        simulator.step(simulator.expert())
        assert simulator._environment.data.time < 2.5  # 200 steps
    after = simulator.observe()
    for seen in (before, after):
        assert seen["images"].shape == (2, 64, 64, 3) and seen["images"].dtype == np.uint8
        assert seen["images"][:, ::8, ::8].std() > 20
    assert np.abs(before["images"].astype(int) - after["images"]).mean() > 1
    assert after["proprioception"].shape == (4,)
    scene = before["images"][0].astype(int)
    assert scene[:12].std() < 10 < scene[-12:].std()  # a grey wall above, the table's legs below
    assert scene[-12:, :20].mean() < scene[-12:, -20:].mean() - 30  # the robot's black foot on the left
    simulator.close()


@pytest.mark.parametrize("task", ["reach-v3", "drawer-open-v3", "hammer-v3"])
def test_snapshot_puts_everything_back(task):
    simulator = MetaWorld(task, cameras=())
    plain = played(simulator, steps=60)
    chunks = played(simulator, steps=60, disturb=lambda simulator: host_simulator.expert_chunk(simulator, 8))
    np.testing.assert_array_equal(plain, chunks)


@pytest.mark.parametrize("task", ["door-open-v3", "stick-pull-v3"])
def test_reset_leaves_nothing_of_the_episode_before(task):
    used = MetaWorld(task, cameras=())
    played(used, seed=8, steps=70)
    np.testing.assert_array_equal(played(used), played(MetaWorld(task, cameras=())))


def test_expert_chunk_is_its_own_episode():
    simulator = MetaWorld("reach-v3", cameras=())
    simulator.reset(0, "train")
    chunk = host_simulator.expert_chunk(simulator, 5)
    for action in chunk:
        np.testing.assert_array_equal(action, simulator.expert())
        simulator.step(action)


def test_a_state_is_all_that_the_expert_goes_by():
    simulator = MetaWorld("push-v3", cameras=(), state=True)
    simulator.reset(0, "train")
    state, environment = simulator.observe()["proprioception"], simulator._environment
    assert set(simulator.observe()) == {"proprioception"} and state.shape == metaworld.STATE.shape[1:]
    hand, thing, goal = environment.get_endeff_pos(), environment._get_pos_objects(), environment._target_pos
    for part, whole in ((state[:3], hand), (state[4:7], thing), (state[-3:], goal)):
        np.testing.assert_allclose(part, whole, atol=1e-6)
    seen = np.zeros(39)
    seen[:18], seen[-3:] = state[:18], state[-3:]
    np.testing.assert_allclose(np.clip(simulator._policy.get_action(seen), -1, 1), simulator.expert(), atol=1e-5)


@pytest.mark.parametrize("task", metaworld.SUITES["ten"])
def test_states_of_ten_tasks_lie_between_their_bounds(task):
    simulator = MetaWorld(task, cameras=(), state=True)
    least, most = metaworld.STATE
    for seed in range(3):
        simulator.reset(seed, "train")
        state = simulator.observe()["proprioception"]
        absent = np.isin(np.arange(len(state)), np.arange(11, 18)) & (state == 0)  # a second thing
        assert np.all(absent | (state >= least - 0.05) & (state <= most + 0.05)), state


def test_scenes_of_splits_differ():
    simulator, goals = MetaWorld("reach-v3", cameras=()), {}
    for split in host_simulator.SPLITS:
        for seed in range(6):
            simulator.reset(seed, split)
            goals[split, seed] = tuple(simulator._environment._target_pos)
    assert len(set(goals.values())) == 12


def at_random(size, seen, keys):
    actions = jax.vmap(lambda key: size * jax.random.normal(key, (4, 4)))(keys)
    return actions, actions


def test_episodes_are_the_same_of_one_process_and_of_two():
    rollouts = []
    for workers in (1, 2):
        make = functools.partial(MetaWorld, size=32)
        tasks = np.array([metaworld.NAMES.index(name) for name in ("reach-v3", "drawer-close-v3")])
        keys = jax.random.split(jax.random.key(0), 2)
        with Pool(make, workers=workers, batch=2) as pool:
            starts, how = Starts(tasks, tasks), {"plan": Plan(2, 4), "expert_steps": 4}
            rollouts.append(host_episodes.rollout(pool, at_random, jnp.float32(0.5), starts, keys, **how))
    (one, redone), (two, _) = rollouts
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not redone and one.states.shape == (2, 2, 4, 4) and one.length.tolist() == [8, 8]
    assert one.observation["images"].shape == (2, 2, 1, 32, 32, 3)


def test_simulators_of_a_task_draw_on_one_canvas_what_each_would_alone():
    import mujoco

    both = [MetaWorld("push-v3", cameras=("topview", "corner"), size=32) for _ in range(2)]
    other = MetaWorld("reach-v3", cameras=("topview",), size=32)
    canvas = [simulator._camera._canvas for simulator in (*both, other)]
    assert canvas[0] is canvas[1] and canvas[1] is not canvas[2]
    del canvas
    alone = mujoco.Renderer(both[1]._environment.model, 32, 32)
    for _ in range(2):
        for seed, simulator in enumerate(both):
            simulator.reset(seed, "train")
        pictures = [simulator.observe()["images"] for simulator in both]
        for camera, picture in zip(("topview", "corner"), pictures[1]):
            alone.update_scene(both[1]._environment.data, camera=camera)
            for dear in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                alone.scene.flags[dear] = 0
            np.testing.assert_array_equal(picture, alone.render())
    assert (pictures[0] != pictures[1]).any()
    alone.close()
    both[0].close()
    np.testing.assert_array_equal(both[1].observe()["images"], pictures[1])
    kept = len(mujoco_gl._canvases)
    both[1].close()
    assert len(mujoco_gl._canvases) == kept - 1, "a canvas outlives its simulators"


def test_mistakes_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="task='fly-v3': give 0 to 49, or one of assembly-v3"):
        MetaWorld("fly-v3")
    with pytest.raises(ConfigError, match=r"cameras=\('moon',\): no moon; choose of topview"):
        MetaWorld(0, cameras=("moon",))
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.delitem(sys.modules, "metaworld.env_dict")
    with pytest.raises(ConfigError, match=r"pip install 'opd_jax\[metaworld\]'") as caught:
        MetaWorld(0, cameras=())
    assert "\n" not in str(caught.value)
