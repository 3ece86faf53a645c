"""The stages of distilling robot policies, each made once: demonstrations, the first student, arms; and success."""

import functools
from pathlib import Path

import jax
import numpy as np

from experiments import stages, vla_base, vla_flow, vla_methods
from experiments.reasoning_stages import arm_recipe
from experiments.vla_methods import Acting, Demonstrations, Starts
from opd_jax import data, hosts, rng, sharding
from opd_jax.config import command_line
from opd_jax.metrics import read_metrics
from opd_jax.sampling.episodes import Plan
from opd_jax.types import EpisodeRollout
from opd_jax.worlds import tabletop

NAMES = {task.name: i for i, task in enumerate(tabletop.TASKS)}


class Experiment:
    """The tasks, the policy and the stages of a config."""

    def __init__(self, config, workdir: Path, mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.about = {"command": command_line()}
        self.place = functools.partial(sharding.shard_batch, mesh=mesh)
        part = config.policy
        self.module = vla_base.module_of(part)
        self.base = vla_base.load(config.base, part) if config.base else None
        self.plan = Plan(1, part.executed)
        self.policies = {
            "bins": vla_methods.bins(self.module, self.plan, config.sigma, config.floor),
            "flow": vla_flow.policy(self.module, self.plan, config.sigma, **config.flow),
        }
        self.tasks = [i for i, task in enumerate(tabletop.TASKS) if task.suite in config.suites]
        self.held_out = [NAMES[name] for name in config.held_out]
        self.seen = [task for task in self.tasks if task not in self.held_out]

    def seen_of(self, suite: str) -> list[int]:
        """The tasks of a suite that arms train on."""
        return [task for task in self.seen if tabletop.TASKS[task].suite == suite]

    # ---- demonstrations ----

    @functools.cached_property
    def few(self) -> Demonstrations:
        """Of all tasks, those that are held out later too."""
        return self.demonstrations(self.tasks, self.config.demonstrations.few)

    @functools.cached_property
    def many(self) -> Demonstrations:
        return self.demonstrations(self.seen, self.config.demonstrations.many)

    def demonstrations(self, tasks, count: int) -> Demonstrations:
        """`count` successful episodes of each task; where the expert fails, another scene is tried."""
        found, missing, seed = [], dict.fromkeys(tasks, count), self.config.demonstrations.seed
        while any(missing.values()):
            asked = [task for task, left in missing.items() for _ in range(left)][: self.at_once]
            rollout = self.expert_episodes(asked, seed, "demonstrations", "train")
            found.append(vla_methods.as_demonstrations(rollout, self.config.policy.horizon))
            for task, good in zip(asked, rollout.success):
                missing[task] -= int(good)
            seed += 1
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    @property
    def at_once(self) -> int:
        """Episodes of the expert: always as many, for one program."""
        return len(self.tasks) * self.config.eval.episodes

    def expert_episodes(self, asked, seed: int, stream: str, split: str) -> EpisodeRollout:
        """Of these tasks, at most `at_once`; numpy arrays. Rows beyond are padding, and no successes."""
        starts = self.starts(np.resize(np.asarray(asked), self.at_once), seed, pad=True)
        steps = int(vla_methods.HORIZONS[self.tasks].max())
        rollout = hosts.fetch(vla_methods.demonstrate(starts, rng.stream(seed, stream), steps, split))
        wanted = np.arange(len(rollout.success)) < len(asked)
        return rollout._replace(states=None, success=np.where(wanted, rollout.success, 0))

    def starts(self, tasks, seed: int, pad: bool = False) -> Starts:
        """One scene for each entry of `tasks`; padded by repetition to what the devices divide, where asked."""
        tasks = np.asarray(tasks, np.int32)
        if pad:
            tasks = np.resize(tasks, -(-len(tasks) // self.mesh.size) * self.mesh.size)
        seeds = np.random.default_rng((seed, len(tasks))).integers(0, 2**32, len(tasks), np.uint32)
        return self.place(Starts(seeds, tasks))

    # ---- students ----

    def train(self, stage: str, recipe, seed: int, start, method: tuple, batches, settings, *upstream: str, **run):
        settings = settings | {"recipe": recipe.to_dict(), "seed": seed, "policy": self.config.policy.to_dict()}
        settings |= {"flow": self.config.flow.to_dict()} if recipe.get("head") == "flow" else {}
        settings |= {"tasks": self.tasks, "held_out": self.held_out}
        settings |= {"sigma": self.config.sigma, "floor": self.config.floor}
        return stages.trained(
            stage,
            self.workdir,
            stages.recipe_of(settings, *upstream),
            method,
            start,
            batches,
            recipe,
            seed,
            place=functools.partial(sharding.replicate, mesh=self.mesh),
            about=self.about,
            averaged=bool(recipe.ema_decay),
            save_every=self.config.save_every,
            **run,
        )

    def imitate(self, stage: str, seed: int, start, head: str, shown: Demonstrations, *upstream: str) -> stages.Made:
        recipe = self.config.sft
        method = self.policies[head].imitation(recipe)
        batches = data.epochs(shown.row, len(shown.task), recipe.batch_size, seed, self.place)
        about = {"demonstrations": self.config.demonstrations.to_dict(), "rows": len(shown.task)}
        return self.train(stage, recipe, seed, start, method, batches, about, *upstream)

    @functools.lru_cache  # noqa: B019  an experiment lives as long as the run
    def student(self, seed: int, head: str) -> stages.Made:
        """SFT on few demonstrations, of a random policy or of one that has practised."""
        params = jax.jit(self.policies[head].init)(rng.stream(seed, "policy"), vla_base.first_observation())
        params = vla_base.begin(params, self.base.params) if self.base else params
        stage = f"student_seed{seed}" if head == "bins" else f"student_{head}_seed{seed}"
        return self.imitate(stage, seed, params, head, self.few, *([self.base.sha256] if self.base else []))

    @functools.lru_cache  # noqa: B019
    def arm(self, name: str, seed: int) -> stages.Made:
        recipe = arm_recipe(self.config, name)
        before = self.arm(recipe.start, seed) if recipe.start else self.student(seed, recipe.head)
        stage = f"{name}_seed{seed}"
        if recipe.method == "sft":
            return self.imitate(stage, seed, before.params, recipe.head, self.many, before.sha256)
        method, upstream, frozen = self.policies[recipe.head].on_policy(recipe), [before.sha256], None
        if recipe.teacher != vla_methods.EXPERT:
            teacher = self.arm(recipe.teacher, seed)
            upstream, frozen = [*upstream, teacher.sha256], sharding.replicate(teacher.params, self.mesh)
        batches = self.scenes(recipe, seed)
        return self.train(stage, recipe, seed, before.params, method, batches, {}, *upstream, teacher_params=frozen)

    def scenes(self, recipe, seed: int):
        """Endless batches of initial states, each of tasks of one horizon; every task is drawn as often."""
        horizons = vla_methods.HORIZONS[self.seen]
        alike = {horizon: np.asarray(self.seen)[horizons == horizon] for horizon in horizons.tolist()}

        def draw(generator: np.random.Generator):
            tasks = generator.choice(alike[int(generator.choice(horizons))], recipe.batch_size)
            return {"seed": generator.integers(0, 2**32, recipe.batch_size, np.uint32), "task": np.int32(tasks)}

        def place(batch):
            whole = {name: value[0] for name, value in batch.items()}
            decisions = vla_methods.decisions_of(whole["task"], self.plan.executed)
            return self.place(whole) | {"decisions": decisions}

        return data.batches(draw, 1, seed, place)

    # ---- what they do ----

    def success(self, params, head: str) -> dict[int, float]:
        """Share of episodes of the test split that each task ends in success; of the expert, where `head` is that."""
        part, asked = self.config.eval, np.repeat(self.tasks, self.config.eval.episodes)
        if head == "expert":
            played = self.expert_episodes(asked, part.seed, "eval", "test")
        else:
            starts, key = self.starts(asked, part.seed, pad=True), rng.stream(part.seed, "eval")
            plan = self.plan._replace(decisions=vla_methods.decisions_of(self.tasks, self.plan.executed))
            acting, params = Acting(plan, split="test"), sharding.replicate(params, self.mesh)
            played = vla_methods.play(self.policies[head].greedy, params, starts, key, acting)
        good = hosts.fetch(played.success)[: len(asked)].reshape(len(self.tasks), part.episodes)
        return dict(zip(self.tasks, good.mean(1)))

    def spent(self, name: str, seed: int) -> dict[str, float]:
        """What an arm has cost: its own actions and labelled decisions, those of its start and of its teacher too."""
        recipe = arm_recipe(self.config, name)
        lines = read_metrics(self.workdir, f"{name}_seed{seed}")
        add = lambda key: sum(line.get(key, 0.0) for line in lines)
        asked = add("decisions") if recipe.method == "opd" else 0.0
        shown = len(self.many.task) if recipe.method == "sft" else 0
        own = {"environment_steps": add("environment_steps") + shown, "teacher_queries": asked + shown}
        for other in (recipe.start, recipe.teacher):
            before = self.spent(other, seed) if other in self.config.arms else {}
            own = {key: value + before.get(key, 0.0) for key, value in own.items()}
        return own
