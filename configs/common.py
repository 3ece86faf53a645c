"""Pieces that several configs share: models, and the settings of a family of experiments."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from opd_jax.worlds import domains, functions, reasoning, scenes


def mesh() -> dict[str, int]:
    """Devices along each axis of `opd_jax.sharding.AXES`; -1, of one of them, takes what is left."""
    return {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1}


def scene_model() -> ConfigDict:
    """The diffusion transformer of the scenes world: 1.3 M parameters."""
    return ConfigDict({
        "patch_size": 4,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 4,
        "num_heads": 3,
        "head_dim": 32,
        "joint_attention_dim": scenes.CONTEXT_DIM,
        "pooled_projection_dim": scenes.POOLED_DIM,
        "pos_embed_max_size": scenes.SIZE // 4,
    })  # fmt: skip


def reasoning_model(width: int, layers: int) -> ConfigDict:
    """A decoder of the Qwen3 family for the reasoning world."""
    return ConfigDict({
        "vocab_size": len(reasoning.WORDS),
        "width": width,
        "mlp_width": 3 * width,
        "num_layers": layers,
        "num_heads": width // 32,
        "num_kv_heads": width // 32,
        "head_dim": 32,
        "qk_norm": True,
        "tie_embeddings": True,
        "max_positions": reasoning.PROMPT_TOKENS + reasoning.SOLUTION_TOKENS,
    })  # fmt: skip


def functions_model(width: int, layers: int) -> ConfigDict:
    """A decoder for records of Python functions."""
    model = reasoning_model(width, layers)
    model.update({"vocab_size": functions.VOCABULARY, "max_positions": 256})
    return model


def domains_model(width: int, layers: int, pictures: bool = True) -> ConfigDict:
    """A model of the Qwen3-VL family for the world of five domains; without `pictures` its decoder alone."""
    decoder = reasoning_model(width, layers)
    decoder.update({"vocab_size": len(domains.WORDS), "max_positions": 128})
    model = ConfigDict({"decoder": decoder})
    if pictures:
        model.vision = {
            "width": 64, "mlp_width": 192, "num_layers": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 1,
            "num_positions": (domains.IMAGE_SIZE // 4) ** 2, "deepstack": (),
        }  # fmt: skip
        model.rope_sections = (6, 5, 5)
    return model


def language_experiment() -> ConfigDict:
    """What the configs of language models share; `experiments/reasoning.py` reads it."""
    optimizer = {"warmup": 5, "weight_decay": 0.0, "b2": 0.999, "micro_batches": 1}
    return ConfigDict({
        "experiment": "reasoning",
        "seeds": (0,),  # of the students, from SFT on; the teachers are one for all
        "only": (),  # names of arms, such as ('a', 'b'); (): all
        "allow_inconsistent_teacher": False,  # True: run arms whose labels are not of the teacher that wrote SFT data
        "student": {"path": "", "layers": 0},  # a Hugging Face directory; "": shipped, of `layers` random ones if not 0
        "compute": {  # of models from directories; parameters that are trained are float32 in any case
            "dtype": "float32",  # of products and of the cache; or bfloat16
            "remat": "",  # what the student's blocks keep for the backward pass: "" all; nothing; dots (docs/scale.md)
            "attention": "",  # within rows: "" is XLA's, keeping [S, S]; "flash" the device's kernel (docs/scale.md)
            "offload": False,  # True: moments and average wait in the host's memory between updates
            "sampling_copy": True,  # samplers read a copy that is whole over fsdp; False: gathered for every token
        },
        "teachers": {
            "own": {"path": "", "layers": 0, "url": "", "api": "vllm", "served_model": ""},
            "other": {"path": "", "layers": 0, "url": "", "api": "vllm", "served_model": ""},
        },
        "problems": {  # that are answered on-policy; "": the embedded world's
            "path": "",
            "count": 8_192,  # 0: all of the file
            "levels": (1, 2, 3),
            "seed": 17,
            "template": "{prompt}",
            "chat": False,
            "prompt_tokens": 20,  # room for a prompt; level 5 needs 48
        },
        "sampler": {  # of rollouts, online and stored alike; level 5 needs 96 tokens
            "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 44, "slots": 128,
        },
        "sft": {
            "path": "",  # problems of the teacher's answers, if not those of `problems`
            "answers": 2_048,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "steps": 300,  # 0: the student as it is
            "batch_size": 64,
            "learning_rate": 2e-3,
            "decay_steps": 150,
        } | optimizer,
        "opd": {  # of every arm, if it says nothing else
            "method": "online",  # online, lightning, off_policy, grpo, sft
            "sft": "own",  # the teacher on whose answers the student was fine-tuned
            "teacher": "own",  # the one that labels
            "residual": False,  # labels without what the teacher's style shares: Lightning OPD 2.0
            "allow_inconsistent_teacher": False,
            "divergence": "sampled",  # online: of the sampled token, or exact: reverse_kl, forward_kl, ...
            "parameter": placeholder(float),  # of the divergence; None: its own
            "weighting": "unit",  # lightning: unit, reference, sampling
            "clip": 0.3,  # of the advantage, in nats; the paper's 10 led offline arms astray in batches of 64
            "steps": 120,
            "batch_size": 128,  # prompts of an update
            "group": 1,  # answers per prompt
            "learning_rate": 3e-4,
        } | optimizer,
        "shard": 1_024,  # problems per shard of a store
        "eval": {
            "path": "", "problems": 1_024, "seed": 1234, "temperature": 0.6, "top_k": 0, "top_p": 0.95,
            "held_out": True,  # False: problems of the training split, to choose settings on; embedded world only
        },
        "save_every": 50,
        "compile_quickly": False,  # True: little optimised, for runs that are mostly compilation
        "mesh": mesh(),
    })  # fmt: skip


def tiny_language(config: ConfigDict) -> None:
    for part in (config.student, *config.teachers.values()):
        part.layers = 1
    config.problems.count = config.sft.answers = config.eval.problems = 8
    config.sampler.update({"max_new_tokens": 12, "slots": 4})
    config.eval.update({"temperature": 1.0, "top_p": 1.0})  # as the other samplers, so that less is compiled
    config.sft.update({"steps": 2, "batch_size": 4, "decay_steps": 0, "warmup": 0})
    config.opd.update({"steps": 2, "batch_size": 4, "warmup": 0})
    config.update({"shard": 4, "save_every": 1, "compile_quickly": True})
    for arm in config.arms.values():
        arm.update({key: 2 for key in ("batch_size", "group") if key in arm})


def variant(arg: str | None, known: tuple[str, ...]) -> str:
    """The variant named after the colon of `--config=FILE:variant`. Raises: ValueError naming what is known."""
    name = arg or "default"
    if name not in known:
        raise ValueError(f"unknown variant {name!r}: choose one of {', '.join(known)}")
    return name


# Policies of the tabletop: chunks of `horizon` actions.
TABLETOP_POLICY = {"width": 64, "layers": 2, "horizon": 8, "points": 6}  # points 0: a vision transformer

# Simulators on the host, in processes.
SIMULATORS = {
    "workers": 2,  # processes
    "at_once": 16,  # simulators, and rows of the policy; their memory is the limit
    "spare": 24,  # idle ones of 40 MB that a process keeps for other tasks: making one takes .15 s
    "timeout": 120.0,  # seconds for one decision of one
    "cameras": ("topview", "gripperPOV"),  # of Meta-World
    "size": 64,  # of pictures, in pixels
    "state": False,  # of Meta-World: the policy sees no pictures, but all that the expert goes by, where things are
    "fast": True,  # pictures without shadows, reflections and multisampling
    "horizon": 120,  # steps of an episode of Meta-World
}

# A policy in OpenVLA's layout, for worlds on the host.
OPENVLA = {
    "path": "",
    "statistics": "",  # the data set whose actions it goes by (unnorm_key); "": the only one
    "cameras": 1,  # the first of the simulator's
    "crop": 0.9,  # share of a picture that is left, in the middle
    "proprioception": False,
    "dtype": "float32",  # of products, or bfloat16; parameters that are trained are float32
    "remat": "",  # what blocks keep for the backward pass: "" all; or nothing, dots and so on (docs/scale.md)
    "attention": "",  # of the language model: "" is XLA's; "flash" the device's kernel (docs/scale.md)
    "sampling_copy": True,  # episodes read a copy that is whole over fsdp; False: gathered at every decision
}
