"""Pretrains the base model of the scenes world: small, and mediocre on purpose.

    python experiments/main.py --config=configs/scenes_base.py --workdir=runs/scenes_base

It learns from pairs as a crawler finds them: a third of the captions err in one thing, three in ten pictures are
spoilt. So it knows how to draw everything, yet often draws something else, as the base models of the papers do.
The result is shipped as `opd_jax/worlds/weights/scenes_base.safetensors`; its wall time and figures: `docs/results.md`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, ("default", "tiny"))
    config = ConfigDict({
        "experiment": "scenes_base",
        "seed": 0,
        "model": common.scene_model(),
        "wrong": 0.35,  # share of captions that err in one thing
        "damaged": 0.3,  # share of pictures that are spoilt
        "batch_size": 64,
        "steps": 11_000,
        "learning_rate": 1.5e-3,
        "warmup": 200,
        "decay_steps": 3_500,  # linear decay to zero over the last steps
        "weight_decay": 1e-3,
        "ema_decay": 0.999,
        "time_center": 0.2,  # logit-normal times, a little towards noise, where the composition is decided
        "time_spread": 1.2,
        "save_every": 500,
        "eval": {"prompts": 256, "steps": 20, "shift": 2.0, "seed": 1234},
        "mesh": {"data": -1},
    })  # fmt: skip
    if variant == "tiny":
        config.update({"batch_size": 16, "steps": 6, "warmup": 2, "decay_steps": 2, "save_every": 3})
        config.eval.update({"prompts": 8, "steps": 3})
        config.model.num_layers = 2
    return config.lock()
