# SPDX-License-Identifier: Apache-2.0
"""Steps a second of episodes: the tabletop on the device, Meta-World in processes, and gymnasium's vectors of it.

    pip install -e '.[metaworld]'
    python benchmarks/episodes.py                         # some minutes on two idle cores
    python benchmarks/episodes.py --workers 1 4 8 --envs 8    # rows for these numbers of processes
    python benchmarks/episodes.py --tabletop              # its rows alone, a minute

Everywhere the same policy, random actions from a jitted function, and a picture at each decision: of 128 x 128, on the
tabletop two of 40 x 40. So where every step is a decision, environment steps are image steps. Ours and gymnasium's
`SyncVectorEnv` and `AsyncVectorEnv` step the same simulator class, drawn the same way; where gymnasium gives a picture
at every step, ours decides at every step. Rows with chunks of 8 are what a policy of chunks needs. All in turns from
one process, so that other load falls on all alike; what is compiled, started or made, is so before the clock.

Columns: environment steps a second, fastest and median round; the first relative to ours of as many processes with a
picture each step (beside `SyncVectorEnv` the fewest, beside `AsyncVectorEnv` the most); labelled states a second. Rows
of the device have environment steps a second of processor time, median round: what other load takes from them least.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from opd_jax.sampling import episodes, host_episodes
from opd_jax.sampling.episodes import Plan
from opd_jax.sampling.host_episodes import Starts
from opd_jax.sampling.host_pool import Pool
from opd_jax.worlds import metaworld, mujoco_gl, tabletop

TASK, CHUNK = metaworld.NAMES.index("pick-place-v3"), 8


def act(params, observation, keys):
    """Random actions, and nothing else drawn."""
    actions = jax.vmap(lambda key: jax.random.uniform(key, (CHUNK, 4), minval=-1, maxval=1))(keys)
    return (), actions


class Gym(gymnasium.Env):
    """The same simulator for gymnasium."""

    def __init__(self, size: int, horizon: int):
        self._simulator, self._length = metaworld.MetaWorld(TASK, size=size, horizon=horizon), 0
        image = gymnasium.spaces.Box(0, 255, (1, size, size, 3), np.uint8)
        hand = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"images": image, "proprioception": hand})
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        self._length = 0
        self._simulator.reset(seed or 0, "train")
        return self._simulator.observe(), {}

    def step(self, action):
        self._simulator.step(action)
        self._length += 1
        over = self._length == self._simulator.horizon
        return self._simulator.observe(), 0.0, self._simulator.success(), over, {}

    def close(self):
        self._simulator.close()


class Table:
    """The tabletop as it is seen."""

    step, observe, success = map(staticmethod, (tabletop.step, tabletop.observe, tabletop.success))


def on_device(args, executed: int = CHUNK, labelled: bool = False) -> Callable[[], tuple[int, int]]:
    """Functions give environment steps and labelled states: those of which the expert's chunk of 8 was asked."""
    batch, plan = args.table_batch, Plan(args.steps // executed, executed)
    index, keys = jnp.arange(batch, dtype=jnp.int32), jax.random.split(jax.random.key(0), batch)
    states = jax.vmap(lambda key: tabletop.reset(key, 0))(keys)
    how = {"plan": plan, "horizon": jnp.full(batch, args.steps), "group": index, "task": index}
    table = Table()

    @jax.jit
    def play(states, keys):
        rollout = episodes.rollout(table, act, None, states, keys, **how)
        ask = functools.partial(episodes.expert_chunks, environment=table, expert=tabletop.expert, steps=CHUNK)
        return rollout, ask(tabletop.undisturbed(rollout.states)) if labelled else None

    def timed():
        rollout, _ = jax.block_until_ready(play(states, keys))
        return int(rollout.length.sum()), int(rollout.counted.any(-1).sum()) if labelled else 0

    return timed


def in_processes(args, workers: int, executed: int, expert_steps: int) -> Callable[[], tuple[int, int]]:
    make = functools.partial(metaworld.MetaWorld, size=args.size, horizon=args.steps)
    pool, plan = Pool(make, workers=workers, batch=args.envs), Plan(args.steps // executed, executed)
    starts, keys = (
        Starts(np.full(args.envs, TASK), np.arange(args.envs)),
        jax.random.split(jax.random.key(0), args.envs),
    )

    def play():
        rollout, _ = host_episodes.rollout(pool, act, None, starts, keys, plan=plan, expert_steps=expert_steps)
        return int(rollout.length.sum()), int(rollout.counted.any(-1).sum()) if expert_steps else 0

    return play


def in_gymnasium(args, kind: type) -> Callable[[], tuple[int, int]]:
    make = functools.partial(Gym, args.size, args.steps)
    how = {"context": "spawn"} if kind is AsyncVectorEnv else {}
    envs = kind([make] * args.envs, autoreset_mode=AutoresetMode.DISABLED, **how)
    keys = jax.random.split(jax.random.key(0), args.envs)
    choose = jax.jit(lambda seen, t: act(None, seen, jax.vmap(jax.random.fold_in, (0, None))(keys, t))[1][:, 0])

    def play():
        seen, _ = envs.reset(seed=list(range(args.envs)))
        for t in range(args.steps):
            seen, *_ = envs.step(np.asarray(choose(seen, t)))
        return args.steps * args.envs, 0

    return play


class Contender(NamedTuple):
    """A row."""

    play: Callable[[], tuple[int, int]]
    peer: str = ""  # the row that its steps a second are divided by; "": it is on the device


def processes(workers: int) -> str:
    return f"processes, {workers} worker" + "s" * (workers > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 80), ("envs", 2), ("size", 128), ("table_batch", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="processes of ours, a row for each number"
    )
    parser.add_argument("--tabletop", action="store_true", help="its rows alone")
    args = parser.parse_args()
    if not 1 <= min(args.workers) <= max(args.workers) <= args.envs:
        parser.error(f"--workers {args.workers}: give 1 to --envs, {args.envs} simulators at once")
    contenders = {
        "tabletop on the device": Contender(on_device(args)),
        "tabletop on the device, a picture each step": Contender(on_device(args, 1)),
        "tabletop on the device, and expert's": Contender(on_device(args, labelled=True)),
    }
    if args.tabletop:
        print(f"{os.cpu_count()} cores, {vars(args)}")
    else:
        contenders |= simulators(args)
    measure(args.rounds, contenders)


def simulators(args) -> dict[str, Contender]:
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's; as many drawing threads as processes, for all alike
    print(f"{os.cpu_count()} cores, MUJOCO_GL={mujoco_gl.choose()}, {vars(args)}")
    rows, fewest, most = {}, processes(min(args.workers)), processes(max(args.workers))
    rows["SyncVectorEnv"] = Contender(in_gymnasium(args, SyncVectorEnv), fewest)
    rows[f"AsyncVectorEnv, {args.envs} processes"] = Contender(in_gymnasium(args, AsyncVectorEnv), most)
    for workers in args.workers:
        own = processes(workers)
        rows[own] = Contender(in_processes(args, workers, 1, 0), own)
        rows[f"chunks of 8, {own}"] = Contender(in_processes(args, workers, CHUNK, 0), own)
        rows[f"chunks of 8 and expert's, {own}"] = Contender(in_processes(args, workers, CHUNK, CHUNK), own)
    return rows


def measure(rounds: int, contenders: dict[str, Contender]) -> None:
    rates, busy = ({name: [] for name in contenders} for _ in range(2))
    labels = dict.fromkeys(contenders, 0.0)
    for turn in range(rounds + 1):
        for name, (play, _) in contenders.items():
            began, worked = time.perf_counter(), time.process_time()
            steps, labelled = play()
            seconds, worked = time.perf_counter() - began, time.process_time() - worked
            if turn:  # the first compiles, and starts processes
                rates[name].append(steps / seconds)
                busy[name].append(steps / worked)
                labels[name] = max(labels[name], labelled / seconds)
    for name, (_, peer) in contenders.items():
        found = rates[name]
        of_peer = f"{max(found) / max(rates[peer]):8.2f}" if peer else ""
        ratio = of_peer or f"{np.median(busy[name]):9.1f} of processor time"
        label = f"{labels[name]:8.1f} labelled/s" if labels[name] else ""
        print(f"{name:46}{max(found):9.1f} {np.median(found):9.1f} steps/s {ratio} {label}")


if __name__ == "__main__":
    main()
