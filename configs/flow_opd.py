"""Flow-OPD (arXiv:2605.08063): several specialised teachers distilled into one student on its own paths.

    python experiments/main.py --config=configs/flow_opd.py            # minutes on two cores, from the shipped teachers
    python experiments/main.py --config=configs/flow_opd.py:full       # makes base, teachers and GRPO-mix again: hours
    python experiments/main.py --config=configs/flow_opd.py:tiny       # every stage, a few steps, under a minute

Wall time, machine and the numbers to expect are in `docs/results.md`, with the command that printed them.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("default", "tiny", "full", "seeds", "paper")


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, VARIANTS)
    config = ConfigDict({
        "experiment": "flow_opd",
        "seed": 0,
        "seeds": (0,),  # of the students; teachers and base are the same for all
        "shipped": True,  # start from the weights in the package; False makes base, teachers and GRPO-mix again
        "model": common.scene_model(),
        "lora": {"pattern": r"(attn|ff|ff_context)/\w+/kernel", "rank": 8, "scale": 2.0},  # scale = alpha / rank
        "sampler": {"kind": "sde", "steps": 10, "shift": 2.0, "noise_level": 0.7},
        "grpo": {
            "steps": 220, "prompts": 16, "group": 12, "learning_rate": 2e-3, "warmup": 5, "clip": 1e-4, "window": 3,
            "updates": 1, "micro_batches": 1, "ema_decay": 0.9,
        },
        "grpo_mix_steps": 330,
        "teachers": {  # name: the prompts it trains on and the reward each of them is judged by
            "composition": {"prompts": ("composition",), "rewards": ("composition",)},
            "ocr": {"prompts": ("ocr",), "rewards": ("ocr",)},
            "quality": {"prompts": ("composition", "ocr"), "rewards": ("quality", "quality")},
        },
        "grpo_mix": {
            "prompts": ("composition", "ocr", "composition", "ocr"),
            "rewards": ("composition", "ocr", "quality", "quality"),
        },
        "tasks": ("composition", "ocr"),  # a prompt of this task is labelled by the teacher of this name
        "anchor": "quality",  # the teacher that holds every record by MAR
        "opd": {
            "steps": 40, "prompts": 32, "group": 2, "learning_rate": 2e-3, "warmup": 3, "micro_batches": 1,
            "ema_decay": 0.8, "estimator": "analytic", "weighting": "kl", "anchor_weight": 0.3, "init": "merge",
            "method": "opd",
        },
        "arms": {  # every row of the table that trains: what it changes in `opd`
            "offline": {"init": "base", "method": "offline"},
            "flow_opd": {},
            "no_mar": {"anchor_weight": 0.0},
            "state_only": {"estimator": "state_only"},
            "log_ratio": {"estimator": "log_ratio"},
            "kl_no_dt": {"weighting": "kl_no_dt"},
            "velocity": {"weighting": "velocity"},
            "mean": {"weighting": "mean"},
            "x0": {"weighting": "x0"},
        },
        "eval": {"prompts": 192, "steps": 20, "shift": 2.0, "seed": 1234},
        "save_every": 20,
        "mesh": {"data": -1},
    })  # fmt: skip
    if variant == "tiny":
        _tiny(config)
    elif variant == "full":
        config.shipped = False
    elif variant == "seeds":
        config.seeds = (0, 1, 2)
    return config.lock()


def _tiny(config: ConfigDict) -> None:
    config.shipped = False
    config.model.num_layers = 1
    config.arms = {name: config.arms[name] for name in ("offline", "flow_opd", "state_only")}
    config.sampler.steps = 4
    config.lora.rank = 2
    config.grpo.update({"steps": 2, "prompts": 2, "group": 2, "window": 2})
    config.grpo_mix_steps = 2
    config.opd.update({"steps": 2, "prompts": 2, "group": 2})
    config.eval.update({"prompts": 4, "steps": 2})
