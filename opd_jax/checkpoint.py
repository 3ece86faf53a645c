# SPDX-License-Identifier: Apache-2.0
"""State on disk: a run's checkpoints (Orbax) and parameter trees that travel between runs (safetensors)."""

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors

from opd_jax import hosts
from opd_jax.config import ConfigError, to_json
from opd_jax.tensors import Lazy, dtype_of, write_tensors
from opd_jax.types import PyTree


class Checkpoints:
    """The checkpoints of one run: training state and data position together, bit-exact, whole or absent.

    A step is written into a temporary folder and renamed when it is complete, so that a run killed at any moment finds
    its previous checkpoint, and what was half written is never seen. Arrays are copied before `save` returns; the
    writing itself goes on in the background, and the state may be donated to the next update meanwhile.

    Args:
        directory: created when missing.
        keep: how many of the latest checkpoints to keep.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        self.directory = Path(directory).expanduser().absolute()  # Orbax refuses relative paths
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the latest complete checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, data_state: bytes | Mapping[str, Any] | None = None) -> None:
        """Saves a state and the position of its data. A step that is saved already is left as it is.

        Args:
            step: the number of updates done; must grow from one save to the next.
            state: any pytree of arrays.
            data_state: what the data iterator returned as its position.

        Raises:
            ValueError: a later step is saved already, so that this one would not be what a resume finds.
        """
        latest = self.latest_step
        if latest == step:
            return
        if latest is not None and latest > step:
            raise ValueError(f"step {step} comes before the saved step {latest} in {self.directory}; use a new folder")
        about = {"data": _encode(data_state), "state": _describe(state)}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        )

    def restore(self, state_like: PyTree, step: int | None = None) -> tuple[PyTree, Any, int] | None:
        """The latest complete checkpoint, or that of `step`.

        Args:
            state_like: a state with the structure, shapes, dtypes and shardings wanted; values do not matter.

        Returns:
            `(state, data_state, step)`, or None when nothing was saved.

        Raises:
            ValueError: what is stored has other names, shapes or dtypes than `state_like`, or cannot be read.
        """
        self.wait()
        step = self.latest_step if step is None else step
        if step is None:
            return None
        about = self._read(step, "about", ocp.args.JsonRestore())
        _require_same_tree(about["state"], _describe(state_like), self.directory / str(step))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state_like)
        state = self._read(step, "state", ocp.args.StandardRestore(target))
        return state, _decode(about["data"]), step

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # Orbax, tensorstore and json each raise their own
            path, remedy = self.directory / str(step), "delete that folder to resume from the checkpoint before it"
            raise ConfigError(f"cannot read checkpoint {path} ({type(error).__name__}); {remedy}") from error

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _describe(state: PyTree) -> dict[str, str]:
    """`{path of a leaf: "float32[2,3]"}`."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): f"{np.dtype(leaf.dtype)}{list(np.shape(leaf))}" for path, leaf in leaves}


def _require_same_tree(stored: dict[str, str], wanted: dict[str, str], path: Path) -> None:
    keys = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    if keys:
        lines = [f"{key}: {stored.get(key, 'absent')} stored, {wanted.get(key, 'absent')} wanted" for key in keys]
        shown = "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
        raise ConfigError(f"checkpoint {path} is of another state: {shown}; use the config it was saved with")


def _encode(data_state: bytes | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(data_state, bytes):
        return {"base64": base64.b64encode(data_state).decode()}
    return {"json": to_json(data_state)}


def _decode(stored: dict[str, Any]) -> Any:
    return base64.b64decode(stored["base64"]) if "base64" in stored else stored["json"]


# ---- parameter trees -------------------------------------------------------------------------------------------------


def flatten_params(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A nested dict of arrays as `{"block/dense/kernel": array}`, on the host, in alphabetical order.

    A key that holds a slash itself, such as a LoRA adapter's `blocks_0/to_q/kernel`, is stored with `%2F` in its place
    (and `%25` for a percent sign), so that `unflatten_params` gives back exactly the same nesting.

    Raises:
        ValueError: something other than non-empty dicts with string keys, and arrays.
    """
    return {name: _whole(leaf) for name, leaf in _named(tree)}


def _named(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The leaves where they are, in alphabetical order of their names."""
    return sorted(_flatten(tree, ()), key=lambda pair: pair[0])


def _whole(leaf: Any) -> np.ndarray:
    """One leaf on the host. Of several processes all must ask for it."""
    return np.array(hosts.fetch(leaf), order="C")  # safetensors writes strided arrays wrongly


def _flatten(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    name = "/".join(part.replace("%", "%25").replace("/", "%2F") for part in path)
    if isinstance(node, Mapping):
        if not node:
            raise ValueError(f"parameters: {name or 'the tree'} is an empty dict, which no file can hold; leave it out")
        for key, child in node.items():
            if not isinstance(key, str):
                raise ValueError(f"parameters: key {key!r} under {name or 'the root'} is no string; rename it")
            yield from _flatten(child, (*path, key))
    elif isinstance(node, list | tuple) or not hasattr(node, "dtype"):
        raise ValueError(f"parameters: {name or 'the root'} is a {type(node).__name__}; use nested dicts of arrays")
    else:
        yield name, node


def unflatten_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_params`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = (part.replace("%2F", "/").replace("%25", "%") for part in name.split("/"))
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def save_params(path: str | os.PathLike, tree: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes a tree of parameters and JSON metadata as one safetensors file, atomically and reproducibly.

    The same tree and metadata always give the same bytes. Leaves come to the host one at a time.

    Raises:
        ValueError: as `flatten_params`, or a data type that such a file cannot hold.
    """
    leaves = sorted(_named(tree), key=lambda pair: -np.dtype(pair[1].dtype).itemsize)  # aligned, and else by name
    about = {"metadata": json.dumps(to_json(metadata or {}), sort_keys=True)}
    return write_tensors(path, leaves, (_whole(leaf) for _, leaf in leaves), about)


def load_params(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_params` wrote: a nested dict of numpy arrays with dtypes as stored, and the metadata.

    Files of other writers are read too; their metadata is what they put there.

    Raises:
        ConfigError: the file is missing, truncated or no safetensors file.
    """
    flat, about = _open(path)
    with _readable(path):
        return unflatten_params({name: np.asarray(leaf) for name, leaf in flat.items()}), about


def open_params(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `load_params`, with nothing read but the header: every leaf is a `tensors.Lazy` of the file."""
    flat, about = _open(path)
    return unflatten_params(flat), about


def _open(path: str | os.PathLike) -> tuple[dict[str, Lazy], dict[str, Any]]:
    with _readable(path):
        file = safetensors.safe_open(os.fspath(path), framework="numpy")
        flat, about = {name: _leaf(file, name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        return flat, json.loads(about["metadata"]) if "metadata" in about else about


def _leaf(file: Any, name: str) -> Lazy:
    part = file.get_slice(name)
    return Lazy(tuple(part.get_shape()), dtype_of(part.get_dtype()), lambda: file.get_tensor(name))


@contextlib.contextmanager
def _readable(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"no parameters at {path}; check the path, or run the stage that writes them") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(f"cannot read parameters from {path} ({error}); delete it and write it again") from error


def params_sha256(tree: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a parameter tree: which teacher this was, in 64 digits."""
    digest = hashlib.sha256()
    for name, leaf in ((name, _whole(leaf)) for name, leaf in _named(tree)):
        digest.update(f"{name}\0{leaf.dtype}\0{leaf.shape}\0".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
