"""Pretraining of the reasoning world's models: supervised on worked solutions, in the one loop."""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments import language, stages
from experiments.recipes import check_counts, check_names
from opd_jax import data, loop, optim, report, rng, sharding
from opd_jax.config import checks, command_line
from opd_jax.losses import cross_entropy
from opd_jax.losses.cross_entropy import Text
from opd_jax.models.decoder import Decoder
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.types import Method
from opd_jax.worlds import reasoning


def validate(config, mesh) -> None:
    with checks() as check:
        longest = reasoning.PROMPT_TOKENS + reasoning.SOLUTION_TOKENS
        check(config.row_tokens >= longest, f"row_tokens={config.row_tokens}: give {longest} or more, a whole record")
        earlier = {""}
        check_counts(check, config, "save_every")
        for name in check_names(check, config, "order", config.models):
            part = config.models[name]
            check(part.start in earlier, f"{name}.start={part.start!r}: choose one of {sorted(earlier)}")
            wrong = optim.schedule_mistake(part.steps, config.warmup, part.decay_steps)
            check(not wrong, f"{name}: {wrong}")
            for key, known in (("styles", reasoning.STYLES), ("levels", reasoning.LEVELS)):
                check(part[key] and set(part[key]) <= set(known), f"{name}.{key}={part[key]}: choose of {known}")
            earlier.add(name)
        uneven = sharding.uneven(config.rows, mesh, "rows")
        check(not uneven, uneven)


SHARED = ("seed", "rows", "row_tokens", "warmup", "weight_decay", "ema_decay")


def recipes(config, shared: Sequence[str] = SHARED) -> dict[str, str]:
    """The recipe of every model, from the settings that all share and its own."""
    made: dict[str, str] = {}
    shared = {key: config[key] for key in shared}
    for name in config.order:
        part = config.models[name]
        made[name] = stages.recipe_of(shared | part.to_dict(), *([made[part.start]] if part.start else []))
    return made


def pretrain(config, name: str, params, workdir, checkpoint_dir, mesh, steps: int):
    """The first `steps` of a model's training, from `params` or, where they are None, from scratch; their average."""
    part = config.models[name]
    module = Decoder(**part.model)
    model = language.functions(module, module.vocab_size)
    if params is None:
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = jax.jit(module.init)(rng.stream(config.seed, name), tokens)["params"]
    decay = (part.steps, part.decay_steps)
    optimizer = optim.adamw(part.learning_rate, warmup=config.warmup, decay=decay, weight_decay=config.weight_decay)
    supervise = cross_entropy.supervise(model.hidden, head_fn=model.head)
    update = optim.dense(supervise, optimizer, ema_decay=config.ema_decay)
    draw = functools.partial(language.packed_row, length=config.row_tokens, styles=part.styles, levels=part.levels)
    state, _ = loop.run(
        Method(lambda _, batch, key: Text(**batch), lambda _, rollout: None, update),
        sharding.replicate(optim.init_state(params, optimizer), mesh),
        data.batches(draw, config.rows, config.seed, lambda batch: sharding.shard_batch(batch, mesh)),
        workdir=workdir,
        stage=name,
        checkpoint_dir=checkpoint_dir,
        steps=steps,
        seed=config.seed,
        save_every=config.save_every,
    )
    return state.ema


def make(config, name, params, workdir, mesh, checkpoint_dir) -> tuple:
    trained = pretrain(config, name, params, workdir, checkpoint_dir, mesh, config.models[name].steps)
    return to_ship(trained), 0


def to_ship(params):
    """In bfloat16, half the bytes."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def load(path, recipe: str | None = None) -> stages.Made:
    """A finished model, its parameters in float32."""
    made = stages.load(path, recipe)
    return made._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), made.params))


def run(config, workdir, mesh) -> None:
    began, about = time.time(), {"command": command_line()}
    made, rows = {}, []
    world, problems = (
        language.reasoning_language(),
        {
            f"level {level}": language.reasoning_problems(
                config.eval.problems, config.eval.seed + level, (level,), True
            )
            for level in reasoning.LEVELS
        },
    )
    how = SamplingParams(reasoning.SOLUTION_TOKENS, world.stop_ids, temperature=0.0, pad_id=world.pad_id)
    for name, recipe in recipes(config).items():
        part = config.models[name]
        start = load(stages.path_of(part.start, workdir, recipes(config)[part.start])).params if part.start else None
        stages.once(name, workdir, recipe, functools.partial(make, config, name, start, workdir, mesh), about)
        made[name] = load(stages.path_of(name, workdir, recipe), recipe)
        module = Decoder(**part.model)
        model, params = language.functions(module, module.vocab_size), sharding.replicate(made[name].params, mesh)
        where = {"slots": min(128, config.eval.problems), "mesh": mesh}
        accuracy = {}
        for level, some in problems.items():
            rollout = language.answer_all(model, params, some, reasoning.PROMPT_TOKENS, how, rng.stream(0, ""), **where)
            accuracy[f"{level} ↑"] = float(language.outcomes(world, some, rollout).mean())
        rows.append({"model": name} | accuracy | {"seconds": round(made[name].seconds)})
    seconds = {name: one.seconds for name, one in made.items()} | {"total": time.time() - began}
    hashes = {name: one.sha256 for name, one in made.items()}
    report.write_summary(workdir / "summary.json", {"table": rows, "params_sha256": hashes, "seconds": seconds})
    print(report.format_table(rows))
