"""Adapters of SD3 transformers in the files of PEFT and diffusers, read and written without torch.

| file | keys | scale |
| --- | --- | --- |
| PEFT's (and Flow-GRPO's) `adapter_model.safetensors` | `base_model.model.MODULE.lora_A.weight` | its config's |
| diffusers' `pytorch_lora_weights.safetensors` | `transformer.MODULE.lora_A.weight` | 1, its header's, or `.alpha` |

`lora_A` is `[r, in]`, our `a` transposed, and `lora_B` `[out, r]`. Here a scale is one number that is given beside an
adapter (`models.lora`), so a file's own is put into `b`.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from opd_jax.config import ConfigError, write_atomic
from opd_jax.models.hf.mmdit import diffusers_name, shapes_of
from opd_jax.models.hf.tensor_files import read_json
from opd_jax.models.lora import Adapter
from opd_jax.models.mmdit import MMDiT

PEFT, PEFT_CONFIG, DIFFUSERS = "adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"
PREFIXES = {PEFT: "base_model.model.", DIFFUSERS: "transformer."}


def load_lora(directory: str | Path, module: MMDiT, scale: float) -> Adapter:
    """An adapter for `module` from a directory, PEFT's file if it has both.

    Args:
        scale: that it will be given with: `scale * a @ b` is the update that the file describes.

    Returns:
        Factors as stored, `b` float32 where the file's scale is another.

    Raises:
        ConfigError: neither file is there; a tensor that is not a pair of factors of one of the module's matrices;
            another kind of adapter.
    """
    directory, paths = Path(directory), _paths(module)
    name = next((name for name in (PEFT, DIFFUSERS) if (directory / name).is_file()), None)
    if name is None:
        raise ConfigError(f"{directory}: holds no adapter; give a directory with {PEFT} or {DIFFUSERS}")
    with safe_open(directory / name, "numpy") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    factors: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(
            re.escape(PREFIXES[name]) + r"(.+?)\.(lora_A|lora_B|alpha)(?:\.default)?(?:\.weight)?", key
        )
        if found is None or found[1] not in paths:
            raise ConfigError(f"{directory / name}: {key} belongs to no matrix of this model; give one made for it")
        factors.setdefault(found[1], {})[found[2]] = tensor
    scales = _peft_scale(directory) if name == PEFT else _diffusers_scale(metadata)
    adapter = {}
    for own, pair in sorted(factors.items()):
        path, shape = paths[own]
        if not {"lora_A", "lora_B"} <= pair.keys():
            raise ConfigError(f"{directory / name}: {own} has only {sorted(pair)}; fetch the file again")
        a, b = jnp.asarray(pair["lora_A"]).T, jnp.asarray(pair["lora_B"]).T
        if (a.shape[0], b.shape[1]) != shape or a.shape[1] != b.shape[0]:
            raise ConfigError(f"{directory / name}: {own} has factors {a.shape} and {b.shape}, the model's is {shape}")
        given = float(pair["alpha"]) / a.shape[1] if "alpha" in pair else scales(own, a.shape[1])
        adapter[path] = {"a": a, "b": b if given == scale else b.astype(jnp.float32) * (given / scale)}
    return adapter


def save_lora(module: MMDiT, adapter: Adapter, scale: float, directory: str | Path, base: str = "") -> None:
    """Writes both files, for PEFT's `PeftModel.from_pretrained` and diffusers' `load_lora_weights`.

    Args:
        scale: `alpha / r`; PEFT's config has it, in diffusers' file it is in `lora_B`, whose scale is 1.
        base: name or path of the model that it adapts, for PEFT's config.

    Raises:
        ValueError: a path that is no matrix of the module, or ranks that differ.
    """
    directory, names = Path(directory), {path: own for own, (path, _) in _paths(module).items()}
    if unknown := sorted(adapter.keys() - names.keys()):
        raise ValueError(f"{unknown} are no linear layers of this model; leave them out of the pattern")
    ranks = {factors["a"].shape[1] for factors in adapter.values()}
    if len(ranks) != 1:
        raise ValueError(f"ranks {sorted(ranks)}; make them one, by `lora.truncate`")
    rank = ranks.pop()
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base or None, "r": rank, "lora_alpha": scale * rank,
        "target_modules": sorted(names[path] for path in adapter), "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_rslora": False,
        "use_dora": False, "task_type": None, "modules_to_save": None,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    for file, factor in ((PEFT, 1.0), (DIFFUSERS, scale)):
        tensors = {}
        for path, pair in adapter.items():
            own = PREFIXES[file] + names[path]
            tensors[f"{own}.lora_A.weight"] = np.ascontiguousarray(np.asarray(pair["a"]).T)
            tensors[f"{own}.lora_B.weight"] = np.ascontiguousarray((np.asarray(pair["b"]) * factor).T)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    write_atomic(directory / PEFT_CONFIG, json.dumps(config, indent=2) + "\n")


def _paths(module: MMDiT) -> dict[str, tuple[str, tuple[int, int]]]:
    """By diffusers' name of a linear layer, the path of its kernel and the kernel's shape."""
    kernels = {path: leaf.shape for path, leaf in shapes_of(module).items() if path.endswith("/kernel")}
    kernels.pop("patch_embed/kernel")  # a convolution there
    return {diffusers_name(path).removesuffix(".weight"): (path, shape) for path, shape in kernels.items()}


def _peft_scale(directory: Path):
    config = read_json(directory / PEFT_CONFIG)
    odd = [key for key in ("use_dora", "modules_to_save", "fan_in_fan_out") if config.get(key)]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        kind = config.get("peft_type"), *odd
        raise ConfigError(f"{directory / PEFT_CONFIG}: {kind} is not read; give a plain LoRA")
    patterns = config.get("alpha_pattern") or {}
    alpha = lambda own: next((value for key, value in patterns.items() if re.search(key, own)), config["lora_alpha"])
    return lambda own, rank: alpha(own) / (rank**0.5 if config.get("use_rslora") else rank)


def _diffusers_scale(metadata: dict[str, Any]):
    """Diffusers writes PEFT's config, its keys prefixed, into the file's header; without it alpha is the rank."""
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alpha = config.get("transformer.lora_alpha")
    return lambda own, rank: 1.0 if alpha is None else alpha / rank
