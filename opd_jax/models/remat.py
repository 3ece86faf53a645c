# SPDX-License-Identifier: Apache-2.0
"""What of a block the backward pass finds kept, and what it computes again: one setting of all models."""

from typing import Any

import flax.linen as nn
import jax

ATTENTION = "attention"  # name of what a kernel of `models.flash` keeps
_DOTS = jax.checkpoint_policies.checkpoint_dots
_KERNELS = jax.checkpoint_policies.save_only_these_names(ATTENTION)
# What is kept of a block beside its input, by name; all else is computed again.
POLICIES = {
    "nothing": None,  # least memory; the forward pass of every block runs twice, but for its last product
    # results of all products, those of attention too
    "dots": jax.checkpoint_policies.save_from_both_policies(_DOTS, _KERNELS),
    "dots_with_no_batch_dims": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,  # but those of attention
}
CHOICES = ("", *POLICIES)  # "": everything is kept, nothing computed again
_ALSO = {"False": "", "True": "nothing"}  # as a setting that was once a boolean is written


def name_of(remat: bool | str) -> str:
    """The setting as one of `CHOICES`; False and True are "" and "nothing".

    Raises: ValueError: it is none.
    """
    if wrong := mistake(remat):
        raise ValueError(wrong)
    return _ALSO.get(str(remat), remat)


def mistake(remat: bool | str) -> str:
    """What is wrong with the setting, in a line, or ""."""
    known = _ALSO.get(str(remat), remat) in CHOICES
    return "" if known else f"remat={remat!r}: choose {', '.join(POLICIES)}, or '' to keep everything"


def block_of(block: type[nn.Module], remat: bool | str, **how: Any) -> Any:
    """A class of blocks, whose backward pass computes again what the setting does not keep.

    Args:
        remat: one of `CHOICES`, or a boolean.
        how: for `nn.remat`, such as `prevent_cse=False` of scanned blocks.

    Raises: ValueError: an unknown setting.
    """
    name = name_of(remat)
    return nn.remat(block, policy=POLICIES[name], **how) if name else block
