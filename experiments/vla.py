"""Distillation of robot policies: the config checked, every arm of it made, and a table of success and cost."""

import time
from pathlib import Path

import jax
import numpy as np

from experiments.recipes import arm_recipe, check_arms, check_recipe
from experiments.vla_methods import EXPERT, GIVEN
from experiments.vla_notes import NOISE, noise, redone, redone_note, sooner, sooner_note, zeros
from experiments.vla_pictures import pictures
from experiments.vla_stages import BASES, WORLDS, Experiment
from experiments.vla_worlds import PRACTISED
from opd_jax import metrics, report, sharding
from opd_jax.config import checks, versions
from opd_jax.losses.vla_opd import OBJECTIVES
from opd_jax.models import attention, remat

BEFORE = {"bins": "student, before", "flow": "flow student, before"}
METHODS = ("opd", "grpo", "sft")
DTYPES = ("float32", "bfloat16")  # of products
LOGGED = ("reverse_kl", "student_entropy", "loss", *NOISE)
COSTS = ("environment_steps", "teacher_queries", "seconds")


def validate(config, mesh) -> None:
    """Everything that can be wrong with the config, before anything expensive. Raises: ConfigError with all of it."""
    with checks() as check:
        known = config.world in WORLDS
        if check(known, f"world={config.world!r}: choose one of {', '.join(WORLDS)}"):
            check_tasks(check, config)
        check_arms(check, config)
        check_policies(check, config)
        check(config.sigma > 0, f"sigma={config.sigma}: give a number above 0")
        check(0 <= config.floor < 1, f"floor={config.floor}: give a share below 1")
        check(config.eval.episodes > 0, f"eval.episodes={config.eval.episodes}: give 1 or more")
        shown = config.demonstrations
        check(shown.few > 0 and shown.many > 0, f"demonstrations: few={shown.few}, many={shown.many}; give 1 or more")
        learns = config.sft.steps > 0 or any(arm_recipe(config, name).method == "sft" for name in config.arms)
        shown = config.demos or not known or WORLDS[config.world].expert
        check(shown or not learns, f"sft: {config.world} has no expert; give demos, or set sft.steps=0 and no sft arm")
        for name, used in (("sft", learns), ("practice", config.base == PRACTISED)):
            if used:
                check_supervised(check, config[name], name, mesh)
        for name in config.arms:
            check_arm(check, config, name, mesh)


def check_policies(check, config) -> None:
    part = config.policy
    fits = 1 <= part.executed <= part.horizon
    check(fits, f"policy.executed={part.executed}: give 1 to policy.horizon={part.horizon}")
    even = part.width > 0 and part.width % 8 == 0
    check(even, f"policy.width={part.width}: give a multiple of 8, of four heads of even size")
    check(part.layers > 0, f"policy.layers={part.layers}: give 1 or more")
    few = part.points >= 0
    check(few, f"policy.points={part.points}: give 0, for a vision transformer, or a number of points")
    part = config.student
    check(not (wrong := remat.mistake(part.remat)), f"student.{wrong}")
    check(part.dtype in DTYPES, f"student.dtype={part.dtype!r}: choose {' or '.join(DTYPES)}")
    if part.path and part.dtype in DTYPES:
        check(not (wrong := attention.mistake(part.attention, part.dtype)), f"student.{wrong}")
    if any(arm_recipe(config, name).head == "flow" for name in config.arms):
        part = config.flow
        check(part.steps > 1, f"flow.steps={part.steps}: give 2 or more, the last is not trained")
        noisy = part.noise_level > 0
        check(noisy, f"flow.noise_level={part.noise_level}: give a number above 0, for steps to have a density")


def check_supervised(check, recipe, name: str, mesh) -> None:
    uneven = sharding.uneven(recipe.batch_size, mesh)
    uneven = uneven or sharding.uneven_parts(recipe.batch_size, recipe.micro_batches, mesh)
    check(not uneven, f"{name}: {uneven}")
    check_recipe(check, recipe, f"({name})")


def check_tasks(check, config) -> None:
    world = WORLDS[config.world]
    for line in world.mistakes(config):
        check(False, line)
    known, tasks = ", ".join(world.SUITES), world.catalogue(config)
    for suite in config.suites:
        check(suite in world.SUITES, f"suites: there is no {suite!r}; choose of {known}")
    check(len(config.suites) > 0, f"suites=(): choose of {known}")
    suite_of = {task.name: task.suite for task in tasks}
    for name in config.held_out:
        check(name in suite_of, f"held_out: there is no task {name!r}; they are called as {tasks[0].name!r}")
        there = name not in suite_of or suite_of[name] in config.suites
        check(there, f"held_out: {name!r} is of no suite in {tuple(config.suites)}; leave it out")
    for suite in set(config.suites) & set(suite_of.values()):
        left = [name for name, its in suite_of.items() if its == suite and name not in config.held_out]
        check(left, f"held_out: has all of {suite}; leave one task to train on")


def check_arm(check, config, name: str, mesh) -> None:
    arm = arm_recipe(config, name)
    check(arm.method in METHODS, f"method={arm.method!r} (arm {name}): choose one of {', '.join(METHODS)}")
    known = arm.objective in OBJECTIVES
    check(known, f"objective={arm.objective!r} (arm {name}): choose one of {', '.join(OBJECTIVES)}")
    check(arm.head in BEFORE, f"head={arm.head!r} (arm {name}): choose one of {', '.join(BEFORE)}")
    rewarded = arm.head == "flow" and arm.method == "grpo"
    check(not rewarded, f"method='grpo' (arm {name}): policies with head='flow' are distilled; choose opd or sft")
    alike = {other: arm_recipe(config, other) for other in config.arms}
    others = [other for other, its in alike.items() if not its.start and its.head == arm.head]
    from_one = not arm.start or arm.start in others
    remedy = f"name it in `only`, too, or choose of {', '.join(others) or 'no others'}"
    check(from_one, f"start={arm.start!r} (arm {name}): is no arm of this run that begins with the student; {remedy}")
    teachers = [other for other, its in alike.items() if its.teacher == EXPERT and its.head == "bins"]
    by_arm = arm.teacher in teachers and arm.head == "bins" and arm.teacher != name
    taught, choices = by_arm or arm.teacher in (EXPERT, GIVEN), ", ".join((EXPERT, GIVEN, *teachers))
    check(taught, f"teacher={arm.teacher!r} (arm {name}): choose one of {choices}, or name the arm in `only`, too")
    world = WORLDS.get(config.world)
    labelled = arm.method == "opd"
    alone = labelled and arm.teacher == EXPERT and world and not world.expert
    check(not alone, f"teacher={EXPERT!r} (arm {name}): {config.world} has none; give teacher.path and {GIVEN!r}")
    without = labelled and arm.teacher == GIVEN and not config.teacher.path
    check(not without, f"teacher={GIVEN!r} (arm {name}): needs a policy of a directory; give teacher.path")
    both = arm.head == "flow" and (config.student.path or arm.teacher == GIVEN)
    check(not both, f"head='flow' (arm {name}): policies of directories are over bins; choose head='bins'")
    drawn = arm.objective == "sampled" and labelled and arm.head == "bins"
    same = not drawn or arm.acting_temperature == arm.temperature
    given = f"acting_temperature={arm.acting_temperature}, temperature={arm.temperature}"
    check(same, f"{given} (arm {name}): objective='sampled' scores what was drawn; set both alike")
    for key in ("acting_temperature", "temperature", "teacher_temperature"):
        check(arm[key] > 0, f"{key}={arm[key]} (arm {name}): give a number above 0")
    alone = arm.method == "grpo" and arm.group < 2
    check(not alone, f"group={arm.group} (arm {name}): GRPO compares episodes of one initial state; give 2 or more")
    if arm.method != "sft" and check(arm.updates > 0, f"updates={arm.updates} (arm {name}): give 1 or more"):
        each, left = divmod(arm.batch_size * arm.group, arm.updates)
        left = left and f"{each * arm.updates + left} episodes do not divide into updates={arm.updates}"
        uneven = left or sharding.uneven(arm.batch_size, mesh) or sharding.uneven_parts(each, arm.micro_batches, mesh)
        check(not uneven, f"arm {name}: {uneven}")
        stale = drawn and arm.updates > 1
        check(not stale, f"updates={arm.updates} (arm {name}): objective='sampled' is of the policy that drew; set 1")
    check(arm.refills >= 0, f"refills={arm.refills} (arm {name}): give 0 or more")
    unused = arm.refills > 0 and arm.method != "grpo"
    check(not unused, f"refills={arm.refills} (arm {name}): are of method='grpo'; set 0")
    share = len(arm.kept) == 2 and 0 <= arm.kept[0] <= arm.kept[1] <= 1
    check(share, f"kept={tuple(arm.kept)} (arm {name}): give two shares of successes, the lower one first")


def run(config, workdir: Path, mesh) -> None:
    began = time.time()
    experiment = Experiment(config, workdir, mesh)
    rows, said, known, given = [], [], None, experiment.world.teacher

    def add(name: str, successes: list[dict[int, float]], cost: dict | None = None, told: bool = True) -> None:
        rows.append(row(experiment, name, successes) | (cost or {}))
        found = zeros(experiment, name, successes, known, metrics.read_metrics(workdir)) if told else []
        said.extend(line for line in found if line not in said)
        print("\n".join(found), end="\n" if found else "")

    if experiment.world.expert:
        known = experiment.success(None, "expert")
        add(EXPERT, [known])
    if given:
        add("teacher", [experiment.success(given.params, "bins")])
    for head in dict.fromkeys(arm_recipe(config, name).head for name in config.arms):
        if config.base == PRACTISED:
            base = experiment.base(head)  # has not seen these tasks: that it fails is nothing to tell
            add(BASES[head].replace("_", " "), [experiment.success(base.params, head)], told=False)
        students = [experiment.student(seed, head) for seed in config.seeds]
        cost = costs(experiment.shown_to_students(), students) if config.sft.steps else None
        add(BEFORE[head], [experiment.success(one.params, head) for one in students], cost)
    made = {}
    for name in config.arms:
        students = [experiment.arm(name, seed) for seed in config.seeds]
        made[name] = students[0]
        head, cost = arm_recipe(config, name).head, costs(experiment.spent(name, config.seeds[0]), students)
        add(name, [experiment.success(student.params, head) for student in students], cost)
    write(experiment, rows, made, said, began)


def costs(spent: dict[str, float], made: list) -> dict[str, int]:
    """Columns of what the first seed has spent, and of the seconds of all, on average."""
    seconds = float(np.mean([one.seconds for one in made]))
    return {key.replace("_", " "): round(value) for key, value in spent.items()} | {"seconds": round(seconds)}


def row(experiment: Experiment, name: str, successes: list[dict[int, float]]) -> dict:
    """Success by suite over the tasks that arms train on, their average, and that of held-out tasks."""
    groups = {suite: experiment.seen_of(suite) for suite in experiment.config.suites}
    groups |= {"average": experiment.seen, "held out": experiment.held_out}
    line = {"model": name}
    for group, tasks in groups.items():
        if tasks:
            values = [float(np.mean([one[task] for task in tasks])) for one in successes]
            line[f"{group} ↑"] = report.over_seeds(values)
    return line


def shown(experiment: Experiment, name: str, made) -> tuple[list, dict]:
    """Films of the student before and after, for the report; and heat maps of policies over bins."""
    head = arm_recipe(experiment.config, name).head
    before = experiment.student(experiment.config.seeds[0], head).params
    films, maps = pictures(experiment, {BEFORE[head]: before, name: made.params}, head)
    teacher = "expert" if experiment.world.expert else "given teacher"
    return [films], {f"Reverse KL from the {teacher} along episodes, nats per token": maps} if maps else {}


def by_costs(experiment: Experiment, lines: list[dict]) -> dict[str, dict]:
    """Success of training episodes against each cost, of all and, where there are several suites, of each.

    Labelled decisions are queries of arms that are distilled.
    """
    asking = {
        f"{name}_seed{seed}"
        for name in experiment.config.arms
        if arm_recipe(experiment.config, name).method == "opd"
        for seed in experiment.config.seeds
    }
    acted = [line for line in lines if "environment_steps" in line]  # demonstrations are successes all
    acted = [line | ({"teacher_queries": line["decisions"]} if line["stage"] in asking else {}) for line in acted]
    found = {f"success by {cost}": report.curves_by(acted, "success", cost) for cost in COSTS}
    for suite in experiment.config.suites:
        each = [line | _success_in(suite, line) for line in acted if f"episodes_{suite}" in line]
        found |= {f"{suite} by {cost}": report.curves_by(each, suite, cost) for cost in COSTS if each}
    return found


def _success_in(suite: str, line: dict) -> dict[str, float]:
    """Of an update's episodes, where it has had any of the suite."""
    episodes = line[f"episodes_{suite}"]
    return {suite: line[f"succeeded_{suite}"] / episodes} if episodes else {}


def write(experiment: Experiment, rows: list[dict], made: dict, said: list[str], began: float) -> None:
    """summary.json, report.html and the table on the terminal."""
    config, workdir = experiment.config, experiment.workdir
    columns = list(dict.fromkeys(column for line in rows for column in line))
    rows = [{column: line.get(column) for column in columns} for line in rows]
    main_name = "vla_opd" if "vla_opd" in made else list(made)[-1]
    main = made[main_name]
    timings = {name: one.seconds for name, one in made.items()}
    lines = [line for line in metrics.read_metrics(workdir) if line["stage"] not in BASES.values()]
    again, soon = redone(experiment, lines), sooner(config, lines)
    summary = {
        "table": rows,
        "params_sha256": main.sha256,
        "params_sha256_of": {name: one.sha256 for name, one in made.items()},
        "seconds": timings | {"total": time.time() - began},
        "episodes_begun_again": again,
        "environment_steps_to_best_of": soon,
        "without_success": said,
    }
    report.write_summary(workdir / "summary.json", summary)
    films, maps = shown(experiment, main_name, main)
    spent = by_costs(experiment, lines)
    notes = [
        f"Success: {experiment.world.goal} before the horizon; it ends the episode, so success once and at "
        "the end are the same. Scenes of the test split, the most probable bins. Held out: tasks that only the first "
        "student has seen. Steps and queries are of the arm, of its start and of a teacher that is an arm; those "
        "of the first student's demonstrations are in its own row alone.",
        *(["Base: has practised other tasks; what that cost is in no row."] if config.base == PRACTISED else []),
        *said,
        *sooner_note(soon),
        *noise(experiment, lines, made),
        *redone_note(again),
        f"params_sha256: {main.sha256}; devices: {jax.device_count()} {jax.devices()[0].device_kind}.",
    ]
    report.write_report(
        workdir / "report.html",
        title="VLA-OPD: robot policies that learn from their own episodes",
        command=experiment.about["command"],
        tables={"Share of episodes that succeed": rows},
        images=films,
        heat_maps=maps,
        curves=spent | report.curves_from(lines, LOGGED),
        along={curve: curve.split(" by ")[1].replace("_", " ") for curve in spent},
        timings=timings,
        versions=versions(),
        notes=notes,
    )
    print(report.format_table(rows))
    print(f"\nreport: {workdir / 'report.html'}")
