"""The embedded tabletop as a world of robot policies: all of it JAX, an episode is one scan."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial
from jaxtyping import Array, Float

from experiments import stages, vla_policies
from experiments.vla_worlds import PRACTISED, Acting, Demonstrations, Starts, collected
from opd_jax import hosts, rng, sharding
from opd_jax.config import ConfigError
from opd_jax.models import vla
from opd_jax.models.vla import Observation
from opd_jax.sampling import episodes
from opd_jax.sampling.episodes import Plan
from opd_jax.types import EpisodeRollout, PyTree
from opd_jax.worlds import tabletop

INSTRUCTIONS = jnp.array(np.stack([tabletop.encode(task.instruction) for task in tabletop.TASKS]))
HORIZONS = np.array([task.horizon for task in tabletop.TASKS])
EVERY = 3  # actions from one frame of a film to the next


class Table:
    """The tabletop as a policy sees it: with its instruction."""

    def step(self, state, action):
        return tabletop.step(state, action)

    def success(self, state):
        return tabletop.success(state)

    def observe(self, state) -> Observation:
        seen = tabletop.observe(state)
        return Observation(seen.images, seen.proprioception, INSTRUCTIONS[state.task])


class Shown(Table):
    """The same with what the expert does: for demonstrations."""

    def observe(self, state):
        return super().observe(state), tabletop.expert(state)


TABLE, SHOWN = Table(), Shown()


# ---- the policy ------------------------------------------------------------------------------------------------------


def module_of(policy) -> vla.Vla:
    """The policy's sizes as a module."""
    return vla_policies.small(policy, tabletop.ACTION_DIMS, len(tabletop.VOCABULARY), tabletop.IMAGE_SIZE)


def first_observation() -> Observation:
    """An observation, as every policy on the table gets them: `[1, ...]`."""
    state = tabletop.reset(jax.random.key(0), 0)
    return jax.tree.map(lambda leaf: leaf[None], TABLE.observe(state))


def load(path: str, policy) -> stages.Made:
    """What a run of `configs/vla_base.py` has made, that of its default where `path` is `shipped`.

    Raises: ConfigError where it is missing or of another size.
    """
    path = str(stages.SHIPPED / "tabletop_base.safetensors") if path == "shipped" else path
    if not Path(path).is_file():
        raise ConfigError(f"base={path}: no such file; give one that a run of configs/vla_base.py has left in stages/")
    made = stages.load(Path(path))
    expected = jax.eval_shape(module_of(policy).init, jax.random.key(0), first_observation())["params"]
    shapes = [{path: leaf.shape for path, leaf in flatten_dict(tree).items()} for tree in (made.params, expected)]
    if shapes[0] != shapes[1]:
        sizes = ", ".join(f"{name}={policy[name]}" for name in ("width", "layers", "points"))
        raise ConfigError(f"base={path}: is not a policy of {sizes}; make it so")
    return made


def begin(params: PyTree, base: PyTree) -> PyTree:
    """`params` of a policy, of either head, with all that it shares with `base` from there."""
    known = flatten_dict(base)
    return unflatten_dict({path: known.get(path, leaf) for path, leaf in flatten_dict(params).items()})


# ---- episodes --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("group", "split"))
def _begin(starts: Starts, key, *, group: int, split: str):
    """First states, the key of each episode, and its scene and task. By itself: it is long in compiling."""
    first = jax.vmap(lambda seed, task: tabletop.reset(jax.random.key(seed), task, split))(*starts)
    scene = jnp.arange(len(starts.task), dtype=jnp.int32)
    first, scene, task = jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=0), (first, scene, starts.task))
    keys = rng.per_record(key, len(scene))
    first = first._replace(key=jax.vmap(jax.random.fold_in, (0, None))(keys, 2**31 - 1))  # disturbances of its own
    return first, keys, scene, task


@functools.partial(jax.jit, static_argnames=("environment", "plan"))
def _go_on(act_fn, params, first, keys, scene, task, *, environment: Table, plan: Plan) -> EpisodeRollout:
    how = {"plan": plan, "horizon": jnp.asarray(HORIZONS)[task], "group": scene, "task": task}
    return episodes.rollout(environment, act_fn, params, first, keys, **how)


def _play(act_fn, params, starts: Starts, key, *, environment: Table, acting: Acting) -> EpisodeRollout:
    begun = _begin(starts, key, group=acting.group, split=acting.split)
    return _go_on(act_fn, params, *begun, environment=environment, plan=acting.plan)


def _shown(params, observation, keys):
    return observation[1], observation[1][:, None]


def demonstrate(starts: Starts, key, steps: int, split: str = "train") -> EpisodeRollout:
    """Episodes of the expert, an observation and an action at every step."""
    return _play(Partial(_shown), None, starts, key, environment=SHOWN, acting=Acting(Plan(steps, 1), split=split))


class Tabletop:
    """`vla_worlds.World`."""

    expert, settle, SUITES, goal = True, 0, tabletop.SUITES, "the goal holds and the hand is free"
    tasks, identity, teacher = tabletop.TASKS, {}, None
    redone = np.zeros(2, np.int32)  # nothing fails on the device

    def __init__(self, config, mesh):
        self.config, self.mesh = config, mesh
        self.module, self.example = module_of(config.policy), first_observation()
        self._base = load(config.base, config.policy) if config.base else None
        self.upstream = (self._base.sha256,) if self._base else ()
        self._chosen = [at for at, task in enumerate(self.tasks) if task.suite in config.suites]

    @staticmethod
    def catalogue(config) -> tuple[tabletop.Task, ...]:
        return tabletop.TASKS

    @staticmethod
    def mistakes(config) -> list[str]:
        own = not config.demos, f"demos={config.demos}: the tabletop's expert demonstrates; set ''"
        paths = {name: config[name].path for name in ("student", "teacher")}
        given = [(not path, f"{name}.path={path}: is of simulators; set ''") for name, path in paths.items()]
        base = config.base != PRACTISED, f"base={PRACTISED!r}: is of simulators; give shipped, a file or ''"
        return [line for good, line in (own, base, *given) if not good]

    def first(self, init, key) -> PyTree:
        params = jax.jit(init)(key, self.example)
        return begin(params, self._base.params) if self._base else params

    def starts(self, tasks, seed: int, split: str = "train", pad: bool = False) -> Starts:
        tasks = np.asarray(tasks, np.int32)
        if pad:
            tasks = np.resize(tasks, -(-len(tasks) // self.mesh.size) * self.mesh.size)
        seeds = np.random.default_rng((seed, len(tasks))).integers(0, 2**32, len(tasks), np.uint32)
        return sharding.shard_batch(Starts(seeds, tasks), self.mesh)

    def play(self, act: Partial, params, starts: Starts, key, acting: Acting) -> EpisodeRollout:
        return _play(act, params, starts, key, environment=TABLE, acting=acting)

    @staticmethod
    def chunks(states, steps: int) -> Float[Array, "B T H A"]:
        """What the expert would do if nothing went wrong: labels that know what will are noise to the student."""
        calm = tabletop.undisturbed(states)
        return episodes.expert_chunks(calm, environment=TABLE, expert=tabletop.expert, steps=steps)

    # ---- the expert ----

    @property
    def _at_once(self) -> int:
        """Episodes of the expert: always as many, for one program."""
        return len(self._chosen) * self.config.eval.episodes

    def _expert_episodes(self, asked, seed: int, stream: str, split: str) -> EpisodeRollout:
        """Of these tasks, at most `_at_once`; numpy arrays. Rows beyond are padding, and no successes."""
        starts = self.starts(np.resize(np.asarray(asked), self._at_once), seed, pad=True)
        steps = int(HORIZONS[self._chosen].max())
        rollout = hosts.fetch(demonstrate(starts, rng.stream(seed, stream), steps, split))
        wanted = np.arange(len(rollout.success)) < len(asked)
        return rollout._replace(states=None, success=np.where(wanted, rollout.success, 0))

    def demonstrations(self, tasks, count: int, seed: int) -> Demonstrations:
        play = lambda asked, seed: self._expert_episodes(asked[: self._at_once], seed, "demonstrations", "train")
        return collected(play, self, tasks, count, seed)

    def expert_success(self, asked, seed: int) -> np.ndarray:
        return self._expert_episodes(asked, seed, "eval", "test").success[: len(asked)]

    # ---- films ----

    def expert_film(self, tasks, starts: Starts, key, chosen: np.ndarray, executed: int) -> np.ndarray:
        shown = demonstrate(starts, key, int(HORIZONS[tasks].max()), "test")
        return film(shown, shown.drawn, chosen)

    def film(
        self, rollout: EpisodeRollout, starts: Starts, actions: Float[Array, "B S A"], chosen: np.ndarray
    ) -> np.ndarray:
        return film(rollout, actions, chosen)


def film(rollout: EpisodeRollout, actions: Float[Array, "B S A"], chosen: np.ndarray) -> np.ndarray:
    """`[n, T, H, W, 3]` bytes of the chosen episodes, cameras side by side; one that is over stands still."""
    states = jax.tree.map(lambda leaf: leaf[chosen, 0], rollout.states)
    return hosts.fetch(_film(states, actions[chosen], rollout.length[chosen]))


@jax.jit
def _film(states, actions, length):
    def act(states, at):
        action, t = at
        new = jax.vmap(tabletop.step)(states, action)
        states = episodes.where(t < length, new, states)
        return states, jax.vmap(tabletop.render)(states)

    first = jax.vmap(tabletop.render)(states)
    _, frames = jax.lax.scan(act, states, (jnp.moveaxis(actions, 1, 0), jnp.arange(actions.shape[1])))
    frames = jnp.concatenate([first[None], frames[EVERY - 1 :: EVERY]])  # [T, n, C, H, W, 3]
    time, count, _, height, _, _ = frames.shape
    return frames.transpose(1, 0, 3, 2, 4, 5).reshape(count, time, height, -1, 3)
