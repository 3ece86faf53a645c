"""Lightning OPD (arXiv:2604.13010): distillation on stored answers of the student, labelled once, beside online OPD.

    python experiments/main.py --config=configs/lightning_opd.py    # from shipped models; 8 to 17 minutes on two cores
    python experiments/main.py --config=configs/lightning_opd.py:seeds      # three seeds, mean and standard deviation
    python experiments/main.py --config=configs/lightning_opd.py:tiny       # every stage, a few steps

The student answers problems of the embedded world; `qwen3_0p6b` and `paper` take your own directories of weights and
files of problems. Wall time, machine and the numbers to expect are in `docs/results.md`, with the commands.
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("default", "tiny", "seeds", "qwen3_0p6b", "paper")


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, VARIANTS)
    config = common.language_experiment()
    ablation = {"allow_inconsistent_teacher": True}  # the paper's grid; a run of your own is stopped with the reason
    config.arms = {
        "online": {"method": "online"},
        "lightning": {"method": "lightning"},
        "lightning_weighted": {"method": "lightning", "weighting": "reference"},  # tokens by pi_S / pi_ref; ours
        "off_policy": {"method": "off_policy"},  # the teacher's distribution on the teacher's answers
        "grpo": {"method": "grpo", "group": 8, "batch_size": 16, "learning_rate": 1e-4},
        # METHOD_A_B: SFT data of teacher A, labels of teacher B
        "online_own_other": {"teacher": "other"} | ablation,
        "lightning_own_other": {"method": "lightning", "teacher": "other"} | ablation,
        "residual_own_other": {"method": "lightning", "teacher": "other", "residual": True},  # Lightning OPD 2.0
        "online_other_own": {"sft": "other"} | ablation,
        "lightning_other_own": {"method": "lightning", "sft": "other"} | ablation,
        "residual_other_own": {"method": "lightning", "sft": "other", "residual": True},
    }
    {"tiny": common.tiny_language, "seeds": _seeds, "qwen3_0p6b": _qwen3_0p6b, "paper": _paper}.get(
        variant, lambda _: None
    )(config)
    return config.lock()


def _seeds(config: ConfigDict) -> None:
    config.seeds = (0, 1, 2)


def _qwen3_0p6b(config: ConfigDict) -> None:
    """One GPU: a student of 0.6 B parameters from one of 1.7 B, shorter answers. Ours, not the paper's."""
    _paper(config)
    config.mesh.update(common.mesh())
    config.problems.count = config.sft.answers = 4_000
    config.sft.update({"steps": 500, "warmup": 50, "decay_steps": 450, "batch_size": 16, "micro_batches": 4})
    config.sampler.update({"max_new_tokens": 1_024, "slots": 64})
    config.opd.update({"batch_size": 64, "micro_batches": 16, "learning_rate": 1e-5})
    config.arms.online.update({"batch_size": 16, "group": 4})  # as many answers; the cache of 256 does not fit


def _paper(config: ConfigDict) -> None:
    """Qwen3-8B-Base from Qwen3-32B, tables 5 and 6; `code` marks what the released code does where the paper is silent.

    Give `student.path`, `teachers.own.path`, `problems.path` and `eval.path`, and `teachers.own.url` for a teacher that
    a server holds.
    """
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 4})  # ours, for 64 chips: docs/scale.md
    config.compute.update({"dtype": "bfloat16", "remat": "nothing"})  # ours
    config.problems.update(
        {
            "path": "problems.jsonl",  # DAPO-Math-17k
            "count": 0,  # all
            "template": "Question: {prompt}\nPlease reason step by step, and put your final answer within \\boxed{}.",
            "chat": True,  # code: with enable_thinking
            "prompt_tokens": 1_024,  # not stated
        }
    )
    config.eval.update({"path": "held_out.jsonl", "problems": 0, "temperature": 0.6, "top_p": 0.95})
    config.sampler.update({"temperature": 0.8, "top_p": 1.0, "max_new_tokens": 4_096, "slots": 256})
    config.sft.update(
        {
            "path": "sft_problems.jsonl",  # OpenThoughts3, 300 K
            "answers": 0,
            "temperature": 0.7,  # code
            "top_p": 0.9,  # code
            "steps": 3_000,
            "batch_size": 128,
            "learning_rate": 8e-5,
            "warmup": 300,  # 0.1
            "decay_steps": 2_700,  # paper: cosine
            "micro_batches": 16,
        }
    )
    config.opd.update(
        {
            "steps": 150,
            "batch_size": 256,
            "group": 1,  # the online baseline: 64 prompts x 4
            "learning_rate": 2e-6,
            "warmup": 0,
            "weight_decay": 0.1,
            "b2": 0.98,
            "clip": 10.0,
            "micro_batches": 16,  # ours: one record per device at a time where data=16
        }
    )
    config.shard = 1_024
    del config.teachers["other"]
    for name in set(config.arms) - {"lightning", "online"}:
        del config.arms[name]
    config.arms.online.update({"batch_size": 64, "group": 4})
