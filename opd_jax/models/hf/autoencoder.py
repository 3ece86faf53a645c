# SPDX-License-Identifier: Apache-2.0
"""Autoencoders of Stable Diffusion: a diffusers `vae` directory to `Autoencoder` and back, without torch.

A torch convolution is `[out, in, h, w]`, a Flax kernel `[h, w, in, out]`; a torch Linear is `[out, in]`, a Flax kernel
`[in, out]`. Data types stay as stored.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from opd_jax.config import ConfigError, write_atomic
from opd_jax.models.autoencoder import Autoencoder
from opd_jax.models.hf.tensor_files import TensorFiles, read_json

Params = dict[str, Any]

CLASS_NAME = "AutoencoderKL"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# diffusers' argument -> (Autoencoder's field, diffusers' default, which a config may leave out)
CONFIG = {
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "latent_channels": ("latent_channels", 4),
    "block_out_channels": ("block_channels", (64,)),
    "layers_per_block": ("layers_per_block", 1),
    "norm_num_groups": ("norm_groups", 32),
    "mid_block_add_attention": ("mid_attention", True),
    "use_quant_conv": ("use_quant_conv", True),
    "use_post_quant_conv": ("use_post_quant_conv", True),
    "scaling_factor": ("scaling_factor", 0.18215),
    "shift_factor": ("shift_factor", None),
}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
# Where diffusers tiles, and that float16 overflows: SD3.5's values.
UNUSED = {"sample_size": 1024, "force_upcast": True}


def load_autoencoder(directory: str | Path) -> tuple[Autoencoder, Params]:
    """The module a diffusers `AutoencoderKL` directory describes, and its parameters.

    Args:
        directory: a local directory, such as the `vae` folder of a Stable Diffusion 3.5 snapshot.

    Returns:
        `(module, params)`; parameters keep the stored data type; the module computes in float32, or as
        `module.clone(dtype=...)` says.

    Raises:
        ConfigError: naming the file that is absent (then it is a FileNotFoundError too) or corrupt, the class or config
            key it does not know, every missing or unexpected tensor, or the tensor whose shape is wrong.
    """
    directory = Path(directory)
    module = autoencoder_of(directory)
    expected = {_diffusers_name(path): (path, leaf.shape) for path, leaf in _shapes(module).items()}
    files = TensorFiles(directory, WEIGHTS)
    missing, extra = sorted(expected.keys() - files.names), sorted(files.names - expected.keys())
    if missing or extra:
        raise ConfigError(
            f"{directory} does not match its config.json: missing {missing}, unexpected {extra}; fetch it again"
        )
    params = {}
    for name, (path, shape) in expected.items():
        tensor = files.read(name)
        params[path] = jnp.asarray(_to_flax(tensor))
        if params[path].shape != shape:
            stored = _to_torch(np.broadcast_to(tensor.dtype.type(0), shape)).shape
            raise ConfigError(f"{name} has shape {tensor.shape}; the config says {stored}; fetch {directory} again")
    return module, unflatten_dict(params, sep="/")


def save_autoencoder(module: Autoencoder, params: Params, directory: str | Path) -> None:
    """Writes a directory that `load_autoencoder` and diffusers' `AutoencoderKL.from_pretrained` read, bit for bit.

    Raises:
        ValueError: naming the parameters that are missing, unexpected or of the wrong shape for `module`.
    """
    directory, flat = Path(directory), flatten_dict(params, sep="/")
    shapes, given = ({path: leaf.shape for path, leaf in tree.items()} for tree in (_shapes(module), flat))
    if wrong := sorted({path for path, _ in shapes.items() ^ given.items()}):
        raise ValueError(f"params do not belong to this module: {wrong} are missing, unexpected or of another shape")
    config = {"_class_name": CLASS_NAME, **{key: getattr(module, field) for key, (field, _) in CONFIG.items()}}
    config |= {key: [kind] * len(module.block_channels) for key, kind in BLOCKS.items()} | FIXED | UNUSED
    tensors = {_diffusers_name(path): np.ascontiguousarray(_to_torch(np.asarray(leaf))) for path, leaf in flat.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    write_atomic(directory / "config.json", json.dumps(config, indent=2) + "\n")


def autoencoder_of(directory: str | Path) -> Autoencoder:
    """The module alone, from `config.json`; no weights are read. Raises: as `load_autoencoder`, of that file."""
    file = Path(directory) / "config.json"
    config = read_json(file)
    if config.get("_class_name") != CLASS_NAME:
        raise ConfigError(f"{file} has _class_name={config.get('_class_name')!r}; only {CLASS_NAME!r} is known")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := sorted(config.keys() - (CONFIG | BLOCKS | FIXED | UNUSED).keys()):
        raise ConfigError(f"{file} has unknown keys {unknown}; remove them or load the model with diffusers")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{file} has {key}={config[key]!r}; only {value!r} is supported, load it with diffusers")
    fields = {field: config.get(key, default) for key, (field, default) in CONFIG.items()}
    fields |= {"block_channels": tuple(fields["block_channels"]), "shift_factor": fields["shift_factor"] or 0.0}
    for key, kind in BLOCKS.items():
        if list(config.get(key, [kind])) != [kind] * len(fields["block_channels"]):
            number = len(fields["block_channels"])
            raise ConfigError(f"{file} has {key}={config.get(key, [kind])}; only {number} of {kind!r} are supported")
    return Autoencoder(**fields)


def _shapes(module: Autoencoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter's shape by path, without computing any."""
    image = jax.ShapeDtypeStruct((1, module.downscale, module.downscale, module.in_channels), jnp.float32)
    return flatten_dict(jax.eval_shape(module.init, jax.random.key(0), image)["params"], sep="/")


def _diffusers_name(path: str) -> str:
    """`decoder/up_blocks_0/resnets_1/norm1/scale` is there `decoder.up_blocks.0.resnets.1.norm1.weight`."""
    path = re.sub(r"_(\d+)/", r".\1/", path)
    return re.sub(r"/(kernel|scale)$", "/weight", path).replace("/", ".")


def _to_flax(tensor: np.ndarray) -> np.ndarray:
    """Only convolutions have four axes, only linear layers two."""
    return {4: lambda t: t.transpose(2, 3, 1, 0), 2: np.transpose}.get(tensor.ndim, np.asarray)(tensor)


def _to_torch(leaf: np.ndarray) -> np.ndarray:
    return {4: lambda t: t.transpose(3, 2, 0, 1), 2: np.transpose}.get(leaf.ndim, np.asarray)(leaf)
