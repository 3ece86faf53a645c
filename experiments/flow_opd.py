"""Flow-OPD on the scenes world: base -> one GRPO teacher per reward -> cold start -> students, and the table."""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from configs import common
from experiments import flow_methods, scenes, stages
from opd_jax import loop, metrics, optim, report, rng, sharding
from opd_jax.config import checks, command_line, fingerprint, versions
from opd_jax.losses import flow_opd as losses
from opd_jax.losses import gaussians
from opd_jax.models import lora
from opd_jax.rewards import combination
from opd_jax.worlds import scene_verifiers
from opd_jax.worlds.scene_verifiers import REWARDS
from opd_jax.worlds.scenes import TASKS

SHOWN = 10  # pictures of each model in the report
SHIPPED_BASE = stages.SHIPPED / "scenes_base.safetensors"
INITS = ("merge", "base")  # where a student starts; or where an arm ended that started from one of these
ARM_CHOICES = {
    "method": ("opd", "offline"),
    "estimator": tuple(losses.ESTIMATORS),
    "weighting": gaussians.WEIGHTINGS,
}


def validate(config, mesh) -> None:
    """Everything that can be wrong with the config, before anything expensive. Raises: ConfigError with all of it."""
    with checks() as check:
        check(not config.missing, f"this variant cannot run: it needs {config.missing}")
        for name in config.tasks:
            check(name in config.teachers, f"tasks: {name!r} has no teacher; teachers are {list(config.teachers)}")
            check(name in TASKS, f"tasks: {name!r} has no prompts; choose of {TASKS}")
        check(config.anchor in config.teachers, f"anchor={config.anchor!r}: choose one of {list(config.teachers)}")
        kinds = gaussians.KINDS[1:]  # an ODE has no density to learn from
        check(config.sampler.kind in kinds, f"sampler.kind={config.sampler.kind!r}: choose one of {kinds}")
        steps = config.sampler.steps
        check(steps > 1, f"sampler.steps={steps}: give at least 2, the last is not trained")
        methods, window = ("awm", "flow_grpo"), config.grpo.flow_grpo.window
        check(config.grpo.method in methods, f"grpo.method={config.grpo.method!r}: choose one of {', '.join(methods)}")
        check(1 <= window <= steps, f"grpo.flow_grpo.window={window}: choose 1..{steps}, sampler.steps")
        for name, part in {**config.teachers, "grpo_mix": config.grpo_mix}.items():
            warm = grpo_recipe(config, part).warm_start
            uneven = sharding.uneven(warm.pairs, mesh, f"{name}.warm_start.pairs")
            check(warm.steps == 0 or not uneven, uneven)
            check(len(part.prompts) == len(part.rewards), f"{name}: give one reward for each of prompts={part.prompts}")
            check(set(part.prompts) <= set(TASKS), f"{name}.prompts={part.prompts}: choose of {TASKS}")
            known = (*REWARDS, *config.judges)
            check(set(part.rewards) <= set(known), f"{name}.rewards={part.rewards}: choose of {known}")
        for name, judge in config.judges.to_dict().items():
            check(name not in REWARDS, f"judges.{name}: is a reward of the world already; choose another name")
            for line in combination.mistakes(judge.get("weights", {}), judge.get("rewards", {})):
                check(False, f"judges.{name}: {line}")
        for name in config.arms:
            arm = arm_recipe(config, name)
            for key, known in ARM_CHOICES.items():
                check(arm[key] in known, f"{key}={arm[key]!r} (arm {name}): choose one of {', '.join(known)}")
            inits = (*INITS, *(other for other in config.arms if arm_recipe(config, other).init in INITS))
            check(arm.init in inits, f"init={arm.init!r} (arm {name}): choose one of {', '.join(inits)}")
        for name, part in (("grpo", config.grpo), ("opd", config.opd)):
            records, parts = part.prompts * part.group, part.micro_batches * part.get("updates", 1)
            check(records % parts == 0, f"{name}: {records} records do not divide into {parts} updates x micro_batches")
            uneven = sharding.uneven(part.prompts, mesh, f"{name}.prompts")
            check(not uneven, uneven)
    if config.shipped:
        base = stages.load(SHIPPED_BASE)
        for name, part in grpo_parts(config).items():
            stages.load(shipped(name), stages.recipe_of(grpo_settings(config, part), base.sha256))


def shipped(stage: str) -> Path:
    return stages.SHIPPED / f"scenes_{stage}.safetensors"


def grpo_parts(config) -> dict:
    """The stages that Flow-GRPO trains: a specialist for each reward, and the mixture of all."""
    return {f"grpo_{name}": part for name, part in config.teachers.items()} | {"grpo_mix": config.grpo_mix}


def arm_recipe(config, name: str):
    """The settings of one student: `config.opd` with what its arm changes."""
    recipe = config.opd.copy_and_resolve_references()
    with recipe.unlocked():
        recipe.update(config.arms[name])
    return recipe


def grpo_recipe(config, part):
    """The settings of one specialist: `config.grpo` with what its part changes."""
    recipe = config.grpo.copy_and_resolve_references()
    with recipe.unlocked():
        recipe.update({key: value for key, value in part.items() if key in ("steps", "learning_rate", "warm_start")})
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
        self.model = scenes.module(config)
        self.about = {"command": command_line()}
        self.base = self.load_base()
        self.judges = {name: combination.Rewards(**one) for name, one in config.judges.to_dict().items()}
        for judge in self.judges.values():
            judge.self_test()
        backbone = sharding.replicate(self.base.params, mesh)
        self.velocity = flow_methods.adapted_velocity(self.model, config.lora.scale, backbone)
        self.updates = {}
        self.routed = flow_methods.routed_velocity(self.model, config.lora.scale, backbone)

    def load_base(self) -> stages.Made:
        """The shipped model, made by `configs/scenes_base.py`; a random one if the config asks for another size."""
        config = self.config
        if config.model.to_dict() == common.scene_model().to_dict():
            return stages.load(SHIPPED_BASE)
        recipe = stages.recipe_of({"model": config.model.to_dict(), "seed": config.seed})
        random = lambda _: (scenes.init_params(self.model, config.seed), 0)
        return stages.once("random_base", self.workdir, recipe, random, self.about)

    def adapter(self, seed: int, rank: int):
        return lora.init(rng.stream(seed, "lora"), self.base.params, self.config.lora.pattern, rank)

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
            self.updates[shared] = new(self.velocity, recipe=recipe)
        return self.updates[shared]

    def judge(self, name: str, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """A reward by name, NaN where it is unknown: the world's own, or one of the config's judges."""
        if name not in self.judges:
            return scene_verifiers.reward(name, images, captions)
        return self.judges[name].label(images, captions, self.workdir / "unscored" / name).score

    def train(self, checkpoint_dir, stage, method, optimizer, adapter, batches, steps, seed, teacher_params=None):
        """Runs the loop on an adapter and returns its average over time."""
        state = sharding.replicate(optim.init_state(adapter, optimizer), self.mesh)
        state, _ = loop.run(
            method,
            state,
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

    def grpo(self, stage: str, part) -> stages.Made:
        """A specialist (one reward) or the mixture baseline (all of them), from the base."""
        config, recipe = self.config, grpo_recipe(self.config, part)
        recipe_hash = stages.recipe_of(grpo_settings(config, part), self.base.sha256)
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
            pairs = scenes.clean_pairs(tuple(dict.fromkeys(part.prompts)), recipe.warm_start.pairs, seed, self.mesh)
            where = checkpoint_dir / "sft"
            adapter = self.train(where, f"{stage}_sft", method, optimizer, adapter, pairs, warm_steps, seed)
        if not steps:
            return adapter
        update, optimizer = self.shared_update(recipe, flow_methods.grpo_update)
        method = flow_methods.grpo_method(self.velocity, part.rewards, update, config, recipe, self.judge)
        batches = scenes.prompts(part.prompts, recipe.prompts, seed, self.mesh)
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
                method = flow_methods.offline_method(self.routed, adapters, update, config, recipe)
            else:
                method = flow_methods.opd_method(self.velocity, self.routed, update, config, recipe)
            batches = scenes.prompts(config.tasks, recipe.prompts, seed, self.mesh)
            labels = (adapters, anchor)
            trained = self.train(checkpoint_dir, stage, method, optimizer, start, batches, recipe.steps, seed, labels)
            return trained, recipe.steps * recipe.prompts * recipe.group

        shared = {key: config[key].to_dict() for key in ("sampler", "lora")}
        settings = shared | {"arm": recipe.to_dict(), "seed": seed, "anchor": config.anchor, "tasks": config.tasks}
        upstream = {key: made.sha256 for key, made in teachers.items()} | ({"init": earlier.sha256} if earlier else {})
        recipe_hash = stages.recipe_of(settings | {"teachers": upstream}, self.base.sha256)
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
        return jax.device_get(lora.average([made.params for made in teachers.values()]))

    def scores(self, adapter, captions) -> dict[str, float]:
        found = scenes.score(self.velocity, adapter, captions, **self.sampler())
        rewards = {name: found.pop(name) for name in REWARDS}
        return rewards | {"average": float(np.mean(list(rewards.values())))} | found

    def sampler(self) -> dict:
        return {name: self.config.eval[name] for name in ("steps", "shift", "seed")}

    def pictures(self, adapter, captions) -> np.ndarray:
        return scenes.pictures(self.velocity, adapter, captions, **self.sampler())


class Model(NamedTuple):
    """A row of the table: one adapter for each seed, and what they cost on average, their teachers' cost included."""

    name: str
    adapters: list
    seconds: float
    images: int


def run(config, workdir: Path, mesh) -> None:
    began = time.time()
    experiment = Experiment(config, workdir, mesh)
    teachers = {name: experiment.grpo(f"grpo_{name}", part) for name, part in config.teachers.items()}
    mix = experiment.grpo("grpo_mix", config.grpo_mix)
    students = {name: [experiment.student(name, seed, teachers) for seed in config.seeds] for name in config.arms}

    spent, seen = sum(made.seconds for made in teachers.values()), sum(made.samples for made in teachers.values())
    models = [Model("base", [{}], 0, 0)]
    models += [Model(f"teacher: {name}", [made.params], made.seconds, made.samples) for name, made in teachers.items()]
    models += [Model("GRPO-mix", [mix.params], mix.seconds, mix.samples)]
    models += [Model("cold start (merge)", [experiment.merged(teachers)], spent, seen)]
    for name, arms in students.items():
        seconds = float(np.mean([made.seconds for made in arms]))
        models.append(Model(name, [made.params for made in arms], spent + seconds, seen + arms[0].samples))
    made = {"base": experiment.base} | {f"grpo {name}": part for name, part in teachers.items()} | {"GRPO-mix": mix}
    write(experiment, models, made | {name: arms[0] for name, arms in students.items()}, began)


def table(experiment: Experiment, models: list[Model], test: bool) -> list[dict]:
    """Every model on held-out (or training) prompts: mean and, over several seeds, standard deviation."""
    captions = scenes.held_out(experiment.config.eval.prompts, experiment.config.eval.seed, test)
    rows = []
    for model in models:
        scores = [experiment.scores(adapter, captions) for adapter in model.adapters]
        row = {"model": model.name}
        for column in scores[0]:
            values = [score[column] for score in scores]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[f"{column} ↑"] = values[0] if spread is None else report.Estimate(float(np.mean(values)), spread)
        rows.append(row | {"seconds": round(model.seconds), "images": model.images})
    return rows


def write(experiment: Experiment, models: list[Model], made: dict[str, stages.Made], began: float) -> None:
    """summary.json, report.html and the table on the terminal."""
    config, workdir = experiment.config, experiment.workdir
    tables = {f"{split} prompts": table(experiment, models, split == "Held-out") for split in ("Held-out", "Training")}
    captions = scenes.held_out(SHOWN, config.eval.seed + 1)
    samples = [
        report.Samples(
            f"{task}: the same prompts and the same noise for every model",
            texts,
            {model.name: experiment.pictures(model.adapters[0], texts) for model in models},
        )
        for task, texts in captions.items()
    ]
    main = made.get("flow_opd", experiment.base)
    timings = {name: part.seconds for name, part in made.items() if name != "base"}
    summary = {
        "table": tables["Held-out prompts"],
        "table_of_training_prompts": tables["Training prompts"],
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
            "composition and ocr are of their own prompts, quality of both; average is of the three. strict is the "
            "share of pictures right in every respect, tesseract an OCR engine's reading; nothing trained on these. "
            "Seconds and images of a student include its teachers'; those of shipped models are of the machine that "
            "made them.",
            f"params_sha256 of flow_opd: {main.sha256}; devices: {jax.device_count()} {jax.devices()[0].device_kind}.",
        ],
    )
    print(report.format_table(tables["Held-out prompts"]))
    print(f"\nreport: {workdir / 'report.html'}    pictures: python experiments/sample.py {workdir} 'a red circle'")
