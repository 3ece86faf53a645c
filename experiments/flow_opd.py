"""Flow-OPD on a world: base -> one GRPO teacher per reward -> cold start -> students, and the table."""

import functools
import re
import shlex
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flow_methods, latents, scenes, stages
from experiments.recipes import arm_recipe, check_arms, check_counts, check_recipe
from opd_jax import hosts, loop, metrics, optim, report, rng, sharding
from opd_jax.checkpoint import params_sha256
from opd_jax.config import checks, command_line, fingerprint, versions
from opd_jax.losses import flow_opd as losses
from opd_jax.losses import gaussians
from opd_jax.models import lora
from opd_jax.models.hf import load_lora
from opd_jax.offload import offloaded
from opd_jax.rewards import combination
from opd_jax.rewards.remote import Scores

WORLDS = {"scenes": scenes.Scenes, "pipeline": latents.Pipeline}  # flow_methods.World
PART_KEYS = ("path", "prompts", "rewards")  # of a teacher or the mixture; what else it has changes `grpo`
GRPO_METHODS = ("awm", "flow_grpo")
INITS = ("merge", "base")  # where a student starts; or where an arm ended that started from one of these
ARM_CHOICES = {
    "method": ("opd", "offline"),
    "estimator": tuple(losses.ESTIMATORS),
    "weighting": gaussians.WEIGHTINGS,
}


def validate(config, mesh) -> None:
    """Everything that can be wrong with the config, before anything expensive. Raises: ConfigError with all of it."""
    with checks() as check:
        check(config.world in WORLDS, f"world={config.world!r}: choose one of {', '.join(WORLDS)}")
    world = WORLDS[config.world]
    with checks() as check:
        check_arms(check, config)
        check_counts(check, config, "eval.prompts", "lora.rank")
        known_tasks = world.tasks(config)
        check(len(config.tasks) > 0, f"tasks=(): choose of {list(config.teachers)}")
        for name in config.tasks:
            check(name in config.teachers, f"tasks: {name!r} has no teacher; teachers are {list(config.teachers)}")
            check(name in known_tasks, f"tasks: {name!r} has no prompts; choose of {known_tasks}")
        check(config.anchor in config.teachers, f"anchor={config.anchor!r}: choose one of {list(config.teachers)}")
        kinds = gaussians.KINDS[1:]  # an ODE has no density to learn from
        check(config.sampler.kind in kinds, f"sampler.kind={config.sampler.kind!r}: choose one of {kinds}")
        steps = config.sampler.steps
        check(steps > 1, f"sampler.steps={steps}: give at least 2, the last is not trained")
        try:
            re.compile(config.lora.pattern)
        except re.error as error:
            check(False, f"lora.pattern={config.lora.pattern!r}: {error}; give a regular expression")
        for name, part in rewarded(config).items():
            check_rewarded(check, config, name, part, mesh)
        check_judges(check, config)
        for name in config.arms:
            check_arm(check, config, name, mesh)
        for line in world.mistakes(config):
            check(False, line)
    if config.shipped:
        base = stages.load(scenes.SHIPPED_BASE)
        for name, part in grpo_parts(config).items():
            stages.load(shipped(name), stages.recipe_of(grpo_settings(config, part), base.sha256))


def check_rewarded(check, config, name: str, part, mesh) -> None:
    """A teacher, or the mixture: what it is rewarded for, and how it is trained where it is."""
    world = WORLDS[config.world]
    for key in (key for key in part if key not in (*PART_KEYS, *config.grpo)):
        check(False, f"{name}.{key}: neither {', '.join(PART_KEYS)} nor a setting of grpo, {', '.join(config.grpo)}")
    check(len(part.prompts) == len(part.rewards), f"{name}: give one reward for each of prompts={part.prompts}")
    known = world.tasks(config)
    check(set(part.prompts) <= set(known), f"{name}.prompts={part.prompts}: choose of {known}")
    known = (*world.own_rewards, *config.judges) + (("",) if part.get("path") else ())
    check(set(part.rewards) <= set(known), f"{name}.rewards={part.rewards}: choose of {known}")
    if config.shipped or part.get("path"):
        return
    recipe, of = grpo_recipe(config, part), f"({name})"
    warm, window, steps = recipe.warm_start, recipe.flow_grpo.window, config.sampler.steps
    if warm.steps:
        check_recipe(check, warm, f"({name}.warm_start)")
        check(not (uneven := sharding.uneven(warm.pairs, mesh, f"{name}.warm_start.pairs")), uneven)
    check_recipe(check, recipe, of)
    check(recipe.method in GRPO_METHODS, f"grpo.method={recipe.method!r} {of}: choose one of {', '.join(GRPO_METHODS)}")
    check(1 <= window <= steps, f"grpo.flow_grpo.window={window} {of}: choose 1..{steps}, sampler.steps")
    if check(recipe.updates > 0, f"grpo.updates={recipe.updates} {of}: give 1 or more"):
        check_batch(check, recipe, f"grpo of {name}", mesh)


def check_judges(check, config) -> None:
    for name in config.judges:
        own = name in WORLDS[config.world].own_rewards
        check(not own, f"judges.{name}: is a reward of the world already; choose another name")
    for name, judge in used_judges(config).items():
        for line in combination.mistakes(judge.get("weights", {}), judge.get("rewards", {})):
            check(False, f"judges.{name}: {line}")


def check_arm(check, config, name: str, mesh) -> None:
    arm = arm_recipe(config, name)
    for key, known in ARM_CHOICES.items():
        check(arm[key] in known, f"{key}={arm[key]!r} (arm {name}): choose one of {', '.join(known)}")
    inits = (*INITS, *(other for other in config.arms if arm_recipe(config, other).init in INITS))
    remedy = f"choose one of {', '.join(inits)}, or name it in `only`, too"
    check(arm.init in inits, f"init={arm.init!r} (arm {name}): is no arm of this run; {remedy}")
    check_batch(check, arm, f"arm {name}", mesh)


def check_batch(check, recipe, name: str, mesh) -> None:
    each, left = divmod(recipe.prompts * recipe.group, recipe.get("updates", 1))
    uneven = sharding.uneven(recipe.prompts, mesh, "prompts")
    uneven = uneven or sharding.uneven_parts(each, recipe.micro_batches, mesh)
    check(not uneven and not left, f"{name}: {uneven or f'{left} records are left over by updates'}")


def shipped(stage: str) -> Path:
    return stages.SHIPPED / f"scenes_{stage}.safetensors"


def grpo_parts(config) -> dict:
    """The stages that Flow-GRPO trains: a specialist for each reward, unless it is given, and the mixture of all."""
    parts = {f"grpo_{name}": part for name, part in config.teachers.items() if not part.get("path")}
    return parts | ({"grpo_mix": config.grpo_mix} if config.grpo_mix.steps else {})


def rewarded(config) -> dict:
    """The parts with rewards: teachers, given ones too, and the mixture where there is one."""
    return {**config.teachers} | ({"grpo_mix": config.grpo_mix} if config.grpo_mix.steps else {})


def used_judges(config) -> dict[str, dict]:
    """The judges that a reward names."""
    names = {name for part in rewarded(config).values() for name in part.rewards}
    return {name: judge for name, judge in config.judges.to_dict().items() if name in names}


def grpo_recipe(config, part):
    """The settings of one specialist: `config.grpo` with what its part changes."""
    recipe = config.grpo.copy_and_resolve_references()
    with recipe.unlocked():
        recipe.update({key: value for key, value in part.items() if key in config.grpo and key not in PART_KEYS})
    return recipe


def grpo_settings(config, part) -> dict:
    """What a specialist, or the mixture, depends on beside the base: the recipe that its shipped weights must match."""
    shared = {name: config[name].to_dict() for name in ("grpo", "lora", "sampler")}
    if judges := {name: config.judges[name].to_dict() for name in part.rewards if name in config.judges}:
        shared["judges"] = judges
    return shared | {"part": part.to_dict(), "seed": config.seed}


class Experiment:
    """The pieces that the stages share, and the stages themselves, each made once.

    The velocity functions are made here, once: jit recognises a function by identity.
    """

    def __init__(self, config, workdir: Path, mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.about = {"command": command_line()}
        self.judges = {name: combination.Rewards(**one) for name, one in used_judges(config).items()}
        hosts.by_first(lambda: [judge.self_test() for judge in self.judges.values()])
        self.world = WORLDS[config.world](config, workdir, mesh, self.about)
        self.updates = {}

    def adapter(self, seed: int, rank: int):
        return lora.init(rng.stream(seed, "lora"), self.world.base.params, self.config.lora.pattern, rank)

    def update(self, recipe) -> tuple:
        """The compiled update of an arm and its optimiser."""
        if recipe.method == "offline":
            return self.shared_update(recipe, flow_methods.offline_update)
        return self.shared_update(recipe, functools.partial(flow_methods.opd_update, config=self.config))

    def shared_update(self, recipe, new) -> tuple:
        """`new(velocity, recipe)`, made once for all seeds and for recipes that differ elsewhere."""
        elsewhere = ("init", "warm_start", "pairs") + (() if recipe.get("decay_steps") else ("steps",))
        shared = fingerprint({key: value for key, value in recipe.to_dict().items() if key not in elsewhere})
        if shared not in self.updates:
            self.updates[shared] = new(self.world.velocity, recipe=recipe)
        return self.updates[shared]

    def judge(self, name: str, images: np.ndarray, texts: list[str]) -> combination.PendingSum | flow_methods.Own:
        """A reward by name, of one of the config's judges, who is at work meanwhile, or the world's own.

        By this process: in training the first of several asks, and shares what was said.
        """
        if name not in self.judges:
            return flow_methods.Own(self.world.reward, (name, images, texts))
        return self.asked(name, images, texts)

    def judged(self, name: str, images: np.ndarray, texts: list[str]) -> combination.Combined:
        """What a judge says, with the rewards that it adds up; of several processes the first asks, for all."""
        if not hosts.several():
            return self.judged_here(name, images, texts)
        parts = tuple(self.config.judges[name].weights)

        def rows():
            said = self.judged_here(name, images, texts)
            return np.stack([said.score, *(said.parts[part].score for part in parts)])

        score, *others = hosts.from_first(rows, (1 + len(parts), len(texts)))
        shared = {part: Scores(one, np.isfinite(one), {}) for part, one in zip(parts, others)}
        return combination.Combined(score, ~np.isnan(score), shared)

    def judged_here(self, name: str, images: np.ndarray, texts: list[str]) -> combination.Combined:
        """The same by this process, whatever the others do."""
        return self.asked(name, images, texts).collect()

    def asked(self, name: str, images: np.ndarray, texts: list[str]) -> combination.PendingSum:
        """A judge at work on pictures, here."""
        return self.judges[name].submit(images, texts, self.workdir / "unscored" / name, self.world.metadata(texts))

    def train(self, checkpoint_dir, stage, method, optimizer, adapter, batches, steps, seed, teacher_params=None):
        """Runs the loop on an adapter and returns its average over time."""
        state = sharding.replicate(optim.init_state(adapter, optimizer), self.mesh)
        state, _ = loop.run(
            method,
            offloaded(state) if self.config.offload else state,
            batches,
            workdir=self.workdir,
            stage=stage,
            checkpoint_dir=checkpoint_dir,
            steps=steps,
            seed=seed,
            teacher_params=teacher_params,
            save_every=self.config.save_every,
        )
        return state.ema

    def teacher(self, name: str, part) -> stages.Made:
        """A specialist from its file, or trained here."""
        if not part.get("path"):
            return self.grpo(f"grpo_{name}", part)
        given = load_lora(Path(part.path).expanduser(), self.world.model, self.config.lora.scale)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), given)
        sha = params_sha256(params)
        return stages.Made(params, stages.recipe_of({"given": sha}), sha, 0, 0)

    def grpo(self, stage: str, part) -> stages.Made:
        """A specialist (one reward) or the mixture baseline (all of them), from the base."""
        config, recipe = self.config, grpo_recipe(self.config, part)
        recipe_hash = stages.recipe_of(grpo_settings(config, part), self.world.identity)
        if config.shipped:
            return stages.load(shipped(stage), recipe_hash)

        def make(checkpoint_dir):
            trained = self.train_grpo(stage, part, checkpoint_dir, recipe.warm_start.steps, recipe.steps)
            return trained, recipe.steps * recipe.prompts * recipe.group

        parts = (f"{stage}_sft", stage) if recipe.warm_start.steps else (stage,)
        return stages.once(stage, self.workdir, recipe_hash, make, self.about, parts)

    def train_grpo(self, stage: str, part, checkpoint_dir, warm_steps: int, steps: int):
        """The first steps of a specialist's SFT on clean pairs of its prompts, if it has any, and of its `grpo`."""
        config, recipe = self.config, grpo_recipe(self.config, part)
        adapter, seed = self.adapter(config.seed, config.lora.rank), config.seed
        if warm_steps:
            update, optimizer = self.shared_update(recipe.warm_start, flow_methods.offline_update)
            method = flow_methods.pairs_method(update)
            pairs = self.world.pairs(tuple(dict.fromkeys(part.prompts)), recipe.warm_start.pairs, seed)
            where = checkpoint_dir / "sft"
            adapter = self.train(where, f"{stage}_sft", method, optimizer, adapter, pairs, warm_steps, seed)
        if not steps:
            return adapter
        update, optimizer = self.shared_update(recipe, flow_methods.grpo_update)
        method = flow_methods.grpo_method(self.world, part.rewards, update, config, recipe, self.judge)
        batches = self.world.prompts(part.prompts, recipe.prompts, seed)
        held_to, where = sharding.replicate(adapter, self.mesh), checkpoint_dir / "grpo"
        return self.train(where, stage, method, optimizer, adapter, batches, steps, seed, held_to)

    def student(self, name: str, seed: int, teachers: dict[str, stages.Made]) -> stages.Made:
        """One arm of the comparison: a student distilled from the teachers, one way or another."""
        config, recipe, stage = self.config, arm_recipe(self.config, name), f"{name}_seed{seed}"
        earlier = None if recipe.init in INITS else self.student(recipe.init, seed, teachers)

        def make(checkpoint_dir):
            adapters = sharding.replicate([teachers[task].params for task in config.tasks], self.mesh)
            anchor = sharding.replicate(teachers[config.anchor].params, self.mesh)
            start = earlier.params if earlier else self.start(recipe.init, seed, teachers)
            update, optimizer = self.update(recipe)
            if recipe.method == "offline":
                method = flow_methods.offline_method(self.world, adapters, update, config, recipe)
            else:
                method = flow_methods.opd_method(self.world, update, config, recipe)
            batches = self.world.prompts(config.tasks, recipe.prompts, seed)
            labels = (adapters, anchor)
            trained = self.train(checkpoint_dir, stage, method, optimizer, start, batches, recipe.steps, seed, labels)
            return trained, recipe.steps * recipe.prompts * recipe.group

        shared = {key: config[key].to_dict() for key in ("sampler", "lora")}
        settings = shared | {"arm": recipe.to_dict(), "seed": seed, "anchor": config.anchor, "tasks": config.tasks}
        upstream = {key: made.sha256 for key, made in teachers.items()} | ({"init": earlier.sha256} if earlier else {})
        recipe_hash = stages.recipe_of(settings | {"teachers": upstream}, self.world.identity)
        made = stages.once(stage, self.workdir, recipe_hash, make, self.about)
        if earlier:
            made = made._replace(seconds=made.seconds + earlier.seconds, samples=made.samples + earlier.samples)
        return made

    def start(self, init: str, seed: int, teachers: dict[str, stages.Made]):
        """Where a student starts: at the mean of its teachers, or at the base; of one rank either way."""
        if init == "merge":
            return self.merged(teachers)
        return self.adapter(seed, self.config.lora.rank * len(teachers))

    def merged(self, teachers: dict[str, stages.Made]):
        """The cold start: one adapter whose update is exactly the mean of the teachers' updates."""
        adapters = jax.tree.map(jnp.asarray, [made.params for made in teachers.values()])
        return jax.device_get(lora.average(adapters))

    def scores(self, adapter, texts: dict[str, list[str]]) -> dict[str, float]:
        images = {task: self.pictures(adapter, own) for task, own in texts.items()}
        rewards, others = self.world.score(images, texts, self.judged)
        average = {"average": float(np.mean(list(rewards.values())))} if rewards else {}
        return rewards | average | others

    def pictures(self, adapter, texts: list[str]) -> np.ndarray:
        """One for each prompt, by the ODE; the same noise for every model."""
        return self.world.pictures(adapter, texts, **sampler(self.config))


def sampler(config) -> dict:
    """How pictures are drawn that models are judged by."""
    return {name: config.eval[name] for name in ("steps", "shift", "double_shift", "seed") if name in config.eval}


class Model(NamedTuple):
    """A row of the table: one adapter for each seed, and what they cost on average, their teachers' cost included."""

    name: str
    adapters: list
    seconds: float
    images: int


def run(config, workdir: Path, mesh) -> None:
    began = time.time()
    experiment = Experiment(config, workdir, mesh)
    teachers = {name: experiment.teacher(name, part) for name, part in config.teachers.items()}
    mixes = {"GRPO-mix": experiment.grpo("grpo_mix", config.grpo_mix)} if config.grpo_mix.steps else {}
    students = {name: [experiment.student(name, seed, teachers) for seed in config.seeds] for name in config.arms}

    spent, seen = sum(made.seconds for made in teachers.values()), sum(made.samples for made in teachers.values())
    models = [Model("base", [{}], 0, 0)]
    models += [Model(f"teacher: {name}", [made.params], made.seconds, made.samples) for name, made in teachers.items()]
    models += [Model(name, [mix.params], mix.seconds, mix.samples) for name, mix in mixes.items()]
    models += [Model("cold start (merge)", [experiment.merged(teachers)], spent, seen)]
    for name, arms in students.items():
        seconds = float(np.mean([made.seconds for made in arms]))
        models.append(Model(name, [made.params for made in arms], spent + seconds, seen + arms[0].samples))
    made = {"base": experiment.world.base} | {f"grpo {name}": part for name, part in teachers.items()} | mixes
    write(experiment, models, made | {name: arms[0] for name, arms in students.items()}, began)


def table(experiment: Experiment, models: list[Model], test: bool) -> list[dict]:
    """Every model on held-out (or training) prompts: mean and, over several seeds, standard deviation."""
    texts = experiment.world.held_out(experiment.config.eval.prompts, experiment.config.eval.seed, test)
    rows = []
    for model in models:
        scores = [experiment.scores(adapter, texts) for adapter in model.adapters]
        row = {"model": model.name}
        for column in scores[0]:
            values = [score[column] for score in scores]
            row[f"{column} ↑"] = report.over_seeds(values)
        rows.append(row | {"seconds": round(model.seconds), "images": model.images})
    return rows


def write(experiment: Experiment, models: list[Model], made: dict[str, stages.Made], began: float) -> None:
    """summary.json, report.html and the table on the terminal."""
    config, workdir, world = experiment.config, experiment.workdir, experiment.world
    tables = {f"{split} prompts": table(experiment, models, split == "Held-out") for split in world.splits}
    shown = world.held_out(world.shown, config.eval.seed + 1)
    samples = [
        report.Samples(
            f"{task}: the same prompts and the same noise for every model",
            texts,
            {model.name: experiment.pictures(model.adapters[0], texts) for model in models},
        )
        for task, texts in shown.items()
    ]
    main_name = "flow_opd" if "flow_opd" in made else list(made)[-1]
    main = made[main_name]
    timings = {name: part.seconds for name, part in made.items() if name != "base"}
    summary = {
        "table": tables["Held-out prompts"],
        "table_of_training_prompts": tables.get("Training prompts", []),
        "params_sha256": main.sha256,
        "params_sha256_of": {name: part.sha256 for name, part in made.items()},
        "seconds": timings | {"total": time.time() - began},
    }
    report.write_summary(workdir / "summary.json", summary)
    logged = ("loss", "reward", "reverse_kl", "velocity_error", "anchor_error")
    report.write_report(
        workdir / "report.html",
        title="Flow-OPD: several teachers, one student",
        command=experiment.about["command"],
        tables=tables,
        curves=report.curves_from(metrics.read_metrics(workdir), logged),
        images=samples,
        timings=timings,
        versions=versions(),
        notes=[
            f"{world.note} Seconds and images of a student include its teachers'; those of shipped models are of the "
            "machine that made them, those of given ones are not counted.",
            f"params_sha256 of {main_name}: {main.sha256}",
            f"Devices: {jax.device_count()} {jax.devices()[0].device_kind}.",
        ],
    )
    print(report.format_table(tables["Held-out prompts"]))
    example = shlex.quote(world.example)
    print(f"\nreport: {workdir / 'report.html'}    pictures: python experiments/sample.py {workdir} {example}")
