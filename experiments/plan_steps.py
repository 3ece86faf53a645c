"""What every plan is made of: the compiled steps of an arm, and shapes with their places on a mesh.

An experiment's plan is a module, named in `plan.PLANS` by the config's `experiment`. It has the functions of `Plan`,
and lowers the functions that the experiment itself runs; nothing of their mathematics is in it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from opd_jax import optim, sharding
from opd_jax.config import ConfigError
from opd_jax.offload import HOST
from opd_jax.sharding import Rules
from opd_jax.types import PyTree


class Step(NamedTuple):
    """One program of an arm."""

    name: str
    lower: Callable[[], jax.stages.Lowered]  # to be called with the mesh set
    held: int  # bytes of one device that are not among its arguments: what the run holds meanwhile
    times: float  # in the whole arm
    count: int  # of `unit`, that one run samples, labels or learns from: the most there can be
    unit: str
    float32: bool  # whether products are of float32 numbers
    trips: int = 1  # of a loop that data end, at most: tokens of an answer, or parts of a private batch


class Plan(Protocol):
    """An experiment's plan: a module with these functions. Models are as `plan_models.named` has put them in `config`.

    Raises: ConfigError: in each of them, for what cannot be planned.
    """

    NOT_PLANNED: str  # what of an arm is not among its steps, under the heading of a plan

    def axes(self, config: Any) -> tuple[str, ...]: ...  # of `sharding.AXES`, that split its work: what a search tries
    def names(self, config: Any) -> list[str]: ...  # what can be planned: arms, and stages of their own
    def steps(self, config: Any, mesh: Mesh, name: str) -> list[Step]: ...  # of one of them, the update last
    def heading(self, config: Any, mesh: Mesh) -> list[str]: ...  # models and sizes, a line each
    def parts(self, config: Any, name: str) -> list[int]: ...  # of an update to try, fewest first; (): it has none
    def with_parts(self, config: Any, name: str, parts: int) -> None: ...  # changes the config


class Places:
    """Shapes with their places on a mesh."""

    def __init__(self, mesh: Mesh, rules: Rules = ()):
        self.mesh, self.rules = mesh, rules

    def params(self, tree: PyTree, rules: Rules | None = None) -> PyTree:
        """As `shard_params` places them. Raises: ConfigError: an axis does not split."""
        place = lambda leaf, spec: _placed(leaf, NamedSharding(self.mesh, spec))
        return jax.tree.map(place, tree, sharding.param_specs(tree, self.rules if rules is None else rules, self.mesh))

    def whole(self, tree: PyTree) -> PyTree:
        """As `replicate` places them."""
        return self.params(tree, ())

    def heads(self, tree: PyTree) -> PyTree:
        """Output projections that stand alone."""
        return jax.tree.map(lambda head: self.params({"lm_head": {"kernel": head}})["lm_head"]["kernel"], tree)

    def rows(self, tree: PyTree, count: int | None = None) -> PyTree:
        """Records split over the devices, as `shard_batch` places them; `count` of them, if it is given."""
        where = NamedSharding(self.mesh, sharding.record_spec(self.mesh))
        shape = lambda leaf: leaf.shape if count is None else (count, *leaf.shape[1:])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(shape(leaf), leaf.dtype, sharding=where), tree)

    def state(self, params: PyTree, optimizer, offload: bool = False) -> PyTree:
        """That of a training that begins with these parameters; with `offload` as `offloaded` leaves it."""
        state = self.params(jax.eval_shape(lambda params: optim.init_state(params, optimizer), params))
        if not offload:
            return state
        away = lambda leaf: _placed(leaf, leaf.sharding.with_memory_kind(HOST)) if leaf.ndim else leaf
        return state._replace(opt_state=jax.tree.map(away, state.opt_state), ema=jax.tree.map(away, state.ema))

    def prompts(self, count: int, room: int) -> PyTree:
        """A batch of `token_methods.prompts`."""
        one = jax.ShapeDtypeStruct((count,), jnp.int32)
        tokens = jax.ShapeDtypeStruct((count, room), jnp.int32)
        return self.rows({"tokens": tokens, "length": one, "index": one, "task": one})


def _placed(leaf, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


KEY = jax.eval_shape(lambda: jax.random.key(0))


def shapes_of(module, dtype, *args: Any, **kwargs: Any) -> PyTree:
    """Of a module's parameters, all of type `dtype`, from what it is called with: one token unless given."""
    args = args or (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
    params = jax.eval_shape(functools.partial(module.init, **kwargs), KEY, *args)["params"]
    return of_type(params, dtype)


def of_type(tree: PyTree, dtype) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def lowering(function: Callable, *args: Any, **kwargs: Any) -> Callable[[], jax.stages.Lowered]:
    """`Step.lower` of a function, jitted or not, or of partials of one that hold shapes."""
    function, args, kwargs = _unfolded(function, args, kwargs)
    return functools.partial(function.lower, *args, **kwargs)


def result(function: Callable, *args: Any, **kwargs: Any) -> PyTree:
    """The shapes that such a function gives."""
    function, args, kwargs = _unfolded(function, args, kwargs)
    return function.eval_shape(*args, **kwargs)


def _unfolded(function, args, kwargs):
    while isinstance(function, functools.partial):
        function, args, kwargs = function.func, (*function.args, *args), function.keywords | kwargs
    return (function if hasattr(function, "lower") else jax.jit(function)), args, kwargs


def bytes_of(*trees: PyTree) -> int:
    """Of one device, without what waits in the host's memory."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(size(leaf) for leaf in jax.tree.leaves(trees) if leaf.sharding.memory_kind != HOST)


def check_parts(mesh: Mesh, name: str, records: int, parts: int, prompts: int | None = None) -> None:
    """Raises: ConfigError: prompts, or records of a micro-batch, do not split over devices, which would repeat work.

    Args:
        prompts: of a batch, where records are several answers to each.
    """
    wrong = "" if prompts is None else sharding.uneven(prompts, mesh, "prompts")
    wrong = wrong or sharding.uneven_parts(records, parts, mesh)
    if wrong:
        raise ConfigError(f"arm {name}: {wrong}")


def check_tokens(mesh: Mesh, name: str, tokens: int, what: str) -> None:
    """Raises: ConfigError: the tokens of a record do not split over the devices of `sequence`."""
    if wrong := sharding.uneven_tokens(tokens, mesh, what):
        raise ConfigError(f"arm {name}: {wrong}")


def divisors(records: int) -> list[int]:
    """Numbers of micro-batches to try: 1 and all that are twice one of them, or three times, and divide the records."""
    numbers = {2**i * 3**j for i in range(records.bit_length()) for j in range(3)}
    return sorted(n for n in numbers if records % n == 0)


def described(role: str, params: PyTree) -> str:
    """`student 8.19 B parameters, float32`."""
    leaves = jax.tree.leaves(params)
    return f"{role} {sum(math.prod(leaf.shape) for leaf in leaves) / 1e9:.3g} B parameters, {leaves[0].dtype}"


def unknown(name: str, method: str, known: Sequence[str]) -> ConfigError:
    return ConfigError(f"arm {name}: method {method!r} cannot be planned yet; choose {', '.join(known)}")
