"""Checkpoints in the Hugging Face layout, read and written without torch."""

from opd_jax.models.hf.mmdit import load_mmdit, save_mmdit

__all__ = ["load_mmdit", "save_mmdit"]
