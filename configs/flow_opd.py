"""Flow-OPD (arXiv:2605.08063): several specialised teachers distilled into one student on its own paths.

    python experiments/main.py --config=configs/flow_opd.py            # minutes on two cores, from the shipped teachers
    python experiments/main.py --config=configs/flow_opd.py:full       # makes teachers and GRPO-mix again
    python experiments/main.py --config=configs/flow_opd.py:tiny       # every stage, a few steps

Wall time, machine and the numbers to expect are in `docs/results.md`, with the command that printed them.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("default", "tiny", "full", "seeds", "paper")


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, VARIANTS)
    config = ConfigDict({
        "experiment": "flow_opd",
        "world": "scenes",  # the embedded one, or "pipeline": a Stable Diffusion 3 directory, as in `paper`
        "seed": 0,
        "seeds": (0,),  # of the students; teachers and base are the same for all
        "only": (),  # names of arms, such as ('a', 'b'); (): all
        "shipped": True,  # start from the weights in the package; False makes teachers and GRPO-mix again
        "model": common.scene_model(),
        "lora": {"pattern": r"(attn|ff|ff_context)/\w+/kernel", "rank": 8, "scale": 2.0},  # scale = alpha / rank
        "sampler": {"kind": "sde", "steps": 10, "shift": 2.0, "double_shift": False, "noise_level": 0.7},
        "grpo": _grpo(),
        "teachers": {  # name: its prompts, the reward each is judged by, and what it changes in `grpo`
            "composition": {
                "prompts": ("composition",),
                "rewards": ("composition",),
                "steps": 80,
                "learning_rate": 2e-3,
                "warm_start": {"steps": 1_200},  # thousands of scenes: by rewards alone it gains 0.03 in 50 updates
            },
            "ocr": {
                "prompts": ("ocr",),
                "rewards": ("ocr",),
                "steps": 80,
                "learning_rate": 2e-3,  # at 5e-3 it falls again after 50 updates
            },
            "quality": {
                "prompts": ("composition", "ocr"),
                "rewards": ("quality", "quality"),
                "learning_rate": 5e-4,  # falls again at 1e-3
            },
        },
        "grpo_mix": {
            "prompts": ("composition", "ocr", "composition", "ocr"),
            "rewards": ("composition", "ocr", "quality", "quality"),
            "steps": 220,  # as many as its three competitors have together
            "learning_rate": 5e-4,  # collapses at 1.5e-3
            "warm_start": {"steps": 1_200},  # of both tasks: after composition alone it wrote no letters any more
        },
        "judges": {},  # more rewards, by name: {"weights": {...}, "rewards": {...}} as in docs/rewards.md
        "tasks": ("composition", "ocr"),  # a prompt of this task is labelled by the teacher of this name
        "anchor": "quality",  # the teacher that holds every record by MAR
        "opd": {
            "method": "opd",
            "init": "merge",  # mean of the teachers' updates, "base", or the arm it goes on from; rank: sum of theirs
            "steps": 60,
            "prompts": 16,
            "group": 2,
            "learning_rate": 2e-3,
            "warmup": 3,
            "micro_batches": 1,
            "ema_decay": 0.8,
            "estimator": "analytic",
            "weighting": "kl",
            "anchor_weight": 0.1,
        },
        "arms": {  # every row of the table that trains: what it changes in `opd`
            "flow_opd": {},
            "no_mar": {"anchor_weight": 0.0},
            "offline": {"init": "base", "method": "offline"},  # SFT on the teachers' pictures
            "after_sft": {"init": "offline"},  # the paper's other cold start
            "state_only": {"estimator": "state_only", "anchor_weight": 0.0},
            "log_ratio": {"estimator": "log_ratio"},
            "kl_no_dt": {"weighting": "kl_no_dt"},
            "velocity": {"weighting": "velocity"},
            "mean": {"weighting": "mean"},
            "x0": {"weighting": "x0"},
        },
        "eval": {"prompts": 192, "steps": 20, "shift": 2.0, "double_shift": False, "seed": 1234},
        "save_every": 20,
        "offload": False,  # True: moments and average wait in the host's memory between updates
        "compile_quickly": False,  # True: little optimised, for runs that are mostly compilation
        "mesh": common.mesh(),
    })  # fmt: skip
    {"tiny": _tiny, "full": _full, "seeds": _seeds, "paper": _paper}.get(variant, lambda _: None)(config)
    return config.lock()


def _grpo() -> ConfigDict:
    """How every specialist and GRPO-mix are trained, where their part says nothing else."""
    return ConfigDict({
        "method": "awm",  # a picture's likelihood by the loss on it; or "flow_grpo", by the steps that led to it
        "steps": 60,
        "prompts": 16,
        "group": 12,
        "learning_rate": 5e-3,
        "warmup": 5,
        "updates": 1,
        "micro_batches": 1,
        "ema_decay": 0.9,
        "warm_start": {  # SFT on clean pairs of its own prompts comes first
            "steps": 0, "pairs": 64, "learning_rate": 4e-3, "warmup": 20, "decay_steps": 600, "ema_decay": 0.99,
        },
        "awm": {"draws": 2, "time_center": 0.7, "time_spread": 1.2, "beta": 0.1},  # beta holds to the start
        "flow_grpo": {
            "kind": "cps",
            "noise_level": 0.8,
            "window": 3,  # stochastic, trained steps, somewhere in the first half
            "same_start": True,  # a group shares its first noise, so its rewards differ by what is trained alone
            "balanced": True,  # early steps, which decide what is drawn, count as much as late ones
            "clip": 1e-4,
            "beta": 0.01,  # weight of the KL to the start, in nats per element
        },
    })  # fmt: skip


def _tiny(config: ConfigDict) -> None:
    config.shipped = False
    config.model.num_layers = 1
    config.sampler.steps = 4
    config.lora.rank = 2
    config.grpo.update({"steps": 2, "prompts": 2, "group": 2})
    for part in (config.grpo_mix, *config.teachers.values()):
        part.steps = 2
        if "warm_start" in part:
            part.warm_start.steps = 2
    config.grpo.warm_start.update({"pairs": 4, "warmup": 0, "decay_steps": 1})
    config.opd.update({"steps": 2, "prompts": 2, "group": 2})
    config.eval.update({"prompts": 4, "steps": 2})
    config.update({"save_every": 1, "compile_quickly": True})
    for name in set(config.arms) - {"flow_opd", "offline", "after_sft"}:
        del config.arms[name]


def _full(config: ConfigDict) -> None:
    config.shipped = False


def _seeds(config: ConfigDict) -> None:
    config.seeds = (0, 1, 2)


def _paper(config: ConfigDict) -> None:
    """Stable Diffusion 3.5 Medium at 512 px, as published; `code` marks the released configuration, not the paper.

    Give `pipeline.path`, the files of `pipeline.prompts` and what `judges` name; see docs/flow_opd.md.
    """
    config.world, config.shipped = "pipeline", False
    del config.model  # the directory's
    config.pipeline = {
        "path": "",  # a diffusers directory
        "resolution": 512,
        "guidance": 4.5,  # code: in sampling, student, teachers and evaluation; the paper does not state it
        "dtype": "bfloat16",  # of the transformer's products; code: float16
        "remat": "nothing",  # blocks keep nothing for the backward pass, and are computed again; or "", dots and so on
        "attention": "",  # within rows: "" is XLA's, keeping [S, S]; "flash" the device's kernel (docs/scale.md)
        "embeddings": "embeddings",  # folder of what the text encoders make of the prompts; written at the first start
        "max_sequence_length": 128,  # tokens of T5, Flow-GRPO
        "encoders": {"dtype": "float32", "stored": "bfloat16", "device": "cpu", "batch_size": 16},  # they run in torch
        "pictures": 4,  # that a device draws or decodes at once
        "prompts": {  # a line each, or JSON lines with a key "prompt", whose others go to the judges
            "geneval": {"train": "", "test": ""},
            "ocr": {"train": "", "test": ""},
            "pickscore": {"train": "", "test": ""},
        },
    }
    # q, k, v and out of both streams of joint attention
    config.lora.update({"pattern": r"attn/(to|add)_\w+/kernel", "rank": 32, "scale": 2.0})  # alpha 64
    config.sampler.update(
        {"steps": 10, "shift": 3.0, "double_shift": True, "noise_level": 0.7}
    )  # the first nine steps are trained
    # Flow-GRPO's reference: 48 groups of 24, beta 0.04 (GenEval, OCR) or 0.01 (PickScore, the teacher of quality's)
    config.grpo.update({"method": "flow_grpo", "prompts": 48, "group": 24, "learning_rate": 3e-4, "updates": 2})
    config.grpo.update({"steps": 1_000, "micro_batches": 72, "ema_decay": 0.987})  # steps not stated; 0.9 per 8 updates
    config.grpo.flow_grpo.update(
        {"kind": "sde", "noise_level": 0.7, "window": 9, "same_start": False, "balanced": False, "beta": 0.04}
    )
    config.grpo.flow_grpo.weighting = "kl_no_dt"
    config.teachers = {  # path: its LoRA, in PEFT's or diffusers' files; "": trained here
        name: {"path": "", "prompts": (prompts,), "rewards": (reward,)}
        for name, prompts, reward in (
            ("geneval", "geneval", "geneval"), ("ocr", "ocr", "ocr"), ("quality", "pickscore", "quality"),
        )
    }  # fmt: skip
    config.teachers.quality.flow_grpo = {"beta": 0.01}
    config.grpo_mix = {  # the baseline, 3:1:1
        "prompts": ("geneval", "geneval", "geneval", "ocr", "pickscore"),
        "rewards": ("geneval", "geneval", "geneval", "ocr", "quality"),
        "steps": 0,  # 0: without it
    }
    config.judges = {
        "geneval": {"weights": {"geneval": 1.0}, "rewards": {"geneval": _server(8001)}},
        "ocr": {"weights": {"ocr": 1.0}, "rewards": {"ocr": {"kind": "ocr"}}},
        "quality": {  # 4:6 in the text; the appendix has 1:1, the code 0.8:0.2
            "weights": {"deqa": 0.4, "pickscore": 0.6},
            "rewards": {
                "deqa": _server(8002),
                "pickscore": {"kind": "pickscore", "path": "PickScore_v1", "processor": "CLIP-ViT-H-14"},
            },
        },
    }
    config.tasks, config.anchor = ("geneval", "ocr"), "quality"
    config.opd.update(
        {
            "group": 24,  # code: 16 in the 8-GPU configuration
            "prompts": 48,
            "steps": 500,  # not stated
            "micro_batches": 144,  # ours, as 72 in grpo: of a record per device, of 8; docs/scale.md
            "learning_rate": 1e-4,  # code; the paper does not state it
            "anchor_weight": 0.02,  # code: 0.04
            "weighting": "kl",  # code: kl_no_dt
            "ema_decay": 0.987,  # code, 0.9 every 8 updates; the paper does not state it
        }
    )
    config.only = ("flow_opd",)  # of the arms; (): all
    config.eval.update({"prompts": 0, "steps": 40, "shift": 3.0, "double_shift": True})  # 0: all test prompts


def _server(port: int) -> dict:
    return {"kind": "http", "url": f"http://localhost:{port}"}
