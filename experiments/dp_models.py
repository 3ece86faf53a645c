"""Pretraining on public records, in the one loop: the teacher and the student of private distillation."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import dp_records, language, reasoning_models, stages
from experiments.recipes import check_counts, check_names
from opd_jax import data, loop, optim, report, rng, sharding
from opd_jax.config import checks, command_line
from opd_jax.losses import cross_entropy
from opd_jax.losses.cross_entropy import Text
from opd_jax.models.decoder import Decoder
from opd_jax.types import Method
from opd_jax.worlds import functions

SHARED = ("seed", "rows", "row_tokens", "warmup", "weight_decay", "ema_decay")


def validate(config, mesh) -> None:
    with checks() as check:
        longest = functions.TOKENS
        check(config.row_tokens >= longest, f"row_tokens={config.row_tokens}: give {longest} or more, a whole record")
        check_counts(check, config, "save_every")
        for name in check_names(check, config, "order", config.models):
            part = config.models[name]
            check(not part.start, f"{name}.start={part.start!r}: these models begin with nothing; set ''")
            wrong = optim.schedule_mistake(part.steps, config.warmup, part.decay_steps)
            check(not wrong, f"{name}: {wrong}")
        uneven = sharding.uneven(config.rows, mesh, "rows")
        check(not uneven, uneven)


def recipes(config) -> dict[str, str]:
    """The recipe of every model."""
    return reasoning_models.recipes(config, SHARED)


def packed_row(generator: np.random.Generator, length: int, texts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Random texts, several in a row: tokens, response (all but the first of each) and segment_ids `[length]`."""
    row = {"tokens": np.zeros(length, np.int32), "response": np.zeros(length, bool)}
    row["segment_ids"] = np.zeros(length, np.int32)
    used, segment = 0, 1
    while True:
        text = texts[generator.integers(len(texts))]
        end = used + len(text)
        if end > length:
            return row
        row["tokens"][used:end], row["segment_ids"][used:end] = text, segment
        row["response"][used + 1 : end] = True
        used, segment = end, segment + 1


def make(config, name: str, mesh, workdir, checkpoint_dir) -> tuple:
    part = config.models[name]
    module = Decoder(**part.model)
    model = language.functions(module, module.vocab_size)
    start = jax.jit(module.init)(rng.stream(config.seed, name), jnp.zeros((1, 1), jnp.int32))["params"]
    decay = (part.steps, part.decay_steps)
    optimizer = optim.adamw(part.learning_rate, warmup=config.warmup, decay=decay, weight_decay=config.weight_decay)
    supervise = cross_entropy.supervise(model.hidden, head_fn=model.head)
    texts = [functions.encode(record)[0] for record in functions.public_records()]
    state, _ = loop.run(
        Method(
            lambda _, batch, key: Text(**batch),
            lambda _, rollout: None,
            optim.dense(supervise, optimizer, ema_decay=config.ema_decay),
        ),
        sharding.replicate(optim.init_state(start, optimizer), mesh),
        data.batches(
            functools.partial(packed_row, length=config.row_tokens, texts=texts),
            config.rows,
            config.seed,
            lambda batch: sharding.shard_batch(batch, mesh),
        ),
        workdir=workdir,
        stage=name,
        checkpoint_dir=checkpoint_dir,
        steps=part.steps,
        seed=config.seed,
        save_every=config.save_every,
    )
    return reasoning_models.to_ship(state.ema), 0


def run(config, workdir, mesh) -> None:
    began, about = time.time(), {"command": command_line()}
    about |= {"public_corpus": functions.corpus_fingerprint("public")}
    rows, made = [], {}
    corpora = {"private": functions.private_records("held_out"), "public": functions.public_records("held_out")}
    read = lambda records: [functions.encode(record) for record in records[: config.eval.records]]
    whole = functions.TOKENS
    texts = {name: dp_records.texts_of(read(records), whole, whole // 2) for name, records in corpora.items()}
    for name, recipe in recipes(config).items():
        part = config.models[name]
        stages.once(name, workdir, recipe, functools.partial(make, config, name, mesh, workdir), about)
        made[name] = reasoning_models.load(stages.path_of(name, workdir, recipe), recipe)
        module = Decoder(**part.model)
        model = language.functions(module, module.vocab_size)
        params = sharding.replicate(made[name].params, mesh)
        scores = {
            f"{corpus} perplexity ↓": dp_records.perplexity(model, params, some, mesh) for corpus, some in texts.items()
        }
        rows.append({"model": name} | scores | {"seconds": round(made[name].seconds)})
    seconds = {name: one.seconds for name, one in made.items()} | {"total": time.time() - began}
    hashes = {name: one.sha256 for name, one in made.items()}
    report.write_summary(workdir / "summary.json", {"table": rows, "params_sha256": hashes, "seconds": seconds})
    print(report.format_table(rows))
