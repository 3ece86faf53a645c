"""Stable Diffusion 3 and 3.5 transformers: a diffusers directory to `MMDiT` and back, without torch.

A directory holds `config.json` and `diffusion_pytorch_model.safetensors`, or shards of it named by
`diffusion_pytorch_model.safetensors.index.json`. A torch Linear is `[out, in]`, a Flax kernel `[in, out]`; the patch
convolution `[D, C, p, p]` becomes a Dense on flattened patches `[p * p * C, D]`. Data types stay as stored.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from opd_jax.models.decoder import partition_rules
from opd_jax.models.hf.tensor_files import TensorFiles, read_json
from opd_jax.models.mmdit import RULES, MMDiT
from opd_jax.sharding import param_specs, put
from opd_jax.tensors import write_tensors

Params = dict[str, Any]

CLASS_NAME = "SD3Transformer2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# diffusers' argument -> (MMDiT's field, diffusers' default, which a config may leave out)
CONFIG = {
    "sample_size": ("sample_size", 128),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 16),
    "num_layers": ("num_layers", 18),
    "attention_head_dim": ("head_dim", 64),
    "num_attention_heads": ("num_heads", 18),
    "joint_attention_dim": ("joint_attention_dim", 4096),
    "pooled_projection_dim": ("pooled_projection_dim", 2048),
    "out_channels": ("out_channels", 16),
    "pos_embed_max_size": ("pos_embed_max_size", 96),
    "dual_attention_layers": ("dual_attention_layers", ()),
    "qk_norm": ("qk_norm", None),
}
# Flax path -> diffusers name, applied in turn
RENAMES = (
    (r"^pos_embed$", "pos_embed.pos_embed"),
    (r"^patch_embed/", "pos_embed.proj/"),
    (r"^(timestep|text)_embedder/", r"time_text_embed.\1_embedder/"),
    (r"^blocks_(\d+)/", r"transformer_blocks.\1/"),
    (r"(^|/)(norm1|norm1_context|norm_out)/", r"\1\2.linear/"),
    (r"/to_out/", "/to_out.0/"),
    (r"/proj_in/", "/net.0.proj/"),
    (r"/proj_out/", "/net.2/"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/", "."),
)


def load_mmdit(directory: str | Path, mesh: Mesh | None = None) -> tuple[MMDiT, Params]:
    """The module a diffusers SD3 transformer directory describes, and its parameters.

    Tensors are read one at a time, so the host holds one tensor beside what lies on the devices.

    Args:
      directory: a local directory, such as the `transformer` folder of a Stable Diffusion 3.5 snapshot.
      mesh: parameters are split over its axes `fsdp` and `tensor` by `mmdit.RULES`; None: the default device.

    Returns:
      `(module, params)`; parameters keep the stored data type; the module computes in float32, or as
      `module.clone(dtype=...)` says.

    Raises:
      FileNotFoundError: naming the file that is absent.
      ValueError: naming the corrupt file, the class or config key it does not know, or every missing or unexpected
        tensor, or the tensor whose shape is wrong.
    """
    directory = Path(directory)
    module = mmdit_of(directory)
    expected = {diffusers_name(path): (path, leaf.shape) for path, leaf in shapes_of(module).items()}
    files = TensorFiles(directory, WEIGHTS)
    missing, extra = sorted(expected.keys() - files.names), sorted(files.names - expected.keys())
    if missing or extra:
        raise ValueError(f"{directory} does not match its config.json: missing {missing}, unexpected {extra}")
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in expected.values()}
    specs = param_specs(shapes, partition_rules(mesh, RULES), mesh) if mesh else {}
    placed = lambda path, leaf: put(leaf, NamedSharding(mesh, specs[path])) if mesh else jnp.asarray(leaf)
    params = {
        path: placed(path, _to_flax(files.read(n), path, shape, module, n)) for n, (path, shape) in expected.items()
    }
    return module, unflatten_dict(params, sep="/")


def save_mmdit(module: MMDiT, params: Params, directory: str | Path) -> None:
    """Writes a directory that `load_mmdit` and diffusers' `SD3Transformer2DModel.from_pretrained` read, bit for bit.

    Raises:
      ValueError: naming the parameters that are missing, unexpected or of the wrong shape for `module`.
    """
    directory = Path(directory)
    flat = flatten_dict(params, sep="/")
    shapes, given = ({path: leaf.shape for path, leaf in tree.items()} for tree in (shapes_of(module), flat))
    wrong = sorted({path for path, _ in shapes.items() ^ given.items()})
    if wrong:
        raise ValueError(f"params do not belong to this module: {wrong} are missing, unexpected or of another shape")
    directory.mkdir(parents=True, exist_ok=True)
    config = {key: getattr(module, field) for key, (field, _) in CONFIG.items()}
    config["sample_size"] = module.sample_size or module.pos_embed_max_size * module.patch_size
    config = {"_class_name": CLASS_NAME, **config, "caption_projection_dim": module.width}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    paths = sorted(flat, key=lambda path: -flat[path].dtype.itemsize)  # aligned
    stored = lambda path: _stored_shape(path, flat[path].shape, module)
    leaves = [(diffusers_name(path), jax.ShapeDtypeStruct(stored(path), flat[path].dtype)) for path in paths]
    tensors = (_to_torch(np.asarray(flat[path]), path, module) for path in paths)
    write_tensors(directory / WEIGHTS, leaves, tensors, {"format": "pt"})


def mmdit_of(directory: str | Path) -> MMDiT:
    """The module alone, from `config.json`; no weights are read. Raises: as `load_mmdit`, of that file."""
    file = Path(directory) / "config.json"
    config = read_json(file)
    if config.get("_class_name") != CLASS_NAME:
        raise ValueError(f"{file} has _class_name={config.get('_class_name')!r}; only {CLASS_NAME!r} is known")
    unknown = sorted(k for k in config if not k.startswith("_") and k not in CONFIG and k != "caption_projection_dim")
    if unknown:
        raise ValueError(f"{file} has unknown keys {unknown}; remove them or load the model with diffusers")
    fields = {field: config.get(key, default) for key, (field, default) in CONFIG.items()}
    fields["dual_attention_layers"] = tuple(fields["dual_attention_layers"])
    if fields["out_channels"] is None:
        fields["out_channels"] = fields["in_channels"]
    module = MMDiT(**fields)
    if config.get("caption_projection_dim", 1152) != module.width:
        raise ValueError(
            f"{file} has caption_projection_dim={config.get('caption_projection_dim', 1152)}; it must equal "
            f"num_attention_heads * attention_head_dim = {module.width}"
        )
    return module


def shapes_of(module: MMDiT) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter's shape by path, without computing any."""
    side = module.patch_size
    inputs = (
        (1, side, side, module.in_channels),
        (1,),
        (1, 1, module.joint_attention_dim),
        (1, module.pooled_projection_dim),
    )
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    return flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"], sep="/")


def diffusers_name(path: str) -> str:
    """The name of a parameter in a diffusers directory, from its path here, `blocks_0/attn/to_q/kernel`."""
    for pattern, replacement in RENAMES:
        path = re.sub(pattern, replacement, path)
    return path


def _to_flax(tensor: np.ndarray, path: str, shape: tuple[int, ...], module: MMDiT, name: str) -> np.ndarray:
    stored = _stored_shape(path, shape, module)
    if tensor.shape != stored:
        raise ValueError(f"{name} has shape {tensor.shape}; the config says {stored}")
    if path == "patch_embed/kernel":
        tensor = tensor.transpose(2, 3, 1, 0).reshape(shape)
    elif path.endswith("/kernel"):
        tensor = tensor.T
    return tensor


def _stored_shape(path: str, shape: tuple[int, ...], module: MMDiT) -> tuple[int, ...]:
    return _to_torch(np.broadcast_to(np.float32(0), shape), path, module).shape


def _to_torch(leaf: np.ndarray, path: str, module: MMDiT) -> np.ndarray:
    if path == "patch_embed/kernel":
        p = module.patch_size
        return leaf.reshape(p, p, module.in_channels, -1).transpose(3, 2, 0, 1)
    return leaf.T if path.endswith("/kernel") else leaf
