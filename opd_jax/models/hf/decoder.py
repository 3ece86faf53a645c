"""Qwen3, Qwen2.5, Llama 3 and Qwen3-MoE: a transformers directory to `Decoder` and back, without torch.

Configs are read as transformers 4 or 5 writes them; how tensors are stacked is in `stacks`.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from opd_jax.config import ConfigError, checks
from opd_jax.models.decoder import RULES, Decoder
from opd_jax.models.hf.stacks import Layout, Params, load_params, save_params, special_tokens
from opd_jax.models.hf.tensor_files import read_json
from opd_jax.models.rope import Rope

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")


def load_decoder(
    directory: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, lazy: bool = False
) -> tuple[Decoder, Params]:
    """The module a transformers directory describes, and its parameters, in the memory that `load_params` needs.

    Args:
      directory: a local directory, such as a snapshot of Qwen/Qwen3-8B.
      dtype: data type of the parameters; None keeps the stored one.
      mesh: parameters are split over its axes `fsdp` and `tensor` by `decoder.RULES`; None: the default device.
      lazy: parameters go to no device; each is a `tensors.Lazy`, which reads the files when a writer asks for it.

    Returns:
      `(module, params)`; the module computes in float32, or as `module.clone(dtype=...)` says.

    Raises:
      ConfigError: naming the file that is absent (then it is a FileNotFoundError too) or corrupt; the architecture,
        rope type, activation or sliding window that is not supported; the missing, unexpected or misshapen tensors; or
        the parameter that does not split over the mesh.
    """
    directory = Path(directory)
    module = _module(directory / "config.json")
    return module, load_params(directory, _layout(module), RULES, dtype=dtype, mesh=mesh, lazy=lazy)


def save_decoder(
    module: Decoder,
    params: Params,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    like: str | Path | None = None,
) -> Path:
    """Writes a directory that `load_decoder` and transformers' `AutoModelForCausalLM` read, bit for bit.

    All is written beside the directory and renamed: a killed run leaves the whole directory or none.

    Args:
      params: on any devices, or `tensors.Lazy`; one parameter at a time is on the host.
      directory: new, or empty.
      max_shard_bytes: a larger model is split into several files.
      like: the directory of a model with the same tokenizer, whose tokenizer files, generation settings and ids of
        special tokens are copied.

    Raises:
      ConfigError: the directory holds something, or `like` is no model directory.
      ValueError: `params` do not belong to `module`; or none of the families has its combination of fields.
    """
    config = decoder_config(module) | special_tokens(like)
    return save_params(directory, _layout(module), params, config, max_shard_bytes=max_shard_bytes, like=like)


# ---- config.json -----------------------------------------------------------------------------------------------------


def _module(file: Path) -> Decoder:
    config = read_json(file)
    family, architectures = config.get("model_type"), config.get("architectures")
    if family not in FAMILIES or FAMILIES[family] not in (architectures or FAMILIES.values()):
        raise ConfigError(
            f"{file}: model_type={family!r} with architectures={architectures} is not supported; "
            f"use one of {', '.join(FAMILIES.values())}"
        )
    return decoder_module(file, config)


def decoder_module(file: Path, config: dict[str, Any]) -> Decoder:
    """The decoder of a config whose `model_type` is one of `FAMILIES`; `file` is for errors, which are ConfigErrors."""
    family, config = config["model_type"], {"num_experts": config.get("num_local_experts")} | config
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    moe = family == "qwen3_moe"
    sizes += ("moe_intermediate_size", "num_experts", "num_experts_per_tok") if moe else ("intermediate_size",)
    if absent := [key for key in sizes if config.get(key) is None]:
        raise ConfigError(f"{file}: {', '.join(absent)} missing; fetch it again")
    _check_config(file, config)
    heads, bias = config["num_attention_heads"], bool(config.get("attention_bias", False))
    return Decoder(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        mlp_width=config["moe_intermediate_size" if moe else "intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
        rope=_rope(file, config),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        num_experts=config["num_experts"] if moe else 0,
        experts_per_token=config["num_experts_per_tok"] if moe else 0,
        normalize_experts=moe and bool(config.get("norm_topk_prob", False)),
        max_positions=config["max_position_embeddings"],
    )


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """Refuses what would change the function and is not in `Decoder`."""
    get, moe = config.get, config["model_type"] == "qwen3_moe"
    sliding = get("use_sliding_window") and get("sliding_window", 4096) is not None
    if not moe:
        fewer = get("max_window_layers", 28) < config["num_hidden_layers"]
        sliding = set(get("layer_types") or ()) - {"full_attention"} or (sliding and fewer and not get("layer_types"))
    dense_layers = moe and (get("mlp_only_layers") or get("decoder_sparse_step", 1) != 1)
    with checks() as check:
        check(
            not sliding,
            f"{file}: use_sliding_window={get('use_sliding_window')}, layer_types={get('layer_types')}: "
            "no sliding windows are supported; use a model with full attention in all layers",
        )
        check(get("hidden_act", "silu") == "silu", f"{file}: hidden_act={get('hidden_act')!r}; only silu is supported")
        check(
            not dense_layers,
            f"{file}: mlp_only_layers={get('mlp_only_layers')}, decoder_sparse_step={get('decoder_sparse_step')}: "
            "layers without experts are not supported among others; use a model with experts in all layers",
        )


def _rope(file: Path, config: dict[str, Any]) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    stored = config.get("rope_scaling") or config.get("rope_parameters") or {}
    get = lambda key, default: default if stored.get(key) is None else stored[key]
    kind = get("rope_type", get("type", "default"))
    kind = "per layer type" if any(isinstance(value, dict) for value in stored.values()) else kind
    partial = get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if kind not in ROPES or partial != 1.0:
        raise ConfigError(
            f"{file}: rope type {kind!r} with partial_rotary_factor={partial} is not supported; "
            f"only {', '.join(ROPES)} over whole heads"
        )
    theta, longest = get("rope_theta", config.get("rope_theta", 10_000.0)), config["max_position_embeddings"]
    if kind == "default":
        return Rope(theta)
    trained = config.get("original_max_position_embeddings") or get("original_max_position_embeddings", longest)
    trained = longest if kind == "dynamic" else trained
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    if absent := [key for key in needed if stored.get(key) is None]:
        raise ConfigError(f"{file}: rope type {kind!r} lacks {', '.join(absent)}; fetch it again")
    rope = Rope(theta, kind, factor=stored["factor"])
    if kind == "linear":
        return rope
    rope = rope._replace(original_max_positions=trained)
    if kind == "llama3":
        return rope._replace(low_freq_factor=stored["low_freq_factor"], high_freq_factor=stored["high_freq_factor"])
    if kind == "yarn":
        return rope._replace(
            beta_fast=get("beta_fast", 32.0),
            beta_slow=get("beta_slow", 1.0),
            truncate=get("truncate", True),
            attention_factor=get("attention_factor", _yarn_scale(stored)),
        )
    return rope


def _yarn_scale(stored: dict[str, Any]) -> float | None:
    """DeepSeek's way to state the attention factor; None leaves it to `Rope`."""
    if not (stored.get("mscale") and stored.get("mscale_all_dim")):
        return None
    scale = lambda m: 0.1 * m * math.log(max(stored["factor"], 1.0)) + 1.0
    return scale(stored["mscale"]) / scale(stored["mscale_all_dim"])


def decoder_config(module: Decoder) -> dict[str, Any]:
    """What transformers 4 and 5 both read.

    Raises:
      ValueError: none of the families has the module's combination of fields.
    """
    family = _family(module)
    config = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": module.vocab_size,
        "hidden_size": module.width,
        "intermediate_size": module.mlp_width,
        "num_hidden_layers": module.num_layers,
        "num_attention_heads": module.num_heads,
        "num_key_value_heads": module.num_kv_heads,
        "head_dim": module.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": module.norm_epsilon,
        "max_position_embeddings": module.max_positions,
        "tie_word_embeddings": module.tie_embeddings,
        "rope_theta": module.rope.theta,
        "rope_scaling": _rope_scaling(module.rope),
        "use_sliding_window": False,
    }
    if family != "qwen2":
        config["attention_bias"] = module.qkv_bias
    if family == "llama":
        config["mlp_bias"] = module.mlp_bias
    if family == "qwen3_moe":
        config |= {"moe_intermediate_size": module.mlp_width, "num_experts": module.num_experts}
        config |= {"num_experts_per_tok": module.experts_per_token, "norm_topk_prob": module.normalize_experts}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return config


def _family(module: Decoder) -> str:
    same = module.qkv_bias == module.out_bias
    if module.qk_norm and same and not module.mlp_bias:
        return "qwen3_moe" if module.num_experts else "qwen3"
    if not module.qk_norm and not module.num_experts and same:
        return "llama"
    if not module.qk_norm and not module.num_experts and module.qkv_bias and not module.mlp_bias:
        return "qwen2"
    fields = ("qk_norm", "qkv_bias", "out_bias", "mlp_bias", "num_experts")
    given = ", ".join(f"{name}={getattr(module, name)}" for name in fields)
    raise ValueError(f"no family of {', '.join(FAMILIES)} has {given}; save it with checkpoint.save_params")


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow", "truncate")}
    scaling |= {name: getattr(rope, name) for name in names.get(rope.kind, ())}
    if rope.kind == "yarn" and rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    return scaling


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _layout(module: Decoder) -> Layout:
    """Every parameter's shape, without computing any, and transformers' names."""
    params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    return Layout(
        {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()},
        lambda name: name if name == "lm_head" else f"model.{name}",
        tied="model.embed_tokens.weight" if module.tie_embeddings else "",
    )
