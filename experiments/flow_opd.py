"""Flow-OPD on the scenes world: base -> one GRPO teacher per reward -> cold start -> students, and the table."""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from configs import common
from experiments import flow_methods, scenes, stages
from opd_jax import loop, metrics, optim, report, rng, sharding
from opd_jax.config import checks, versions
from opd_jax.losses import flow_opd as losses
from opd_jax.losses import gaussians
from opd_jax.models import lora
from opd_jax.worlds.scene_verifiers import REWARDS

SHOWN = 10  # pictures of each model in the report


def validate(config, mesh) -> None:
    """Everything that can be wrong with the config, before anything expensive. Raises: ConfigError with all of it."""
    with checks() as check:
        check(not config.missing, f"this variant cannot run: it needs {config.missing}")
        for name in config.tasks:
            check(name in config.teachers, f"tasks: {name!r} has no teacher; teachers are {list(config.teachers)}")
        check(config.anchor in config.teachers, f"anchor={config.anchor!r}: choose one of {list(config.teachers)}")
        check(config.sampler.kind in gaussians.KINDS, f"sampler.kind={config.sampler.kind!r}: one of {gaussians.KINDS}")
        check(
            1 <= config.grpo.window <= config.sampler.steps,
            f"grpo.window={config.grpo.window}: choose 1..{config.sampler.steps}, at most sampler.steps",
        )
        check(
            config.sampler.kind != "ode", "sampler.kind='ode': has no density to learn from; choose sde, cps or dance"
        )
        for name in config.arms:
            arm = arm_recipe(config, name)
            known = tuple(losses.ESTIMATORS)
            check(arm.estimator in known, f"arms.{name}.estimator={arm.estimator!r}: choose one of {known}")
            known = gaussians.WEIGHTINGS
            check(arm.weighting in known, f"arms.{name}.weighting={arm.weighting!r}: choose one of {known}")
    for name, part in (("grpo", config.grpo), ("opd", config.opd)):
        sharding.batch_must_divide(part.prompts, mesh, f"{name}.prompts")
    if config.shipped and not config.missing:
        for name in ("base", *config.teachers, "grpo_mix"):
            stages.load(stages.SHIPPED / f"scenes_{name}.safetensors")


def arm_recipe(config, name: str):
    """The settings of one student: `config.opd` with what its arm changes."""
    recipe = config.opd.copy_and_resolve_references()
    with recipe.unlocked():
        recipe.update(config.arms[name])
    return recipe


def grpo_settings(config, part) -> dict:
    """What a specialist, or the mixture, depends on beside the base: the recipe that its shipped weights must match."""
    shared = {name: config[name].to_dict() for name in ("grpo", "lora", "sampler")}
    return shared | {"part": part.to_dict(), "seed": config.seed}


class Experiment:
    """The pieces that the stages share, and the stages themselves, each made once.

    The velocity functions are made here, once: jit recognises a function by identity.
    """

    def __init__(self, config, workdir: Path, mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.model = scenes.module(config)
        self.about = {"command": " ".join(sys.argv)}
        self.base = self.load_base()
        backbone = sharding.replicate(self.base.params, mesh)
        self.velocity = flow_methods.adapted_velocity(self.model, config.lora.scale, backbone)
        self.updates = {}
        self.routed = flow_methods.routed_velocity(self.model, config.lora.scale, backbone)

    def made(self, name: str, settings, upstream, make) -> stages.Made:
        recipe = stages.recipe_of(settings, *upstream)
        if self.config.shipped and (shipped := stages.SHIPPED / f"scenes_{name}.safetensors").exists():
            return stages.load(shipped, recipe)
        return stages.once(name, self.workdir, recipe, make, self.about)

    def load_base(self) -> stages.Made:
        """The shipped model, made by `configs/scenes_base.py`; a random one if the config asks for another size."""

        def random():
            return scenes.init_params(self.model, self.config.seed), 0

        if self.config.model.to_dict() == common.scene_model().to_dict():
            return stages.load(stages.SHIPPED / "scenes_base.safetensors")
        return self.made("random_base", self.config.model.to_dict(), (), random)

    def adapter(self, seed: int, rank: int):
        return lora.init(rng.stream(seed, "lora"), self.base.params, self.config.lora.pattern, rank)

    def update(self, name: str) -> tuple:
        """The compiled update of an arm, or of GRPO, and its optimiser: one for all seeds and all rewards."""
        if name not in self.updates:
            self.updates[name] = self.new_update(name)
        return self.updates[name]

    def new_update(self, name: str) -> tuple:
        if name == "grpo":
            return flow_methods.grpo_update(self.velocity, self.config, self.config.grpo)
        recipe = arm_recipe(self.config, name)
        if recipe.method == "offline":
            return flow_methods.offline_update(self.velocity, recipe)
        return flow_methods.opd_update(self.velocity, self.config, recipe)

    def train(self, stage: str, method, optimizer, adapter, batches, steps: int, seed: int, teacher_params=None):
        """Runs the loop on an adapter and returns its average over time."""
        state = sharding.replicate(optim.init_state(adapter, optimizer), self.mesh)
        state, _ = loop.run(
            method,
            state,
            batches,
            workdir=self.workdir,
            stage=stage,
            steps=steps,
            seed=seed,
            teacher_params=teacher_params,
            save_every=self.config.save_every,
        )
        return state.ema

    def grpo(self, name: str, part) -> stages.Made:
        """A specialist (one reward) or the mixture baseline (all of them), by Flow-GRPO from the base."""
        config, recipe = self.config, self.config.grpo
        steps = part.get("steps", recipe.steps)

        def make():
            update, optimizer = self.update("grpo")
            method = flow_methods.grpo_method(self.velocity, part.rewards, update, config, recipe)
            batches = scenes.prompts(part.prompts, recipe.prompts, config.seed, self.mesh)
            adapter = self.adapter(config.seed, config.lora.rank)
            trained = self.train(f"grpo_{name}", method, optimizer, adapter, batches, steps, config.seed)
            return trained, steps * recipe.prompts * recipe.group

        settings = grpo_settings(config, part)
        return self.made(name, settings, (self.base,), make)

    def student(self, name: str, seed: int, teachers: dict[str, stages.Made]) -> stages.Made:
        """One arm of the comparison: a student distilled from the teachers, one way or another."""
        config, recipe = self.config, arm_recipe(self.config, name)

        def make():
            adapters = sharding.replicate([teachers[task].params for task in config.tasks], self.mesh)
            anchor = sharding.replicate(teachers[config.anchor].params, self.mesh)
            start = self.merged(teachers)
            if recipe.init == "base":
                start = self.adapter(seed, config.lora.rank * len(teachers))
            update, optimizer = self.update(name)
            if recipe.method == "offline":
                method = flow_methods.offline_method(self.routed, adapters, update, config, recipe)
            else:
                method = flow_methods.opd_method(self.velocity, self.routed, update, config, recipe)
            batches = scenes.prompts(config.tasks, recipe.prompts, seed, self.mesh)
            labels = (adapters, anchor)
            stage = f"{name}_seed{seed}"
            trained = self.train(stage, method, optimizer, start, batches, recipe.steps, seed, labels)
            return trained, recipe.steps * recipe.prompts * recipe.group

        settings = {"arm": recipe.to_dict(), "sampler": config.sampler.to_dict(), "seed": seed, "anchor": config.anchor}
        recipe_hash = stages.recipe_of(settings, self.base, *teachers.values())
        return stages.once(f"{name}_seed{seed}", self.workdir, recipe_hash, make, self.about)

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
    teachers = {name: experiment.grpo(name, part) for name, part in config.teachers.items()}
    mix = experiment.grpo("grpo_mix", config.grpo_mix)
    students = {name: [experiment.student(name, seed, teachers) for seed in config.seeds] for name in config.arms}

    spent, seen = sum(made.seconds for made in teachers.values()), sum(made.images for made in teachers.values())
    models = [Model("base", [{}], 0, 0)]
    models += [Model(f"teacher: {name}", [made.params], made.seconds, made.images) for name, made in teachers.items()]
    models += [Model("GRPO-mix", [mix.params], mix.seconds, mix.images)]
    models += [Model("cold start (merge)", [experiment.merged(teachers)], spent, seen)]
    for name, arms in students.items():
        seconds = float(np.mean([made.seconds for made in arms]))
        models.append(Model(name, [made.params for made in arms], spent + seconds, seen + arms[0].images))
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
