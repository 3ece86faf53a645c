"""A folder of safetensors, whole or in shards, read one tensor at a time; errors name the file and the tensor."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from opd_jax.config import ConfigError
from opd_jax.tensors import dtype_of


class MissingFile(ConfigError, FileNotFoundError):
    """A file that a checkpoint must have is absent."""


class TensorFiles:
    """The tensors of `directory / weights`, or of the shards that `weights.index.json` names.

    Files are mapped into memory and read where a tensor is asked for: nothing is held but what `read` returned.

    Raises:
      MissingFile: naming the file that is absent, also a shard.
      ConfigError: naming the file that is corrupt.
    """

    def __init__(self, directory: Path, weights: str):
        index = directory / f"{weights}.index.json"
        if index.exists():
            where = {name: directory / file for name, file in read_json(index).get("weight_map", {}).items()}
            self._files = {file: _open(file) for file in sorted(set(where.values()))}
        else:
            file = directory / weights
            self._files = {file: _open(file)}
            where = dict.fromkeys(self._files[file].keys(), file)
        self._where = where

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header of the file alone."""
        return tuple(self._ask("get_slice", name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """As stored, from the header alone."""
        return dtype_of(self._ask("get_slice", name).get_dtype())

    def read(self, name: str, part: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        """A copy of one tensor, in the data type stored, or of what is between (start, stop) along its axes."""
        if part is None:
            return self._ask("get_tensor", name)
        return self._ask("get_slice", name)[tuple(slice(*ends) for ends in part)]

    def _ask(self, method: str, name: str) -> Any:
        file = self._where[name]
        try:
            return getattr(self._files[file], method)(name)
        except SafetensorError as error:
            raise ConfigError(f"{file} does not hold {name} ({error}); fetch it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
      MissingFile: it is absent.
      ConfigError: it is not JSON.
    """
    if not file.exists():
        raise MissingFile(f"{file} is absent; give a Hugging Face model directory")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); fetch it again") from error


def _open(file: Path) -> Any:
    if not file.exists():
        raise MissingFile(f"{file} is absent; give a Hugging Face model directory with safetensors weights")
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is corrupt ({error}); fetch it again") from error
