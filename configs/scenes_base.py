"""Pretrains the base model of the scenes world: small, and mediocre on purpose.

    python experiments/main.py --config=configs/scenes_base.py --workdir=runs/scenes_base

It learns from pairs as a crawler finds them: some captions err in one thing, three in ten pictures are spoilt. So it
knows how to draw everything, yet often draws something else, as the base models of the papers do. The first phase
learns to draw, the second, at noisier times and with fewer wrong captions, to listen to the caption.
The result is shipped as `opd_jax/worlds/weights/scenes_base.safetensors`; its wall time and figures: `docs/results.md`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, ("default", "tiny"))
    draw = {
        "steps": 11_000,
        "learning_rate": 1.5e-3,
        "warmup": 200,
        "decay_steps": 3_500,  # linear decay to zero over the last steps
        "wrong": 0.35,  # share of pictures in which one thing is drawn without regard to the caption
        "damaged": 0.3,  # share of pictures that are spoilt
        "time_center": 0.2,  # logit-normal times
        "time_spread": 1.2,
    }
    listen = draw | {
        "steps": 3_600,
        "learning_rate": 1e-3,
        "warmup": 100,
        "decay_steps": 1_600,
        "wrong": 0.1,
        "time_center": 1.0,  # towards noise, where the caption decides what is drawn
    }
    config = ConfigDict({
        "experiment": "scenes_base",
        "seed": 0,
        "model": common.scene_model(),
        "phases": {"draw": draw, "listen": listen},
        "batch_size": 64,
        "weight_decay": 1e-3,
        "ema_decay": 0.999,
        "save_every": 500,
        "eval": {"prompts": 256, "steps": 20, "shift": 2.0, "seed": 1234},
        "mesh": {"data": -1},
    })  # fmt: skip
    if variant == "tiny":
        config.update({"batch_size": 16, "save_every": 3})
        for phase in config.phases.values():
            phase.update({"steps": 6, "warmup": 2, "decay_steps": 2})
        config.eval.update({"prompts": 8, "steps": 3})
        config.model.num_layers = 1
    return config.lock()
