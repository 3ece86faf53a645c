"""Pieces that several configs share."""

from ml_collections import ConfigDict

from opd_jax.worlds import scenes


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


def variant(arg: str | None, known: tuple[str, ...]) -> str:
    """The variant named after the colon of `--config=FILE:variant`. Raises: ValueError naming what is known."""
    name = arg or "default"
    if name not in known:
        raise ValueError(f"unknown variant {name!r}: choose one of {', '.join(known)}")
    return name
