# SPDX-License-Identifier: Apache-2.0
"""Parameters that stay where they are until someone asks: read from files, and written to them, one at a time."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from opd_jax import hosts
from opd_jax.config import write_atomic

OTHERS = {"bool": "BOOL", "bfloat16": "BF16"}  # whose names in safetensors are no letter and bits


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A parameter that `np.asarray` makes on the host, whole, each time it is asked for; no device ever holds it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        made = self.make()
        return made if dtype is None else made.astype(dtype, copy=False)


def write_tensors(
    path: str | os.PathLike, leaves: Sequence[tuple[str, Any]], arrays: Iterable[np.ndarray], about: Mapping[str, str]
) -> Path:
    """Writes a safetensors file, atomically; the host holds one array at a time.

    Args:
      leaves: name, and what has the shape and the dtype, of every tensor, in the file's order: wider types first, so
        that all are aligned.
      arrays: their values in this order. Of several processes all ask for them, the first writes.
      about: the file's metadata.

    Raises:
      ValueError: a data type that such a file cannot hold.
    """
    size = lambda leaf: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    ends = list(itertools.accumulate((size(leaf) for _, leaf in leaves), initial=0))
    header: dict[str, Any] = {"__metadata__": dict(about)}
    for (name, leaf), offsets in zip(leaves, itertools.pairwise(ends)):
        header[name] = {"dtype": code_of(name, leaf.dtype), "shape": list(leaf.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    pieces = map(np.ndarray.tobytes, arrays)  # keeps no array while the next is made
    if not hosts.first():
        for _ in pieces:  # what the first process asks for, all do
            pass
    return write_atomic(path, itertools.chain([len(text).to_bytes(8, "little"), text], pieces))


def code_of(name: str, dtype: Any) -> str:
    """What safetensors calls the data type of a tensor."""
    dtype = np.dtype(dtype)
    if dtype.kind in "fiu":
        return f"{dtype.kind.upper()}{8 * dtype.itemsize}"
    if dtype.name not in OTHERS:
        raise ValueError(f"parameters: {name} is {dtype.name}, which safetensors does not hold; convert it")
    return OTHERS[dtype.name]


def dtype_of(code: str) -> np.dtype:
    """And back. Raises: ValueError: a type that numpy has no name for."""
    others = {"BOOL": np.dtype(bool), "BF16": np.dtype(ml_dtypes.bfloat16)}
    return others[code] if code in others else np.dtype(f"{code[0].lower()}{int(code[1:]) // 8}")
