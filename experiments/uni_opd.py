"""Uni-OPD: the config checked, every arm of it made, and a table for each setting of students and teachers."""

import time
from pathlib import Path

import jax
import numpy as np

from configs import domains_models as models_config
from experiments import domains, language, uni_setup
from experiments.reasoning_stages import sampling_params
from experiments.recipes import arm_recipe, check_arms, check_counts
from experiments.uni_stages import Experiment, order_violations
from opd_jax import metrics, report, sharding
from opd_jax.config import checks, versions
from opd_jax.losses import balancing, uni_opd
from opd_jax.losses.divergences import F_DIVERGENCES
from opd_jax.sampling.token_filters import check_params
from opd_jax.worlds import domains as world

LOGGED = ("loss", "right", "log_ratio", "order_violation", "order_violation_after", "shift", "balanced_out", "unknown")
CHOICES = {
    "method": ("uni_opd", "offline", "grpo"),
    "divergence": ("sampled", *F_DIVERGENCES),
    "scope": balancing.SCOPES,
    "margin": uni_opd.MARGINS,
    "mode": uni_opd.MODES,
    "direction": uni_opd.DIRECTIONS,
    "reduction": ("record", "token"),
}


def validate(config, mesh) -> None:
    """Everything that can be wrong with the config, before anything expensive. Raises: ConfigError with all of it."""
    embedded = not config.problems.path
    with checks() as check:
        check_arms(check, config)
        check_counts(check, config, "balancing.samples", "balancing.cap", *(["eval.problems"] if embedded else []))
        language.check_compute(check, config.compute)
        if embedded:
            check_world(check, config)
        else:
            paths = {"student": config.student.path}
            paths |= {f"teachers.{name}": part.path for name, part in config.teachers.items() if not part.get("url")}
            for name, path in paths.items():
                there = path and (Path(path) / "config.json").exists()
                check(there, f"{name}.path={path!r}: give a Hugging Face directory, since problems.path is given")
            check(config.eval.path, "eval.path='': give a JSONL file of held-out problems")
            for name, setting in config.settings.items():
                unknown = set(setting.values()) - set(config.teachers)
                check(not unknown, f"settings.{name}: no teachers {sorted(unknown)}; give their paths")
        check(embedded or config.eval.held_out, "eval.held_out=False: problems.path has no splits; give eval.path")
        check(config.balancing.shape in balancing.SHAPES, f"balancing.shape={config.balancing.shape!r}: u or j")
        room = config.problems.prompt_tokens if config.problems.path else domains.ROOM
        length = sharding.uneven_tokens(room + config.sampler.max_new_tokens, mesh, "prompt and sampler.max_new_tokens")
        for uneven in (sharding.uneven(config.sampler.slots, mesh, "sampler.slots"), length):
            check(not uneven, uneven)
        for name, part in {"sampler": config.sampler, "eval": config.eval, "balancing": config.balancing}.items():
            try:
                check_params(sampling_params(part, 1, (0,), 0))
            except ValueError as error:
                check(False, f"{name}.{error}")
        for name in config.arms:
            check_arm(check, config, name, mesh)


def check_world(check, config) -> None:
    known, levels = models_config.get_config().models, config.problems.levels
    check(levels and set(levels) <= set(world.LEVELS), f"problems.levels={levels}: choose of {world.LEVELS}")
    check_counts(check, config, "problems.count")
    own = config.student.path
    check(not own, f"student.path={own}: problems.path='' are of the embedded world, and so is its student")
    room = 48 if max(levels, default=0) < 4 else world.SOLUTION_TOKENS
    short = config.sampler.max_new_tokens < room and config.shipped
    check(not short, f"sampler.max_new_tokens={config.sampler.max_new_tokens}: solutions of these levels need {room}")
    for name, setting in config.settings.items():
        for domain, teacher in setting.items():
            key = f"settings.{name}.{domain}={teacher!r}"
            check(domain in world.DOMAINS, f"{key}: no such domain; choose of {world.DOMAINS}")
            check(teacher in known, f"{key}: choose of {sorted(known)}")
            sees = teacher in known and (domain not in domains.PICTURED or "vision" in known[teacher].model)
            check(sees, f"{key}: that model reads no pictures")


def check_arm(check, config, name: str, mesh) -> None:
    arm = arm_recipe(config, name)
    for key, choices in CHOICES.items():
        check(arm[key] in choices, f"{key}={arm[key]!r} (arm {name}): choose one of {', '.join(choices)}")
    if arm.setting not in config.settings:
        check(False, f"setting={arm.setting!r} (arm {name}): choose one of {', '.join(config.settings)}")
        return
    exact = arm.method == "uni_opd" and arm.divergence != "sampled"
    for teacher in config.settings[arm.setting].values():
        served = config.teachers.get(teacher, {}).get("url", "")
        says = f"arm {name}: teacher {teacher} is served and gives log-probs of samples only; divergence='sampled'"
        check(not (served and exact), says)
    count = len(config.settings[arm.setting])
    if not check(count > 0, f"settings.{arm.setting}={{}}: give teachers by domain"):
        return
    check(arm.label_parts > 0, f"label_parts={arm.label_parts} (arm {name}): give 1 or more")
    even = arm.batch_size % count == 0
    check(even, f"batch_size={arm.batch_size} (arm {name}): give a multiple of its {count} domains")
    each = arm.batch_size // count * arm.group
    uneven = "" if arm.method == "offline" else sharding.uneven(arm.batch_size, mesh)
    uneven = uneven or sharding.uneven(each, mesh, "answers of a domain in a batch, batch_size / domains * group,")
    whole = uneven or each % (max(arm.label_parts, 1) * sharding.record_parts(mesh)) == 0
    check(whole, f"label_parts={arm.label_parts} (arm {name}): {each} answers do not divide; choose a divisor")
    uneven = uneven or sharding.uneven_parts(arm.batch_size * arm.group, arm.micro_batches, mesh)
    check(not uneven, f"arm {name}: {uneven}")
    wide = all(isinstance(width, int) and width > 0 for width in arm.widths)
    check(wide, f"widths={arm.widths} (arm {name}): give numbers of tokens, or () for the whole width")
    stored = arm.method != "offline" or arm.divergence == "sampled"
    check(stored, f"divergence={arm.divergence!r} (arm {name}): a store has the log-probs of samples; 'sampled'")
    check(arm.group > 1, f"group={arm.group} (arm {name}): outcomes are compared within a prompt; give 2 or more")
    check(arm.ratio >= 0, f"ratio={arm.ratio} (arm {name}): right to wrong answers, 0 or more")


def run(config, workdir: Path, mesh) -> None:
    began = time.time()
    setup = (uni_setup.of_directories if config.problems.path else uni_setup.of_world)(config, mesh)
    experiment, made, tables = Experiment(config, setup, workdir, mesh), {}, {}
    student = setup.student
    for setting in dict.fromkeys(arm_recipe(config, name).setting for name in config.arms):
        names = tuple(config.settings[setting])
        rows = [line("student", [experiment.score(student, student.params, names)])]
        if (of_teachers := experiment.score_of_teachers(setting)) is not None:
            rows.append(line("teacher", [of_teachers]))
        for name in (name for name in config.arms if arm_recipe(config, name).setting == setting):
            students = [experiment.arm(name, seed) for seed in config.seeds]
            made[name] = students[0]
            experiment.export(name, students[0])
            scores = [experiment.score(student, one.params, names) for one in students]
            rows.append(line(name, scores) | costs(experiment, name, students))
        tables[setting] = rows
    write(experiment, tables, made, began)


def line(name: str, scored: list[dict[str, np.ndarray]]) -> dict:
    """Accuracy by domain and their mean; with the standard deviation of seeds, or with the standard error of one."""
    row = {"model": name}
    for domain in scored[0]:
        row[f"{domain} ↑"] = estimate([[one[domain]] for one in scored])
    return row | {"average ↑": estimate([list(one.values()) for one in scored])}


def estimate(outcomes: list[list[np.ndarray]]) -> report.Estimate:
    """Of the mean over domains; unknown outcomes are left out."""
    means = [float(np.mean([np.nanmean(domain) for domain in seed])) for seed in outcomes]
    if len(means) > 1:
        return report.over_seeds(means)
    variances = [np.nanvar(domain) / max(np.isfinite(domain).sum(), 1) for domain in outcomes[0]]
    return report.Estimate(means[0], float(np.sqrt(np.sum(variances)) / len(variances)))


def costs(experiment: Experiment, name: str, students) -> dict:
    logs = [metrics.read_metrics(experiment.workdir, f"{name}_seed{seed}") for seed in experiment.config.seeds]
    seconds = {"seconds": round(float(np.mean([student.seconds for student in students])))}
    if "order_violation" not in logs[0][-1]:
        return seconds
    first, last = np.mean([order_violations(log) for log in logs], axis=0)
    return {"violations, first": round(float(first), 3), "last": round(float(last), 3)} | seconds


def write(experiment: Experiment, tables: dict, made: dict, began: float) -> None:
    """summary.json, report.html and the tables on the terminal."""
    workdir, config = experiment.workdir, experiment.config
    timings = {name: one.seconds for name, one in made.items()}
    main = made.get("uni_opd_multi") or list(made.values())[-1]
    summary = {
        "table": tables,
        "params_sha256": main.sha256,
        "params_sha256_of": {name: one.sha256 for name, one in made.items()},
        "seconds": timings | {"total": time.time() - began},
        "unverified": dict(experiment.failures),
    }
    report.write_summary(workdir / "summary.json", summary)
    spread = "the standard deviation over seeds" if len(config.seeds) > 1 else "the standard error over problems"
    report.write_report(
        workdir / "report.html",
        title="Uni-OPD: several teachers, balanced rollouts, calibrated margins",
        command=experiment.about["command"],
        tables=tables,
        curves=report.curves_from(metrics.read_metrics(workdir), LOGGED),
        timings=timings,
        versions=versions(),
        notes=[
            f"Share of right answers to {'held-out' if config.eval.held_out else 'training'} problems, sampled at "
            f"temperature {config.eval.temperature}; ± is {spread}. Violations: of answers in groups with right and "
            "wrong ones, the share whose group has a right answer that the teacher scores below a wrong one.",
            f"Verifiers that failed, by reason (their outcomes are unknown): {dict(experiment.failures) or 'none'}.",
            f"params_sha256: {main.sha256}; devices: {jax.device_count()} {jax.devices()[0].device_kind}.",
        ],
    )
    for setting, rows in tables.items():
        print(f"\n{setting}\n{report.format_table(rows)}")
    print(f"\nreport: {workdir / 'report.html'}")
