"""The stages of distilling robot policies, each made once: demonstrations, the first student, arms; and success."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import stages, vla_flow, vla_host, vla_methods, vla_tabletop, vla_worlds
from experiments.recipes import arm_recipe
from experiments.vla_worlds import PRACTISED, Acting, Demonstrations, Starts
from opd_jax import data, hosts, rng, sharding
from opd_jax.checkpoint import params_sha256
from opd_jax.config import command_line, write_atomic
from opd_jax.metrics import read_metrics
from opd_jax.models.decoder import partition_rules
from opd_jax.models.vla import RULES
from opd_jax.sampling.episodes import Plan

Shown = Callable[[], Demonstrations]
BASES = {"bins": "base", "flow": "base_flow"}  # stages, by the head of a policy
WORLDS = {"tabletop": vla_tabletop.Tabletop, "metaworld": vla_host.MetaWorld, "libero": vla_host.Libero}


def in_use(recipe) -> dict:
    """A recipe's settings without those of what it does not do: what was made before there were such is as good."""
    settings = recipe.to_dict()
    unused = {"refills", "kept"} if not settings.get("refills") else set()
    unused |= {"updates"} if settings.get("updates") == 1 else set()
    return {name: value for name, value in settings.items() if name not in unused}


class Experiment:
    """The world, the policy and the stages of a config."""

    def __init__(self, config, workdir: Path, mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.about = {"command": command_line()}
        self.place = functools.partial(sharding.shard_batch, mesh=mesh)
        part = config.policy
        self.world = WORLDS[config.world](config, mesh)
        self.module = self.world.module
        self.plan = Plan(1, part.executed, self.world.settle)
        self.policies = {
            "bins": vla_methods.bins(self.world, self.plan, config.sigma, config.floor, config.suites),
            "flow": vla_flow.policy(self.world, self.plan, config.sigma, **config.flow, suites=config.suites),
        }
        number = {task.name: i for i, task in enumerate(self.world.tasks)}
        self.tasks = [i for i, task in enumerate(self.world.tasks) if task.suite in config.suites]
        self.held_out = [number[name] for name in config.held_out]
        self.seen = [task for task in self.tasks if task not in self.held_out]

    def put(self, tree):
        """Parameters, or a state that holds trees of them, by the rules of the policy."""
        return sharding.shard_params(tree, self.mesh, partition_rules(self.mesh, RULES))

    def to_act(self, params):
        """A policy's parameters as its episodes read them: a copy that belongs to one rollout."""
        return stages.copied(self.module.sampling_copy, params) if self.config.student.sampling_copy else params

    def acting(self, method):
        """The method with `sample` reading that copy."""
        return method._replace(sample=lambda params, batch, key: method.sample(self.to_act(params), batch, key))

    def seen_of(self, suite: str) -> list[int]:
        """The tasks of a suite that arms train on."""
        return [task for task in self.seen if self.world.tasks[task].suite == suite]

    # ---- demonstrations ----

    @functools.cached_property
    def few(self) -> Demonstrations:
        """Of all tasks, those that are held out later too."""
        return self.demonstrations(self.tasks, self.config.demonstrations.few)

    @functools.cached_property
    def many(self) -> Demonstrations:
        return self.demonstrations(self.seen, self.config.demonstrations.many)

    def rows(self, which: str) -> int:
        """How many decisions of the expert `few` or `many` have; in a file, for a finished run does not ask again."""
        path = self.workdir / f"demonstrated_{which}.txt"
        if path.exists():
            return int(path.read_text())
        count = len(getattr(self, which).task)
        write_atomic(path, str(count))
        return count

    def demonstrations(self, tasks, count: int) -> Demonstrations:
        return self.world.demonstrations(tasks, count, self.config.demonstrations.seed)

    # ---- students ----

    def train(self, stage: str, recipe, seed: int, start, method: tuple, batches, settings, *upstream: str, **run):
        settings = settings | {"recipe": in_use(recipe), "seed": seed, "policy": self.config.policy.to_dict()}
        settings |= {"flow": self.config.flow.to_dict()} if recipe.get("head") == "flow" else {}
        settings |= {"tasks": self.tasks, "held_out": self.held_out}
        settings |= {"sigma": self.config.sigma, "floor": self.config.floor} | self.world.identity
        return stages.trained(
            stage,
            self.workdir,
            stages.recipe_of(settings, *upstream),
            method,
            start,
            batches,
            recipe,
            seed,
            place=self.put,
            about=self.about,
            averaged=bool(recipe.ema_decay),
            save_every=self.config.save_every,
            offload=self.config.offload,
            **run,
        )

    def imitate(self, stage: str, seed: int, start, head: str, shown: Shown, *upstream: str) -> stages.Made:
        about = {"demonstrations": self.config.demonstrations.to_dict()}
        return self.supervise(stage, self.config.sft, seed, start, head, shown, about, *upstream)

    def supervise(self, stage: str, recipe, seed: int, start, head: str, shown: Shown, about: dict, *upstream: str):
        """SFT on what the expert has shown; it is asked where the stage is not made yet."""
        method = self.policies[head].imitation(recipe)

        def batches():
            rows = shown()
            return data.epochs(rows.row, len(rows.task), recipe.batch_size, seed, self.place)

        return self.train(stage, recipe, seed, start, method, batches, about, *upstream)

    # ---- practice ----

    @functools.cached_property
    def practice(self) -> Demonstrations:
        """The expert's episodes, disturbed, in the tasks of `practice`: all that are in no suite, if it names none."""
        part = self.config.practice
        of = lambda task: task.name in part.tasks if part.tasks else not task.suite
        tasks = [i for i, task in enumerate(self.world.tasks) if of(task)]
        return self.world.practice(tasks, part.episodes, part.seed)

    @functools.lru_cache  # noqa: B019  an experiment lives as long as the run
    def base(self, head: str) -> stages.Made:
        """A policy that has practised, one for the students of all seeds."""
        part = self.config.practice
        start = self.world.first(self.policies[head].init, rng.stream(part.seed, "policy"))
        return self.supervise(BASES[head], part, part.seed, start, head, lambda: self.practice, {})

    def first(self, seed: int, head: str) -> tuple:
        """What the student of a seed begins with, and the hashes of what that depends on."""
        if self.config.base == PRACTISED:
            base = self.base(head)
            return base.params, (base.sha256,)
        return self.world.first(self.policies[head].init, rng.stream(seed, "policy")), self.world.upstream

    @functools.lru_cache  # noqa: B019
    def student(self, seed: int, head: str) -> stages.Made:
        """SFT on few demonstrations, of a random policy or of one that has learnt; `sft.steps=0`: that one itself."""
        params, upstream = self.first(seed, head)
        if not self.config.sft.steps:
            return stages.Made(params, "", params_sha256(params), 0.0, 0)
        stage = f"student_seed{seed}" if head == "bins" else f"student_{head}_seed{seed}"
        return self.imitate(stage, seed, params, head, lambda: self.few, *upstream)

    @functools.lru_cache  # noqa: B019
    def arm(self, name: str, seed: int) -> stages.Made:
        recipe = arm_recipe(self.config, name)
        before = self.arm(recipe.start, seed) if recipe.start else self.student(seed, recipe.head)
        stage = f"{name}_seed{seed}"
        if recipe.method == "sft":
            return self.imitate(stage, seed, before.params, recipe.head, lambda: self.many, before.sha256)
        (method, optimizer), upstream = self.policies[recipe.head].on_policy(recipe), [before.sha256]
        learns, frozen = (self.acting(method), optimizer), None
        if recipe.method == "opd" and recipe.teacher != vla_methods.EXPERT:
            teacher = self.teacher(recipe.teacher, seed)
            upstream, frozen = [*upstream, teacher.sha256], self.put(teacher.params)
        batches = self.scenes(recipe, seed)
        return self.train(stage, recipe, seed, before.params, learns, batches, {}, *upstream, teacher_params=frozen)

    def teacher(self, name: str, seed: int) -> stages.Made:
        """A policy that labels: that of `teacher.path`, or an arm's."""
        return self.world.teacher if name == vla_methods.GIVEN else self.arm(name, seed)

    def scenes(self, recipe, seed: int):
        """Endless batches of initial states, each of tasks of one horizon; every task is drawn as often. Those of
        refills are in `more`."""
        horizons = vla_worlds.horizons(self.world)[self.seen]
        alike = {horizon: np.asarray(self.seen)[horizons == horizon] for horizon in horizons.tolist()}

        count = recipe.batch_size * (1 + recipe.refills)

        def draw(generator: np.random.Generator):
            tasks = generator.choice(alike[int(generator.choice(horizons))], count)
            return {"seed": generator.integers(0, 2**32, count, np.uint32), "task": np.int32(tasks)}

        def place(batch):
            seed, task = (batch[name].reshape(-1, recipe.batch_size) for name in Starts._fields)
            first, *more = (self.place(Starts(*rows)) for rows in zip(seed, task))
            decisions = vla_worlds.decisions_of(self.world, task[0], self.plan.executed)
            return first._asdict() | {"decisions": decisions} | ({"more": tuple(more)} if more else {})

        return data.batches(draw, 1, seed, place)

    # ---- what they do ----

    def success(self, params, head: str) -> dict[int, float]:
        """Share of episodes of the test split that each task ends in success; of the expert, where `head` is that."""
        part, asked = self.config.eval, np.repeat(self.tasks, self.config.eval.episodes)
        if head == "expert":
            good = self.world.expert_success(asked, part.seed)
        else:
            starts, key = self.world.starts(asked, part.seed, "test", pad=True), rng.stream(part.seed, "eval")
            plan = self.plan._replace(decisions=vla_worlds.decisions_of(self.world, self.tasks, self.plan.executed))
            acting, params = Acting(plan, split="test"), self.to_act(self.put(params))
            good = hosts.fetch(self.world.play(self.policies[head].greedy, params, starts, key, acting).success)
        return dict(zip(self.tasks, good[: len(asked)].reshape(len(self.tasks), part.episodes).mean(1)))

    def shown_to_students(self) -> dict[str, float]:
        """What their demonstrations have cost: the expert's steps, and as many of its actions."""
        return {"environment_steps": self.rows("few"), "teacher_queries": self.rows("few")}

    def spent(self, name: str, seed: int) -> dict[str, float]:
        """What an arm has cost: its own actions and labelled decisions, those of its start and of its teacher too."""
        recipe = arm_recipe(self.config, name)
        lines = read_metrics(self.workdir, f"{name}_seed{seed}")
        add = lambda key: sum(line.get(key, 0.0) for line in lines)
        asked = add("decisions") if recipe.method == "opd" else 0.0
        shown = self.rows("many") if recipe.method == "sft" else 0
        own = {"environment_steps": add("environment_steps") + shown, "teacher_queries": asked + shown}
        for other in (recipe.start, recipe.teacher):
            before = self.spent(other, seed) if other in self.config.arms else {}
            own = {key: value + before.get(key, 0.0) for key, value in own.items()}
        return own
