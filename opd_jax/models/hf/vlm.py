"""Qwen3-VL: a transformers directory to `VLM` and back, without torch.

`config.json` has a section for each half, and is read as transformers 4 or 5 writes it; how tensors are stacked is in
`stacks`. The patch convolution `[width, channels, frames, p, p]` is a Dense on flattened patches.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from opd_jax.config import ConfigError, checks
from opd_jax.models.hf.decoder import decoder_config, decoder_module
from opd_jax.models.hf.stacks import Layout, Params, load_params, save_params, special_tokens
from opd_jax.models.hf.tensor_files import read_json
from opd_jax.models.images import ImageBank
from opd_jax.models.vision import Vision
from opd_jax.models.vlm import RULES, VLM, Marks

MODEL_TYPE, ARCHITECTURE = "qwen3_vl", "Qwen3VLForConditionalGeneration"
# transformers' argument -> (Vision's field, transformers' default, which a config may leave out)
VISION = {
    "hidden_size": ("width", 1152),
    "intermediate_size": ("mlp_width", 4304),
    "depth": ("num_layers", 27),
    "num_heads": ("num_heads", 16),
    "patch_size": ("patch_size", 16),
    "spatial_merge_size": ("merge_size", 2),
    "temporal_patch_size": ("temporal_patch_size", 2),
    "in_channels": ("in_channels", 3),
    "num_position_embeddings": ("num_positions", 2304),
    "deepstack_visual_indexes": ("deepstack", (8, 16, 24)),
}
MARKS = {f"{name}_token_id": (name, default) for name, default in Marks()._asdict().items()}
SECTIONS = (24, 20, 20)  # transformers' mrope_section, where a config has none
THETA = 500_000.0  # and its theta of the text's rope


def load_vlm(
    directory: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, lazy: bool = False
) -> tuple[VLM, Params]:
    """The module a transformers directory describes, and its parameters, in the memory that `load_params` needs.

    Args:
      directory: a local directory, such as a snapshot of Qwen/Qwen3-VL-4B-Instruct.
      dtype: data type of the parameters; None keeps the stored one.
      mesh: parameters are split over its axes `fsdp` and `tensor` by `vlm.RULES`; None: the default device.
      lazy: parameters go to no device; each is a `tensors.Lazy`, which reads the files when a writer asks for it.

    Returns:
      `(module, params)`; the module takes one image a row and computes in float32, or as
      `module.clone(images_per_row=..., language_model=module.language_model.clone(dtype=...))` says.

    Raises:
      ConfigError: as `load_decoder`; also naming what of the tower is not supported.
    """
    directory = Path(directory)
    module = vlm_of(directory)
    return module, load_params(directory, _layout(module), RULES, dtype=dtype, mesh=mesh, lazy=lazy)


def save_vlm(
    module: VLM,
    params: Params,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    like: str | Path | None = None,
) -> Path:
    """Writes a directory that `load_vlm` and transformers' `AutoModelForImageTextToText` read, bit for bit.

    Arguments and errors are those of `save_decoder`; from `like` come the image processor's settings too.
    """
    config = _config(module)
    config["text_config"] |= special_tokens(like, "text_config")
    return save_params(directory, _layout(module), params, config, max_shard_bytes=max_shard_bytes, like=like)


# ---- config.json -----------------------------------------------------------------------------------------------------


def vlm_of(directory: str | Path) -> VLM:
    """The module alone, from `config.json`; no weights are read. Raises: as `load_vlm`, of that file."""
    file = Path(directory) / "config.json"
    config = read_json(file)
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    architectures = config.get("architectures")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    with checks() as check:
        check(
            config.get("model_type") == MODEL_TYPE and ARCHITECTURE in (architectures or [ARCHITECTURE]),
            f"{file}: model_type={config.get('model_type')!r} with architectures={architectures} is not supported; "
            f"only {ARCHITECTURE}",
        )
        check(text and vision, f"{file}: text_config or vision_config missing; fetch it again")
        act = vision.get("hidden_act", "gelu_pytorch_tanh")
        check(
            act == "gelu_pytorch_tanh", f"{file}: the tower's hidden_act={act!r}; only gelu_pytorch_tanh is supported"
        )
        check(rope.get("mrope_interleaved", True), f"{file}: mrope_interleaved is false; only true is supported")
        sections = tuple(rope.get("mrope_section", SECTIONS))
        check(len(sections) == 3, f"{file}: mrope_section={list(sections)}; it must have three numbers")
        axial = vision.get("rope_parameters") or {}
        check(
            axial.get("rope_type", "axial") == "axial",
            f"{file}: the tower's rope type {axial.get('rope_type')!r} is not supported; only axial",
        )
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    decoder = decoder_module(file, {"rope_theta": THETA} | text | {"model_type": "qwen3", "tie_word_embeddings": tied})
    fields = {field: vision.get(key, default) for key, (field, default) in VISION.items()}
    fields["deepstack"] = tuple(fields["deepstack"])
    out = vision.get("out_hidden_size", 3584)
    if out != decoder.width:
        raise ConfigError(f"{file}: out_hidden_size={out} of the tower is not hidden_size={decoder.width} of the text")
    return VLM(
        vision=Vision(**fields, rope_theta=axial.get("rope_theta", 10_000.0)),
        language_model=decoder,
        rope_sections=sections,
        marks=Marks(**{field: config.get(key, default) for key, (field, default) in MARKS.items()}),
    )


def _config(module: VLM) -> dict[str, Any]:
    """What transformers 4 and 5 both read."""
    text = decoder_config(module.language_model)
    if text["model_type"] != "qwen3":
        raise ValueError(
            f"the text of {ARCHITECTURE} is a Qwen3, not {text['model_type']}; save it as checkpoint.save_params"
        )
    del text["architectures"], text["use_sliding_window"]
    sections = {"mrope_section": list(module.rope_sections), "mrope_interleaved": True}
    scaling = {"rope_type": "default"} | (text["rope_scaling"] or {}) | sections
    vision = {key: getattr(module.vision, field) for key, (field, _) in VISION.items()}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "tie_word_embeddings": module.language_model.tie_embeddings,
        **{key: getattr(module.marks, field) for key, (field, _) in MARKS.items()},
        "text_config": text | {"model_type": f"{MODEL_TYPE}_text", "rope_scaling": scaling},
        "vision_config": vision
        | {
            "model_type": f"{MODEL_TYPE}_vision",
            "out_hidden_size": module.language_model.width,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "axial", "rope_theta": module.vision.rope_theta},
        },
    }


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _layout(module: VLM) -> Layout:
    """Every parameter's shape, without computing any, and transformers' names."""
    vision = module.vision
    bank = ImageBank(jnp.zeros((1, vision.merge_size**2, vision.patch_dim)), jnp.zeros((1, 2), jnp.int32))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, bank)["params"]
    patch = vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size
    return Layout(
        {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()},
        _rename,
        tied="model.language_model.embed_tokens.weight" if module.language_model.tie_embeddings else "",
        convolutions={"visual/patch_embed/kernel": (vision.width, *patch)},
    )


def _rename(name: str) -> str:
    renamed = {"language_model.lm_head": "lm_head", "visual.patch_embed": "model.visual.patch_embed.proj"}
    return renamed.get(name, f"model.{name}")
