# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: one mesh with the axes `data` and `model`, and rules that give every parameter its place.

All axes are of type Auto: code is written for the whole ("global") batch and XLA splits it. The default of
`jax.make_mesh`, Explicit, breaks embedding look-ups. Gradients are taken in that global view, never inside a
`shard_map`: there `pmean(grad(loss))` of replicated parameters is N times too large (`check_vma=True`, the default).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opd_jax.config import ConfigError
from opd_jax.types import PyTree

Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh of a run and sets it as the current one.

    Args:
        shape: devices along each axis, such as `{"data": 4, "model": 2}`, in that order; -1, once, takes what is left.
            Without it, all devices lie along `data`.
        devices: to compile for, instead of this process's own; their mesh is not set, for nothing can run there.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or a torus of TPUs cannot be cut like that.
    """
    shape = dict(shape or {"data": -1})
    count = jax.device_count() if devices is None else len(devices)
    known = math.prod(size for size in shape.values() if size != -1)
    if list(shape.values()).count(-1) == 1 and known > 0 and count % known == 0:
        shape = {name: count // known if size == -1 else size for name, size in shape.items()}
    if any(size < 1 for size in shape.values()) or math.prod(shape.values()) != count:
        raise ConfigError(f"mesh={shape}: does not fit {count} devices; the sizes must multiply to {count}")
    axis_types = (AxisType.Auto,) * len(shape)
    try:
        mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axis_types, devices=devices)
    except NotImplementedError as error:  # of a torus of TPUs
        remedy = "make each axis a product of some of the sides, such as 16 and 4 of 4x4x4"
        raise ConfigError(f"mesh={shape}: does not fit the sides of this torus of {count}; {remedy}") from error
    if devices is None:
        jax.set_mesh(mesh)
    return mesh


def uneven(batch: int, mesh: Mesh, name: str = "batch_size") -> str:
    """What is wrong with a batch that does not split over the `data` axis, and the sizes next to it that do; or ""."""
    n = mesh.shape["data"]
    if batch % n == 0 and batch > 0:
        return ""
    near = sorted({max(n, batch // n * n), (batch // n + 1) * n})
    return f"{name}={batch}: does not split over {n} devices; use {' or '.join(map(str, near))}"


def mapped_axis(count: int) -> str | None:
    """For `jax.vmap(..., spmd_axis_name=)` over `count` records: `data`, where there is a mesh that they split over.

    Without it XLA is free to split what is mapped along other dimensions, and exchanges activations in every layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return "data" if "data" in mesh.axis_names and count % mesh.shape["data"] == 0 else None


def put(leaf: Any, where: NamedSharding) -> jax.Array:
    """An array at its place. Every process gives the whole of it, and keeps what belongs on its own devices.

    `jax.device_put` does so too, but first compares what the processes give: no thread that works ahead may wait so.
    """
    if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, where)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every array whole on every device."""
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: put(leaf, where), tree)


def shard_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every array split along its first axis, over `data`.

    To go through such a batch in n pieces, reshape to `(B // n, n, ...)` and swap the axes: `(n, B // n, ...)` would
    gather the whole batch on every device.

    Raises:
        ConfigError: the arrays do not all have one first axis, or it does not divide.
    """
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(tree)}
    if len(sizes) > 1 or None in sizes:
        raise ConfigError(f"batch: first axes {sorted(map(str, sizes))}; every array of a batch needs the same one")
    if wrong := next(filter(None, (uneven(size, mesh) for size in sizes)), None):
        raise ConfigError(wrong)
    where = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda leaf: put(leaf, where), tree)


def param_specs(tree: PyTree, rules: Rules) -> PyTree:
    """The PartitionSpec of every parameter: that of the first rule whose regex is found in `block/dense/kernel`.

    A parameter that no rule matches is replicated.

    Raises:
        ConfigError: a spec has more entries than the parameter has axes.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        chosen = next((spec for pattern, spec in rules if re.search(pattern, name)), PartitionSpec())
        if len(chosen) > leaf.ndim:
            raise ConfigError(f"{name}: {chosen} does not fit the shape {leaf.shape}; give it a rule of its own")
        return chosen

    return jax.tree_util.tree_map_with_path(spec, tree)


def shard_params(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """Places parameters, or an optimizer state or TrainState that holds trees of the same names, by `param_specs`.

    Raises:
        ConfigError: an axis of a parameter does not split over the mesh axis that its rule names.
    """
    specs = param_specs(tree, rules)

    def place(path: tuple[Any, ...], leaf: Any, spec: PartitionSpec) -> jax.Array:
        for size, axis in zip(leaf.shape, spec):
            n = math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))
            if size % n:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ConfigError(f"{name}: an axis of {size} does not split over {axis}={n}; replicate it, or resize")
        return put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree, specs)
