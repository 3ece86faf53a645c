"""Qwen3, Qwen2.5, Llama 3 and Qwen3-MoE: a transformers directory to `Decoder` and back, without torch.

A directory holds `config.json`, as transformers 4 or 5 writes it, and `model.safetensors`, or shards of it named by
`model.safetensors.index.json`. A torch Linear is `[out, in]`, a Flax kernel `[in, out]`, and a parameter of the scanned
block is the stack of what the file has for every layer (and every expert).
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors.numpy import save_file

from opd_jax.config import ConfigError, checks, write_atomic
from opd_jax.models.decoder import Decoder, Rope, partition_rules
from opd_jax.models.hf.tensor_files import TensorFiles, read_json
from opd_jax.sharding import shard_params

Params = dict[str, Any]

WEIGHTS = "model.safetensors"
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a constant that old Llama checkpoints hold
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
COMPANIONS += ("chat_template*", "generation_config.json")


def load_decoder(directory: str | Path, *, dtype: Any = None, mesh: Mesh | None = None) -> tuple[Decoder, Params]:
    """The module a transformers directory describes, and its parameters.

    Tensors are read one at a time from mapped files into their stack, and each stack goes to its devices before the
    next: the peak on the host is one parameter of all layers beside what the devices hold.

    Args:
      directory: a local directory, such as a snapshot of Qwen/Qwen3-8B.
      dtype: data type of the parameters; None keeps the stored one.
      mesh: parameters are split over its axes `data` and `model` by `decoder.RULES`; None: the default device.

    Returns:
      `(module, params)`; the module computes in float32, or as `module.clone(dtype=...)` says.

    Raises:
      ConfigError: naming the file that is absent (then it is a FileNotFoundError too) or corrupt; the architecture,
        rope type, activation or sliding window that is not supported; the missing, unexpected or misshapen tensors; or
        the parameter that does not split over the mesh.
    """
    directory = Path(directory)
    module = _module(directory / "config.json")
    shapes, files = _shapes(module), TensorFiles(directory, WEIGHTS)
    _check_tensors(directory, module, shapes, files)
    params = {}
    for path, shape in shapes.items():
        stack = _read(files, path, shape, dtype)
        params[path] = shard_params({path: stack}, mesh, partition_rules(mesh))[path] if mesh else jnp.asarray(stack)
        del stack  # before the next one is made
    return module, unflatten_dict(params, sep="/")


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
      params: on any devices; one tensor and one shard at a time come to the host.
      directory: new, or empty.
      max_shard_bytes: a larger model is split into several files.
      like: the directory of a model with the same tokenizer, whose tokenizer files, generation settings and ids of
        special tokens are copied.

    Raises:
      ConfigError: the directory holds something, or `like` is no model directory.
      ValueError: `params` do not belong to `module`; or none of the families has its combination of fields.
    """
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is not an empty directory; give a new one to save the model in")
    flat = flatten_dict(params, sep="/")
    given = {path: leaf.shape for path, leaf in flat.items()}
    if wrong := sorted({path for path, _ in _shapes(module).items() ^ given.items()}):
        raise ValueError(f"params do not belong to this module: {wrong} are missing, unexpected or of another shape")
    config = _config(module, flat["embed_tokens/embedding"].dtype)
    if like is not None:
        source = read_json(Path(like) / "config.json")
        config |= {f"{token}_token_id": source.get(f"{token}_token_id") for token in ("bos", "eos", "pad")}

    draft = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)  # of a run killed in the middle of a write
    draft.mkdir(parents=True)
    _write_tensors(flat, draft, max_shard_bytes)
    for file in (file for pattern in COMPANIONS if like is not None for file in Path(like).glob(pattern)):
        shutil.copy(file, draft)
    write_atomic(draft / "config.json", json.dumps(config, indent=2) + "\n")
    os.replace(draft, directory)
    return directory


# ---- config.json -----------------------------------------------------------------------------------------------------


def _module(file: Path) -> Decoder:
    config = read_json(file)
    family, architectures = config.get("model_type"), config.get("architectures")
    if family not in FAMILIES or FAMILIES[family] not in (architectures or FAMILIES.values()):
        raise ConfigError(
            f"{file}: model_type={family!r} with architectures={architectures} is not supported; "
            f"use one of {', '.join(FAMILIES.values())}"
        )
    config.setdefault("num_experts", config.get("num_local_experts"))
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


def _config(module: Decoder, dtype: Any) -> dict[str, Any]:
    """What transformers 4 and 5 both read."""
    family = _family(module)
    config = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "torch_dtype": str(dtype),
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


def _shapes(module: Decoder) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by path, without computing any."""
    params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def _names(path: str, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str, tuple[int, ...]]]:
    """For each tensor of a parameter: where it is in the stack, its name, and its shape in the file."""
    *parts, leaf = path.split("/")
    depth = sum(part in ("layers", "experts") for part in parts)
    stored = shape[depth:][::-1] if leaf == "kernel" else shape[depth:]
    for index in np.ndindex(shape[:depth]):
        number = iter(index)
        name = ".".join(f"{part}.{next(number)}" if part in ("layers", "experts") else part for part in parts)
        root = "" if parts[0] == "lm_head" else "model."
        yield index, f"{root}{name}.{'bias' if leaf == 'bias' else 'weight'}", stored


def _check_tensors(directory: Path, module: Decoder, shapes: dict[str, tuple[int, ...]], files: TensorFiles) -> None:
    expected = {name: stored for path, shape in shapes.items() for _, name, stored in _names(path, shape)}
    missing = sorted(expected.keys() - files.names)
    extra = {name for name in files.names - expected.keys() if not IGNORED.search(name)}
    if module.tie_embeddings and "lm_head.weight" in extra:  # stored all the same; then it must be the same
        extra.remove("lm_head.weight")
        if not np.array_equal(files.read("lm_head.weight"), files.read("model.embed_tokens.weight")):
            raise ConfigError(
                f"{directory}: lm_head.weight differs from the embedding although tie_word_embeddings is true; "
                "set it to false in config.json"
            )
    few = lambda names: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if missing or extra:
        raise ConfigError(
            f"{directory} does not match its config.json: missing [{few(missing)}], unexpected [{few(sorted(extra))}]; "
            "fetch both again"
        )
    for name, stored in expected.items():
        if files.shape(name) != stored:
            raise ConfigError(f"{directory}: {name} has shape {files.shape(name)}; its config.json says {stored}")


def _read(files: TensorFiles, path: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    stack = None
    for index, name, _ in _names(path, shape):
        tensor = files.read(name)
        if stack is None:
            stack = np.empty(shape, dtype or tensor.dtype)
        if dtype is None and tensor.dtype != stack.dtype:
            raise ConfigError(f"{name} is {tensor.dtype}, layers before it {stack.dtype}; give load_decoder a dtype")
        stack[index] = tensor.T if path.endswith("/kernel") else tensor
    return stack


def _write_tensors(flat: dict[str, Any], directory: Path, max_shard_bytes: int) -> None:
    entries = [(path, *entry) for path, leaf in flat.items() for entry in _names(path, leaf.shape)]
    shards, room = [], 0
    for path, index, name, stored in entries:
        size = math.prod(stored) * flat[path].dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((path, index, name))
        room -= size

    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for path, index, name in shard:
            tensor = np.asarray(flat[path][index])
            tensors[name] = np.ascontiguousarray(tensor.T if path.endswith("/kernel") else tensor)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        with open(directory / file, "rb") as written:
            os.fsync(written.fileno())
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(leaf.nbytes for leaf in flat.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(directory / f"{WEIGHTS}.index.json", json.dumps(index, indent=2) + "\n")
