"""On-policy distillation of language models: the config checked, every arm of it made, and the table."""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import language, stages
from experiments.reasoning_stages import Experiment, Scored, sampling_params
from experiments.recipes import arm_recipe, check_arms, check_counts
from opd_jax import metrics, optim, report, sharding
from opd_jax.config import checks, versions
from opd_jax.losses.divergences import F_DIVERGENCES
from opd_jax.losses.lightning_opd import WEIGHTINGS
from opd_jax.sampling.token_filters import check_params
from opd_jax.worlds.reasoning import LEVELS

METHODS = ("online", "lightning", "off_policy", "grpo", "sft")
LOGGED = (
    "loss",
    "reverse_kl",
    "reverse_kl_k1",
    "log_ratio",
    "half_squared_advantage",
    "importance_ratio",
    "student_entropy",
    "reward",
)


def validate(config, mesh) -> None:
    """Everything that can be wrong with the config, before anything expensive. Raises: ConfigError with all of it."""
    with checks() as check:
        check_arms(check, config)
        check_counts(check, config, "eval.problems", "shard") if not config.eval.path else None
        language.check_compute(check, config.compute)
        problems, embedded = config.problems, not config.problems.path
        for name, part in {"student": config.student, **config.teachers}.items():
            key = name if name == "student" else f"teachers.{name}"
            given = part.path or part.get("url")
            written = name == "student" or part.path or embedded or not config.sft.steps
            check(written, f"{key}.path='': needed to write the answers of SFT; or set sft.steps=0")
            check(embedded or given, f"{key}.path='': give a Hugging Face directory, since problems.path is given")
            check(not embedded or not part.path, f"{key}.path={part.path}: problems.path='' are of the embedded world")
            check(
                not part.path or (Path(part.path) / "config.json").exists(), f"{key}.path={part.path}: no config.json"
            )
        check(embedded or config.eval.path, "eval.path='': give a JSONL file of held-out problems")
        check(embedded or config.eval.held_out, "eval.held_out=False: problems.path has no splits; give eval.path")
        levels = problems.levels and set(problems.levels) <= set(LEVELS)
        check(levels, f"problems.levels={problems.levels}: choose of {LEVELS}")
        uneven = sharding.uneven(config.sampler.slots, mesh, "sampler.slots")
        check(not uneven, uneven)
        uneven = sharding.uneven(config.sft.batch_size, mesh)
        if config.sft.steps:
            uneven = uneven or sharding.uneven_parts(config.sft.batch_size, config.sft.micro_batches, mesh)
        check(not uneven, f"sft: {uneven}")
        part = config.sft
        wrong = optim.schedule_mistake(part.steps, part.warmup, part.decay_steps) if part.steps else ""
        check(not wrong, f"sft: {wrong}")
        length = problems.prompt_tokens + config.sampler.max_new_tokens
        uneven = sharding.uneven_tokens(length, mesh, "problems.prompt_tokens + sampler.max_new_tokens")
        check(not uneven, uneven)
        for name, part in {"sampler": config.sampler, "eval": config.eval, "sft": config.sft}.items():
            try:
                check_params(sampling_params(part, 1, (0,), 0))
            except ValueError as error:
                check(False, f"{name}.{error}")
        for name in config.arms:
            check_arm(check, config, name, mesh)


def check_arm(check, config, name: str, mesh) -> None:
    arm = arm_recipe(config, name)
    known = {"method": METHODS, "weighting": WEIGHTINGS, "divergence": ("sampled", *F_DIVERGENCES)}
    known |= {"sft": tuple(config.teachers), "teacher": tuple(config.teachers)}
    for key, choices in known.items():
        check(arm[key] in choices, f"{key}={arm[key]!r} (arm {name}): choose one of {', '.join(choices)}")
    records = arm.batch_size * (arm.group if arm.method in ("online", "grpo") else 1)
    uneven = sharding.uneven(arm.batch_size, mesh) or sharding.uneven_parts(records, arm.micro_batches, mesh)
    check(not uneven, f"arm {name}: {uneven}")
    check(arm.clip > 0, f"clip={arm.clip} (arm {name}): give nats above 0")
    check(arm.method != "grpo" or arm.group > 1, f"group={arm.group} (arm {name}): GRPO compares at least 2 answers")
    consistent = arm.sft == arm.teacher or arm.method not in ("online", "lightning") or arm.residual
    check(
        consistent or arm.allow_inconsistent_teacher or config.allow_inconsistent_teacher,
        f"arm {name}: teacher {arm.teacher!r} labels, but {arm.sft!r} wrote the SFT data: the advantages would carry "
        "the difference of their styles; label with the SFT teacher, set residual=True (Lightning OPD 2.0), or run it "
        "as an ablation by --config.allow_inconsistent_teacher",
    )
    served = config.teachers[arm.teacher].url if arm.teacher in config.teachers else ""
    exact = arm.method == "off_policy" or (arm.method == "online" and arm.divergence != "sampled")
    check(not (served and exact), f"arm {name}: a served teacher gives log-probs of samples only; divergence='sampled'")


class Row(NamedTuple):
    """A line of the table: scores of every seed, and what it cost after SFT, on average."""

    name: str
    scored: list[Scored]
    seconds: float
    rollout_tokens: int
    teacher_tokens: int


def cost(experiment: Experiment, name: str, seed: int) -> dict[str, float]:
    """Seconds, tokens sampled by the student and tokens scored by the teacher, from the metrics of an arm's stages."""
    recipe = arm_recipe(experiment.config, name)
    own = metrics.read_metrics(experiment.workdir, f"{name}_seed{seed}")
    spent = {"seconds": own[-1]["seconds"], "rollout_tokens": 0, "teacher_tokens": 0}
    if recipe.method == "lightning":
        stored = metrics.read_metrics(experiment.workdir, f"rollouts_{recipe.sft}_{recipe.teacher}_seed{seed}")
        spent["seconds"] += stored[-1]["seconds"]
        tokens = sum(line["response_tokens"] for line in stored)
        return spent | {"rollout_tokens": tokens, "teacher_tokens": tokens}
    tokens = round(sum(line["weight"] for line in own))
    if recipe.method in ("online", "grpo"):
        spent["rollout_tokens"] = tokens
    if recipe.method in ("online", "off_policy"):
        spent["teacher_tokens"] = tokens
    return spent


def run(config, workdir: Path, mesh) -> None:
    began = time.time()
    experiment = Experiment(config, workdir, mesh)
    rows = [Row("student, before", [experiment.score(experiment.start)], 0, 0, 0)]
    for name, teacher in experiment.teachers.items():
        if teacher.model is not None:
            rows.append(Row(f"teacher: {name}", [experiment.score_of_teacher(teacher)], 0, 0, 0))
    made: dict[str, stages.Made] = {}
    for sft in dict.fromkeys(arm_recipe(config, name).sft for name in config.arms):
        students = [experiment.sft(sft, seed) for seed in config.seeds]
        made[f"SFT ({sft})"] = students[0]
        seconds = float(np.mean([student.seconds for student in students]))
        rows.append(Row(f"SFT ({sft})", [experiment.score(student.params) for student in students], seconds, 0, 0))
    for name in config.arms:
        students = [experiment.arm(name, seed) for seed in config.seeds]
        made[name] = students[0]
        experiment.export(name, students[0])
        costs = [cost(experiment, name, seed) for seed in config.seeds]
        mean = {key: float(np.mean([one[key] for one in costs])) for key in costs[0]}
        scored = [experiment.score(student.params) for student in students]
        rows.append(Row(name, scored, mean["seconds"], round(mean["rollout_tokens"]), round(mean["teacher_tokens"])))
    write(experiment, rows, made, began)


def table(rows: list[Row]) -> list[dict]:
    """Mean and, over several seeds, standard deviation; how much faster an arm was than the first online one."""
    online = next((row.seconds for row in rows if row.name.startswith("online")), 0)
    lines = []
    for row in rows:
        line = {"model": row.name}
        for column in row.scored[0].scores:
            values = [one.scores[column] for one in row.scored]
            line[column] = report.over_seeds(values)
        faster = round(online / row.seconds, 2) if online and row.rollout_tokens else None
        line |= {"seconds": round(row.seconds), "online / seconds": faster}
        lines.append(line | {"rollout tokens": row.rollout_tokens, "teacher tokens": row.teacher_tokens})
    columns = list(dict.fromkeys(column for line in lines for column in line))
    return [{column: line.get(column) for column in columns} for line in lines]


def write(experiment: Experiment, rows: list[Row], made: dict[str, stages.Made], began: float) -> None:
    """summary.json, report.html and the table on the terminal."""
    workdir, found = experiment.workdir, table(rows)
    split = "Held-out" if experiment.config.eval.held_out else "Training"
    timings = {name: one.seconds for name, one in made.items()}
    main = made.get("lightning") or list(made.values())[-1]
    summary = {
        "table": found,
        "params_sha256": main.sha256,
        "params_sha256_of": {name: one.sha256 for name, one in made.items()},
        "seconds": timings | {"total": time.time() - began},
    }
    report.write_summary(workdir / "summary.json", summary)
    report.write_report(
        workdir / "report.html",
        title="On-policy distillation of a language model",
        command=experiment.about["command"],
        tables={f"{split} problems": found, f"Answers to {split.lower()} problems": answers(experiment, rows)},
        curves=report.curves_from(metrics.read_metrics(workdir), LOGGED),
        timings=timings,
        versions=versions(),
        notes=[
            "accuracy is the share of right final answers, reverse_kl = KL(student || teacher 'own') in nats per token "
            "at the student's answers. Seconds and tokens of an arm are those after SFT, rollouts and labels included; "
            "seconds of a line SFT are of SFT alone.",
            f"params_sha256: {main.sha256}; devices: {jax.device_count()} {jax.devices()[0].device_kind}.",
        ],
    )
    print(report.format_table(found))
    print(f"\nreport: {workdir / 'report.html'}")


def answers(experiment: Experiment, rows: list[Row], count: int = 4) -> list[dict]:
    """What every model said to the first problems that are scored, a column each."""
    problems = experiment.problems["eval"]
    asked = [experiment.language.decode(ids).strip() for ids in problems.ids[:count]]
    said = {"right answer": problems.answers} | {row.name: row.scored[0].texts for row in rows}
    line = lambda text: " ⏎ ".join(text.strip().split("\n"))
    return [{"model": name} | dict(zip(asked, map(line, texts))) for name, texts in said.items()]
