"""Parameters of scanned blocks from and to a transformers directory, where every layer has tensors of its own.

A directory holds `config.json` and `model.safetensors`, or shards of it named by `model.safetensors.index.json`. A
torch Linear is `[out, in]`, a Flax kernel `[in, out]`, and a parameter of a scanned block is the stack of what the file
has for every layer (and every expert). What a family calls its tensors is a `Layout`.
"""

import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from opd_jax.config import ConfigError, write_atomic
from opd_jax.models.decoder import partition_rules
from opd_jax.models.hf.tensor_files import TensorFiles, read_json
from opd_jax.sharding import Rules, param_specs, put_parts
from opd_jax.tensors import Lazy, write_tensors

Params = dict[str, Any]
Shape = tuple[int, ...]

WEIGHTS = "model.safetensors"
STACKS = ("layers", "experts", "blocks", "deepstack_merger_list")
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a constant that old Llama checkpoints hold
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
COMPANIONS += ("chat_template*", "generation_config.json", "*processor_config.json")


class Layout(NamedTuple):
    """A module's parameters, and what they are called in files."""

    shapes: Mapping[str, Shape]  # by path
    rename: Callable[[str], str]  # the path of a parameter's layer, with dots and numbers -> its tensors' prefix
    tied: str = ""  # the tensor that lm_head.weight is a copy of
    convolutions: Mapping[str, Shape] = {}  # path of a kernel whose tensor has more than two axes -> that shape

    def tensors(self, path: str) -> Iterator[tuple[Shape, str, Shape]]:
        """For each tensor of a parameter: where it is in the stack, its name, and its shape in the file."""
        *parts, leaf = path.split("/")
        shape, depth = self.shapes[path], sum(part in STACKS for part in parts)
        stored = self.convolutions.get(path) or (shape[depth:][::-1] if leaf == "kernel" else shape[depth:])
        for index in np.ndindex(shape[:depth]):
            number = iter(index)
            name = ".".join(f"{part}.{next(number)}" if part in STACKS else part for part in parts)
            yield index, f"{self.rename(name)}.{'bias' if leaf == 'bias' else 'weight'}", stored


def load_params(
    directory: Path, layout: Layout, rules: Rules, *, dtype: Any = None, mesh: Mesh | None = None, lazy: bool = False
) -> Params:
    """The parameters of a directory.

    Files are mapped and read where they are asked for. On a mesh every device's part of a parameter is read by itself
    and goes to it before the next, so the host holds one part at a time, and a process reads what its own devices hold.
    Without a mesh the host holds one parameter, of all layers.

    Args:
      rules: the place of parameters on `mesh`, without which they go to the default device.
      dtype: of the parameters; None keeps the stored one.
      lazy: they go to no device; each is a `tensors.Lazy`, for who writes or merges them on the host.

    Raises:
      ConfigError: naming the missing, unexpected or misshapen tensors, the file that is absent or corrupt, or the
        parameter that does not split over the mesh.
    """
    files = TensorFiles(directory, WEIGHTS)
    check_tensors(directory, layout, files)
    where = places(layout.shapes, rules, mesh)
    params = {path: read_placed(files, layout, path, dtype, where[path], lazy) for path in layout.shapes}
    return unflatten_dict(params, sep="/")


def places(shapes: Mapping[str, Shape], rules: Rules, mesh: Mesh | None) -> dict[str, NamedSharding | None]:
    """Where each parameter goes; None: to the default device. Raises: ConfigError: one does not split over the mesh."""
    if mesh is None:
        return dict.fromkeys(shapes)
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    specs = param_specs(leaves, partition_rules(mesh, rules), mesh)
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def read_placed(
    files: TensorFiles, layout: Layout, path: str, dtype: Any, where: NamedSharding | None, lazy: bool = False
) -> jax.Array | Lazy:
    """A parameter from its tensors, part by part where it is split; `lazy`: when it is asked for."""
    read = functools.partial(read_stack, files, layout, path, dtype)
    if lazy:
        first = next(name for _, name, _ in layout.tensors(path))
        return Lazy(layout.shapes[path], np.dtype(dtype or files.dtype(first)), read)
    return jnp.asarray(read()) if where is None else put_parts(layout.shapes[path], where, read)


def save_params(
    directory: str | Path,
    layout: Layout,
    params: Params,
    config: dict[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
    like: str | Path | None = None,
) -> Path:
    """Writes a directory that `load_params` reads, bit for bit.

    All is written beside the directory and renamed: a killed run leaves the whole directory or none.

    Args:
      directory: new, or empty.
      params: on any devices, or `tensors.Lazy`; one parameter at a time is on the host.
      config: the content of `config.json`, to which the data type is added.
      max_shard_bytes: a larger model is split into several files.
      like: the directory whose tokenizer, processor and generation settings are copied.

    Raises:
      ConfigError: the directory holds something.
      ValueError: `params` are not those of the layout.
    """
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is not an empty directory; give a new one to save the model in")
    flat = flatten_dict(params, sep="/")
    given = {path: leaf.shape for path, leaf in flat.items()}
    if wrong := sorted({path for path, _ in layout.shapes.items() ^ given.items()}):
        raise ValueError(f"params do not belong to this module: {wrong} are missing, unexpected or of another shape")
    dtype = next(leaf.dtype for path, leaf in flat.items() if path.endswith("embed_tokens/embedding"))

    draft = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)  # of a run killed in the middle of a write
    draft.mkdir(parents=True)
    _write_tensors(flat, layout, draft, max_shard_bytes)
    for file in (file for pattern in COMPANIONS if like is not None for file in Path(like).glob(pattern)):
        shutil.copy(file, draft)
    write_atomic(draft / "config.json", json.dumps(config | {"torch_dtype": str(dtype)}, indent=2) + "\n")
    os.replace(draft, directory)
    return directory


def special_tokens(like: str | Path | None, *sections: str) -> dict[str, Any]:
    """The ids of special tokens in another directory's config, or in a section of it; none without a directory.

    Raises:
      ConfigError: it is no model directory.
    """
    if like is None:
        return {}
    config = read_json(Path(like) / "config.json")
    for section in sections:
        config = config.get(section) or {}
    return {f"{token}_token_id": config.get(f"{token}_token_id") for token in ("bos", "eos", "pad")}


def check_tensors(directory: Path, layout: Layout, files: TensorFiles) -> None:
    """Raises: ConfigError: tensors of a directory that are missing, unexpected or misshapen, by name."""
    expected = {name: stored for path in layout.shapes for _, name, stored in layout.tensors(path)}
    missing = sorted(expected.keys() - files.names)
    extra = {name for name in files.names - expected.keys() if not IGNORED.search(name)}
    if layout.tied and "lm_head.weight" in extra:  # stored all the same; then it must be the same
        extra.remove("lm_head.weight")
        if not np.array_equal(files.read("lm_head.weight"), files.read(layout.tied)):
            raise ConfigError(
                f"{directory}: lm_head.weight differs from the embedding although tie_word_embeddings is true; "
                "set it to false in config.json"
            )
    few = lambda names: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if missing or extra:
        raise ConfigError(
            f"{directory} does not match its config.json: missing [{few(missing)}], unexpected [{few(sorted(extra))}]; "
            "fetch both again"
        )
    for name, stored in expected.items():
        if files.shape(name) != stored:
            raise ConfigError(f"{directory}: {name} has shape {files.shape(name)}; its config.json says {stored}")


def read_stack(
    files: TensorFiles, layout: Layout, path: str, dtype: Any, part: Sequence[tuple[int, int]] | None = None
) -> np.ndarray:
    """A parameter, or what is between (start, stop) along its axes; of that, one tensor at a time."""
    shape, stack = layout.shapes[path], None
    ends = part or [(0, size) for size in shape]
    for index, name, stored in layout.tensors(path):
        first, inside = ends[: len(index)], ends[len(index) :]
        if not all(start <= i < stop for i, (start, stop) in zip(index, first)):
            continue
        turned = path.endswith("/kernel")
        if part is None or len(stored) != len(inside):  # a convolution's is cut when it is flat
            tensor = files.read(name)
            tensor = tensor.reshape(len(tensor), -1).T if turned else tensor
            tensor = tensor[tuple(slice(*both) for both in inside)]
        else:
            tensor = files.read(name, inside[::-1] if turned else inside)
            tensor = tensor.T if turned else tensor
        if stack is None:
            stack = np.empty([stop - start for start, stop in ends], dtype or tensor.dtype)
        if dtype is None and tensor.dtype != stack.dtype:
            raise ConfigError(f"{name} is {tensor.dtype}, layers before it {stack.dtype}; load it with a dtype")
        stack[tuple(i - start for i, (start, _) in zip(index, first))] = tensor
    return stack


def _on_host(stack: Any) -> np.ndarray:
    """A parameter. One that is split is put together from its parts here: no device makes it whole."""
    if not isinstance(stack, jax.Array) or stack.is_fully_replicated:
        return np.asarray(stack)
    whole = np.empty(stack.shape, stack.dtype)
    for shard in (shard for shard in stack.addressable_shards if shard.replica_id == 0):
        whole[shard.index] = np.asarray(shard.data)
    return whole


def _write_tensors(flat: dict[str, Any], layout: Layout, directory: Path, max_shard_bytes: int) -> None:
    paths = sorted(flat, key=lambda path: -flat[path].dtype.itemsize)  # aligned
    entries = [(path, *entry) for path in paths for entry in layout.tensors(path)]
    shards, room = [], 0
    for path, index, name, stored in entries:
        size = math.prod(stored) * flat[path].dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((path, index, name, stored))
        room -= size

    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        leaves = [(name, jax.ShapeDtypeStruct(stored, flat[path].dtype)) for path, _, name, stored in shard]
        write_tensors(directory / file, leaves, _stored(flat, shard), {"format": "pt"})
        weight_map |= dict.fromkeys((name for name, _ in leaves), file)
    if len(shards) > 1:
        total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in flat.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(directory / f"{WEIGHTS}.index.json", json.dumps(index, indent=2) + "\n")


def _stored(flat: dict[str, Any], shard: Sequence[tuple[str, Shape, str, Shape]]) -> Iterator[np.ndarray]:
    """The tensors of a file, in order. Those of a parameter come one after the other: it is fetched once."""
    held, stack = "", None
    for path, index, _, stored in shard:
        if path != held:
            stack = None  # before the next is made
            held, stack = path, _on_host(flat[path])
        turned = np.transpose if path.endswith("/kernel") else np.asarray
        yield np.ascontiguousarray(turned(stack[index])).reshape(stored)
