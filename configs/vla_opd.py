"""VLA-OPD (arXiv:2603.26666): a robot policy learns on its own episodes what an expert would have done at every state.

    python experiments/main.py --config=configs/vla_opd.py          # ten things that go into a basket
    python experiments/main.py --config=configs/vla_opd.py:full     # the tabletop's four suites, and every other arm
    python experiments/main.py --config=configs/vla_opd.py:seeds    # the default's arms, three seeds
    python experiments/main.py --config=configs/vla_opd.py:tiny     # every kind of arm, a step or two

The student begins with one demonstration of each task. Its teacher is the tabletop's scripted expert, as a distribution
over action bins. What has been measured is in `docs/results.md`.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("default", "tiny", "seeds", "full")
MAIN = ("vla_opd", "forward_kl", "dagger", "sft_many", "grpo", "opd_then_grpo")


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, VARIANTS)
    config = ConfigDict({
        "experiment": "vla",
        "seeds": (0,),
        "only": MAIN if variant in ("default", "seeds") else (),  # names of arms, such as ('a', 'b'); (): all
        "suites": ("object",),  # of spatial, object, goal, long
        "held_out": ("object/8", "object/9"),  # tasks that only the first SFT has seen
        "base": "shipped",  # a policy that has practised, by configs/vla_base.py; or your file of one; "": a random one
        "policy": common.TABLETOP_POLICY | {"executed": 8},  # so much of a chunk
        "flow": {"steps": 5, "noise_level": 0.5},  # of policies with a flow-matching head: from noise to a chunk
        "sigma": 0.1,  # of the expert's distribution over bins; an action is in [-1, 1]
        "floor": 0.01,  # share of it that lies on all bins alike, so that no mistake costs hundreds of nats
        "demonstrations": {"few": 1, "many": 20, "seed": 7},  # of each task
        "sft": {  # the student, and the baselines that learn from demonstrations
            "steps": 200, "batch_size": 64, "learning_rate": 3e-4, "warmup": 20, "decay_steps": 100,
            "weight_decay": 0.0, "micro_batches": 1, "ema_decay": 0.0,
        },
        "opd": {  # of every arm, if it says nothing else
            "head": "bins",  # of the policy: bins or flow
            "method": "opd",  # opd, grpo or sft: from `many` demonstrations
            "teacher": "expert",  # or an arm, whose policy labels
            "start": "",  # an arm that it goes on from; "": the student
            "objective": "reverse_kl",  # reverse_kl, forward_kl, hard_cross_entropy, sampled
            "acting_temperature": 0.3,  # of the student in its episodes; and in GRPO's loss
            "temperature": 1.0,  # of the student in the loss of distillation
            "teacher_temperature": 1.0,
            "steps": 100,
            "batch_size": 4,  # initial states, of tasks of one horizon
            "group": 4,  # episodes of each
            "learning_rate": 2e-4,
            "warmup": 5,
            "decay_steps": 30,
            "weight_decay": 0.0,
            "micro_batches": 1,
            "ema_decay": 0.0,
        },
        "arms": {
            "vla_opd": {},
            "forward_kl": {"objective": "forward_kl"},
            "dagger": {"objective": "hard_cross_entropy"},
            "sampled": {"objective": "sampled", "acting_temperature": 1.0},
            "sft_many": {"method": "sft"},
            "grpo": {"method": "grpo"},
            "opd_then_grpo": {"method": "grpo", "start": "vla_opd"},
            "flow": {"head": "flow"},
            "group_1": {"batch_size": 16, "group": 1},  # as many episodes
            "group_8": {"batch_size": 2, "group": 8},
        },
        "eval": {"episodes": 16, "seed": 1234},  # of each task, in scenes of the test split, the most probable bins
        "save_every": 10,
        "compile_quickly": False,  # True: little optimised, for runs that are mostly compilation
        "mesh": {"data": -1},
    })  # fmt: skip
    if variant == "seeds":
        config.seeds = (0, 1, 2)
    if variant == "full":
        config.suites = ("spatial", "object", "goal", "long")
        config.held_out = ("object/8", "object/9", "spatial/8", "spatial/9")
        config.eval.episodes = 4
    if variant == "tiny":
        _tiny(config)
    return config.lock()


def _tiny(config: ConfigDict) -> None:
    config.update({"compile_quickly": True, "base": "", "save_every": 1})
    config.held_out = ("object/9",)
    config.policy.update({"width": 32, "layers": 1})
    config.demonstrations.update({"few": 1, "many": 2})
    config.sft.update({"steps": 3, "batch_size": 8, "warmup": 0, "decay_steps": 1})
    config.opd.update({"steps": 2, "batch_size": 2, "group": 2, "warmup": 0, "decay_steps": 1, "micro_batches": 1})
    config.eval.episodes = 1
    for name in set(config.arms) - {"vla_opd", "sft_many", "opd_then_grpo"}:
        del config.arms[name]
