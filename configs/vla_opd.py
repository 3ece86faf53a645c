"""VLA-OPD (arXiv:2603.26666): a robot policy learns on its own episodes what an expert would have done at every state.

    python experiments/main.py --config=configs/vla_opd.py          # ten things that go into a basket
    python experiments/main.py --config=configs/vla_opd.py:full     # the tabletop's four suites, every arm: hours
    python experiments/main.py --config=configs/vla_opd.py:seeds    # the default's arms, three seeds
    python experiments/main.py --config=configs/vla_opd.py:tiny     # three arms, a step or two
    python experiments/main.py --config=configs/vla_opd.py:metaworld                  # ten tasks of a real simulator
    python experiments/main.py --config=configs/vla_opd.py:metaworld_state            # without pictures
    python experiments/main.py --config=configs/vla_opd.py:paper --config.student.path=... --config.teacher.path=...

The student begins with one demonstration of each task, in Meta-World with five. Its teacher is the world's scripted
expert, as a distribution over action bins. What has been measured is in `docs/results.md`.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("default", "tiny", "seeds", "full", "metaworld", "metaworld_state", "tiny_metaworld", "paper")
ALL = ("tiny", "full", "tiny_metaworld")  # with every arm
GRPO = ("grpo", "opd_then_grpo", "grpo_refilled")
MAIN = ("vla_opd", "forward_kl", "dagger", "sft_many", "grpo", "opd_then_grpo")


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, VARIANTS)
    config = ConfigDict({
        "experiment": "vla",
        "world": "tabletop",  # or metaworld, libero: simulators on the host
        "seeds": (0,),
        "only": () if variant in ALL else MAIN,  # names of arms, such as ('a', 'b'); (): all
        "suites": ("object",),  # of spatial, object, goal, long; of Meta-World: two, ten, mt10, mt50
        "held_out": ("object/8", "object/9"),  # tasks that only the first SFT has seen
        # What students begin with: "shipped", or your file, by configs/vla_base.py; of worlds on the host "practised",
        # which `practice` makes; "": random parameters.
        "base": "shipped",
        "policy": common.TABLETOP_POLICY | {"executed": 8},  # so much of a chunk
        "simulators": common.SIMULATORS,  # of worlds on the host
        "student": common.OPENVLA,  # a directory that students begin with, in place of `policy`'s sizes
        "teacher": {"path": "", "statistics": ""},  # another, which labels where an arm's teacher is given
        "flow": {"steps": 5, "noise_level": 0.5},  # of policies with a flow-matching head: from noise to a chunk
        "sigma": 0.1,  # of the expert's distribution over bins; an action is in [-1, 1]
        "floor": 0.01,  # share of it that lies on all bins alike, so that no mistake costs hundreds of nats
        "demos": "",  # a data set in LeRobot's format, in place of an expert's demonstrations; of worlds on the host
        "demonstrations": {"few": 1, "many": 20, "seed": 7},  # of each task
        "practice": {  # read where `base` is "practised": the world's other tasks, in episodes of the expert, disturbed
            "tasks": (),  # names; (): all that are in no suite
            "episodes": 25, "seed": 11,  # of each task
            "steps": 2500, "batch_size": 64, "learning_rate": 1e-3, "warmup": 100, "decay_steps": 1200,
            "weight_decay": 0.0, "micro_batches": 1, "ema_decay": 0.0,
        },
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
            "refills": 0,  # of GRPO: batches of initial states, at most, that are played in place of those whose
            "kept": (0.1, 0.9),  # share of successes is not in this range
            "updates": 1,  # optimiser steps on each rollout, each with its share of the episodes
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
            "grpo": {"method": "grpo", "learning_rate": 5e-5},
            "opd_then_grpo": {"method": "grpo", "start": "vla_opd", "learning_rate": 5e-5},
            "grpo_refilled": {"method": "grpo", "learning_rate": 5e-5, "refills": 3},
            "flow": {"head": "flow"},
            "group_1": {"batch_size": 16, "group": 1},  # as many episodes
            "group_2": {"batch_size": 8, "group": 2},
            "group_8": {"batch_size": 2, "group": 8},
        },
        "eval": {"episodes": 16, "seed": 1234},  # of each task, in scenes of the test split, the most probable bins
        "save_every": 10,
        "offload": False,  # True: moments and average wait in the host's memory between updates
        "compile_quickly": False,  # True: little optimised, for runs that are mostly compilation
        "mesh": common.mesh(),
    })  # fmt: skip
    if variant == "seeds":
        config.seeds = (0, 1, 2)
    if variant == "full":
        _full(config)
    if variant == "tiny":
        _tiny(config)
    if "metaworld" in variant:
        _metaworld(config)
    if variant == "metaworld_state":
        _metaworld_state(config)
    if variant == "tiny_metaworld":
        _tiny_metaworld(config)
    if variant == "paper":
        _paper(config)
    return config.lock()


def _full(config: ConfigDict) -> None:
    """Four suites: students that have seen more, and learn for longer."""
    config.suites = ("spatial", "object", "goal", "long")
    config.held_out = ("object/8", "object/9", "spatial/8", "spatial/9")
    config.demonstrations.few = 10
    config.sft.update({"steps": 1500, "learning_rate": 5e-4, "decay_steps": 700})
    config.opd.update({"batch_size": 16, "group": 1, "steps": 1500, "decay_steps": 500})
    for name in GRPO:
        config.arms[name].update({"batch_size": 4, "group": 4})
    config.update({"save_every": 50})
    config.eval.episodes = 4


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


def _metaworld(config: ConfigDict) -> None:
    """Ten tasks of Meta-World, students that have practised the forty others."""
    config.update({"world": "metaworld", "suites": ("ten",), "held_out": (), "base": "practised", "save_every": 20})
    config.policy.update({"width": 96, "points": 12})
    config.demonstrations.update({"few": 5, "many": 40})
    config.sft.update({
        "steps": 1000, "batch_size": 32, "learning_rate": 5e-4, "warmup": 30, "decay_steps": 500,
    })  # fmt: skip
    config.opd.update({"batch_size": 16, "group": 1, "steps": 1000, "decay_steps": 300, "micro_batches": 8})
    for name in GRPO:
        config.arms[name].update({"batch_size": 4, "group": 4})
    config.eval.episodes = 10


def _metaworld_state(config: ConfigDict) -> None:
    """The same for policies that see where things are, and no pictures: what is left is what to do."""
    config.simulators.state = True
    config.practice.update({"steps": 4000, "decay_steps": 2000})
    config.opd.update({"steps": 400, "decay_steps": 120, "micro_batches": 1})
    config.save_every = 100


def _tiny_metaworld(config: ConfigDict) -> None:
    """Two tasks, an update or two."""
    _tiny(config)
    config.update({"suites": ("two",), "held_out": ()})
    config.policy.update({"points": 2})
    config.simulators.update({"at_once": 4, "size": 32, "horizon": 64, "spare": 4})
    config.base = "practised"
    config.practice.update({"tasks": ("drawer-close-v3",), "episodes": 1})
    config.practice.update({"steps": 2, "batch_size": 8, "warmup": 0, "decay_steps": 1})
    config.arms.opd_then_grpo.update({"batch_size": 2, "group": 2})


def _paper(config: ConfigDict) -> None:
    """OpenVLA-OFT on LIBERO. Marks: VLA-OPD is the paper, which states little; RLinf and SimpleVLA-RL are the code of
    others that it builds on; "ours" is stated nowhere."""
    config.update({"world": "libero", "suites": ("spatial",), "held_out": (), "base": ""})
    config.mesh.update({"data": 1, "fsdp": -1})  # ours: parameters split over all devices
    config.only = ("vla_opd", "forward_kl", "dagger", "grpo", "opd_then_grpo")  # VLA-OPD, tables 1 and 3, fig. 4
    config.policy.update({"horizon": 8, "executed": 8})  # OpenVLA-OFT: chunks of 8 x 7, all 8 executed
    config.simulators.update({
        "workers": 64, "at_once": 64,  # RLinf: 64 environments
        "spare": 0, "size": 256, "fast": False,  # OpenVLA-OFT's evaluation; 10 settling steps are LIBERO's world's
    })  # fmt: skip
    config.student.update({
        "cameras": 1, "proprioception": False,  # SimpleVLA-RL
        "crop": 0.9,  # OpenVLA-OFT's evaluation
        "dtype": "bfloat16", "remat": "nothing",  # ours
    })  # fmt: skip
    config.sft.steps = 0  # the student's directory is already fine-tuned, on one demonstration of each task: VLA-OPD
    config.opd.update({
        "teacher": "given",
        "objective": "sampled",  # VLA-OPD, eq. 6 and 7; exact over the bins: objective=reverse_kl
        "batch_size": 64, "group": 8,  # VLA-OPD; initial states, and episodes of each
        "acting_temperature": 1.6, "temperature": 1.6, "teacher_temperature": 1.6,  # RLinf; not stated by VLA-OPD
        "learning_rate": 2e-6, "weight_decay": 0.01, "steps": 200,  # RLinf; not stated by VLA-OPD
        "warmup": 0, "decay_steps": 0,  # ours: constant, as SimpleVLA-RL
        "micro_batches": 16,  # ours: two episodes on each of 16 devices; at 32 libtpu 0.0.52 aborts, docs/scale.md
    })  # fmt: skip
    for name in GRPO:
        config.arms[name].update({
            "learning_rate": 5e-6, "weight_decay": 0.0, "steps": 100, "kept": (0.1, 0.9),  # SimpleVLA-RL
            "updates": 4,  # SimpleVLA-RL: 128 episodes each
            "refills": 4,  # ours: there is no limit there
            "micro_batches": 4,  # ours: as many episodes at a time as of the others
        })  # fmt: skip
    config.eval.episodes = 50  # OpenVLA-OFT: every fixed initial state, for testing alone (ours: not for training too)
    config.save_every = 10
