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
from opd_jax.worlds.scenes import TASKS


def validate(config, mesh) -> None:
    with checks() as check:
        least = config.warmup + config.decay_steps
        check(config.steps > least, f"steps={config.steps}: give more than warmup + decay_steps, {least}")
        shares = {"damaged": config.damaged} | {f"wrong.{task}": config.wrong[task] for task in TASKS}
        for name, share in shares.items():
            check(0 <= share < 1, f"{name}={share}: a share, at least 0 and below 1")
        uneven = sharding.uneven(config.batch_size, mesh)
        check(not uneven, uneven)


def method(config, velocity) -> tuple:
    """Flow matching: the "rollout" is a noised picture, the "teacher" the picture itself. And its optimiser."""

    @jax.jit
    def sample(_, batch, key):
        keys = rng.per_record(key, batch["image"].shape[0])
        return flow_matching.noised(batch["image"], batch["tokens"], keys, config.time_center, config.time_spread)

    decay = (config.steps, config.decay_steps)
    optimizer = optim.adamw(config.learning_rate, warmup=config.warmup, decay=decay, weight_decay=config.weight_decay)
    update = optim.dense(flow_matching.supervise(velocity), optimizer, ema_decay=config.ema_decay)
    return Method(sample, lambda _, rollout: rollout.velocity, update), optimizer


def settings(config) -> dict:
    """What the parameters depend on: all of the config but how they are judged, saved and spread over devices."""
    return {key: value for key, value in config.to_dict().items() if key not in ("eval", "save_every", "mesh")}


def pretrain(config, workdir, checkpoint_dir, mesh, steps: int):
    """The first `steps` of the training that `config` describes; returns the parameters' average over time."""
    model = pieces.module(config)
    pretraining, optimizer = method(config, pieces.full_velocity(model))
    state, _ = loop.run(
        pretraining,
        sharding.replicate(optim.init_state(pieces.init_params(model, config.seed), optimizer), mesh),
        pieces.pairs(config.wrong.to_dict(), config.damaged, config.batch_size, config.seed, mesh),
        workdir=workdir,
        stage="base",
        checkpoint_dir=checkpoint_dir,
        steps=steps,
        seed=config.seed,
        save_every=config.save_every,
    )
    return state.ema


def run(config, workdir, mesh) -> None:
    began = time.time()
    make = lambda checkpoint_dir: (pretrain(config, workdir, checkpoint_dir, mesh, config.steps), 0)
    about = {"command": shlex.join(sys.argv)}
    made = stages.once("base", workdir, stages.recipe_of(settings(config)), make, about)
    captions = pieces.held_out(config.eval.prompts, config.eval.seed)
    sampler = {name: config.eval[name] for name in ("steps", "shift", "seed")}
    velocity = pieces.full_velocity(pieces.module(config))
    rows = [{"model": "base"} | pieces.score(velocity, made.params, captions, **sampler)]
    seconds = {"base": made.seconds, "total": time.time() - began}
    report.write_summary(workdir / "summary.json", {"table": rows, "params_sha256": made.sha256, "seconds": seconds})
    print(report.format_table(rows))
