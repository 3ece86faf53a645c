"""Stages of an experiment, each done once: what it makes is kept under the hash of everything it depends on."""

import functools
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax

from opd_jax import hosts, loop, optim
from opd_jax.checkpoint import load_params, params_sha256, save_params
from opd_jax.config import ConfigError, fingerprint
from opd_jax.metrics import read_metrics
from opd_jax.offload import offloaded
from opd_jax.types import PyTree

FIRST = (
    3  # losses written into a stage's file, so that whoever makes it again can see at once whether it goes the same way
)
SHIPPED = Path(str(resources.files("opd_jax"))) / "worlds" / "weights"


class Made(NamedTuple):
    """A finished stage: its parameters, the hash of its recipe, and what making it cost."""

    params: PyTree
    recipe: str
    sha256: str
    seconds: float  # of wall time, by this stage alone
    samples: int  # pictures or answers drawn by this stage alone


def recipe_of(settings: Any, *upstream: str) -> str:
    """Hash of a stage's settings and of what it builds on (hashes of parameters, or of recipes): what a cached result
    must agree with."""
    return fingerprint({"settings": settings, "upstream": list(upstream)})


def load(path: Path, recipe: str | None = None) -> Made:
    """A finished stage from its file. Raises: ConfigError when it was made by another recipe, or is damaged."""
    params, about = load_params(path)
    if "recipe" not in about:
        raise ConfigError(f"{path}: does not say how it was made; give a file that a stage of a run has written")
    if recipe is not None and about.get("recipe") != recipe:
        raise ConfigError(
            f"{path}: made by recipe {str(about.get('recipe'))[:12]}, this config asks for {recipe[:12]}; "
            "use the config it was made with, or make it again with the variant 'full'"
        )
    sha = params_sha256(params)
    if about.get("params_sha256") not in (None, sha):
        raise ConfigError(f"{path}: its parameters do not have the hash it states; fetch or make the file again")
    return Made(params, about["recipe"], sha, float(about.get("seconds", 0)), int(about.get("samples", 0)))


def save(path: Path, made: Made, about: dict[str, Any]) -> None:
    facts = {"recipe": made.recipe, "params_sha256": made.sha256, "seconds": made.seconds, "samples": made.samples}
    save_params(path, made.params, facts | about)


def path_of(name: str, workdir: Path, recipe: str) -> Path:
    """Where a finished stage is kept."""
    return workdir / "stages" / f"{name}-{recipe[:12]}.safetensors"


def once(
    name: str,
    workdir: Path,
    recipe: str,
    make: Callable[[Path], tuple[PyTree, int]],
    about: dict | None = None,
    logged_as: tuple[str, ...] = (),
) -> Made:
    """The stage `name`: read from `workdir/stages` when it is there, else made, timed and written.

    Args:
        make: given a folder for its checkpoints, which belongs to this recipe alone, returns the parameters and the
            number of samples drawn; killed half way it must be able to go on.
        logged_as: the names under which its parts log their metrics, in order; one part, `name`, unless given.
    """
    path = path_of(name, workdir, recipe)
    if path.exists():
        return load(path, recipe)
    began = time.time()
    params, samples = make(workdir / "checkpoints" / f"{name}-{recipe[:12]}")
    params = hosts.fetch(params)
    hosts.wait(f"{name} is made")
    parts = [lines for part in logged_as or (name,) if (lines := read_metrics(workdir, part))]
    seconds = sum(lines[-1]["seconds"] for lines in parts)  # includes those before a resume
    made = Made(params, recipe, params_sha256(params), seconds if parts else time.time() - began, samples)
    first = [line["loss"] for line in parts[0][:FIRST] if "loss" in line] if parts else []  # none of private training
    save(path, made, (about or {}) | {"stage": name, "first_losses": first})
    hosts.wait(f"{name} is saved")
    return made


def trained(
    name: str,
    workdir: Path,
    recipe: str,
    method: tuple,
    start: PyTree,
    batches,
    part,
    seed: int,
    *,
    place,
    about,
    averaged: bool = False,
    offload: bool = False,
    **run,
) -> Made:
    """The stage `name` that is `part.steps` updates in the loop.

    Args:
        method: a `Method` and its optimiser.
        start: parameters that it begins with.
        batches: an iterator for the loop, or, where it is dear, a function that makes one when it is needed.
        part: of the config, with steps and batch_size, and group where a prompt is answered more than once.
        place: puts the state on the devices.
        averaged: whether the moving average is what was made.
        offload: whether moments and average wait in the host's memory between updates.
        run: for `loop.run`.
    """
    functions, optimizer = method

    def make(checkpoint_dir):
        state = place(optim.init_state(place(start), optimizer))  # first: the whole state may not fit one device
        state, _ = loop.run(
            functions,
            offloaded(state) if offload else state,
            batches() if callable(batches) else batches,
            workdir=workdir,
            stage=name,
            checkpoint_dir=checkpoint_dir,
            steps=part.steps,
            seed=seed,
            **run,
        )
        params = state.ema if averaged else state.params
        return params, part.steps * part.batch_size * part.get("group", 1)

    return once(name, workdir, recipe, make, about)


@functools.partial(jax.jit, static_argnums=0)
def copied(sampling_copy: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """A model's `sampling_copy` of `params`, compiled: for a loop on the host. Compiled loops make it themselves."""
    return sampling_copy(params)
