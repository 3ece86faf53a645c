"""Episodes in processes: the same to the bit whatever happens to them, and nothing left behind."""

import functools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import host_line
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from host_line import ALWAYS_RAISES, ENDS, FINE, HANGS, KILLED, RAISES, SPAWNS, Line

from opd_jax.sampling import episodes, host_episodes, host_simulator, host_worker
from opd_jax.sampling.episodes import Plan
from opd_jax.sampling.host_episodes import Starts
from opd_jax.sampling.host_pool import Pool, SimulatorError
from opd_jax.types import ActionTokens

FIRST = 4  # seeds from here on: some goals are reached within the horizon, and none at once
H, PLAN = 3, Plan(decisions=7, executed=2)


def act(gain, observation, keys):
    """A chunk of equal steps towards the goal, and what was drawn."""
    noise = jax.vmap(jax.random.normal)(keys)
    towards = jnp.clip(gain * (observation["goal"] - observation["place"])[:, 0], -1, 1) + 0.1 * noise
    actions = jnp.broadcast_to(towards[:, None, None], (len(towards), H, 1))
    return ActionTokens(jnp.round(100 * actions).astype(jnp.int32), actions), actions


@pytest.fixture(autouse=True)
def started():
    """`started()`: the processes that a test has started and that still run; at its end there is none."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}  # of other modules
    running = lambda: [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    yield running
    assert not running(), f"processes left behind: {running()}"


def starts(tasks) -> Starts:
    return Starts(np.asarray(tasks), FIRST + np.arange(len(tasks)))


def played(folder, tasks=(FINE,) * 5, *, workers=2, timeout=20.0, retries=2, gain=0.5, group=1, **how):
    keys = jax.random.split(jax.random.key(1), len(tasks) * group)
    with Pool(host_line.maker(folder), workers=workers, batch=4, timeout=timeout, retries=retries) as pool:
        how = {"plan": PLAN, "expert_steps": H} | how
        return host_episodes.rollout(pool, act, jnp.float32(gain), starts(tasks), keys, group=group, **how)


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class Point(NamedTuple):
    """The simulator's state as the device has it."""

    place: jax.Array
    goal: jax.Array
    noise: jax.Array
    steps: jax.Array


class DeviceLine:
    def step(self, state, action):
        return state._replace(place=state.place + action[0] + state.noise[state.steps], steps=state.steps + 1)

    def observe(self, state):
        return {"place": state.place[None], "goal": state.goal[None]}

    def success(self, state):
        return jnp.abs(state.place - state.goal) < 0.25


def test_rollout_equals_the_device_s(tmp_path):
    ours, redone = played(tmp_path, expert_steps=0)
    lines = [Line(FINE, "") for _ in range(5)]
    for seed, line in enumerate(lines):
        line.reset(FIRST + seed, "train")
    state = Point(*(jnp.array([getattr(line, name) for line in lines]) for name in Point._fields))
    index, keys = jnp.arange(5, dtype=jnp.int32), jax.random.split(jax.random.key(1), 5)
    how = {"plan": PLAN, "horizon": jnp.full(5, 13), "group": index, "task": jnp.zeros(5, jnp.int32)}
    theirs = episodes.rollout(DeviceLine(), act, jnp.float32(0.5), state, keys, **how)
    assert not redone and 0 < ours.success.sum() < 5  # both ends occur
    for name in ("counted", "success", "length", "group", "task"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    seen = ours.counted.any(-1)
    np.testing.assert_allclose(ours.observation["place"][seen], theirs.observation["place"][seen], atol=1e-6)
    np.testing.assert_allclose(ours.drawn.behavior_logp[seen], theirs.drawn.behavior_logp[seen], atol=1e-6)


def test_rollout_is_the_same_of_any_number_of_workers(tmp_path):
    one, three = (played(tmp_path, workers=workers)[0] for workers in (1, 3))
    assert_same(one, three)
    assert not one.observation["imported_jax"].any()


def test_rollout_does_not_recompile(tmp_path):
    count = []

    def counting(gain, observation, keys):
        count.append(len(keys))
        return act(gain, observation, keys)

    with Pool(host_line.maker(tmp_path), workers=1, batch=4) as pool:
        for n in (5, 2):
            keys = jax.random.split(jax.random.key(1), n)
            host_episodes.rollout(pool, counting, jnp.float32(0.5), starts([FINE] * n), keys, plan=PLAN)
    assert count in ([4], [4, 4])  # the number of keys is another shape; rows are not


def test_groups_share_their_start_and_splits_do_not(tmp_path):
    ours, _ = played(tmp_path, (FINE,) * 3, group=2)
    goal = ours.observation["goal"][:, 0, 0]
    assert ours.group.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(goal[::2], goal[1::2])
    assert not np.array_equal(ours.drawn.tokens[::2], ours.drawn.tokens[1::2])
    test, _ = played(tmp_path, (FINE,) * 3, split="test")
    assert not set(goal) & set(test.observation["goal"][:, 0, 0])


def test_split_seed_is_never_of_both_splits():
    seeds = {split: {host_simulator.split_seed(seed, split) for seed in range(100)} for split in host_simulator.SPLITS}
    assert len(seeds["train"] | seeds["test"]) == 200
    with pytest.raises(ValueError, match="split='eval': choose train or test"):
        host_simulator.split_seed(0, "eval")


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (ENDS, "its process has ended, exit code 3"),
        (KILLED, "its process has ended, by SIGKILL"),
        (HANGS, "its process gave no reply for 1 s"),
        (RAISES, "the arm is off the table"),
    ],
)
def test_rollout_is_the_same_after_a_failure(tmp_path, task, reason):
    tasks = [FINE, task, FINE, FINE, FINE]
    (tmp_path / str(task)).touch()
    well, redone = played(tmp_path, tasks, expert_steps=0)
    assert not redone
    (tmp_path / str(task)).unlink()
    again, redone = played(tmp_path, tasks, timeout=1.0, expert_steps=0)
    assert_same(well, again)
    assert [(one.episode, one.decision) for one in redone if one.reason] == [(1, 2)]
    assert reason in next(one.reason for one in redone if one.reason)
    others = {one.episode for one in redone if not one.reason}
    assert others == (set() if task == RAISES else {3})  # the other one of its process


def test_rollout_gives_up_with_the_traceback(tmp_path):
    with pytest.raises(SimulatorError) as caught:
        played(tmp_path, [FINE, ALWAYS_RAISES], retries=1, expert_steps=0)
    text = str(caught.value)
    assert f"task {ALWAYS_RAISES}, seed {FIRST + 1}, train: the simulator failed 2 times, last at decision 1" in text
    assert "ZeroDivisionError: the arm is off the table" in text and "host_line.py" in text


def test_rollout_says_what_cannot_be_made(tmp_path):
    keys = jax.random.split(jax.random.key(0), 1)
    with Pool(host_line.unmakable) as pool, pytest.raises(SimulatorError, match=r"(?s)task 0.*cannot be made.*no mesh"):
        host_episodes.rollout(pool, act, 1.0, starts([FINE]), keys, plan=PLAN)
    with pytest.raises(ValueError, match="cannot be pickled"):
        Pool(lambda task: None)
    with pytest.raises(ValueError, match="workers=0"):
        Pool(host_line.unmakable, workers=0)


def test_rollout_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="executed=4: more than the 3 actions"):
        played(tmp_path, plan=Plan(2, 4))
    with Pool(host_line.maker(tmp_path)) as pool, pytest.raises(ValueError, match="1 keys for 2 starts"):
        host_episodes.rollout(pool, act, 1.0, starts([FINE] * 2), jax.random.split(jax.random.key(0), 1), plan=PLAN)


def test_settling_steps_come_first_and_do_not_count(tmp_path):
    ours, _ = played(tmp_path, (FINE,), plan=PLAN._replace(settle=2), expert_steps=0)
    line = Line(FINE, "")
    line.reset(FIRST, "train")
    np.testing.assert_allclose(ours.observation["place"][0, 0, 0], line.noise[:2].sum(), atol=1e-6)
    assert ours.length[0] <= line.horizon


def test_experts_plan_is_its_own_episode_and_leaves_no_trace(tmp_path):
    with_expert, _ = played(tmp_path)
    without, _ = played(tmp_path, expert_steps=0)
    assert_same(with_expert._replace(states=None), without)
    line = Line(FINE, "")
    line.reset(FIRST, "train")
    plan = []
    for _ in range(H):
        plan.append(line.expert())
        line.step(plan[-1])
    np.testing.assert_allclose(with_expert.states[0, 0], plan, atol=1e-6)
    assert with_expert.states.shape == (5, PLAN.decisions, H, 1) and with_expert.states.dtype == np.float32


def test_what_follows_the_last_decision_repeats_it(tmp_path):
    ours, _ = played(tmp_path, gain=1.0)
    last = np.maximum(ours.counted.any(-1).sum(1), 1) - 1
    assert (last < PLAN.decisions - 1).any()
    for i, t in enumerate(last):
        for leaf in (ours.observation["place"], ours.drawn.tokens, ours.states):
            assert (leaf[i, t:] == leaf[i, t]).all()


def test_processes_of_a_simulator_end_with_the_pool(tmp_path, started):
    with Pool(host_line.maker(tmp_path), workers=1) as pool:
        keys = jax.random.split(jax.random.key(0), 1)
        host_episodes.rollout(pool, act, jnp.float32(0.5), starts([SPAWNS]), keys, plan=PLAN)
        sleeping = [one for one in started() if one.name() == "sleep"]
    assert len(sleeping) == 1 and not psutil.wait_procs(sleeping, timeout=5)[1]


def test_an_exception_of_the_policy_ends_the_processes(tmp_path, started):
    pool = Pool(host_line.maker(tmp_path))

    def fails(params, observation, keys):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host_episodes.rollout(pool, fails, 1.0, starts([FINE]), jax.random.split(jax.random.key(0), 1), plan=PLAN)
    assert not started()
    del pool  # which would have ended them too


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_their_parent(tmp_path, end):
    """A parent that is interrupted, or killed, while a simulator hangs."""
    program = f"""
    import host_line
    from opd_jax.sampling.host_pool import Pool
    from opd_jax.sampling.host_worker import Act, Begin
    import numpy as np
    with Pool(host_line.maker({str(tmp_path)!r}), workers=2) as pool:
        pool.exchange({{slot: Begin(host_line.HANGS, 0, "train", 9, 0, 0) for slot in range(2)}})
        pool.exchange({{slot: Act(np.zeros((3, 1), np.float32)) for slot in range(2)}})
    """
    path = os.pathsep.join([os.path.dirname(host_line.__file__), *filter(None, sys.path)])
    command = [sys.executable, "-c", textwrap.dedent(program)]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    while not (tmp_path / str(HANGS)).exists():
        assert parent.poll() is None
        time.sleep(0.02)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(end)
    parent.wait(20)
    assert len(children) == 2
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_idle_simulators_are_kept_for_tasks_to_come():
    made, closed = [], []

    class Known(Line):
        def close(self):
            closed.append(self.task)

    def make(task):
        made.append(task)
        return Known(task, "")

    slots = host_worker._Slots(make, spare=1)
    for task in (FINE, RAISES, FINE, RAISES):
        assert slots.answer(0, host_worker.Begin(task, FIRST, "train", 9, 0, 0)).observation is not None
    assert made == [FINE, RAISES] and not closed
    slots.answer(1, host_worker.Begin(HANGS, FIRST, "train", 9, 0, 0))
    slots.answer(1, host_worker.Begin(ENDS, FIRST, "train", 9, 0, 0))
    assert closed == [FINE]  # the longest idle of two
    slots.close()
    assert sorted(closed) == sorted(made)


def test_a_shown_simulator_says_what_its_expert_does():
    simulator = host_simulator.shown(functools.partial(Line, folder=""), FINE, steps=3)
    simulator.reset(FIRST, "train")
    seen, place = simulator.observe()["expert"], simulator.place
    assert seen.shape == (3, 1) and seen.dtype == np.float32 and simulator.horizon == 13 and simulator.place == place
    for action in seen:
        np.testing.assert_array_equal(action, np.float32(simulator.expert()))
        simulator.step(action)


def told(simulator, seed, split="train", steps=40):
    """What a disturbed simulator, told to stand still, has done instead."""
    done, step = [], simulator._simulator.step
    simulator._simulator.step = lambda action: (done.append(action), step(action))
    simulator.reset(seed, split)
    for _ in range(steps):
        simulator.step(np.zeros(1, np.float32))
    simulator._simulator.step = step
    return np.stack(done)


def test_disturbances_are_of_the_episode_and_more_in_some_than_in_others():
    simulator = host_simulator.disturbed(functools.partial(Line, folder=""), FINE)
    episodes = np.stack([told(simulator, seed) for seed in range(24)])
    np.testing.assert_array_equal(told(simulator, 3), episodes[3])  # whatever was played before
    assert (told(simulator, 3, "test") != episodes[3]).any()
    assert episodes.dtype == np.float32 and np.abs(episodes).max() <= 1
    size = np.sort(np.abs(episodes).mean((1, 2)))
    assert size[0] < 0.1 and size[-1] > 0.4
    stands = (episodes[:, :-7] == episodes[:, 7:]).all(-1) & (episodes[:, :-7] != 0).all(-1)
    assert stands.any(), "a push lasts eight steps"


def test_an_expert_within_disturbances_looks_ahead_without_them():
    make = functools.partial(host_simulator.shown, functools.partial(Line, folder=""), steps=4)
    simulator = host_simulator.disturbed(make, FINE)
    for seed in range(4):
        simulator.reset(seed, "train")
        simulator.step(np.ones(1, np.float32))
        shown = simulator.observe()["expert"]
        np.testing.assert_array_equal(shown, host_simulator.expert_chunk(simulator._simulator, 4))


def test_protocols_are_those_of_the_example():
    assert isinstance(Line(FINE, ""), host_simulator.ExpertSimulator)
    assert not isinstance(DeviceLine(), host_simulator.Simulator)
    assert isinstance(pickle.loads(pickle.dumps(host_line.maker(""))), functools.partial)
