"""Draws pictures from any stage of a finished or running flow run.

python experiments/sample.py WORKDIR "two red circles left of a blue square" [--stage=flow_opd_seed0] [--count=16]

Of a run on a Stable Diffusion 3 directory it draws prompts of the run's files; for others export the stage, and load it
in diffusers.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

import sys
from pathlib import Path

from absl import flags

from configs import common
from experiments import flow_methods, flow_opd, latents, scenes, stages
from opd_jax import config as config_lib
from opd_jax import report, sharding
from opd_jax.config import ConfigError
from opd_jax.worlds.scenes import parse

_STAGE = flags.DEFINE_string("stage", None, "Stage to draw from; default the main student, else the last one made.")
_COUNT = flags.DEFINE_integer("count", 16, "Number of pictures.", lower_bound=1, upper_bound=256)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of the ODE; default as in the run's evaluation.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "PNG to write; default WORKDIR/samples/STAGE.png.")


DRAWING = ("flow_opd", "scenes_base")  # experiments whose stages draw pictures


def checkpoints(workdir: Path, with_shipped: bool | None) -> dict[str, Path]:
    """Every stage with parameters, the latest last: those it made, and those shipped, if the run starts from them.

    Args:
        with_shipped: False for the shipped base alone, None for nothing shipped.
    """
    own = sorted([*workdir.glob("*.safetensors"), *(workdir / "stages").glob("*.safetensors")], key=os.path.getmtime)
    found = {path.stem.removeprefix("scenes_"): path for path in sorted(stages.SHIPPED.glob("scenes_*.safetensors"))}
    if not with_shipped:
        found = {} if with_shipped is None else {"base": found["base"]}
    for path in own:
        name = path.stem.rsplit("-", 1)[0]
        found.pop("base" if name == "random_base" else name, None)
        found[name] = path
    return found


def main(argv) -> None:
    if len(argv) < 3:
        raise ConfigError('usage: python experiments/sample.py WORKDIR "two red circles left of a blue square"')
    workdir, captions = Path(argv[1]), argv[2:]
    if not (workdir / "config.json").exists():
        raise ConfigError(f"{workdir}: no config.json there; give the --workdir of a run")
    config = config_lib.load(workdir / "config.json")
    if config.experiment not in DRAWING:
        raise ConfigError(
            f"{workdir}: is a run of {config.experiment}; pictures are drawn of one of {' or '.join(DRAWING)}"
        )
    pipeline = config.get("world") == "pipeline"
    try:
        captions = captions if pipeline else [parse(caption).caption for caption in captions]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    of_shipped = not pipeline and config.model.to_dict() == common.scene_model().to_dict()
    found = checkpoints(workdir, config.get("shipped", False) if of_shipped else None)
    if not found:
        raise ConfigError(f"{workdir}: has made no stage yet; wait for its first")
    students = [name for name in found if name.startswith("flow_opd_seed")]
    stage = _STAGE.value or (students or list(found))[-1]
    if stage not in found:
        raise ConfigError(f"--stage={stage}: not made yet; there are {', '.join(found)}")
    made = stages.load(found[stage])
    each = [caption for caption in captions for _ in range(_COUNT.value)]
    settings = flow_opd.sampler(config) | {"seed": _SEED.value} | ({"steps": _STEPS.value} if _STEPS.value else {})
    if pipeline:
        world = latents.Pipeline(config, workdir, sharding.make_mesh(), {})
        images = world.pictures(made.params, each, **settings)
    else:
        velocity = scenes_velocity(config, found, made)
        images = scenes.pictures(velocity, made.params, each, **settings)
    path = Path(_OUT.value) if _OUT.value else workdir / "samples" / f"{stage}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    report.image_grid(images, min(_COUNT.value, 8), 1 if pipeline else 4).save(path)
    print(f"{path}: {len(images)} pictures from {stage}", file=sys.stdout)


def scenes_velocity(config, found: dict[str, Path], made: stages.Made):
    """That of a backbone, or of an adapter on the run's base."""
    model = scenes.module(config)
    if "pos_embed" in made.params:
        return scenes.full_velocity(model)
    base = stages.load(found["random_base" if "random_base" in found else "base"])
    return flow_methods.adapted_velocity(model, config.lora.scale, base.params, scenes.encode)


if __name__ == "__main__":
    config_lib.run(main)
