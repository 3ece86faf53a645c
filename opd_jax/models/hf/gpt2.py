"""GPT-2: a transformers directory to `GPT2` and back, without torch.

What is a matrix in a block is transformers' `Conv1D`, stored `[in, out]` like a Flax kernel. To `stacks` such a tensor
is a `weight`: it turns only a `kernel`.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from opd_jax.config import ConfigError, checks
from opd_jax.models.gpt2 import GPT2, RULES
from opd_jax.models.hf.stacks import (
    WEIGHTS,
    Layout,
    Params,
    check_tensors,
    places,
    read_placed,
    save_params,
    special_tokens,
)
from opd_jax.models.hf.tensor_files import TensorFiles, read_json

MODEL_TYPE, ARCHITECTURE = "gpt2", "GPT2LMHeadModel"
PREFIX = "transformer."  # of all tensors, but in files of the bare GPT2Model, as OpenAI's are
NAMES = {"embed_tokens": "wte", "embed_positions": "wpe", "layers": "h"}
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask and its -inf, in old checkpoints
# transformers' argument -> GPT2's field
SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "width",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_positions": "max_positions",
}
# What would change the function and is not in `GPT2`: the value that is supported, transformers' default
ONLY = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def load_gpt2(
    directory: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, lazy: bool = False
) -> tuple[GPT2, Params]:
    """The module a transformers directory describes, and its parameters, in the memory that `load_params` needs.

    Args:
      directory: a local directory, such as a snapshot of openai-community/gpt2 or distilbert/distilgpt2.
      dtype: data type of the parameters; None keeps the stored one.
      mesh: parameters are split over its axes `fsdp` and `tensor` by `gpt2.RULES`; None: the default device.
      lazy: parameters go to no device; each is a `tensors.Lazy`, which reads the files when a writer asks for it.

    Returns:
      `(module, params)`; the module computes in float32, or as `module.clone(dtype=...)` says. The config's dropout is
      left out.

    Raises:
      ConfigError: naming the file that is absent (then it is a FileNotFoundError too) or corrupt; the architecture,
        activation, attention or untied embedding that is not supported; the missing, unexpected or misshapen tensors;
        or the parameter that does not split over the mesh.
    """
    directory = Path(directory)
    module = gpt2_of(directory)
    files = _Files(directory, WEIGHTS)
    layout = _layout(module, PREFIX if any(name.startswith(PREFIX) for name in files.names) else "")
    check_tensors(directory, layout, files)
    where = places(_leaves(layout.shapes, "weight", "kernel"), RULES, mesh).values()
    params = {path: read_placed(files, layout, path, dtype, place, lazy) for path, place in zip(layout.shapes, where)}
    return module, unflatten_dict(_leaves(params, "weight", "kernel"), sep="/")


def save_gpt2(
    module: GPT2,
    params: Params,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    like: str | Path | None = None,
) -> Path:
    """Writes a directory that `load_gpt2` and transformers' `AutoModelForCausalLM` read, bit for bit.

    Arguments and errors are those of `save_decoder`.
    """
    flat = _leaves(flatten_dict(params, sep="/"), "kernel", "weight")
    config = _config(module) | special_tokens(like)
    return save_params(directory, _layout(module), flat, config, max_shard_bytes=max_shard_bytes, like=like)


# ---- config.json -----------------------------------------------------------------------------------------------------


def gpt2_of(directory: str | Path) -> GPT2:
    """The module alone, from `config.json`; no weights are read. Raises: as `load_gpt2`, of that file."""
    file = Path(directory) / "config.json"
    config = read_json(file)
    family, architectures = config.get("model_type"), config.get("architectures")
    if family != MODEL_TYPE or not {ARCHITECTURE, "GPT2Model"} & set(architectures or [ARCHITECTURE]):
        raise ConfigError(
            f"{file}: model_type={family!r} with architectures={architectures} is not supported; only {ARCHITECTURE}"
        )
    if absent := [key for key in SIZES if config.get(key) is None]:
        raise ConfigError(f"{file}: {', '.join(absent)} missing; fetch it again")
    with checks() as check:
        for key, value in ONLY.items():
            given = config.get(key, value)
            check(given == value, f"{file}: {key}={given!r} is not supported; only {value!r}")
    return GPT2(
        **{field: config[key] for key, field in SIZES.items()},
        mlp_width=config.get("n_inner") or 0,
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
    )


def _config(module: GPT2) -> dict[str, Any]:
    """What transformers 4 and 5 both read. Without ids of special tokens it would take 50256 for them."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{key: getattr(module, field) for key, field in SIZES.items()},
        "n_inner": module.mlp_width or None,
        "layer_norm_epsilon": module.norm_epsilon,
        **ONLY,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), None),
    }


# ---- tensors ---------------------------------------------------------------------------------------------------------


class _Files(TensorFiles):
    """Without the buffers."""

    @property
    def names(self) -> set[str]:
        return {name for name in super().names if not BUFFERS.search(name)}


def _layout(module: GPT2, prefix: str = PREFIX) -> Layout:
    """Every parameter's shape, without computing any, and transformers' names."""
    params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    rename = lambda name: prefix + re.sub(r"^\w+", lambda part: NAMES.get(part[0], part[0]), name)
    return Layout(_leaves(shapes, "kernel", "weight"), rename, tied=f"{prefix}wte.weight")


def _leaves(flat: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """With another name for some leaves."""
    return {re.sub(f"/{old}$", f"/{new}", path): leaf for path, leaf in flat.items()}
