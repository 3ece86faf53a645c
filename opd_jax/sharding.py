# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: one mesh with axes of four names, `AXES`, and rules that give every parameter its place.

A config's `mesh` names those that it wants, with their sizes. Records split over `data` and `fsdp` together; that is
said here alone, by `record_axes`.

All axes are of type Auto: code is written for the whole ("global") batch and XLA splits it. The default of
`jax.make_mesh`, Explicit, breaks embedding look-ups. Gradients are taken in that global view, never inside a
`shard_map`: there `pmean(grad(loss))` of replicated parameters is N times too large (`check_vma=True`, the default).
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from opd_jax.config import ConfigError
from opd_jax.types import PyTree

Rules = Sequence[tuple[str, PartitionSpec]]
AXES = {  # what each splits
    "data": "records",
    "fsdp": "records, and the matrices that rules name, with their gradients and the optimiser's state",
    "sequence": "the tokens of a record",
    "tensor": "the inside of layers and the vocabulary",
}
RECORDS = ("data", "fsdp")
PARAMETERS = "fsdp"  # splits matrices of parameters
VOCABULARY = HEADS = "tensor"  # splits output heads by columns, and the heads of attention
TOKENS = "sequence"  # splits the tokens of a record


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh of a run and sets it as the current one.

    Args:
        shape: devices along each axis, such as `{"data": 4, "tensor": 2}`, in that order; -1, once, takes what is left.
            Names are of `AXES`; an axis of one device is left out. Without it, all devices lie along `data`.
        devices: to compile for, instead of this process's own; their mesh is not set, for nothing can run there.

    Raises:
        ConfigError: a name that is not in `AXES`; sizes that do not multiply to the number of devices; or a torus of
            TPUs that cannot be cut like that.
    """
    shape = dict(shape or {"data": -1})
    if unknown := [name for name in shape if name not in AXES]:
        raise ConfigError(f"mesh={shape}: there is no axis {unknown[0]!r}; choose of {', '.join(AXES)}")
    count = jax.device_count() if devices is None else len(devices)
    known = math.prod(size for size in shape.values() if size != -1)
    if list(shape.values()).count(-1) == 1 and known > 0 and count % known == 0:
        shape = {name: count // known if size == -1 else size for name, size in shape.items()}
    if any(size < 1 for size in shape.values()) or math.prod(shape.values()) != count:
        plain = {"data": -1} | {name: 1 for name in shape if name != "data"}
        given = " ".join(f"--config.mesh.{name}={size}" for name, size in plain.items())
        remedy = f"make the sizes multiply to {count}, as by {given}"
        raise ConfigError(f"mesh={shape}: does not fit {count} devices; {remedy}")
    shape = {name: size for name, size in shape.items() if size > 1} or {"data": 1}
    axis_types = (AxisType.Auto,) * len(shape)
    try:
        mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axis_types, devices=devices)
    except NotImplementedError as error:  # of a torus of TPUs
        remedy = "make each axis a product of some of the sides, such as 16 and 4 of 4x4x4"
        raise ConfigError(f"mesh={shape}: does not fit the sides of this torus of {count}; {remedy}") from error
    if devices is None:
        jax.set_mesh(mesh)
    return mesh


def record_axes(mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """The axes that records split over, of those that a mesh has and leaves to XLA; None: of the current mesh."""
    return tuple(name for name in RECORDS if _automatic(name, mesh))


def _automatic(name: str, mesh: Mesh | AbstractMesh | None = None) -> bool:
    """Whether a mesh, or the current one, has this axis and leaves it to XLA."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return dict(zip(mesh.axis_names, mesh.axis_types)).get(name) == AxisType.Auto


def automatic_axes() -> set[str]:
    """All axes of the current mesh that are left to XLA."""
    return {name for name in jax.sharding.get_abstract_mesh().axis_names if _automatic(name)}


def record_parts(mesh: Mesh | AbstractMesh | None = None) -> int:
    """How many parts records split into."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[name] for name in record_axes(mesh))


def record_spec(mesh: Mesh | AbstractMesh | None = None, *before: str | None) -> PartitionSpec:
    """The place of arrays whose first axis, or the one behind `before`, is of records."""
    return PartitionSpec(*before, record_axes(mesh) or None)


def uneven(batch: int, mesh: Mesh, name: str = "batch_size") -> str:
    """What is wrong with a batch that does not split over the mesh, and the sizes next to it that do; or ""."""
    return _uneven(batch, record_parts(mesh), name)


def uneven_parts(records: int, parts: int, mesh: Mesh) -> str:
    """The same of an update's records, and of those of each of its micro-batches, which devices would repeat."""
    if parts < 1 or records % parts:
        wrong = f"{records} records do not divide into {parts} micro-batches; use a divisor"
    else:
        wrong = uneven(records, mesh, "records") or uneven(records // parts, mesh, "records of a micro-batch")
    return f"{wrong}, or change micro_batches={parts} or mesh={dict(mesh.shape)}" if wrong else ""


def uneven_tokens(length: int, mesh: Mesh, name: str) -> str:
    """The same of the tokens of a record, where the mesh has an axis for them."""
    return _uneven(length, mesh.shape.get(TOKENS, 1), name)


def _uneven(count: int, n: int, name: str) -> str:
    if count % n == 0 and count > 0:
        return ""
    near = sorted({max(n, count // n * n), (count // n + 1) * n})
    return f"{name}={count}: does not split over {n} devices; use {' or '.join(map(str, near))}"


def mapped_axis(count: int) -> tuple[str, ...] | None:
    """For `jax.vmap(..., spmd_axis_name=)` over `count` records: their axes, where the current mesh splits so many.

    Without it XLA is free to split what is mapped along other dimensions, and exchanges activations in every layer.
    """
    return (record_axes() or None) if count % record_parts() == 0 else None


def token_axis(length: int) -> str | None:
    """The axis of the current mesh that splits the tokens of records of this length, where there is one that does."""
    splits = _automatic(TOKENS) and length % jax.sharding.get_abstract_mesh().shape[TOKENS] == 0
    return TOKENS if splits else None


def head_parts(heads: int) -> int:
    """How many parts `tensor` of the current mesh splits these heads into."""
    parts = jax.sharding.get_abstract_mesh().shape[HEADS] if _automatic(HEADS) else 1
    return 1 if heads % parts else parts


def over_records(x: Float[Array, "*tokens D"], records: int) -> Float[Array, "*tokens D"]:
    """Keeps tokens split over the mesh as records are: XLA would split D instead, like the parameters.

    A single record is whole on every device, and what it is mapped over is split (`sharding.mapped_axis`). Tokens that
    are not flat, `[B, S, D]`, are split along S too.
    """
    if x.ndim == 3:
        return _constrained(x, token_axis(x.shape[1]), None)
    if not record_axes() or (records > 1 and records % record_parts()):
        return x
    return jax.lax.with_sharding_constraint(x, record_spec() if records > 1 else PartitionSpec())


def over_width(x: Float[Array, "N W"], records: int, units: int) -> Float[Array, "N W"]:
    """`over_records` inside a layer of so many heads or neurons, which `tensor` splits where they divide."""
    if not _automatic(HEADS) or head_parts(units) == 1 or (records > 1 and records % record_parts()):
        return over_records(x, records)
    rows = record_axes() or None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows if records > 1 else None, HEADS))


def over_tokens(x: Shaped[Array, "B S *rest"]) -> Shaped[Array, "B S *rest"]:
    """Every device has some of the tokens of its records."""
    return _constrained(x, token_axis(x.shape[1]), *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 2))


def whole_rows(x: Shaped[Array, "B S *rest"]) -> Shaped[Array, "B S *rest"]:
    """Every device has all tokens of its records."""
    return _constrained(x, None, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 2))


def _constrained(x: Array, *rest: Any) -> Array:
    """Along the first axis as records are, along the others as said."""
    rows = record_axes() if x.shape[0] > 1 else None
    rows = PartitionSpec.UNCONSTRAINED if rows and x.shape[0] % record_parts() else rows or None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *rest))


def over_vocabulary(x: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Keeps an embedding split by tokens until they are looked up: XLA, left to itself, makes it whole everywhere."""
    if not _automatic(VOCABULARY) or x.shape[0] % jax.sharding.get_abstract_mesh().shape[VOCABULARY]:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(VOCABULARY, None))


def put(leaf: Any, where: NamedSharding) -> jax.Array:
    """An array at its place. Every process gives the whole of it, and keeps what belongs on its own devices.

    `jax.device_put` does so too, but first compares what the processes give: no thread that works ahead may wait so.
    """
    if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, where)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def put_parts(
    shape: tuple[int, ...], where: NamedSharding, read: Callable[[tuple[tuple[int, int], ...]], np.ndarray]
) -> jax.Array:
    """An array at its place, of which the host holds no more at a time than what one device will.

    Args:
        read: the part of the array between (start, stop) along every axis. Called once for each part that devices of
            this process hold.
    """
    devices: dict[tuple, list] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        part = tuple(one.indices(size)[:2] for one, size in zip(index, shape))
        devices.setdefault(part, []).append(device)
    placed = []
    for part, holders in devices.items():
        values = read(part)
        placed += [jax.device_put(values, device) for device in holders]
    return jax.make_array_from_single_device_arrays(shape, where, placed)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every array whole on every device."""
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: put(leaf, where), tree)


def shard_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every array split along its first axis, that of records.

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
    where = NamedSharding(mesh, record_spec(mesh))
    return jax.tree.map(lambda leaf: put(leaf, where), tree)


def param_specs(tree: PyTree, rules: Rules, mesh: Mesh | AbstractMesh | None = None) -> PyTree:
    """The PartitionSpec of every parameter: that of the first rule whose regex is found in `block/dense/kernel`.

    A parameter that no rule matches is replicated. On a mesh, of several rules that match the first counts by which the
    parameter splits evenly, so that a later one can say what is left whole.

    Raises:
        ConfigError: a spec has more entries than the parameter has axes; or, on a mesh, an axis of a parameter does
            not split over the mesh axis that its only rule, or the last one, names.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name, wrong = jax.tree_util.keystr(path, simple=True, separator="/"), ""
        for chosen in (spec for pattern, spec in rules if re.search(pattern, name)):
            if len(chosen) > leaf.ndim:
                raise ConfigError(f"{name}: {chosen} does not fit the shape {leaf.shape}; give it a rule of its own")
            if not (wrong := "" if mesh is None else _unsplit(name, leaf.shape, chosen, mesh)):
                return chosen
        if wrong:
            raise ConfigError(wrong)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def _unsplit(name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> str:
    """What does not split evenly, or ""."""
    for size, axis in zip(shape, spec):
        n = math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))
        if size % n:
            return f"{name}: an axis of {size} does not split over {axis}={n}; choose another mesh, or resize it"
    return ""


def along(rules: Rules, axes: Collection[str]) -> Rules:
    """`rules` without all other axes than these."""
    keep = lambda spec: PartitionSpec(*(axis if axis in axes else None for axis in spec))
    return tuple((pattern, keep(spec)) for pattern, spec in rules)


def gathered_rules(rules: Rules, mesh: Mesh | AbstractMesh | None = None) -> Rules:
    """`rules` as `gathered` leaves parameters: split over all axes but `fsdp`; None: on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return along(rules, [axis for axis in mesh.axis_names if axis != PARAMETERS and _automatic(axis, mesh)])


def gathered(tree: PyTree, rules: Rules, narrowed: str = "", dtype: Any = None) -> PyTree:
    """Parameters for many calls in a loop: no longer split over `fsdp`, and in the type that products are computed in.

    To be traced before the loop. What `rules` name is gathered once, and left split as they say over the other axes;
    of parameters that are split over `fsdp` every step of the loop would gather all of them. The rest stays where it
    is. Without such an axis, on one device say, only types change.

    Args:
        tree: parameters, or anything that holds trees of them, such as a `Partial` and what it binds.
        rules: the model's, with the axes of all meshes.
        narrowed: a regex that finds the parameters which the model casts to `dtype` before anything else. These are
            cast now, if that makes them smaller; so half as much is gathered, and results are the same bit for bit.
        dtype: of the model's products.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), gathered_rules(rules)

    def once(path: tuple[Any, ...], leaf: Array, spec: PartitionSpec) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if narrowed and re.search(narrowed, name) and jnp.dtype(dtype).itemsize < leaf.dtype.itemsize:
            leaf = leaf.astype(dtype)
        split = _automatic(PARAMETERS) and any(re.search(pattern, name) for pattern, _ in rules)
        return jax.lax.with_sharding_constraint(leaf, spec) if split else leaf

    return jax.tree_util.tree_map_with_path(once, tree, param_specs(tree, rules, mesh))


def shard_params(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """Places parameters, or an optimizer state or TrainState that holds trees of the same names, by `param_specs`.

    Raises:
        ConfigError: an axis of a parameter does not split over the mesh axis that its rule names.
    """
    place = lambda leaf, spec: put(leaf, NamedSharding(mesh, spec))
    return jax.tree.map(place, tree, param_specs(tree, rules, mesh))


class InPlace:
    """A jitted `update(supervise, state, *more) -> (state, metrics)` whose new state lies where the old one did.

    The old one is donated. XLA, left to itself, splits what rules leave whole, biases for example: the next update
    would then be compiled again, and a state that is restored, which lies by the rules, would be another program's.
    A state that is not placed on a mesh is left to XLA.
    """

    def __init__(self, update: Callable):
        self._update, self._programs = update, {}

    def __call__(self, *args: Any) -> Any:
        return self._program(args[1])(*args)

    def lower(self, *args: Any) -> Any:
        """As of a jitted function; a state may be of `jax.ShapeDtypeStruct`."""
        return self._program(args[1]).lower(*args)

    def _program(self, state: PyTree) -> Any:
        traced = lambda leaf: isinstance(leaf, jax.core.Tracer)
        place = lambda leaf: "" if traced(leaf) else getattr(leaf, "sharding", "")  # "": on no mesh; None is no leaf
        places = jax.tree.map(place, state)
        leaves, structure = jax.tree.flatten(places)
        on_mesh = all(isinstance(place, NamedSharding) for place in leaves)
        key = (structure, *leaves) if on_mesh else None
        if key not in self._programs:
            where = {"out_shardings": (places, None)} if on_mesh else {}
            self._programs[key] = jax.jit(self._update, donate_argnums=1, **where)
        return self._programs[key]
