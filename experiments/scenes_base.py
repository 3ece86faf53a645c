"""Pretraining of the scenes world's base model: flow matching on captioned pictures, in the one loop."""

import time

import jax

from experiments import scenes as pieces
from opd_jax import checkpoint, loop, optim, report, rng, sharding
from opd_jax.config import checks, fingerprint
from opd_jax.losses import flow_matching
from opd_jax.types import Method


def validate(config, mesh) -> None:
    with checks() as check:
        check(config.steps > config.warmup + config.decay_steps, f"steps={config.steps}: give more than warmup + decay")
        check(0 <= config.wrong < 1, f"wrong={config.wrong}: a share, below 1")
    sharding.batch_must_divide(config.batch_size, mesh)


def method(config, model) -> Method:
    """Flow matching: the "rollout" is a noised picture, the "teacher" the picture itself."""

    def sample(_, batch, key):
        keys = rng.per_record(key, batch["image"].shape[0])
        return flow_matching.noised(batch["image"], batch["tokens"], keys, config.time_center, config.time_spread)

    optimizer = optim.adamw(
        config.learning_rate,
        warmup=config.warmup,
        decay=(config.steps, config.decay_steps),
        weight_decay=config.weight_decay,
    )
    supervise = flow_matching.supervise(pieces.full_velocity(model))
    update = optim.dense(supervise, optimizer, ema_decay=config.ema_decay)
    return Method(jax.jit(sample), lambda _, rollout: rollout.velocity, update), optimizer


def run(config, workdir, mesh) -> None:
    began = time.time()
    model = pieces.module(config)
    pretraining, optimizer = method(config, model)
    state = sharding.replicate(optim.init_state(pieces.init_params(model, config.seed), optimizer), mesh)
    batches = pieces.pairs(config.wrong, config.damaged, config.batch_size, config.seed, mesh)
    state, seconds = loop.run(
        pretraining,
        state,
        batches,
        workdir=workdir,
        stage="base",
        steps=config.steps,
        seed=config.seed,
        save_every=config.save_every,
    )
    scores = pieces.score(
        pieces.full_velocity(model),
        state.ema,
        pieces.held_out(config.eval.prompts, config.eval.seed),
        steps=config.eval.steps,
        shift=config.eval.shift,
        seed=config.eval.seed,
    )
    sha = checkpoint.params_sha256(state.ema)
    about = {"recipe": fingerprint(config), "params_sha256": sha, "seed": config.seed, "steps": config.steps}
    checkpoint.save_params(workdir / "base.safetensors", jax.device_get(state.ema), about)
    summary = {"table": scores, "params_sha256": sha, "seconds": seconds | {"total": time.time() - began}}
    report.write_summary(workdir / "summary.json", summary)
    print(report.format_table([{"model": "base", **scores}]))
