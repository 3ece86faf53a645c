"""Uni-OPD (arXiv:2605.03677): several teachers, balanced rollouts, margins calibrated by outcome; text and images.

    python experiments/main.py --config=configs/uni_opd.py          # from shipped models
    python experiments/main.py --config=configs/uni_opd.py:seeds    # three seeds, mean and standard deviation
    python experiments/main.py --config=configs/uni_opd.py:full     # every arm
    python experiments/main.py --config=configs/uni_opd.py:tiny     # every stage, a few steps

A student that reads text and pictures learns from the experts of domains whose answers can be checked. Wall time,
machine and the numbers to expect are in `docs/results.md`, with the commands.
"""

from ml_collections import ConfigDict

from configs import common
from opd_jax.worlds import domains

PLAIN = {"upsample": False, "balance": False, "margin": "none"}  # standard OPD
TEACHER = {"path": "", "url": "", "api": "vllm", "served_model": ""}  # a directory, or a server
SETTINGS = {  # a domain's teacher
    **{f"single_{domain}": {domain: domain} for domain in domains.DOMAINS},
    "multi": {"logic": "logic", "charts": "charts"},
    "strong": {"logic": "strong"},  # wider and deeper than the student
    "cross_modal": {"code": "text", "charts": "charts"},  # one teacher reads text alone
}
MAIN = (  # the arms of the default and of `seeds`
    "opd_single_logic", "uni_opd_single_logic", "opd_multi", "uni_opd_multi", "opd_strong", "uni_opd_strong",
    "opd_cross_modal", "uni_opd_cross_modal", "no_margin", "no_offline", "no_online", "ratio_half", "ratio_2",
    "shuffled", "reinforce",
)  # fmt: skip
VARIANTS = ("default", "full", "tiny", "seeds", "paper", "paper_vl")


def get_config(arg: str | None = None) -> ConfigDict:
    variant = common.variant(arg, VARIANTS)
    config = ConfigDict({
        "experiment": "uni_opd",
        "seeds": (0,),
        "only": MAIN if variant in ("default", "seeds") else (),  # names of arms, such as ('a', 'b'); (): all
        "student": {"path": ""},  # a Hugging Face directory; "": the embedded world's
        "compute": {  # of models from directories; parameters that are trained are float32 in any case
            "dtype": "float32",  # of products and of the cache; or bfloat16
            "remat": "",  # what the student's blocks keep for the backward pass: "" all; nothing; dots (docs/scale.md)
            "attention": "",  # within rows: "" is XLA's, keeping [S, S]; "flash" the device's kernel (docs/scale.md)
            "offload": False,  # True: moments and average wait in the host's memory between updates
            "sampling_copy": True,  # samplers read a copy that is whole over fsdp; False: gathered for every token
        },
        "teachers": {},  # NAME: as TEACHER, where problems.path is given
        "problems": {
            "path": "",  # a JSONL file; "": the embedded world's
            "count": 512,  # of each domain
            "levels": (1, 2, 3),
            "seed": 17,
            "template": "{prompt}",
            "chat": False,
            "thinking": False,  # enable_thinking of the chat template, where it knows that
            "prompt_tokens": 1_024,  # room for a prompt, images included
            "images": 1,  # most of a prompt; what a student of text alone does not ask for
            "max_pixels": 512 * 512,  # larger images are made smaller
        },
        "verifiers": {},  # DOMAIN: maths, code, choice, number or text, where its name is not one of them
        "sampler": {  # of rollouts; level 4 needs 64 tokens
            "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 48, "slots": 160,
        },
        "balancing": {  # offline: prompts by how often the student solves them
            "samples": 8, "shape": "u", "cap": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        },
        "settings": SETTINGS,
        "opd": {  # of every arm, if it says nothing else
            "setting": "multi",
            "method": "uni_opd",  # offline: on stored answers and labels; grpo: the outcome alone, no teacher
            "divergence": "reverse_kl",  # exact over the vocabulary; or forward_kl, ...; or sampled, as published
            "upsample": True,  # offline balancing
            "balance": True,  # answers balanced by outcome, right to wrong as ratio to 1
            "ratio": 1.0,
            "scope": "group",  # within which right and wrong answers are balanced: group, of a prompt, or batch
            "margin": "shift",  # shift, mask, none, reinforce
            "delta": 0.4,  # nats that right answers are to lead wrong ones by
            "mode": "mean",  # of right and of wrong answers; or minmax, the worst right and the best wrong one
            "direction": "both",  # which the shift moves; or correct_up, incorrect_down
            "retain": 0.25,  # share of the answers of a side that margin=mask leaves at least
            "token_gap": 10.0,  # nats; tokens whose log-ratio is as large are left out
            "shuffled": False,  # a control: outcomes dealt out at random within the batch
            "clip": 0.2,
            "clip_high": 0.28,
            "reduction": "record",  # every answer counts as one; or token, each token
            "steps": 64,
            "batch_size": 20,  # prompts of an update
            "group": 8,  # answers per prompt
            "micro_batches": 8,  # of answers of like length, each as wide as needed of
            "widths": (32, 48, 64),  # tokens, or of the whole width
            "label_parts": 1,  # that a teacher reads its answers of a batch in, one after the other, to bound memory
            "learning_rate": 1e-3,
            "warmup": 5,
            "decay_steps": 32,  # linear to zero over the last steps; 0: constant
            "weight_decay": 0.0,
            "b2": 0.98,
        },
        "arms": {
            f"{name}_{setting}": {"setting": setting} | change
            for setting in SETTINGS
            for name, change in (("opd", PLAIN), ("uni_opd", {}))
        } | {
            "no_margin": {"margin": "none"},
            "no_offline": {"upsample": False},
            "no_online": {"balance": False},
            "margin_mask": {"margin": "mask"},
            "ratio_half": {"ratio": 0.5},
            "ratio_2": {"ratio": 2.0},
            "shuffled": {"shuffled": True},
            "reinforce": {"margin": "reinforce"},
            "opd_sampled": {"divergence": "sampled"} | PLAIN,
            "sampled": {"divergence": "sampled"},
            "offline": {"method": "offline", "divergence": "sampled"},
            "grpo": {"method": "grpo"} | PLAIN,
        },
        "eval": {
            "path": "", "problems": 256, "seed": 1234, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
            "held_out": True,  # False: problems of the training split, to choose settings on
        },
        "shard": 128,  # prompts per shard of a store
        "save_every": 20,
        "shipped": True,  # False: random models of the same shapes
        "compile_quickly": False,  # True: little optimised, for runs that are mostly compilation
        "mesh": common.mesh(),
    })  # fmt: skip
    variants = {"tiny": _tiny, "seeds": _seeds, "paper": _paper, "paper_vl": _paper_vl}
    variants.get(variant, lambda _: None)(config)
    return config.lock()


def _seeds(config: ConfigDict) -> None:
    config.seeds = (0, 1, 2)


def _tiny(config: ConfigDict) -> None:
    config.shipped = False
    config.problems.count = 4
    config.sampler.slots = 8
    config.balancing.samples = 2
    few = {"steps": 2, "batch_size": 8, "group": 2, "warmup": 0, "decay_steps": 1}
    config.opd.update(few | {"micro_batches": 1, "widths": ()})
    config.eval.update({"problems": 2})
    config.update({"save_every": 1, "compile_quickly": True})
    config.shard = 4
    for name in set(config.arms) - {"uni_opd_multi", "sampled", "offline"}:
        del config.arms[name]


def _paper(config: ConfigDict) -> None:
    """Qwen3-4B (or 1.7B) from experts of mathematics and code: table C.2 and the released text scripts.

    Give `student.path`, `teachers.mathematics.path`, `teachers.code.path`, `problems.path` and `eval.path`. What
    neither states is marked as ours.
    """
    config.compute.update({"dtype": "bfloat16", "remat": "nothing"})  # ours
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 4})  # ours, for 64 chips: docs/scale.md
    config.teachers = {name: dict(TEACHER) for name in ("mathematics", "code")}
    config.verifiers = {"mathematics": "maths"}
    config.settings = {"multi": {"mathematics": "mathematics", "code": "code"}}
    config.problems.update({
        "path": "problems.jsonl",  # DeepMath of difficulty 6 and more, 57 K; Eurus-2-RL code, 25.3 K
        "count": 0,  # all
        "chat": True,
        "prompt_tokens": 4_096,
        "images": 0,
    })  # fmt: skip
    config.sampler.update({"max_new_tokens": 16_384, "slots": 256})
    config.balancing.update({"top_k": 50, "top_p": 0.95})  # cap: ours
    config.opd.update({
        "steps": 50,  # to the reported scores
        "batch_size": 64,
        "group": 16,
        "divergence": "sampled",
        "learning_rate": 1e-6,
        "warmup": 5,
        "decay_steps": 0,
        "weight_decay": 0.1,
        "b2": 0.98,
        "micro_batches": 64,  # ours: of 16 answers, one where fsdp=16, for attention is 20,480 x 20,480
        "label_parts": 32,  # ours, of 16 answers too
        "widths": (4_096, 8_192),  # ours
    })  # fmt: skip
    config.eval.update({"path": "held_out.jsonl", "problems": 0, "seed": 42})
    config.arms = {"opd_multi": config.arms.opd_multi, "uni_opd_multi": config.arms.uni_opd_multi}


def _paper_vl(config: ConfigDict) -> None:
    """Qwen3-VL-4B from experts of mathematics, logic and documents in pictures; what differs from the text runs."""
    _paper(config)
    names = ("mathematics", "logic", "documents")
    config.teachers = {name: dict(TEACHER) for name in names}
    config.settings = {"multi": {name: name for name in names}}
    config.verifiers = {"mathematics": "maths", "logic": "choice", "documents": "number"}  # ours, for OpenMMReasoner
    config.problems.images = 1
    config.opd.update({"direction": "correct_up", "delta": 0.0})
    # 64 in the paper, which neither three domains divide nor, one less, devices: 16 of each domain where fsdp=16
    config.opd.update({"batch_size": 48, "micro_batches": 48, "label_parts": 16})
