# SPDX-License-Identifier: Apache-2.0
"""Several teachers, one batch: every record is labelled by the teacher of its task, and by no other."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from opd_jax import hosts
from opd_jax.config import ConfigError
from opd_jax.types import PyTree, TokenRollout


def check_routes(teachers: Mapping[str, Any], tasks: Mapping[int, str]) -> None:
    """Raises: ConfigError naming a task of the data that no teacher is given for, before anything is sampled."""
    for task in tasks.values():
        if task not in teachers:
            raise ConfigError(
                f"no teacher for {task!r}: give one, or leave out its problems; given: {sorted(teachers)}"
            )


def label_by_task(
    label_fns: Mapping[int, Callable[[TokenRollout], PyTree]],
    rollout: TokenRollout,
    place: Callable[[TokenRollout], TokenRollout] = lambda part: part,
    multiple: int = 1,
) -> PyTree:
    """What each record's own teacher says of it, put together on the host in the order of the batch.

    A teacher sees its records alone, so that N teachers cost as much as one, whatever their sizes and wherever they
    are: in this process, behind a server, in a store. For one compilation each, batches should have a fixed number of
    records of every task, which then also divides `multiple`.

    Args:
        label_fns: by task, `label(part)` -> an array `[b, S, ...]` or a tree of them, NaN for a record that it could
            not label.
        place: puts the part of a batch where the teacher wants it.
        multiple: parts are filled up to a multiple of this by records that are there already; of the devices, say.

    Returns:
        The same tree, of numpy float32, zeros beyond a narrower teacher's last axis.

    Raises:
        ConfigError: a task without a teacher.
    """
    rollout = hosts.fetch(rollout)
    task, found = np.asarray(rollout.task), {}
    for name in np.unique(task).tolist():
        if name not in label_fns:
            raise ConfigError(f"no teacher for task {name}; teachers are given for {sorted(label_fns)}")
        index = np.flatnonzero(task == name)
        filled = np.resize(index, len(index) + -len(index) % multiple)
        part = place(jax.tree.map(lambda leaf, filled=filled: leaf[filled], rollout))
        found[name] = index, hosts.fetch(label_fns[name](part))
    indices, labels = zip(*found.values())
    return jax.tree.map(functools.partial(_together, len(task), indices), *labels)


def _together(count: int, indices: Sequence[np.ndarray], *parts: np.ndarray) -> Float[np.ndarray, "B S *rest"]:
    """Parts of a batch at their places, without what they were filled up with; zeros beyond a narrower last axis."""
    out = np.zeros((count, *(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts)))), np.float32)
    for index, part in zip(indices, parts):
        out[(index, *(slice(0, size) for size in part.shape[1:]))] = part[: len(index)]
    return out
