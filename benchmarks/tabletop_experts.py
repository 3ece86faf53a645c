# SPDX-License-Identifier: Apache-2.0
"""How often the tabletop's scripted expert succeeds, suite by suite and task by task, and after how many steps.

    python benchmarks/tabletop_experts.py --episodes 50          # some minutes on two cores

Episodes are those of an experiment, disturbed as there, but no picture is drawn: over with the first success or after
the task's horizon. `--split train` plays the other half of the scenes.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.worlds import tabletop

HORIZONS = np.array([task.horizon for task in tabletop.TASKS])


@functools.partial(jax.jit, static_argnames="split")
def begin(keys, tasks, split: str):
    return jax.vmap(lambda key, task: tabletop.reset(key, task, split))(keys, tasks)


@jax.jit
def finished(states):
    """The step after which each of B episodes of the expert first succeeds, if it goes on so long; 0: never."""

    def advance(carry, step):
        state, found = carry
        state = tabletop.step(state, tabletop.expert(state))
        return (state, jnp.where((found == 0) & tabletop.success(state), step, found)), None

    def play(state):
        steps = jnp.arange(1, HORIZONS.max() + 1)
        return jax.lax.scan(advance, (state, jnp.zeros((), steps.dtype)), steps)[0][1]

    return jax.vmap(play)(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50, help="of each task")
    parser.add_argument("--split", default="test", choices=("train", "test"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(vars(args), flush=True)
    tasks, played = jnp.arange(len(tabletop.TASKS)), []
    for index in range(args.episodes):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), index), len(tasks))
        played.append(np.asarray(finished(begin(keys, tasks, args.split))))
    steps = np.stack(played, 1)  # [tasks, episodes]
    good = (steps > 0) & (steps <= HORIZONS[:, None])
    rate = good.mean(1)
    for suite in tabletop.SUITES:
        own = np.array([task.suite == suite for task in tabletop.TASKS])
        worst = min(np.flatnonzero(own), key=lambda task: rate[task])
        taken = steps[own][good[own]]
        print(
            f"{suite:8} {good[own].mean():.3f} of {good[own].size}; steps {taken.mean():.0f}, at most {taken.max()}, "
            f"horizon {HORIZONS[own].max()}; worst task {tabletop.TASKS[worst].name} {rate[worst]:.2f}"
        )
    below = [f"{task.name} {rate[i]:.2f}" for i, task in enumerate(tabletop.TASKS) if rate[i] < 0.95]
    print(f"mean of {len(rate)} tasks: {rate.mean():.3f}; below 0.95: {', '.join(below) or 'none'}")


if __name__ == "__main__":
    main()
