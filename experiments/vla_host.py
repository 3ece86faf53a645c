"""Simulators in processes as worlds of robot policies: Meta-World and LIBERO.

The expert is asked where the simulator is: its chunk from every state that a policy comes to, simulator put back to the
bit (`host_simulator.expert_chunk`). So labels are those of the tabletop. Its own steps ahead are no environment steps.
"""

import abc
import contextlib
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Float

from experiments import vla_demos, vla_openvla, vla_policies
from experiments.vla_policies import Robot
from experiments.vla_worlds import PRACTISED, Acting, Demonstrations, Starts, collected, decisions_of
from opd_jax import hosts, rng, sharding
from opd_jax.models import vla
from opd_jax.sampling import host_episodes
from opd_jax.sampling.episodes import Plan
from opd_jax.sampling.host_pool import Pool
from opd_jax.sampling.host_simulator import disturbed, shown
from opd_jax.types import EpisodeRollout, PyTree
from opd_jax.worlds import libero, metaworld, mujoco_gl

ROUNDS = 4  # episodes of the expert that one simulator plays before they are taken down, to bound memory
SCENES = 2**31  # of the training split


class Told(NamedTuple):
    """`vla_worlds.Task`."""

    name: str
    suite: str
    instruction: str
    horizon: int


class Host(abc.ABC):
    """What the simulators have in common, as `vla_worlds.World`; a subclass says which they are."""

    expert, settle, goal = False, 0, "the simulator says so"

    def __init__(self, config, mesh):
        self.config, self.mesh, self.tasks = config, mesh, self.catalogue(config)
        self.redone = np.zeros(2, np.int32)
        robot = self.robot(config)
        own = functools.partial(vla_policies.own, config.policy, robot)
        self._kit = vla_openvla.kit(config, robot, mesh) if config.student.path else own()
        self.module, self.example, self.teacher = self._kit.module, self._kit.example, self._kit.teacher
        self.upstream = (self._kit.student.sha256,) if self._kit.student else ()
        elsewhere = ("workers", "timeout", "spare")
        settings = {name: value for name, value in config.simulators.to_dict().items() if name not in elsewhere}
        self.identity = {"world": config.world, "simulators": settings}
        if config.demos:
            self.identity["demos"] = vla_demos.digest(config.demos)
        if config.student.path:
            self.identity["student"] = {name: config.student[name] for name in ("cameras", "crop", "proprioception")}
        self._sees = bool(self.example.images.shape[1])
        self._pool = self._simulators(self.make(config, pictures=self._sees))
        rows = NamedSharding(mesh, sharding.record_spec(mesh))
        even = config.simulators.at_once % sharding.record_parts(mesh) == 0
        self._on_robot = functools.partial(_on_robot, self._kit.to_robot, rows if even else None)

    # ---- of a subclass ----

    @staticmethod
    @abc.abstractmethod
    def catalogue(config) -> tuple[Told, ...]:
        """All tasks, in the order of their numbers."""

    @staticmethod
    @abc.abstractmethod
    def make(config, pictures: bool = True) -> functools.partial:
        """`make(task)`, of a module that imports no JAX."""

    @staticmethod
    @abc.abstractmethod
    def robot(config) -> Robot:
        """What a policy has to know of the simulator."""

    # ---- what they share ----

    @classmethod
    def mistakes(cls, config) -> list[str]:
        part, found = config.simulators, []
        for name, least in (("workers", 1), ("at_once", 1), ("spare", 0), ("size", 8), ("horizon", 1)):
            if part[name] < least:
                found.append(f"simulators.{name}={part[name]}: give {least} or more")
        if part.timeout <= 0:
            found.append(f"simulators.timeout={part.timeout}: give seconds above 0")
        if hosts.several():
            found.append(f"world={config.world!r}: its simulators belong to one process; start the run as one")
        if config.demos and not Path(config.demos).expanduser().is_dir():
            found.append(f"demos={config.demos}: no such folder; give a data set in LeRobot's format")
        part, taught = config.student, config.teacher.path
        for which in ("student", "teacher"):
            path = config[which].path
            if path and not Path(path).expanduser().is_dir():
                found.append(f"{which}.path={path}: no such folder; give one in OpenVLA's layout")
        if taught and not part.path:
            found.append(f"teacher.path={taught}: labels a student of its own kind; give student.path too")
        patch = vla.patch_of(config.policy.points)
        if not part.path and config.simulators.size % patch:
            found.append(f"simulators.size={config.simulators.size}: give a multiple of {patch}, the policy's patches")
        told = [task.instruction for task in cls.catalogue(config) if task.suite in config.suites]
        twice = sorted({words for words in told if told.count(words) > 1})
        if config.demos and twice:
            found.append(f"demos={config.demos}: tells tasks by their words, and two have {twice[0]!r}; change suites")
        if not 0 < part.crop <= 1:
            found.append(f"student.crop={part.crop}: give the share of a picture that is left, above 0, at most 1")
        found += cls._practice_mistakes(config)
        most = cls.robot(config).cameras
        if part.path and most and not 1 <= part.cameras <= most:
            found.append(f"student.cameras={part.cameras}: give 1 to {most}, the simulator's")
        return found

    @classmethod
    def _practice_mistakes(cls, config) -> list[str]:
        if config.base not in ("", PRACTISED):
            return [f"base={config.base!r}: is of the tabletop; give '{PRACTISED}', or '' for random parameters"]
        if not config.base:
            return []
        found, known = [], {task.name: task.suite for task in cls.catalogue(config)}
        if not cls.expert or config.student.path:
            found.append(f"base={PRACTISED!r}: of policies of our own in a world with an expert; set base=''")
        for name in config.practice.tasks:
            if name not in known:
                found.append(f"practice.tasks: there is no {name!r}; choose of {', '.join(known)}")
            elif known[name]:
                found.append(f"practice.tasks: {name!r} is of {known[name]}, which students learn; leave it out")
        if not config.practice.tasks and all(known.values()):
            found.append(f"base={PRACTISED!r}: suites={tuple(config.suites)} leave no task to practise; set base=''")
        if config.practice.episodes < 1:
            found.append(f"practice.episodes={config.practice.episodes}: give 1 or more")
        return found

    def _simulators(self, make) -> Pool:
        part = self.config.simulators
        return Pool(make, workers=part.workers, batch=part.at_once, timeout=part.timeout, spare=part.spare)

    def first(self, init, key) -> PyTree:
        return self._kit.student.params if self._kit.student else jax.jit(init)(key, self.example)

    def starts(self, tasks, seed: int, split: str = "train", pad: bool = False) -> Starts:
        """Test scenes are numbers 0, 1, ... of each task, in the order in which it is asked for."""
        found = _scenes(tasks, seed, split)
        if pad:
            count = -(-len(tasks) // self.mesh.size) * self.mesh.size
            found = jax.tree.map(lambda leaf: np.resize(leaf, count), found)
        return sharding.shard_batch(found, self.mesh)

    def play(self, act: Partial, params, starts: Starts, key, acting: Acting) -> EpisodeRollout:
        rollout = self._rollout(
            self._pool, Partial(self._on_robot, act), params, starts, key, acting, self._kit.prepare
        )
        if acting.split != "train":
            self.redone = self.redone + rollout.redone.sum(0)
        return sharding.shard_batch(rollout, self.mesh)

    def _rollout(self, pool, act, params, starts, key, acting: Acting, prepare) -> EpisodeRollout:
        task, seed = (np.asarray(leaf, np.int64) for leaf in hosts.fetch((starts.task, starts.seed)))
        seed = seed % SCENES  # twice a seed is to fit 32 bits
        keys = rng.per_record(key, len(task) * acting.group)
        how = {"plan": acting.plan, "split": acting.split, "group": acting.group, "expert_steps": acting.asked}
        found = host_episodes.Starts(task, seed)
        rollout, redone = host_episodes.rollout(pool, act, params, found, keys, prepare=prepare, **how)
        often = np.zeros((len(keys), 2), np.int32)
        for one in redone:
            often[one.episode, 0 if one.reason else 1] += 1
            if one.reason:
                print(
                    f"episode {one.episode} was begun again, at decision {one.decision}: {one.reason.splitlines()[-1]}"
                )
        return rollout._replace(redone=often)

    def chunks(self, states, steps: int) -> Float[Array, "B T H A"]:
        return self._kit.from_robot(states)

    # ---- the expert ----

    def _demonstrate(
        self, pool: Pool, starts: Starts, seed: int, split: str, prepare, executed: int = 1
    ) -> EpisodeRollout:
        """Episodes of the expert, an observation and `executed` of its actions at every decision; numpy arrays."""
        decisions = decisions_of(self, hosts.fetch(starts.task), executed)
        both = lambda seen, words: (prepare(seen, words), np.asarray(self._kit.from_robot(seen["expert"]), np.float32))
        acting = Acting(Plan(decisions, executed, self.settle), split=split)
        repeat = Partial(self._on_robot, _REPEAT)
        rollout = self._rollout(pool, repeat, None, starts, rng.stream(seed, "expert"), acting, both)
        self.redone = self.redone + rollout.redone.sum(0)
        return rollout

    def demonstrations(self, tasks, count: int, seed: int) -> Demonstrations:
        if self.config.demos:
            numbers = {self.tasks[task].instruction: task for task in tasks}
            return vla_demos.read(self.config.demos, self._kit, self.robot(self.config), numbers, count)
        most = ROUNDS * self.config.simulators.at_once
        with self._simulators(functools.partial(shown, self.make(self.config, pictures=self._sees))) as pool:
            scenes = lambda asked, seed: _scenes(asked[:most], seed, "train")
            play = lambda asked, seed: self._demonstrate(pool, scenes(asked, seed), seed, "train", self._kit.prepare)
            return collected(play, self, tasks, count, seed)

    def practice(self, tasks, count: int, seed: int) -> Demonstrations:
        """`count` episodes of the expert in each task, disturbed; a row for every decision, with its whole chunk."""
        steps, asked, found = self.module.horizon, np.repeat(tasks, count), []
        telling = functools.partial(shown, self.make(self.config, pictures=self._sees), steps=steps)
        most = ROUNDS * self.config.simulators.at_once
        with self._simulators(functools.partial(disturbed, telling)) as pool:
            for first in range(0, len(asked), most):
                starts = _scenes(asked[first : first + most], seed + first, "train")
                found.append(self._demonstrate(pool, starts, seed, "train", self._kit.prepare, steps))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *map(_as_practice, found))

    def expert_success(self, asked, seed: int) -> np.ndarray:
        with self._simulators(functools.partial(shown, self.make(self.config, pictures=False))) as pool:
            unseen = lambda seen, words: seen["proprioception"]
            return self._demonstrate(pool, _scenes(asked, seed, "test"), seed, "test", unseen).success

    # ---- films ----

    def expert_film(self, tasks, starts: Starts, key, chosen: np.ndarray, executed: int) -> np.ndarray:
        first = jax.tree.map(lambda leaf: leaf[chosen], hosts.fetch(starts))
        with self._simulators(functools.partial(shown, self.make(self.config))) as pool:
            drawn = lambda seen, words: self._kit.prepare(seen, words).images if self._sees else seen["images"]
            played = self._demonstrate(pool, first, self.config.eval.seed, "test", drawn)
        return _side_by_side(played.observation[0][:, ::executed])

    def film(self, rollout: EpisodeRollout, starts: Starts, actions, chosen: np.ndarray) -> np.ndarray:
        """The moments of decisions: a simulator is not drawn in between."""
        if self._sees:
            return _side_by_side(hosts.fetch(rollout.observation.images)[chosen])
        starts, counted, actions = hosts.fetch((starts, rollout.counted, self._kit.to_robot(actions)))
        shape = *counted.shape[:2], -1, actions.shape[-1]
        again = lambda row: self._again(starts.task[row], starts.seed[row], actions.reshape(shape)[row], counted[row])
        return _side_by_side(np.stack([again(row) for row in chosen]))

    def _again(self, task: int, seed: int, chunks: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """The pictures of a test episode whose policy did not see them; the last stays when it is over."""
        with contextlib.closing(self.make(self.config)(int(task))) as simulator:
            simulator.reset(int(seed), "test")
            frames = []
            for chunk, live in zip(chunks, counted):
                frames.append(simulator.observe()["images"] if live.any() else frames[-1])
                for action in chunk[live[: len(chunk)]]:
                    simulator.step(action)
        return np.stack(frames)


def _scenes(tasks, seed: int, split: str) -> Starts:
    """One for each task, as numpy arrays."""
    tasks = np.asarray(tasks, np.int32)
    if split == "test":
        return Starts(np.array([(tasks[:i] == task).sum() for i, task in enumerate(tasks)], np.uint32), tasks)
    return Starts(np.random.default_rng((seed, len(tasks))).integers(0, SCENES, len(tasks), np.uint32), tasks)


def _side_by_side(pictures: np.ndarray) -> np.ndarray:
    count, time, _, height, _, channels = pictures.shape
    return pictures.transpose(0, 1, 3, 2, 4, 5).reshape(count, time, height, -1, channels)


def _on_robot(to_robot, rows, act, params, observation, keys):
    """A policy with its rows split over the devices, its actions as the simulator takes them."""
    if rows is not None:
        observation = jax.lax.with_sharding_constraint(observation, rows)
    drawn, actions = act(params, observation, keys)
    return drawn, to_robot(actions)


def _as_practice(rollout: EpisodeRollout) -> Demonstrations:
    """Every decision; the expert says what to do beyond the end of an episode, too."""
    live = np.asarray(rollout.counted)[..., 0]
    seen, chunks = jax.tree.map(lambda leaf: np.asarray(leaf)[live], rollout.observation)
    task = np.broadcast_to(np.asarray(rollout.task)[:, None], live.shape)[live]
    return Demonstrations(seen, chunks, np.ones(chunks.shape[:2], bool), task.astype(np.int32))


def _repeat(params, observation, keys):
    return observation[1][:, 0], observation[1]


_REPEAT = Partial(_repeat)


class MetaWorld(Host):
    """Meta-World's tasks, suites of `metaworld.SUITES`."""

    expert = True
    SUITES = tuple(metaworld.SUITES)

    @staticmethod
    def catalogue(config) -> tuple[Told, ...]:
        suite_of = lambda name: next((suite for suite in config.suites if name in metaworld.SUITES.get(suite, ())), "")
        horizon = config.simulators.horizon
        return tuple(Told(name, suite_of(name), words, horizon) for name, words in metaworld.TASKS.items())

    @staticmethod
    def make(config, pictures: bool = True) -> functools.partial:
        part = config.simulators
        cameras = tuple(part.cameras) if pictures else ()
        how = {"size": part.size, "horizon": part.horizon, "fast": part.fast, "state": part.state}
        return functools.partial(metaworld.MetaWorld, cameras=cameras, **how)

    @staticmethod
    def robot(config) -> Robot:
        part = config.simulators
        sentences = tuple(metaworld.TASKS.values())
        alike = np.ones(metaworld.ACTION_DIMS, np.float32), np.zeros(metaworld.ACTION_DIMS, np.float32)
        felt, cameras = (metaworld.STATE, 0) if part.state else (metaworld.HAND, len(part.cameras))
        return Robot(cameras, part.size, metaworld.ACTION_DIMS, felt, sentences, *alike)

    @classmethod
    def mistakes(cls, config) -> list[str]:
        found = super().mistakes(config)
        cameras = config.simulators.cameras
        if not cameras or set(cameras) - set(metaworld.CAMERAS):
            found.append(f"simulators.cameras={tuple(cameras)}: choose of {', '.join(metaworld.CAMERAS)}")
        for name, given in (("demos", config.demos), ("student.path", config.student.path)):
            if config.simulators.state and given:
                found.append(f"{name}={given}: is about pictures, not states; set simulators.state=False")
        metaworld.check()
        mujoco_gl.choose()
        return found


class Libero(Host):
    """LIBERO's suites, for policies of directories. Test scenes are the fixed initial states, 50 of each task."""

    settle, SUITES = libero.SETTLE, libero.SUITES

    @staticmethod
    def catalogue(config) -> tuple[Told, ...]:
        return tuple(
            Told(f"{suite}/{index}", suite, libero.instruction(name), libero.HORIZONS[suite])
            for suite in libero.SUITES
            for index, name in enumerate(libero.tasks(suite))
        )

    @staticmethod
    def make(config, pictures: bool = True) -> functools.partial:
        part = config.simulators
        return functools.partial(libero.numbered, protocol=libero.Protocol(part.size, part.fast))

    @staticmethod
    def robot(config) -> Robot:
        told = tuple(task.instruction for task in Libero.catalogue(config))
        felt = np.zeros((2, libero.PROPRIOCEPTION_DIMS), np.float32)  # directories have statistics of their own
        dims, size = libero.ACTION_DIMS, config.simulators.size
        return Robot(len(libero.CAMERAS), size, dims, felt, told, libero.SCALE, libero.SHIFT)

    @classmethod
    def mistakes(cls, config) -> list[str]:
        libero.check()
        found = super().mistakes(config)
        if config.simulators.state:
            found.append("simulators.state=True: is of Meta-World; LIBERO's policies see pictures")
        if not config.student.path:
            found.append("student.path='': LIBERO is played by a policy of a directory; give one in OpenVLA's layout")
        if config.eval.episodes > libero.STATES:
            most = f"give {libero.STATES} at most, the fixed initial states of a task"
            found.append(f"eval.episodes={config.eval.episodes}: {most}")
        mujoco_gl.choose()
        return found
