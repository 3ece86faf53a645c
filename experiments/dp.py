"""Private distillation: the config checked, every arm of it made, and a table of perplexities beside what was spent."""

import time
from pathlib import Path

import jax
import numpy as np

from experiments import dp_stages
from experiments.dp_stages import Experiment
from experiments.reasoning_stages import sampling_params
from experiments.recipes import arm_recipe, check_arms
from opd_jax import hosts, metrics, report, sharding
from opd_jax.config import ConfigError, checks, fingerprint, versions
from opd_jax.losses import dp_opd
from opd_jax.privacy import ACCOUNTANTS
from opd_jax.sampling.token_filters import check_params
from opd_jax.worlds import functions

LOGGED = ("epsilon", "noised_norm", "noise_norm", "loss")
BY_EPSILON = "perplexity of held-out private records"


def validate(config, mesh) -> None:
    """Everything that can be wrong with the config, before anything expensive. Raises: ConfigError with all of it."""
    with checks() as check:
        check_arms(check, config)
        part, teacher = config.privacy, config.teacher
        check(not hosts.several(), "--distributed: secret and ledger are of one process; leave it out, or one host")
        check(part.epsilon > 0, f"privacy.epsilon={part.epsilon}: give a number above 0")
        check(0 < part.delta < 1e-2, f"privacy.delta={part.delta}: give at most one over the number of records")
        check(part.accountant in ACCOUNTANTS, f"privacy.accountant={part.accountant!r}: {' or '.join(ACCOUNTANTS)}")
        public = teacher.provenance == "public"
        check(
            public,
            f"teacher.provenance={teacher.provenance!r}: every gradient passes through the teacher, so one that was "
            "trained on private data without differential privacy voids the guarantee; give a 'public' one",
        )
        check_data(check, config)
        prompt = 1 <= config.prompt_tokens < config.tokens
        check(prompt, f"prompt_tokens={config.prompt_tokens}: give 1 to less than tokens={config.tokens}")
        uneven = sharding.uneven_tokens(config.tokens, mesh, "tokens")
        check(not uneven, uneven)
        try:
            check_params(sampling_params(config.sampler, 1, (0,), 0))
        except ValueError as error:
            check(False, f"sampler.{error}")
        for name in config.arms:
            check_arm(check, config, name, mesh)


def check_data(check, config) -> None:
    """The embedded records and models, or all of a user's own."""
    if not config.data:
        for name in ("student", "teacher"):
            check(not config[name].path, f"{name}.path={config[name].path}: data='' is embedded, and so are its models")
        fits = 2 <= config.tokens <= functions.TOKENS
        check(fits, f"tokens={config.tokens}: give 2 to {functions.TOKENS}")
        return
    for name in ("student", "teacher"):
        there = config[name].path and (Path(config[name].path) / "config.json").exists()
        check(there, f"{name}.path={config[name].path!r}: give a Hugging Face directory, since data is given")
    check(config.eval.path, "eval.path='': give a file of records to compute perplexities on, since data is given")
    released = config.eval.path and config.eval.released
    check(
        released,
        f"eval.path={config.eval.path!r}: perplexities have no noise, so what is in it is not protected; give records "
        "that are public, or that may be used so, and say so by eval.released=True",
    )
    for name in config.arms:
        public = arm_recipe(config, name).data != "public" or config.public_data
        check(public, f"public_data='' (arm {name}): give a file of public records, or leave the arm out")


def check_arm(check, config, name: str, mesh) -> None:
    arm = arm_recipe(config, name)
    check(0 <= arm.on_policy <= 1, f"on_policy={arm.on_policy} (arm {name}): a probability, 0 to 1")
    check(0 <= arm.own_weight <= 1, f"own_weight={arm.own_weight} (arm {name}): give 0 to 1")
    warm = arm.temperature == 1 or not arm.own_weight
    check(warm, f"temperature={arm.temperature} (arm {name}): own_weight={arm.own_weight} is of text at 1; give 1")
    check(arm.temperature > 0, f"temperature={arm.temperature} (arm {name}): give a number above 0")
    try:
        dp_opd.divergence_of(arm.beta)
    except ValueError as error:
        check(False, f"{error} (arm {name})")
    check(arm.epsilon >= 0, f"epsilon={arm.epsilon} (arm {name}): give a number above 0, or 0 for privacy.epsilon")
    check(arm.clip_norm > 0, f"clip_norm={arm.clip_norm} (arm {name}): give a number above 0")
    whole = not (arm.ghost and arm.lora_rank)
    check(whole, f"ghost=True with lora_rank={arm.lora_rank} (arm {name}): an adapter's gradients are small; False")
    check(arm.rollouts > 0, f"rollouts={arm.rollouts} (arm {name}): give 1 or more")
    once = arm.rollouts == 1 or not arm.stored
    check(once, f"rollouts={arm.rollouts} with stored=True (arm {name}): one continuation a record is stored; give 1")
    for key, choices in {"data": ("private", "public", "synthetic"), "teacher": ("public", "private")}.items():
        check(arm[key] in choices, f"{key}={arm[key]!r} (arm {name}): choose one of {', '.join(choices)}")
    kept = not arm.private or arm.data == "private"
    check(kept, f"private=True with data={arm.data!r} (arm {name}): there is nothing to protect; private=False")
    share = arm.teacher_share
    right = share == 0 if arm.teacher == "public" else 0 < share < 1 or (share == 1 and not arm.private)
    check(right, f"teacher_share={share} (arm {name}): what a private teacher spends; the rest is the student's")
    written = arm.data != "synthetic" or arm.teacher == "private"
    check(written, f"data='synthetic' (arm {name}): written by a private teacher; set teacher='private'")
    if arm.private:  # a batch has room for a multiple of it
        uneven = sharding.uneven(arm.micro_batch, mesh, "records of a micro-batch, micro_batch")
    else:
        uneven = sharding.uneven_parts(arm.batch_size, arm.micro_batches, mesh)
    check(not uneven, f"arm {name}: {uneven}")
    if arm.teacher == "private":
        micro_batch = dp_stages.teacher_recipe(config, arm).micro_batch
        uneven = sharding.uneven(micro_batch, mesh, "private_teacher.micro_batch")
        check(not uneven, f"arm {name}: {uneven}")


def run(config, workdir: Path, mesh) -> None:
    began = time.time()
    setup = (dp_stages.of_directories if config.data else dp_stages.of_world)(config, mesh)
    check_setup(config, setup)
    experiment, made = Experiment(config, setup, workdir, mesh), {}
    rows = [row("student, before", [experiment.score(setup.student.functions, setup.student.params)], 0.0)]
    rows.append(row("teacher", [experiment.score(setup.teacher.functions, setup.teacher.params)], 0.0))
    for name in config.arms:
        students = [experiment.arm(name, seed) for seed in config.seeds]
        made[name] = students[0]
        experiment.export(name, students[0])
        scores = [experiment.score(setup.student.functions, student.params) for student in students]
        seconds = float(np.mean([student.seconds for student in students]))
        rows.append(row(name, scores, spent(config, name)) | {"seconds": round(seconds)})
    write(experiment, rows, made, began)


def check_setup(config, setup: dp_stages.Setup) -> None:
    """Raises: ConfigError where delta allows a record to be published outright, or norms cannot be had."""
    most = 1 / setup.texts["private"].count
    if config.privacy.delta > most:
        raise ConfigError(f"privacy.delta={config.privacy.delta}: above one over the records, {most:.1e}; lower it")
    for name in config.arms:
        if arm_recipe(config, name).ghost and getattr(setup.student.module, "tie_embeddings", True):
            raise ConfigError(f"ghost=True (arm {name}): its head is tied to its embeddings; give ghost=False")


def spent(config, name: str) -> float | None:
    """Epsilon of an arm; None where there is no bound."""
    arm = arm_recipe(config, name)
    if arm.private or arm.data == "synthetic":
        return arm.epsilon or config.privacy.epsilon
    return 0.0 if arm.data == "public" else None


def row(name: str, scores: list[dict[str, float]], epsilon: float | None) -> dict:
    """Mean perplexity and, over several seeds, its standard deviation."""
    line = {"model": name, "epsilon": "none" if epsilon is None else epsilon}
    for column in scores[0]:
        values = [one[column] for one in scores]
        line[column] = report.over_seeds(values) if len(values) > 1 else round(values[0], 2)
    return line


def by_epsilon(config, rows: list[dict]) -> dict[str, tuple[list, list]]:
    """The privacy-utility curve: of arms made with several budgets, epsilons and perplexities of private records."""
    curves, names = {}, {}
    for line in rows:
        if line["model"] not in config.arms or spent(config, line["model"]) is None:
            continue
        recipe = arm_recipe(config, line["model"]).to_dict() | {"epsilon": 0.0}
        name = names.setdefault(fingerprint(recipe), line["model"])
        perplexity = line["private ↓"]
        point = spent(config, line["model"]), float(getattr(perplexity, "value", perplexity))
        curves.setdefault(name, []).append(point)
    return {name: tuple(map(list, zip(*sorted(points)))) for name, points in curves.items() if len(points) > 1}


def write(experiment: Experiment, rows: list[dict], made: dict, began: float) -> None:
    """summary.json, report.html and the table on the terminal."""
    workdir, config = experiment.workdir, experiment.config
    timings = {name: one.seconds for name, one in made.items()}
    columns = list(dict.fromkeys(column for line in rows for column in line))
    rows = [{column: line.get(column) for column in columns} for line in rows]
    main = made.get("dp_opd") or list(made.values())[-1]
    private = not experiment.secret.is_test
    summary = {
        "table": rows,
        "private": private,
        "delta": config.privacy.delta,
        "params_sha256": main.sha256,
        "params_sha256_of": {name: one.sha256 for name, one in made.items()},
        "seconds": timings | {"total": time.time() - began},
    }
    report.write_summary(workdir / "summary.json", summary)
    warning = "NOT PRIVATE: noise and batches come from privacy.test_seed, which anybody can read."
    notes = [
        *([] if private else [warning]),
        f"Perplexity of continuations; delta {config.privacy.delta} beside each epsilon, by the accountant "
        f"{config.privacy.accountant!r}. An epsilon is for one student alone: whoever publishes several of them spends "
        "the sum. Held-out records are not protected: the table is computed from them.",
        f"params_sha256: {main.sha256}; devices: {jax.device_count()} {jax.devices()[0].device_kind}.",
    ]
    report.write_report(
        workdir / "report.html",
        title="DP-OPD: private students" + ("" if private else " (NOT PRIVATE: test seed)"),
        command=experiment.about["command"],
        tables={"Perplexity of held-out records": rows},
        curves=({BY_EPSILON: utility} if (utility := by_epsilon(config, rows)) else {})
        | report.curves_from(metrics.read_metrics(workdir), LOGGED),
        along={BY_EPSILON: "epsilon"},
        timings=timings,
        versions=versions(),
        notes=notes,
    )
    print(report.format_table(rows))
    if not private:
        print(warning)
    print(f"\nreport: {workdir / 'report.html'}")
