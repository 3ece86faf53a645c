"""Models to plan with before their weights are here: public shapes by name, or a directory's config.json."""

from pathlib import Path

from configs import reasoning_models
from opd_jax.config import ConfigError
from opd_jax.models.decoder import Decoder
from opd_jax.models.hf.decoder import decoder_module
from opd_jax.models.hf.tensor_files import read_json


def _qwen3(layers: int, width: int, mlp_width: int, heads: int, tied: bool) -> dict:
    return {
        "model_type": "qwen3", "vocab_size": 151_936, "num_hidden_layers": layers, "hidden_size": width,
        "intermediate_size": mlp_width, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40_960, "rope_theta": 1e6, "tie_word_embeddings": tied,
    }  # fmt: skip


# From the config.json of huggingface.co/Qwen/Qwen3-*, and of meta-llama/Meta-Llama-3-8B.
PUBLIC = {
    "qwen3-0.6b": _qwen3(28, 1_024, 3_072, 16, True),
    "qwen3-1.7b": _qwen3(28, 2_048, 6_144, 16, True),
    "qwen3-4b": _qwen3(36, 2_560, 9_728, 32, True),
    "qwen3-8b": _qwen3(36, 4_096, 12_288, 32, False),
    "qwen3-32b": _qwen3(64, 5_120, 25_600, 64, False),
    "qwen3-30b-a3b": _qwen3(48, 2_048, 6_144, 32, False)
    | {"model_type": "qwen3_moe", "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128}
    | {"num_experts_per_tok": 8, "norm_topk_prob": True},
    "llama-3-8b": {
        "model_type": "llama", "vocab_size": 128_256, "num_hidden_layers": 32, "hidden_size": 4_096,
        "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8_192, "rope_theta": 5e5, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
VARIANTS = {"paper": ("qwen3-8b", "qwen3-32b"), "qwen3_0p6b": ("qwen3-0.6b", "qwen3-1.7b")}  # student, teacher


def module_of(name: str, flag: str) -> Decoder:
    """The module of a public name or of a Hugging Face directory. No weights are read.

    Raises: ConfigError: neither such a name nor a directory with a config.json that `load_decoder` takes.
    """
    if name.lower() in PUBLIC:
        return decoder_module(Path(name), PUBLIC[name.lower()])
    if not (Path(name) / "config.json").exists():
        raise ConfigError(f"{flag}={name}: neither a directory with a config.json nor one of {', '.join(PUBLIC)}")
    config = read_json(Path(name) / "config.json")
    if config.get("model_type") not in ("llama", "qwen2", "qwen3", "qwen3_moe"):
        raise ConfigError(f"{flag}={name}: model_type={config.get('model_type')!r} is no decoder that can be read")
    return decoder_module(Path(name) / "config.json", config)


def student_and_teacher(config, variant: str, student: str, teacher: str) -> tuple[Decoder, Decoder, bool]:
    """The modules a run of `config` would have: of the flags, else of its paths, else those of its variant.

    Returns: student, the teacher `own`, and whether both are shipped with the repository (float32, not loaded from a
    directory in their stored type).
    """
    if not config.problems.path and not (student or teacher):
        models, teachers = reasoning_models.get_config().models, config.teachers
        sized = lambda name, layers: Decoder(
            **models[name].model.to_dict() | ({"num_layers": layers} if layers else {})
        )
        return sized("student", config.student.layers), sized("teacher", teachers.own.layers), True
    defaults = VARIANTS.get(variant, ("", ""))
    names = {
        "student": student or config.student.path or defaults[0],
        "teacher": teacher or config.teachers.own.path or defaults[1],
    }
    for key, name in names.items():
        if not name:
            raise ConfigError(f"--{key}='': give a directory or one of {', '.join(PUBLIC)}")
    return *(module_of(name, f"--{key}") for key, name in names.items()), False
