"""OpenVLA and OpenVLA-OFT: a Hugging Face directory to `Vla` and back, without torch.

A directory holds `config.json`, the weights of Prismatic's model (arXiv 2402.07865) in safetensors, and the statistics
that actions are normalised by: `norm_stats` of the config, in whose place `dataset_statistics.json` is where it exists.
OpenVLA-OFT (arXiv 2502.19645) puts what it adds beside them, in torch's files.

| tensors | here |
| --- | --- |
| `vision_backbone.featurizer`, `.fused_featurizer`: DINOv2 and SigLIP in timm's names | `towers_0`, `towers_1` |
| of them the last block, the norm and the pooling after it, which features do not need | `OpenVla.unused` |
| `projector.fc1` to `fc3` | `projector` |
| `language_model`: a LlamaForCausalLM | `language_model` |
| `proprio_projector--*_checkpoint.pt`: `fc1`, `fc2` | `proprioception` |

Action tokens are decoded in parallel, as OpenVLA-OFT does where it has no head of its own, and as the papers on
reinforcement learning after it do. `openvla/openvla-7b` itself was trained to decode them one after the other,
causally: read here, it is where fine-tuning to parallel decoding begins, not that policy.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from opd_jax.config import ConfigError, checks, write_atomic
from opd_jax.models.action_tokens import NUM_BINS, Statistics
from opd_jax.models.decoder import Decoder, partition_rules
from opd_jax.models.hf.decoder import decoder_config, decoder_module
from opd_jax.models.hf.openvla_inputs import PREPROCESSOR, Images, processor_config, read_images
from opd_jax.models.hf.openvla_tensors import (
    by_channel,
    by_pixel,
    layout_of,
    read_proprioception,
    write_proprioception,
)
from opd_jax.models.hf.stacks import WEIGHTS, Params, check_tensors, places, read_placed, read_stack, save_params
from opd_jax.models.hf.tensor_files import TensorFiles, read_json
from opd_jax.models.vit import DINOV2_LARGE, SIGLIP_SO400M, ViT
from opd_jax.models.vla import RULES, Vla
from opd_jax.sharding import shard_params

MODEL_TYPE, ARCHITECTURE = "openvla", "OpenVLAForActionPrediction"
DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
BACKBONES = {"dinosiglip-vit-so-224px": (DINO, SIGLIP), "siglip-vit-so400m": (SIGLIP,), "dinov2-vit-l": (DINO,)}
TOWERS = {DINO: DINOV2_LARGE, SIGLIP: SIGLIP_SO400M}
# Of a tower that is not timm's own: written, and read, below the key `opd_jax` of config.json.
SIZES = ("width", "mlp_width", "num_layers", "num_heads", "patch_size", "num_registers")
KINDS = "class_token", "layer_scale", "approximate_gelu", "feature_layer", "norm_epsilon"  # what timm's name says
# What transformers' LlamaConfig takes for granted; the published config has no more than the vocabulary.
LLAMA = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA |= {"vocab_size": 32_000, "max_position_embeddings": 2048}
STATISTICS = "dataset_statistics.json"
BOUNDS = {"q99": ("q01", "q99"), "minmax": ("min", "max")}
HORIZON = 8  # OpenVLA-OFT's on LIBERO, a constant of its code


class OpenVla(NamedTuple):
    """A policy of a directory. What a run has changed is `model._replace(params=...)`."""

    module: Vla
    params: Params
    statistics: Mapping[str, Statistics]  # of actions, by data set; `statistics[key]` of another is a ConfigError
    proprioception: Mapping[str, Statistics]  # the same of proprioception, where there are any
    images: Images  # what becomes of a camera's picture before the towers
    config: dict[str, Any]  # config.json, with all statistics in `norm_stats`
    unused: dict[str, np.ndarray]  # tensors of the towers that features do not need, on the host, for `save_openvla`


class _ByDataSet(dict):
    """Statistics by data set."""

    def __missing__(self, key: str) -> Statistics:
        raise ConfigError(f"no statistics of {key!r}; there are {', '.join(sorted(self)) or 'none'}: choose one")


def load_openvla(
    directory: str | Path,
    *,
    horizon: int | None = None,
    action_dim: int | None = None,
    bounds: str = "q99",
    ignore_head: bool = False,
    dtype: Any = None,
    mesh: Mesh | None = None,
    lazy: bool = False,
) -> OpenVla:
    """The policy that a directory holds, in the memory that `stacks.load_params` needs.

    Args:
      directory: a local one, such as a snapshot of openvla/openvla-7b or of a fine-tuned OpenVLA-OFT.
      horizon: H, steps of a chunk. No published config says it: 8 on LIBERO, 25 on RoboTwin and ALOHA, 5 on Bridge.
        None: as `save_openvla` wrote it, else 8.
      action_dim: A; None: that of the statistics.
      bounds: what actions lie between, `q99`: 1st and 99th percentile, or `minmax`, as OpenVLA-OFT's on ALOHA; a
        constant of its code too, so ask who trained the policy.
      ignore_head: also read a directory whose actions come from a regression or diffusion head, which is left out: the
        logits of its tokens are not trained, but training can begin there.
      dtype: data type of the parameters; None keeps the stored one.
      mesh: parameters are split over its axes `fsdp` and `tensor` by `vla.RULES`; None: the default device.
      lazy: parameters go to no device; each is a `tensors.Lazy`, which reads the files when a writer asks for it, or a
        small numpy array.

    Returns:
      The policy; it computes in float32, or as `vla.with_fields(module, dtype=...)` says.

    Raises:
      ConfigError: naming the file that is absent (then it is a FileNotFoundError too) or corrupt; the architecture,
        backbone, activation or number of bins that is not supported; the head; the missing, unexpected or misshapen
        tensors; statistics that lack their bounds or do not agree on A; or the parameter that does not split.
    """
    directory = Path(directory)
    file = directory / "config.json"
    config = read_json(file)
    _check_config(file, config)
    _check_heads(directory, ignore_head)
    if (directory / STATISTICS).exists():
        config["norm_stats"] = read_json(directory / STATISTICS)
    source = directory / STATISTICS if (directory / STATISTICS).exists() else file
    statistics = _statistics(source, config.get("norm_stats") or {}, "action", bounds)
    module = _module(file, config, horizon, action_dim or _action_dim(file, config, statistics))
    images, module = read_images(directory, module)

    files = TensorFiles(directory, WEIGHTS)
    layout = layout_of(module)
    check_tensors(directory, layout, files)
    params, unused = {}, {}
    where = places({path: shape for path, shape in layout.shapes.items() if not _is_unused(path)}, RULES, mesh)
    for path in layout.shapes:
        if _is_unused(path):
            unused[path.removeprefix("unused/")] = read_stack(files, layout, path, dtype)
        elif path in layout.convolutions:
            kernel = by_pixel(read_stack(files, layout, path, dtype), layout.convolutions[path])
            params |= _placed({path: kernel}, mesh, lazy)
        else:
            params[path] = read_placed(files, layout, path, dtype, where[path], lazy)
    params |= _placed(read_proprioception(directory, module.language_model.width, dtype), mesh, lazy)
    return OpenVla(
        module,
        unflatten_dict(params, sep="/"),
        statistics,
        _statistics(source, config.get("norm_stats") or {}, "proprio", bounds, needed=False),
        images,
        config,
        unused,
    )


def save_openvla(
    model: OpenVla,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    like: str | Path | None = None,
) -> Path:
    """Writes a directory that `load_openvla` reads, bit for bit, with the names and files of OpenVLA-OFT.

    All is written beside the directory and renamed: a killed run leaves the whole directory or none.

    Args:
      model: of `load_openvla`, with any parameters of its module; on any devices, or `tensors.Lazy`: one at a time
        comes to the host.
      directory: new, or empty.
      max_shard_bytes: a larger model is split into several files.
      like: the directory whose tokenizer, image processor and code are copied: the one that the model was read from.

    Raises:
      ConfigError: the directory holds something.
      ValueError: the parameters do not belong to the module, or the module is none that an OpenVLA directory can hold.
    """
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is not an empty directory; give a new one to save the model in")
    module, params = model.module, dict(model.params)
    config = _config(model)
    own = params.pop("proprioception", None)
    flat, layout = flatten_dict(params, sep="/"), layout_of(module)
    for path, stored in layout.convolutions.items():
        if path in flat and flat[path].shape == layout.shapes[path]:
            flat[path] = by_channel(np.asarray(flat[path]), stored)
    flat |= {f"unused/{name}": tensor for name, tensor in model.unused.items()}

    draft = directory.with_name(f".{directory.name}.whole.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    tree = unflatten_dict(flat, sep="/")
    save_params(draft, layout, tree, config, max_shard_bytes=max_shard_bytes, like=like)
    write_atomic(draft / STATISTICS, json.dumps(config["norm_stats"], indent=2) + "\n")
    if not (draft / PREPROCESSOR).exists():
        write_atomic(draft / PREPROCESSOR, json.dumps(processor_config(model.images, module), indent=2) + "\n")
    if own is not None:
        write_proprioception(draft, own)
    for code in Path(like).glob("*_prismatic.py") if like is not None else ():
        shutil.copy(code, draft)
    os.replace(draft, directory)
    return directory


# ---- config.json -----------------------------------------------------------------------------------------------------


def _check_config(file: Path, config: dict[str, Any]) -> None:
    backbone, text = config.get("vision_backbone_id"), config.get("text_config") or {}
    towers = BACKBONES.get(backbone, ())
    with checks() as check:
        check(
            config.get("model_type") == MODEL_TYPE and ARCHITECTURE in (config.get("architectures") or [ARCHITECTURE]),
            f"{file}: model_type={config.get('model_type')!r} with architectures={config.get('architectures')} is not "
            f"supported; only {ARCHITECTURE}",
        )
        check(towers, f"{file}: vision_backbone_id={backbone!r} is not supported; only {', '.join(BACKBONES)}")
        fused = config.get("use_fused_vision_backbone", len(towers) == 2)
        check(
            not towers or fused == (len(towers) == 2),
            f"{file}: use_fused_vision_backbone={fused}, but {backbone!r} has {len(towers)} towers; fetch it again",
        )
        ids = config.get("timm_model_ids", list(towers))
        check(not towers or tuple(ids) == towers, f"{file}: timm_model_ids={ids}; of {backbone!r} only {list(towers)}")
        acts = config.get("timm_override_act_layers") or []
        check(not any(acts), f"{file}: timm_override_act_layers={acts}; only timm's own are supported, null")
        check(
            text.get("model_type", "llama") == "llama",
            f"{file}: text_config.model_type={text.get('model_type')!r} is not supported; only llama",
        )
        bins = config.get("n_action_bins", NUM_BINS)
        check(bins == NUM_BINS, f"{file}: n_action_bins={bins} is not supported; only {NUM_BINS}")


def _check_heads(directory: Path, ignore: bool) -> None:
    if films := sorted(directory.glob("vision_backbone--*.pt")):
        raise ConfigError(f"{films[0]}: towers modulated by the words (FiLM) are not supported; take one without")
    heads = sorted((*directory.glob("action_head--*.pt"), *directory.glob("noisy_action_projector--*.pt")))
    if heads and not ignore:
        raise ConfigError(
            f"{heads[0]}: actions come from this head and no action token was trained; take a checkpoint that decodes "
            "tokens, or ignore_head=True to train from its other weights"
        )


def _module(file: Path, config: dict[str, Any], horizon: int | None, action_dim: int) -> Vla:
    text = decoder_module(file, LLAMA | (config.get("text_config") or {}) | {"model_type": "llama"})
    ours, names = config.get("opd_jax") or {}, BACKBONES[config["vision_backbone_id"]]
    sizes, pixels = ours.get("towers") or [{}] * len(names), config.get("image_sizes") or [224] * len(names)
    if not len(sizes) == len(pixels) == len(names):
        raise ConfigError(f"{file}: {len(sizes)} towers and image_sizes={pixels} for {len(names)}; give one of each")
    return Vla(
        towers=tuple(TOWERS[name].clone(**one, image_size=side) for name, one, side in zip(names, sizes, pixels)),
        language_model=text,
        horizon=horizon or ours.get("horizon", HORIZON),
        action_dim=action_dim,
        used_vocab_size=text.vocab_size - config.get("pad_to_multiple_of", 64),
        fused_projector=len(names) == 2,
        learned_placeholders=False,
    )


def _action_dim(file: Path, config: dict[str, Any], statistics: Mapping[str, Statistics]) -> int:
    found = {len(one.q01) for one in statistics.values()}
    if "action_dim" in (config.get("opd_jax") or {}):
        return config["opd_jax"]["action_dim"]
    if len(found) != 1:
        raise ConfigError(f"{file}: statistics of actions of {sorted(found)} dimensions; say which with action_dim=")
    return found.pop()


def _statistics(file: Path, found: dict[str, Any], part: str, bounds: str, needed: bool = True) -> _ByDataSet:
    """Of all data sets; `found` is what the files say."""
    if bounds not in BOUNDS:
        raise ConfigError(f"bounds={bounds!r}; choose {' or '.join(BOUNDS)}")
    result = _ByDataSet()
    for key, one in found.items():
        values = one.get(part) or {}
        if absent := [name for name in BOUNDS[bounds] if name not in values]:
            if needed:
                raise ConfigError(f"{file}: {part} of {key!r} lacks {' and '.join(absent)}; add them, or other bounds=")
            continue
        low, high = (np.asarray(values[name], np.float64) for name in BOUNDS[bounds])
        mask = np.asarray(values.get("mask", [True] * len(low)), bool)
        if not len(low) == len(high) == len(mask):
            raise ConfigError(f"{file}: {part} of {key!r} has {len(low)}, {len(high)} and {len(mask)} values; mend it")
        result[key] = Statistics(low, high, mask)
    return result


def _config(model: OpenVla) -> dict[str, Any]:
    """The config as it was read, with what the policy is now; of a policy of one's own, what transformers needs."""
    module = model.module
    names = next((names for names in BACKBONES.values() if _fits(module, names)), None)
    if names is None or module.learned_placeholders or not isinstance(module.language_model, Decoder):
        raise ValueError(
            "the towers are no DINOv2 and SigLIP, or actions have learned placeholders; an OpenVLA directory cannot "
            "hold this policy, save it with checkpoint.save_params"
        )
    text = decoder_config(module.language_model)
    if text["model_type"] != "llama":
        raise ValueError(f"the text of {ARCHITECTURE} is a llama, not {text['model_type']}; use checkpoint.save_params")
    changed = [
        {} if _sizes(tower) == _sizes(TOWERS[name]) else _sizes(tower) for tower, name in zip(module.towers, names)
    ]
    ours = {"horizon": module.horizon, "action_dim": module.action_dim} | ({"towers": changed} if any(changed) else {})
    norm_stats = {key: dict(value) for key, value in (model.config.get("norm_stats") or {}).items()}
    norm_stats |= {key: _said(norm_stats.get(key, {}), one) for key, one in model.statistics.items()}
    own = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vision_backbone_id": next(key for key, value in BACKBONES.items() if value == names),
        "llm_backbone_id": "llama2-7b-pure",
        "use_fused_vision_backbone": len(names) == 2,
        "timm_model_ids": list(names),
        "timm_override_act_layers": [None] * len(names),
        "image_resize_strategy": model.images.strategy,
        "n_action_bins": NUM_BINS,
        "pad_token_id": module.used_vocab_size,
    }
    fixed = {
        "image_sizes": [tower.image_size for tower in module.towers],
        "pad_to_multiple_of": module.language_model.vocab_size - module.used_vocab_size,
        "norm_stats": norm_stats,
        "opd_jax": ours,
    }
    text = {key: value for key, value in text.items() if key not in ("architectures", "use_sliding_window")}
    return own | model.config | fixed | {"text_config": text | (model.config.get("text_config") or {})}


def _said(found: dict[str, Any], one: Statistics) -> dict[str, Any]:
    """What the files say of a data set; with other percentiles where the policy goes by others."""
    action, mask = found.get("action") or {}, one.mask.tolist()
    for low, high in BOUNDS.values():
        said = [action.get(low), action.get(high), action.get("mask", [True] * len(mask))]
        if said == [one.q01.tolist(), one.q99.tolist(), mask]:
            return found
    return found | {"action": action | {"q01": one.q01.tolist(), "q99": one.q99.tolist(), "mask": mask}}


def _fits(module: Vla, names: tuple[str, ...]) -> bool:
    """Whether the towers are of these kinds, whatever their sizes."""
    kind = lambda tower: isinstance(tower, ViT) and tuple(getattr(tower, name) for name in KINDS)
    return [kind(tower) for tower in module.towers] == [kind(TOWERS[name]) for name in names]


def _sizes(tower: ViT) -> dict[str, int]:
    return {name: getattr(tower, name) for name in SIZES}


def _is_unused(path: str) -> bool:
    return path.startswith("unused/")


def _placed(stacks: Params, mesh: Mesh | None, lazy: bool) -> Params:
    """On their devices; `lazy`: where they are."""
    if lazy:
        return stacks
    return shard_params(stacks, mesh, partition_rules(mesh, RULES)) if mesh else jax.tree.map(jnp.asarray, stacks)
