"""Pretraining of the scenes world's base model: flow matching on captioned pictures, in the one loop."""

import functools
import time

import jax
from ml_collections import ConfigDict

from experiments import scenes as pieces
from experiments import stages
from experiments.recipes import check_counts, check_names
from opd_jax import loop, optim, report, rng, sharding
from opd_jax.config import checks, command_line
from opd_jax.losses import flow_matching
from opd_jax.types import Method
from opd_jax.worlds.scenes import TASKS


def validate(config, mesh) -> None:
    with checks() as check:
        check_counts(check, config, "save_every", "eval.prompts")
        known = (key for key, part in config.items() if isinstance(part, ConfigDict) and "decay_steps" in part)
        for name in check_names(check, config, "phases", known):
            phase = phase_of(config, name)
            wrong = optim.schedule_mistake(phase.steps, phase.warmup, phase.decay_steps)
            check(not wrong, f"{name}: {wrong}")
            shares = {"damaged": phase.damaged}
            for kind in ("wrong", "unrelated"):
                shares |= {f"{kind}.{task}": phase[kind][task] for task in TASKS if kind in phase}
            for key, share in shares.items():
                check(0 <= share < 1, f"{name}: {key}={share}: a share, at least 0 and below 1")
        uneven = sharding.uneven(config.batch_size, mesh)
        check(not uneven, uneven)


def phase_of(config, name: str):
    """The settings of one phase: the config with what the phase changes."""
    phase = config.copy_and_resolve_references()
    with phase.unlocked():
        for key in ("phases", *config.phases):
            del phase[key]
        phase.update(config[name])
    return phase


def settings(phase) -> dict:
    """What the parameters depend on: all but how they are judged, saved, compiled and spread over devices."""
    others = ("eval", "save_every", "mesh", "compile_quickly")
    return {key: value for key, value in phase.to_dict().items() if key not in others}


def found(phase) -> dict:
    """What is wrong with the pairs of a phase, as `web_pair` takes it."""
    given = {name: phase[name] for name in ("wrong", "damaged", "unrelated") if name in phase}
    return {name: value if isinstance(value, float) else value.to_dict() for name, value in given.items()}


def recipes(config) -> dict[str, str]:
    """The recipe of the parameters after each phase, in order."""
    made: dict[str, str] = {}
    for name in config.phases:
        made[name] = stages.recipe_of(settings(phase_of(config, name)), *list(made.values())[-1:])
    return made


def method(config, velocity) -> tuple:
    """Flow matching: the "rollout" is a noised picture, the "teacher" the picture itself. And its optimiser."""

    @jax.jit
    def sample(_, batch, key):
        keys = rng.per_record(key, batch["image"].shape[0])
        return flow_matching.noised(batch["image"], batch["condition"], keys, config.time_center, config.time_spread)

    decay = (config.steps, config.decay_steps)
    optimizer = optim.adamw(config.learning_rate, warmup=config.warmup, decay=decay, weight_decay=config.weight_decay)
    update = optim.dense(flow_matching.supervise(velocity), optimizer, ema_decay=config.ema_decay)
    return Method(sample, lambda _, rollout: rollout.velocity, update), optimizer


def pretrain(config, name: str, params, workdir, checkpoint_dir, mesh, steps: int):
    """The first `steps` of a phase, from `params` or, where they are None, from scratch; returns their average."""
    phase, model = phase_of(config, name), pieces.module(config)
    pretraining, optimizer = method(phase, pieces.full_velocity(model))
    params = pieces.init_params(model, config.seed) if params is None else params
    state, _ = loop.run(
        pretraining,
        pieces.place(optim.init_state(pieces.place(params, mesh), optimizer), mesh),
        pieces.pairs(phase.batch_size, phase.seed, mesh, **found(phase)),
        workdir=workdir,
        stage=name,
        checkpoint_dir=checkpoint_dir,
        steps=steps,
        seed=phase.seed,
        save_every=config.save_every,
    )
    return state.ema


def make_phase(config, name, params, workdir, mesh, checkpoint_dir) -> tuple:
    return pretrain(config, name, params, workdir, checkpoint_dir, mesh, config[name].steps), 0


def run(config, workdir, mesh) -> None:
    began, about = time.time(), {"command": command_line()}
    params, seconds, phases = None, {}, recipes(config)
    finished = [i for i, (name, recipe) in enumerate(phases.items()) if stages.path_of(name, workdir, recipe).exists()]
    for name, recipe in list(phases.items())[max(finished, default=0) :]:  # a later phase needs no earlier one
        make = functools.partial(make_phase, config, name, params, workdir, mesh)
        made = stages.once(name, workdir, recipe, make, about)
        params, seconds[name] = made.params, made.seconds
    captions = pieces.held_out(config.eval.prompts, config.eval.seed)
    sampler = {name: config.eval[name] for name in ("steps", "shift", "seed")}
    velocity = pieces.full_velocity(pieces.module(config))
    params = pieces.place(made.params, mesh)
    images = {task: pieces.pictures(velocity, params, texts, **sampler) for task, texts in captions.items()}
    rewards, others = pieces.score(images, captions)
    rows = [{"model": "base"} | rewards | others]
    seconds["total"] = time.time() - began
    report.write_summary(workdir / "summary.json", {"table": rows, "params_sha256": made.sha256, "seconds": seconds})
    print(report.format_table(rows))
