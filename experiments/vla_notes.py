"""What is said beside the table of robot policies: where one never succeeds and why, noise, what was redone, speed."""

from collections.abc import Sequence

import numpy as np

from experiments.recipes import arm_recipe
from experiments.vla_episodes import REDONE
from experiments.vla_methods import EXPERT
from experiments.vla_stages import Experiment

NOISE = ("exact_gradient_square", "sampled_gradient_variance")
WINDOW = 20  # updates of a running mean of success
SHOWN = 6  # tasks that are named in a line
CHANCE = 5  # in fewer episodes even a good policy may fail


def zeros(
    experiment: Experiment, name: str, successes: Sequence[dict[int, float]], known: dict[int, float] | None = None,
    lines: Sequence[dict] = (),
) -> list[str]:  # fmt: skip
    """Tasks in which a policy never succeeds, a line for each seed, and one for each likely cause, with its remedy.

    Args:
        name: of an arm, or of another row of the table.
        successes: of each seed, by task; a row that is of no seed has one.
        known: the same of the expert.
        lines: of `metrics.jsonl`.
    """
    config, tasks, found = experiment.config, experiment.world.tasks, []
    never = [[task for task, value in one.items() if value == 0] for one in successes]
    for seed, missed in zip(config.seeds, never):
        if missed:
            names = ", ".join(tasks[task].name for task in missed[:SHOWN])
            more = f" and {len(missed) - SHOWN} more" if len(missed) > SHOWN else ""
            of = f"{name}, seed {seed}" if len(successes) > 1 or name in config.arms else name
            chance = ", which may be chance" if config.eval.episodes < CHANCE else ""
            found.append(f"{of}: none of {config.eval.episodes} episodes succeeds in {names}{more}{chance}.")
    if not found:
        return []
    beyond = sorted({task for missed in never for task in missed if known and name != EXPERT and known[task] == 0})
    if beyond:
        names = ", ".join(f"{tasks[task].name} ({tasks[task].horizon} steps)" for task in beyond[:SHOWN])
        found.append(f"The expert never succeeds in {names} either: the horizon is too short, or the task beyond it.")
    return found + causes(experiment, name, lines)


def causes(experiment: Experiment, name: str, lines: Sequence[dict]) -> list[str]:
    """What may be wrong with a policy that never succeeds in some tasks, by how it was made."""
    config = experiment.config
    if name == EXPERT:
        return ["The horizon is too short for the expert, perhaps, or the task is beyond it: what it labels is no use."]
    method = arm_recipe(config, name).method if name in config.arms else ""
    if method == "opd":
        return [falls(config, name, lines)]
    if method == "grpo":
        return ["Where no episode succeeds GRPO has no reward: start from a policy that does, or set the arm's start."]
    if config.student.path:
        return ["Statistics of another data set, perhaps, or other pictures: check student.statistics, cameras, crop."]
    what, then = ("many", "") if method == "sft" else ("few", "; until it succeeds, GRPO has no reward there")
    remedy = f"raise demonstrations.{what}, now {config.demonstrations[what]}, or sft.steps, now {config.sft.steps}"
    return [f"Too few demonstrations or updates, perhaps: {remedy}{then}."]


def falls(config, name: str, lines: Sequence[dict]) -> str:
    """Whether what the arm minimises falls while success stays away; of the first seed, all tasks together."""
    own = [line for line in lines if line["stage"] == f"{name}_seed{config.seeds[0]}"]
    keys = ("reverse_kl", "loss") if arm_recipe(config, name).objective in ("reverse_kl", "sampled") else ("loss",)
    key = next((key for key in keys if own and key in own[0]), None)
    if key is None:
        return "Nothing is known of its distance to the teacher: look into metrics.jsonl."
    few = max(len(own) // 5, 1)
    first, last = (float(np.mean([line[key] for line in part])) for part in (own[:few], own[-few:]))
    if last < first:
        closer = f"Its {key} falls, {first:.3g} to {last:.3g}, while success stays 0 there: it learns states that lead"
        return f"{closer} nowhere; begin with more demonstrations (demonstrations.few), or give opd.steps more."
    return f"Its {key} does not fall, {first:.3g} to {last:.3g}: change opd.learning_rate or raise opd.steps."


def noise(experiment: Experiment, lines: list[dict], made: dict) -> list[str]:
    """How much noise sampled tokens would add, or do, beside the exact gradient; a line for the report, if any."""
    ratios, seed = [], experiment.config.seeds[0]
    for name in (name for name in made if arm_recipe(experiment.config, name).method == "opd"):
        own = [line for line in lines if line["stage"] == f"{name}_seed{seed}" and NOISE[0] in line]
        square, variance = (sum(line[key] for line in own) for key in NOISE)
        ratios += [f"{name} {variance / square:.1f}"] if square else []
    about = "Variance of the gradient of one sampled token by the student's logits, over the square of the exact one"
    return [f"{about}, means of all updates: {', '.join(ratios)}."] if ratios else []


def redone(experiment: Experiment, lines: Sequence[dict]) -> dict[str, int]:
    """Episodes that were begun again: in training, resumed runs included, and by this process outside of it."""
    trained = [sum(int(line.get(key, 0)) for line in lines) for key in REDONE]
    return {key: trained[i] + int(experiment.world.redone[i]) for i, key in enumerate(REDONE)}


def redone_note(counts: dict[str, int]) -> list[str]:
    if not any(counts.values()):
        return []
    own, beside = (counts[key] for key in REDONE)
    return [
        f"Episodes begun again, for a simulator crashed, hung or raised: {own}; beside one in its process: {beside}. "
        "Each was played anew from its start, and only that counts."
    ]


# ---- how soon --------------------------------------------------------------------------------------------------------


def steps_to(lines: Sequence[dict], mark: float | int | None = None) -> tuple[float, float] | None:
    """Where the running mean of training success over `WINDOW` updates first reaches `mark`; None: its own best.

    Returns:
        The environment steps spent until then and that mean; None where it never does, or in fewer updates.
    """
    if len(lines) < WINDOW:
        return None
    success, spent = (np.array([line[key] for line in lines], np.float64) for key in ("success", "environment_steps"))
    means = np.lib.stride_tricks.sliding_window_view(success, WINDOW).mean(1)
    reached = np.flatnonzero(means >= (means.max() if mark is None else mark) - 1e-9)
    if not len(reached):
        return None
    return float(spent[: reached[0] + WINDOW].sum()), float(means[reached[0]])


def sooner(config, lines: Sequence[dict]) -> dict[str, dict]:
    """How many environment steps distilled arms take to the best that GRPO comes to.

    Args:
        config: of `configs/vla_opd.py`.
        lines: of `metrics.jsonl`.

    Returns:
        For every GRPO arm that begins with the student, `success`, its best running mean of each seed, and `steps` to
        it of each seed: its own, and those of the distilled arms that begin there too and act alike; None: never.
    """
    found = {}
    recipes = {name: arm_recipe(config, name) for name in config.arms}
    of = lambda name, seed: [line for line in lines if line["stage"] == f"{name}_seed{seed}"]
    for rewarded, recipe in recipes.items():
        if recipe.method != "grpo" or recipe.start:
            continue
        best = [steps_to(of(rewarded, seed)) for seed in config.seeds]
        if None in best:
            continue
        steps = {rewarded: [spent for spent, _ in best]}
        for name, other in recipes.items():
            alike = other.head == recipe.head and other.acting_temperature == recipe.acting_temperature
            if other.method == "opd" and not other.start and alike and of(name, config.seeds[0]):
                reached = [steps_to(of(name, seed), mean) for seed, (_, mean) in zip(config.seeds, best)]
                steps[name] = [at and at[0] for at in reached]
        found[rewarded] = {"success": [mean for _, mean in best], "steps": steps}
    return found


def sooner_note(found: dict[str, dict]) -> list[str]:
    said = []
    for rewarded, values in found.items():
        own, best = values["steps"][rewarded], ", ".join(f"{mean:.2f}" for mean in values["success"])
        parts = [f"{rewarded} {', '.join(f'{spent:,.0f}' for spent in own)}"]
        for name in (name for name in values["steps"] if name != rewarded):
            times = [f"{spent:,.0f} ({spent / mine:.2f} times that)" if spent else "never"
                     for mine, spent in zip(own, values["steps"][name])]  # fmt: skip
            parts.append(f"{name} {', '.join(times)}")
        rule = f"the best running mean of training success over {WINDOW} updates that {rewarded} comes to, {best}"
        said.append(f"Environment steps to {rule}: {'; '.join(parts)}. Where it gains little, this says little.")
    return said
