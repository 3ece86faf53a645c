"""Pretraining of the scenes world's base model: flow matching on captioned pictures, in the one loop."""

import shlex
import sys
import time

import jax

from experiments import scenes as pieces
from experiments import stages
from opd_jax import loop, optim, report, rng, sharding
from opd_jax.config import checks
from opd_jax.losses import flow_matching
from opd_jax.types import Method


def validate(config, mesh) -> None:
    with checks() as check:
        for name, phase in config.phases.items():
            least = phase.warmup + phase.decay_steps
            check(phase.steps > least, f"phases.{name}.steps={phase.steps}: give more than warmup + decay, {least}")
            for share in ("wrong", "damaged"):
                check(0 <= phase[share] < 1, f"phases.{name}.{share}={phase[share]}: a share, at least 0 and below 1")
    sharding.batch_must_divide(config.batch_size, mesh)


def method(config, phase, velocity) -> tuple:
    """Flow matching: the "rollout" is a noised picture, the "teacher" the picture itself. And its optimiser."""

    @jax.jit
    def sample(_, batch, key):
        keys = rng.per_record(key, batch["image"].shape[0])
        return flow_matching.noised(batch["image"], batch["tokens"], keys, phase.time_center, phase.time_spread)

    decay = (phase.steps, phase.decay_steps)
    optimizer = optim.adamw(phase.learning_rate, warmup=phase.warmup, decay=decay, weight_decay=config.weight_decay)
    update = optim.dense(flow_matching.supervise(velocity), optimizer, ema_decay=config.ema_decay)
    return Method(sample, lambda _, rollout: rollout.velocity, update), optimizer


def phase_settings(config, name: str) -> dict:
    """What the parameters after a phase depend on, beside those before it."""
    shared = {key: config[key] for key in ("seed", "batch_size", "weight_decay", "ema_decay")}
    return shared | {"model": config.model.to_dict(), "name": name, "phase": config.phases[name].to_dict()}


def run(config, workdir, mesh) -> None:
    began = time.time()
    velocity = pieces.full_velocity(pieces.module(config))
    made, seconds = None, {}
    for name, phase in config.phases.items():

        def train(checkpoint_dir, name=name, phase=phase, start=made):
            params = start.params if start else pieces.init_params(pieces.module(config), config.seed)
            pretraining, optimizer = method(config, phase, velocity)
            state, _ = loop.run(
                pretraining,
                sharding.replicate(optim.init_state(params, optimizer), mesh),
                pieces.pairs(phase.wrong, phase.damaged, config.batch_size, config.seed, mesh),
                workdir=workdir,
                stage=name,
                checkpoint_dir=checkpoint_dir,
                steps=phase.steps,
                seed=config.seed,
                save_every=config.save_every,
            )
            return state.ema, 0

        recipe = stages.recipe_of(phase_settings(config, name), *([made.recipe] if made else []))
        made = stages.once(name, workdir, recipe, train, {"command": shlex.join(sys.argv)})
        seconds[name] = made.seconds
    made = made._replace(seconds=sum(seconds.values()))
    stages.save(workdir / "base.safetensors", made, {"stage": "base", "command": shlex.join(sys.argv)})
    captions = pieces.held_out(config.eval.prompts, config.eval.seed)
    sampler = {name: config.eval[name] for name in ("steps", "shift", "seed")}
    rows = [{"model": "base"} | pieces.score(velocity, made.params, captions, **sampler)]
    seconds["total"] = time.time() - began
    report.write_summary(workdir / "summary.json", {"table": rows, "params_sha256": made.sha256, "seconds": seconds})
    print(report.format_table(rows))
