"""Pretraining of the models of the world of five domains: supervised on worked solutions, in the one loop."""

import functools
import time

import numpy as np

from experiments import domains, domains_reading, language, reasoning_models, stages
from experiments.recipes import check_counts, check_names
from opd_jax import data, loop, optim, report, rng, sharding
from opd_jax.config import checks, command_line
from opd_jax.losses import cross_entropy
from opd_jax.losses.cross_entropy import Text
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.types import Method
from opd_jax.worlds import domains as world


def validate(config, mesh) -> None:
    with checks() as check:
        earlier = {""}
        check_counts(check, config, "save_every")
        for name in check_names(check, config, "order", config.models):
            part = config.models[name]
            check(part.start in earlier, f"{name}.start={part.start!r}: choose one of {sorted(earlier)}")
            wrong = optim.schedule_mistake(part.steps, config.warmup, part.decay_steps)
            check(not wrong, f"{name}: {wrong}")
            for key, known in (("styles", world.STYLES), ("domains", world.DOMAINS)):
                check(part[key] and set(part[key]) <= set(known), f"{name}.{key}={part[key]}: choose of {known}")
            earlier.add(name)
        check(set(config.levels) <= set(world.LEVELS), f"levels={config.levels}: choose of {world.LEVELS}")
        uneven = sharding.uneven(config.rows, mesh, "rows")
        check(not uneven, uneven)


SHARED = ("seed", "rows", "row_tokens", "row_pictures", "pictures", "levels", "warmup", "weight_decay", "ema_decay")


def recipes(config) -> dict[str, str]:
    """The recipe of every model."""
    return reasoning_models.recipes(config, SHARED)


def pictures_of(config) -> tuple[dict, object]:
    """The training problems with pictures, by domain with the index of the first's in the bank; and the bank."""
    drawn = {name: domains.draw(name, config.pictures, config.seed, config.levels) for name in domains.PICTURED}
    first = {name: config.pictures * i for i, name in enumerate(drawn)}
    bank = domains.bank_of([problem for problems in drawn.values() for problem in problems])
    return {name: (problems, first[name]) for name, problems in drawn.items()}, bank


def answering(config, part, params, key, mesh, optimizer) -> tuple:
    """Method of learning worked solutions, what it begins with, and its batches."""
    module = domains.module_of(part.model, config.row_pictures)
    pictured, bank = pictures_of(config) if set(part.domains) & set(domains.PICTURED) else ({}, domains.bank_of([]))
    if params is None:
        params = domains.init(module, bank, key)
    model = domains.functions(module, sharding.replicate(bank, mesh), len(world.WORDS))
    supervise = cross_entropy.supervise(model.hidden, head_fn=model.head)
    update = optim.dense(supervise, optimizer, ema_decay=config.ema_decay)
    wanted = {"domains": part.domains, "styles": part.styles, "levels": config.levels, "pictured": pictured}
    wanted |= {"length": config.row_tokens, "pictures": config.row_pictures}
    draw = functools.partial(domains.training_row, **wanted)
    return Method(lambda _, batch, key: Text(**batch), lambda _, rollout: None, update), params, draw, config.rows


def pretrain(config, name: str, params, workdir, checkpoint_dir, mesh, steps: int):
    """The first `steps` of a model's training, from `params` or, where they are None, from scratch; their average."""
    part, key = config.models[name], rng.stream(config.seed, name)
    decay = (part.steps, part.decay_steps)
    optimizer = optim.adamw(part.learning_rate, warmup=config.warmup, decay=decay, weight_decay=config.weight_decay)
    prepare = domains_reading.reading if part.get("reading", False) else answering
    method, start, draw, count = prepare(config, part, params, key, mesh, optimizer)
    state, _ = loop.run(
        method,
        sharding.replicate(optim.init_state(start, optimizer), mesh),
        data.batches(draw, count, config.seed, lambda batch: sharding.shard_batch(batch, mesh)),
        workdir=workdir,
        stage=name,
        checkpoint_dir=checkpoint_dir,
        steps=steps,
        seed=config.seed,
        save_every=config.save_every,
    )
    return domains_reading.with_tower(params, state.ema) if part.get("reading", False) else state.ema


def make(config, name, params, workdir, mesh, checkpoint_dir) -> tuple:
    trained = pretrain(config, name, params, workdir, checkpoint_dir, mesh, config.models[name].steps)
    return reasoning_models.to_ship(trained), 0


def run(config, workdir, mesh) -> None:
    began, about = time.time(), {"command": command_line()}
    made, rows = {}, []
    asked = {
        name: domains.draw(name, config.eval.problems, config.eval.seed, config.levels, test=True)
        for name in world.DOMAINS
    }
    bank = sharding.replicate(domains.bank_of([problem for some in asked.values() for problem in some]), mesh)
    first = np.cumsum([0, *(sum(p.domain in domains.PICTURED for p in some) for some in asked.values())])
    problems = {name: domains.as_problems(some, first[i]) for i, (name, some) in enumerate(asked.items())}
    own = domains.world_language()
    how = SamplingParams(config.solution_tokens, own.stop_ids, temperature=0.0, pad_id=own.pad_id)
    for name, recipe in recipes(config).items():
        part = config.models[name]
        start = None
        if part.start:
            path = stages.path_of(part.start, workdir, recipes(config)[part.start])
            start = reasoning_models.load(path).params
        stages.once(name, workdir, recipe, functools.partial(make, config, name, start, workdir, mesh), about)
        made[name] = reasoning_models.load(stages.path_of(name, workdir, recipe), recipe)
        model = domains.functions(domains.module_of(part.model), bank, own.vocab_size)
        params = sharding.replicate(made[name].params, mesh)
        where = {"slots": min(128, config.eval.problems), "mesh": mesh}
        accuracy = {}
        for domain in part.domains if "vision" not in part.model else world.DOMAINS:
            few = problems[domain]
            rollout = language.answer_all(model, params, few, domains.ROOM, how, rng.stream(0, ""), **where)
            accuracy[f"{domain} ↑"] = float(language.outcomes(own, few, rollout).mean())
        rows.append({"model": name} | accuracy | {"seconds": round(made[name].seconds)})
    columns = ["model", *(f"{domain} ↑" for domain in world.DOMAINS), "seconds"]
    rows = [{column: row.get(column) for column in columns} for row in rows]
    seconds = {name: one.seconds for name, one in made.items()} | {"total": time.time() - began}
    hashes = {name: one.sha256 for name, one in made.items()}
    report.write_summary(workdir / "summary.json", {"table": rows, "params_sha256": hashes, "seconds": seconds})
    print(report.format_table(rows))
