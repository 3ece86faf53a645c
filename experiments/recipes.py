"""Recipes, the settings that train something: those of arms, the rows of a table; what is checked of all of them."""

import difflib
import functools
from collections.abc import Iterable

import optax

from opd_jax import optim


def arm_recipe(config, name: str):
    """The settings of one arm."""
    recipe = config.opd.copy_and_resolve_references()
    with recipe.unlocked():
        recipe.update(config.arms[name])
    return recipe


def optimizer_of(recipe) -> optax.GradientTransformation:
    """AdamW at the recipe's rate: warmed up, and decayed to zero over the last `decay_steps` where it has any.

    Steps are rollouts here, of which each may have several `updates`.
    """
    each = recipe.get("updates", 1)
    decay = (recipe.steps * each, recipe.decay_steps * each) if recipe.get("decay_steps") else None
    own = {name: recipe[name] for name in ("weight_decay", "b2") if name in recipe}
    return optim.adamw(recipe.learning_rate, warmup=recipe.warmup * each, decay=decay, **own)


def update_of(supervise, recipe) -> tuple:
    """`optim.dense` as the recipe has it, and its optimiser."""
    optimizer = optimizer_of(recipe)
    own = {name: recipe[name] for name in ("micro_batches", "updates", "ema_decay") if name in recipe}
    return optim.dense(supervise, optimizer, widths=tuple(recipe.get("widths", ())), **own), optimizer


def check_arms(check, config) -> None:
    """Arms, seeds, what is trained how, and how often it is kept. `check` is of `config.checks`."""
    check(len(config.seeds) > 0, "seeds=(): give one or more, such as (0,)")
    check_counts(check, config, "save_every")
    check(len(config.arms) > 0, "arms: there are none; give one")
    for name, changes in config.arms.items():
        for key in (key for key in changes if key not in config.opd):
            near = difflib.get_close_matches(key, config.opd, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(config.opd)}"
            check(False, f"arms.{name}.{key}: opd has no such setting; {remedy}")
        check_recipe(check, arm_recipe(config, name), f"(arm {name})")


def check_counts(check, config, *keys: str) -> None:
    """Dotted keys of numbers that are 1 or more."""
    for key in keys:
        value = functools.reduce(lambda part, name: part[name], key.split("."), config)
        check(value > 0, f"{key}={value}: give 1 or more")


def check_names(check, config, key: str, known: Iterable[str]) -> list[str]:
    """The names that a key lists, as far as they are known."""
    names, known = config[key], list(known)
    check(len(names) > 0, f"{key}=(): choose of {', '.join(known)}")
    for name in names:
        check(name in known, f"{key}: there is no {name!r}; choose of {', '.join(known)}")
    return [name for name in names if name in known]


def check_recipe(check, recipe, of: str) -> None:
    """What trains anything: the rate and its schedule, and the average.

    Args:
        of: follows the key in every line, such as `(arm flow_opd)`.
    """
    steps, rate, decay = recipe.steps, recipe.learning_rate, recipe.get("ema_decay", 0.0)
    check(steps > 0, f"steps={steps} {of}: give 1 or more")
    wrong = optim.schedule_mistake(steps, recipe.warmup, recipe.get("decay_steps", 0)) if steps > 0 else ""
    check(not wrong, f"{wrong} {of}")
    check(rate > 0, f"learning_rate={rate} {of}: give a number above 0")
    check(0 <= decay < 1, f"ema_decay={decay} {of}: give 0, for none, or a share below 1")
